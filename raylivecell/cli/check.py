"""`check`: find what would fail, hang or be slow before a run starts; each finding says how to fix it.

The facts are about the nodes (cli/probe.py), the dataset and a trial batch. Each finding is a plain function of facts,
so that it can be tested.
"""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from rich.console import Console
from rich.text import Text

from raylivecell import recipe as recipes
from raylivecell.cli import probe
from raylivecell.cli.probe import Node
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import combined, shards
from raylivecell.data.combined import Data
from raylivecell.images.intensity import Intensity
from raylivecell.images.scale import Scale
from raylivecell.ingest import order
from raylivecell.ingest.dataset import cache_budget_bytes, sample_bytes
from raylivecell.network import forward as network_forward
from raylivecell.recipe import PhaseConfig, Recipe
from raylivecell.runs import folder, progress, teachers
from raylivecell.runs.distillation import open_teacher
from raylivecell.runs.start_from import open_parent
from raylivecell.runtime import placement, session
from raylivecell.targets import sample_planes
from raylivecell.training import loop, preflight

Level = Literal["pass", "warn", "fail"]
SHARED_OUT = "s3://..., gs://... or a path on a disk that all nodes share"
COLOURS: dict[Level, str] = {"pass": "green", "warn": "yellow", "fail": "red"}

# Logs, metrics and token expiry compare clocks; S3 refuses requests that are 15 minutes off.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 300.0
# Compiling, or starting a process, may take a minute.
BATCH_TIMEOUT_S = 300.0


class Finding(NamedTuple):
    """One line of output."""

    level: Level
    subject: str
    message: str
    hint: str = ""


class CheckRequest(NamedTuple):
    """The run to check."""

    data: Data
    out: str | None
    recipe: Recipe
    workers: int | tuple[int, int]
    start_from: str | None = None
    teacher: str | None = None

    @property
    def min_workers(self) -> int:
        """Minimum number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


def check(request: CheckRequest) -> int:
    """Print numbered findings; return 1 if any has the level fail, otherwise 0."""
    exit_code, output = 0, Console(highlight=False, soft_wrap=True)
    for number, finding in enumerate(findings(request), 1):
        level = Text(finding.level, COLOURS[finding.level])
        text = f"  {finding.subject}: {finding.message}" + (f"; {finding.hint}" if finding.hint else "")
        output.print(Text.assemble(f"{number:>2} ", level, text))
        exit_code |= finding.level == "fail"
    return int(exit_code)


def findings(request: CheckRequest) -> Iterator[Finding]:
    """Yield all findings, in the order in which a run would fail; without Ray, only those that do not need it."""
    recipe = request.recipe
    description = scale = rule = None
    with _errors_as_findings("dataset") as errors:
        description = combined.description(request.data)
        scale, rule = combined.scale(request.data), combined.intensity(request.data)
    yield from errors
    if description:
        for uri in combined.uris(request.data):
            yield dataset(uri, shards.load_description(uri))
    if request.out:
        yield run_name(request.out)
    networks = [parent(request.start_from, recipe, scale)] if request.start_from else []
    networks += [teacher(request.teacher, recipe, rule, scale)] if request.teacher else []
    yield from networks
    if any(finding.level == "fail" for finding in networks):  # recipes of networks are untrusted: build none from them
        return
    try:
        session.connect(dashboard=True)
    except UserError as error:
        yield Finding("fail", "Ray", _line(error))
        return
    with _errors_as_findings("shared storage", f"give --out as {SHARED_OUT}") as errors:
        nodes = probe.collect(request.out)
        yield cluster(nodes)
        yield versions(nodes)
        yield clocks(nodes)
        yield shared_memory(nodes)
        yield gpus(nodes, request.min_workers)
        if request.out:
            yield shared_storage(nodes, request.out)
    yield from errors
    yield token(os.environ.get("RAY_AUTH_MODE"), _status_without_token())
    yield _preflight("State API", preflight.state_api, "answers")
    yield _preflight(
        "CPUs for data",
        lambda: preflight.worker_cpus(request.max_workers),
        f"{request.max_workers} workers leave enough",
    )
    yield _preflight("hardware", lambda: preflight.hardware(recipe), "can compute the recipe")
    if description:
        yield object_store(description, request)
        yield _preflight(
            "network",
            lambda: preflight.network(request.recipe),
            f"{request.recipe.model.name} accepts the recipe's options",
        )
        yield _preflight("samples", lambda: preflight.samples_fit(request.data, recipe), "fit the recipe")
        has_teacher = request.teacher is not None
        yield _preflight(
            "labels", lambda: preflight.teacher(request.data, recipe, has_teacher), "suffice for the recipe"
        )
        yield _preflight("batch", lambda: preflight.batch_divides(recipe.batch_size, request.workers), "divides")
        yield trial_batch(request)


def dataset(data: str, description: dict[str, Any]) -> Finding:
    """Check that every shard exists, with the number of rows and the size listed in dataset.json."""
    problems, rows = [], 0
    for split in description["splits"].values():
        for shard in split["shards"]:
            rows += shard["rows"]
            problem = _shard_problem(storage.join(data, shard["file"]), shard)
            problems += [f"{shard['file']} {problem}"] if problem else []
    if problems:
        return Finding("fail", "dataset", f"{len(problems)} bad shards: {', '.join(problems[:3])}", "prepare it again")
    return Finding("pass", "dataset", f"{rows} images, every shard complete")


def _shard_problem(uri: str, shard: dict[str, Any]) -> str:
    filesystem, path = storage.open_uri(uri)
    info = filesystem.get_file_info(path)
    if not info.is_file:
        return "is missing"
    if "bytes" in shard and info.size != shard["bytes"]:
        return f"has {info.size} bytes, not {shard['bytes']}"
    try:
        with filesystem.open_input_file(path) as file:
            rows = pq.ParquetFile(file).metadata.num_rows
    except (OSError, pa.ArrowInvalid) as error:
        return _line(error)
    return "" if rows == shard["rows"] else f"has {rows} rows, not {shard['rows']}"


def run_name(out: str) -> Finding:
    """Check that `out` contains no run: Ray would resume it."""
    if failed := folder.failure(out):
        state = f"{out} contains a run that failed ({failed.reason})"
        return Finding("warn", "run name", state, "train starts again, keeping its files; --resume always continues it")
    if folder.holds_run(out):
        return Finding("fail", "run name", f"{out} contains a run", "choose another --out, or --resume always")
    return Finding("pass", "run name", f"{out} is free")


def parent(start_from: str, recipe: Recipe, scale: Scale | None = None) -> Finding:
    """Check that weights of the checkpoint or run `start_from` fit the recipe's network, and its cells the data's."""
    try:
        description, *warnings = open_parent(start_from, recipe, scale).lines
    except (UserError, OSError) as error:
        return Finding("fail", "start from", _line(error))
    if warnings:
        return Finding("warn", "start from", "; ".join(line.removeprefix("warning: ") for line in warnings))
    return Finding("pass", "start from", description.removeprefix("started from "))


def teacher(uri: str, recipe: Recipe, rule: Intensity | None = None, scale: Scale | None = None) -> Finding:
    """Check that the maps of the checkpoint or run `uri` fit the recipe, and the intensities and pixels of the data."""
    try:
        opened = open_teacher(uri, recipe, rule, scale)
    except (UserError, OSError) as error:
        return Finding("fail", "teacher", _line(error))
    return Finding("pass", "teacher", teachers.describe(opened.teacher).removeprefix("learns from "))


def cluster(nodes: Sequence[Node]) -> Finding:
    """Check that every node answers."""
    failures = [f"{node.address} ({node.no_answer})" for node in nodes if node.no_answer]
    if failures:
        return Finding("fail", "Ray", f"no answer from {', '.join(failures[:3])}", "see that node's log, or drain it")
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return Finding("pass", "Ray", f"{len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs")


def versions(nodes: Sequence[Node]) -> Finding:
    """Check that all nodes run the same versions: they exchange tensors and pickles."""
    addresses: dict[Any, list[str]] = {}
    for node in nodes:
        if not node.no_answer:
            addresses.setdefault(node.versions, []).append(node.address)
    if len(addresses) < 2:
        return Finding("pass", "versions", " ".join(f"{a} {b}" for kind in addresses for a, b in kind) or "no node")
    majority, *minorities = sorted(addresses, key=lambda kind: -len(addresses[kind]))
    deviations = [f"{addresses[kind][0]} has {a} {b}" for kind in minorities for a, b in kind if (a, b) not in majority]
    return Finding(
        "fail", "versions", f"{', '.join(deviations)}, unlike the other nodes", "give every node the same image"
    )


def clocks(nodes: Sequence[Node]) -> Finding:
    """Check that the clocks agree."""
    worst = max((node for node in nodes if not node.no_answer), key=lambda node: abs(node.clock_s), default=None)
    offset = abs(worst.clock_s) if worst else 0.0
    if worst is None or offset < CLOCK_WARN_S:
        return Finding("pass", "clocks", f"within {CLOCK_WARN_S:g} s")
    level: Level = "fail" if offset > CLOCK_FAIL_S else "warn"
    return Finding(level, "clocks", f"{worst.address} is {offset:.0f} s off", "synchronise it (chrony, NTP)")


def shared_memory(nodes: Sequence[Node]) -> Finding:
    """Check that each node's object store fits into /dev/shm; otherwise Ray puts it on a disk."""
    too_small = [
        f"{node.address} has {node.shared_memory / 2**30:.1f} GiB for a store of "
        f"{node.resources.get('object_store_memory', 0) / 2**30:.1f}"
        for node in nodes
        if not node.no_answer and node.shared_memory < node.resources.get("object_store_memory", 0)
    ]
    if too_small:
        hint = "give the container --shm-size, the pod an emptyDir of medium Memory, or Ray a smaller store"
        return Finding("warn", "shared memory", ", ".join(too_small[:3]), hint)
    return Finding("pass", "shared memory", "every node's object store fits")


def gpus(nodes: Sequence[Node], workers: int) -> Finding:
    """Check that torch finds the GPUs that Ray has, and that they suffice for `workers`, the minimum of the run."""
    mismatches = [
        f"{node.address}: Ray has {node.resources.get('GPU', 0):g}, torch finds {node.gpus}"
        for node in nodes
        if not node.no_answer and node.gpus < node.resources.get("GPU", 0)
    ]
    total = sum(node.resources.get("GPU", 0) for node in nodes)
    if mismatches:
        hint = "install torch for CUDA there, and check the driver"
        return Finding("fail", "GPUs", ", ".join(mismatches[:3]), hint)
    if 0 < total < workers:
        return Finding("fail", "GPUs", f"{total:g} for {workers} workers", f"use --workers {max(1, int(total))}")
    return Finding("pass", "GPUs", f"{total:g}" if total else "none: training on CPUs")


def shared_storage(nodes: Sequence[Node], out: str) -> Finding:
    """Check that every node can read the files that other nodes write."""
    failures = [f"{node.address}: {node.storage_error}" for node in nodes if node.storage_error]
    if failures:
        hint = f"give --out as {SHARED_OUT}, and its credentials to each node"
        return Finding("fail", "shared storage", f"{out} from {', '.join(failures[:3])}", hint)
    return Finding("pass", "shared storage", f"every node can write to {out} and read the others' files")


def token(mode: str | None, status: int | None) -> Finding:
    """Check that the job API requires a token: otherwise anybody who reaches it can run code.

    Args:
        mode: RAY_AUTH_MODE of this process.
        status: HTTP status of a call without a token; None: the API was not reached.
    """
    if status == 401:
        return Finding("pass", "token", "the job API refuses calls without one")
    if status is None:
        return Finding("warn", "token", "no dashboard to call", "start Ray with its dashboard")
    message = f"the job API answers calls without one (RAY_AUTH_MODE={mode or ''}, HTTP {status})"
    return Finding("warn", "token", message, "start every node with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")


def object_store(description: dict[str, Any], request: CheckRequest) -> Finding:
    """Check that the decoded images fit into the object store; otherwise they are decoded again in every epoch."""
    cells, free = request.recipe.targets != "foreground", cache_budget_bytes()
    needed = description["splits"]["train"]["images"] * sample_bytes(request.data, "train", cells)
    message = f"{needed / 2**30:.1f} GiB of decoded images, {free / 2**30:.1f} GiB available"
    if needed > free:
        hint = "they are decoded again in every epoch: use more CPUs, or more memory"
        return Finding("warn", "object store", message, hint)
    return Finding("pass", "object store", message)


def trial_batch(request: CheckRequest) -> Finding:
    """Check that a worker of the cluster can train one step on its largest possible share of a batch."""
    gpu = min(1, placement.gpu_slots(session.machines()))
    share = max(1, request.recipe.batch_size // request.min_workers)
    crop = request.recipe.crop or max(combined.image_sizes(request.data, "train"), default=(64, 64))
    hint = "lower batch_size or crop, or use more --workers"
    if request.recipe.loop.compile is True:
        hint += ", or set loop.compile: false (--loop.compile False)"
    try:
        teacher_recipe = _recipe_of(request.teacher)
        task = ray.remote(num_cpus=0.5, num_gpus=gpu, max_retries=0)(train_once)
        used = ray.get(task.remote(request.recipe, share, crop, teacher_recipe), timeout=BATCH_TIMEOUT_S)
    except Exception as error:  # out of memory, in torch or killed by Ray; no CPU or GPU free
        cause = getattr(error, "cause", None) or error  # without the process and traceback of the task
        hint = "" if isinstance(cause, UserError) else hint
        return Finding("fail", "trial batch", f"{share} images of {crop[0]}x{crop[1]}: {_line(cause)}", hint)
    return Finding("pass", "trial batch", f"{share} images of {crop[0]}x{crop[1]} take {used / 2**30:.2f} GiB")


def _recipe_of(teacher: str | None) -> Recipe | None:
    """The recipe of the network at the URI `teacher`, which a node of the cluster may not be able to read."""
    if teacher is None:
        return None
    return recipes.load(storage.join(progress.find(storage.absolute(teacher)), progress.RECIPE))


def train_once(recipe: Recipe, images: int, crop: tuple[int, int], teacher_recipe: Recipe | None) -> int:
    """Train one step on random pixels as the recipe does; return the peak memory in bytes, on the GPU if there is one.

    A teacher is a network of `teacher_recipe` with random weights.

    Raises:
        UserError: Ray assigned a GPU to this process, but torch does not find one.
    """
    import resource

    from raylivecell.training.worker import wrap

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ray.get_gpu_ids() and device.type == "cpu":
        raise UserError(preflight.blind_gpu(ray.util.get_node_ip_address()))
    state = loop.start(network_forward.build(recipe, device), recipe.optimizer, 1)
    forward = wrap(state.model, recipe.loop.compile is True, 1, device)  # `auto` compiles long runs only
    planes = torch.randint(0, 2, (images, sample_planes.count(recipe.targets), *crop), dtype=torch.uint8)
    schedule = order.SampleSchedule(0, images, images, (PhaseConfig(steps=1),))
    batches = iter([{"planes": planes}])
    distillation = None
    if teacher_recipe is not None:
        network = network_forward.build(teacher_recipe, device).eval()
        distillation = loop.Distillation(network, recipe.distillation.weight)
    config = recipe.loop, recipe.loss, recipe.targets
    for _ in loop.run(state, forward, batches, schedule, *config, lambda _: {}, distillation=distillation):
        pass
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_without_token() -> int | None:
    """HTTP status of the job API for a call without a token; None if it cannot be reached."""
    url = session.dashboard()
    if not url:
        return None
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _preflight(subject: str, check: Callable[[], Any], message: str) -> Finding:
    """Run a check of training/preflight.py; its finding has its error, or `message`."""
    try:
        check()
    except UserError as error:
        return Finding("fail", subject, _line(error))
    return Finding("pass", subject, message)


@contextlib.contextmanager
def _errors_as_findings(subject: str, hint: str = "") -> Iterator[list[Finding]]:
    """Collect an error raised in the block as a finding of level fail."""
    findings: list[Finding] = []
    try:
        yield findings
    except (UserError, OSError) as error:
        findings.append(Finding("fail", subject, _line(error), hint))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
