"""That cluster/kubernetes agrees with the code: scripts, recipes, flags, images, versions, variables. Rules again."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import ray
from kuberay import ROOT, Doc, Job, Rule, clusters, jobs, pods

from raylivecell.cli.arguments import value_of
from raylivecell.core.errors import UserError
from raylivecell.runs import folder as run_folder
from raylivecell.training import preflight

DOCKERFILE = (ROOT / "Dockerfile").read_text()
CODE = next(iter(re.findall(r"^WORKDIR (\S+)\nCOPY jobs/ jobs/$", DOCKERFILE, re.MULTILINE)))
HOME = next(iter(re.findall(r"\bHOME=(\S+)", DOCKERFILE)))
VERSION = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
RAY = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
STAGES = ("training.train.train", "sweep.sweep.sweep", "inference.predict.predict")


@functools.cache
def _told(script: Path, words: tuple[str, ...]) -> tuple[str, tuple, dict]:
    """Run a job's script with the stages' own functions taken away: what it complained of, and what they were given."""
    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(mock.patch(f"raylivecell.{stage}")) for stage in STAGES]
        stack.enter_context(mock.patch.object(run_folder, "holds_run", return_value=False))
        stack.enter_context(mock.patch.object(sys, "argv", [str(script), *words]))
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(said))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if not end.code:
                (call,) = (stub.call_args for stub in stubs if stub.called)
                return "", call.args, call.kwargs
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", said.getvalue()).split()), (), {}


def commands(docs: list[Doc]) -> Iterator[str]:
    """Each job's command is one that its script takes, and may be given again."""
    for job in jobs(docs):
        words = [word.replace(f"{CODE}/", f"{ROOT}/") for word in shlex.split(job.spec["entrypoint"])]
        if words[0] != "python" or not Path(words[1]).is_absolute():
            yield f"{job.name}: python and a script in {CODE}, not {words[:2]}"
            continue
        missing = [word for word in words[1:] if word.startswith(f"{ROOT}/") and not Path(word).is_file()]
        if missing:
            yield f"{job.name}: not in the project: {', '.join(missing)}"
            continue
        complaint, given, _ = _told(Path(words[1]), tuple(words[2:]))
        if complaint:
            yield f"{job.name}: {complaint}"
        elif "train.py" in words[1]:
            yield from _fits(job, given)
        # Retries without it would stop at a folder in use; predict goes on by itself.
        if job.spec.get("backoffLimit") and "predict.py" not in words[1] and value_of("--resume", words) != "auto":
            yield f"{job.name}: a retry would not resume: --resume auto is missing"


def _fits(job: Job, given: tuple) -> Iterator[str]:
    """Whether the workers share the recipe's batch, and find a GPU each."""
    recipe, workers = given[2], given[3]
    try:
        preflight.batch_divides(recipe.batch_size, workers)
    except UserError as error:
        yield f"{job.name}: {error}"
    groups = job.spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for group in groups
    ]
    begun = sum(int(count) * group["replicas"] for count, group in zip(gpus, groups))
    if begun != (workers if isinstance(workers, int) else workers[1]):
        yield f"{job.name}: {workers} workers on {begun} GPUs"


def images(docs: list[Doc]) -> Iterator[str]:
    """One image, of this version, with CUDA where there are GPUs."""
    for cluster in clusters(docs):
        kind = "cuda" if "nvidia.com/gpu" in str(cluster.spec) else "cpu"
        wanted = f"registry.example/raylivecell:{VERSION}-{kind}"
        for pod in pods(docs):
            for one in pod.spec["containers"]:
                if one["image"] != wanted:
                    yield f"{pod.name}: image {one['image']}, not {wanted}"
    if f"-t raylivecell:{VERSION}-cuda ." not in DOCKERFILE or f"-t raylivecell:{VERSION}-cpu ." not in DOCKERFILE:
        yield "the Dockerfile builds other tags"


def container(docs: list[Doc]) -> Iterator[str]:
    """The user and the home of the image."""
    for pod in pods(docs):
        if f"USER {pod.spec['securityContext'].get('runAsUser')}:" not in DOCKERFILE:
            yield f"{pod.name}: another user than the image's"
        for one in pod.spec["containers"]:
            if HOME not in [mount["mountPath"] for mount in one["volumeMounts"]]:
                yield f"{pod.name}: {HOME} is not writable"


def versions(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        if cluster.spec.get("rayVersion") != RAY:
            yield f"{cluster.name}: rayVersion {cluster.spec.get('rayVersion')}, the image has {RAY}"


@functools.cache
def _variables_of_ray() -> frozenset[str]:
    folder = Path(ray.__file__).parent
    files = (
        "_common/usage/usage_constants",
        "_private/ray_constants",
        "train/constants",
        "train/v2/_internal/constants",
    )
    text = "\n".join((folder / f"{file}.py").read_text() for file in files)
    return frozenset(re.findall(r"\bRAY_[A-Z0-9_]+\b", text))


def variables(docs: list[Doc]) -> Iterator[str]:
    """Those that Ray does not know would be set in vain."""
    for pod in pods(docs):
        for one in (env for container in pod.spec["containers"] for env in container.get("env", [])):
            if one["name"].startswith("RAY_") and one["name"] not in _variables_of_ray():
                yield f"{pod.name}: Ray knows no {one['name']}"


AGREEMENTS: tuple[Rule, ...] = (commands, images, container, versions, variables)
