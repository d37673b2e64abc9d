"""Rules: the scripts, recipes, flags, images, versions and variables in cluster/kubernetes match the code."""

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
def _run_script(script: Path, words: tuple[str, ...]) -> tuple[str, tuple, dict]:
    """Run a job's script with mocked stages; return its error message, and the arguments of the call."""
    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(mock.patch(f"raylivecell.{stage}")) for stage in STAGES]
        stack.enter_context(mock.patch.object(run_folder, "holds_run", return_value=False))
        stack.enter_context(mock.patch.object(sys, "argv", [str(script), *words]))
        output = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(output))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if not end.code:
                (call,) = (stub.call_args for stub in stubs if stub.called)
                return "", call.args, call.kwargs
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", output.getvalue()).split()), (), {}


def commands(docs: list[Doc]) -> Iterator[str]:
    """Each job's script accepts its command, and can run it again after a failure."""
    for job in jobs(docs):
        words = [word.replace(f"{CODE}/", f"{ROOT}/") for word in shlex.split(job.spec["entrypoint"])]
        if words[0] != "python" or not Path(words[1]).is_absolute():
            yield f"{job.name}: python and a script in {CODE}, not {words[:2]}"
            continue
        missing = [word for word in words[1:] if word.startswith(f"{ROOT}/") and not Path(word).is_file()]
        if missing:
            yield f"{job.name}: not in the project: {', '.join(missing)}"
            continue
        error, arguments, _ = _run_script(Path(words[1]), tuple(words[2:]))
        if error:
            yield f"{job.name}: {error}"
        elif "train.py" in words[1]:
            yield from _worker_errors(job, arguments)
        # Without it a retry would be refused because the folder is in use; predict always resumes.
        if job.spec.get("backoffLimit") and "predict.py" not in words[1] and value_of("--resume", words) != "auto":
            yield f"{job.name}: a retry would not resume: --resume auto is missing"


def _worker_errors(job: Job, arguments: tuple) -> Iterator[str]:
    """The batch size is divisible by the number of workers, and each worker has a GPU."""
    recipe, workers = arguments[2], arguments[3]
    try:
        preflight.batch_divides(recipe.batch_size, workers)
    except UserError as error:
        yield f"{job.name}: {error}"
    groups = job.spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for group in groups
    ]
    available = sum(int(count) * group["replicas"] for count, group in zip(gpus, groups))
    if available != (workers if isinstance(workers, int) else workers[1]):
        yield f"{job.name}: {workers} workers on {available} GPUs"


def images(docs: list[Doc]) -> Iterator[str]:
    """One image of this version, with CUDA if the cluster has GPUs."""
    for cluster in clusters(docs):
        kind = "cuda" if "nvidia.com/gpu" in str(cluster.spec) else "cpu"
        expected = f"registry.example/raylivecell:{VERSION}-{kind}"
        for pod in pods(docs):
            for container in pod.spec["containers"]:
                if container["image"] != expected:
                    yield f"{pod.name}: image {container['image']}, not {expected}"
    if f"-t raylivecell:{VERSION}-cuda ." not in DOCKERFILE or f"-t raylivecell:{VERSION}-cpu ." not in DOCKERFILE:
        yield "the Dockerfile documents other tags"


def image_user(docs: list[Doc]) -> Iterator[str]:
    """Pods run as the image's user, with its home writable."""
    for pod in pods(docs):
        if f"USER {pod.spec['securityContext'].get('runAsUser')}:" not in DOCKERFILE:
            yield f"{pod.name}: another user than the image's"
        for container in pod.spec["containers"]:
            if HOME not in [mount["mountPath"] for mount in container["volumeMounts"]]:
                yield f"{pod.name}: {HOME} is not writable"


def versions(docs: list[Doc]) -> Iterator[str]:
    for cluster in clusters(docs):
        if cluster.spec.get("rayVersion") != RAY:
            yield f"{cluster.name}: rayVersion {cluster.spec.get('rayVersion')}, the image has {RAY}"


@functools.cache
def _ray_variables() -> frozenset[str]:
    folder = Path(ray.__file__).parent
    files = (
        "_common/usage/usage_constants",
        "_private/node",
        "_private/ray_constants",
        "train/constants",
        "train/v2/_internal/constants",
    )
    text = "\n".join((folder / f"{file}.py").read_text() for file in files)
    return frozenset(re.findall(r"\bRAY_\w+\b", text))


def variables(docs: list[Doc]) -> Iterator[str]:
    """Every RAY_ variable occurs in Ray's source; any other would have no effect."""
    for pod in pods(docs):
        for name in (env["name"] for container in pod.spec["containers"] for env in container.get("env", [])):
            if name.startswith("RAY_") and name not in _ray_variables():
                yield f"{pod.name}: Ray has no {name}"


AGREEMENTS: tuple[Rule, ...] = (commands, images, image_user, versions, variables)
