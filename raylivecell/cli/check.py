"""`check`: what would fail, hang or be slow, found before anything is spent; each finding with its mend.

Facts come from the nodes (cli/probe.py), the dataset and a trial batch. Findings are plain functions of those facts,
so that each can be tested.
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

from raylivecell.cli import probe
from raylivecell.cli.probe import Node
from raylivecell.core import storage
from raylivecell.core.errors import UserError
from raylivecell.data import shards
from raylivecell.ingest import order
from raylivecell.ingest.dataset import cache_budget_bytes, sample_bytes
from raylivecell.network import forward as segment
from raylivecell.recipe import PhaseConfig, Recipe
from raylivecell.runs import folder
from raylivecell.runtime import placement, session
from raylivecell.targets import sample_planes
from raylivecell.training import loop, preflight

Level = Literal["pass", "warn", "fail"]
COLOURS: dict[Level, str] = {"pass": "green", "warn": "yellow", "fail": "red"}

# Log lines, metrics and token expiry compare clocks; S3 refuses requests 15 minutes off.
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 300.0
# A trial batch may take a minute to compile or to start a process.
BATCH_PATIENCE_S = 300.0


class Finding(NamedTuple):
    """One line of `check`."""

    level: Level
    what: str
    told: str
    hint: str = ""


class CheckRequest(NamedTuple):
    """What is about to be run."""

    data: str
    out: str | None
    recipe: Recipe
    workers: int | tuple[int, int]

    @property
    def least(self) -> int:
        """The fewest workers at once."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers at once."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


def check(plan: CheckRequest) -> int:
    """Print numbered findings; 1 where one is a fail, else 0."""
    worst, page = 0, Console(highlight=False, soft_wrap=True)
    for number, finding in enumerate(findings(plan), 1):
        level = Text(finding.level, COLOURS[finding.level])
        told = f"  {finding.what}: {finding.told}" + (f"; {finding.hint}" if finding.hint else "")
        page.print(Text.assemble(f"{number:>2} ", level, told))
        worst |= finding.level == "fail"
    return int(worst)


def findings(plan: CheckRequest) -> Iterator[Finding]:
    """What there is to say of a plan, in the order in which things would go wrong; without Ray the rest cannot be."""
    description = None
    with _told("dataset") as bad:
        description = shards.load_description(plan.data)
    yield from bad
    if description:
        yield dataset(plan.data, description)
    if plan.out:
        yield run_name(plan.out)
    try:
        session.connect(dashboard=True)
    except UserError as error:
        yield Finding("fail", "Ray", _line(error))
        return
    with _told("shared storage", "give --out as s3://..., gs://... or a disk that all nodes share") as bad:
        found = probe.nodes(plan.out)
        yield cluster(found)
        yield versions(found)
        yield clocks(found)
        yield shared_memory(found)
        yield gpus(found, plan.least)
        if plan.out:
            yield shared_storage(found, plan.out)
    yield from bad
    yield token(os.environ.get("RAY_AUTH_MODE"), _status_without_token())
    yield _tried("State API", preflight.state_api, "answers")
    yield _tried("CPUs for data", lambda: preflight.worker_cpus(plan.most), f"{plan.most} workers leave some")
    yield _tried("hardware", lambda: preflight.hardware(plan.recipe), "computes the recipe")
    if description:
        yield object_store(description, plan)
        yield _tried(
            "network", lambda: preflight.network(plan.recipe), f"{plan.recipe.model.name} takes the recipe's options"
        )
        yield _tried("samples", lambda: preflight.samples_fit(plan.data, plan.recipe), "fit the recipe")
        yield _tried("batch", lambda: preflight.batch_divides(plan.recipe.batch_size, plan.workers), "divides")
        yield trial_batch(plan)


def dataset(data: str, description: dict[str, Any]) -> Finding:
    """Whether every shard is there with the rows and the length that dataset.json says."""
    wrong, rows = [], 0
    for split in description["splits"].values():
        for shard in split["shards"]:
            rows += shard["rows"]
            problem = _shard_problem(storage.join(data, shard["file"]), shard)
            wrong += [f"{shard['file']} {problem}"] if problem else []
    if wrong:
        return Finding("fail", "dataset", f"{len(wrong)} bad shards: {', '.join(wrong[:3])}", "prepare it again")
    return Finding("pass", "dataset", f"{rows} images, every shard whole")


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
    """Whether the folder is free: Ray would go on with what is there."""
    if failed := folder.failure(out):
        state = f"{out} holds a run that failed ({failed.reason})"
        return Finding("warn", "run name", state, "train starts again and keeps its files; --resume continues it")
    if folder.holds_run(out):
        return Finding("fail", "run name", f"{out} holds a run", "choose another --out, or train with --resume")
    return Finding("pass", "run name", f"{out} is free")


def cluster(nodes: Sequence[Node]) -> Finding:
    """Whether every node answers."""
    silent = [f"{node.address} ({node.silent})" for node in nodes if node.silent]
    if silent:
        return Finding("fail", "Ray", f"no answer from {', '.join(silent[:3])}", "look at that node's log, or drain it")
    total = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return Finding("pass", "Ray", f"{len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs")


def versions(nodes: Sequence[Node]) -> Finding:
    """Whether all nodes run the same code: tensors and pickles go between them."""
    kinds: dict[Any, list[str]] = {}
    for node in nodes:
        if not node.silent:
            kinds.setdefault(node.versions, []).append(node.address)
    if len(kinds) < 2:
        return Finding("pass", "versions", " ".join(f"{a} {b}" for kind in kinds for a, b in kind) or "no node")
    usual, *others = sorted(kinds, key=lambda kind: -len(kinds[kind]))
    odd = [f"{kinds[kind][0]} has {a} {b}" for kind in others for a, b in kind if (a, b) not in usual]
    return Finding("fail", "versions", f"{', '.join(odd)}, others not", "give every node the same image")


def clocks(nodes: Sequence[Node]) -> Finding:
    """Whether the clocks agree."""
    worst = max((node for node in nodes if not node.silent), key=lambda node: abs(node.clock_s), default=None)
    off = abs(worst.clock_s) if worst else 0.0
    if worst is None or off < CLOCK_WARN_S:
        return Finding("pass", "clocks", f"within {CLOCK_WARN_S:g} s")
    level: Level = "fail" if off > CLOCK_FAIL_S else "warn"
    return Finding(level, "clocks", f"{worst.address} is {off:.0f} s off", "synchronise it (chrony, NTP)")


def shared_memory(nodes: Sequence[Node]) -> Finding:
    """Whether /dev/shm holds each node's object store, which else lies on a disk."""
    short = [
        f"{node.address} has {node.shared_memory / 2**30:.1f} GiB for a store of "
        f"{node.resources.get('object_store_memory', 0) / 2**30:.1f}"
        for node in nodes
        if not node.silent and node.shared_memory < node.resources.get("object_store_memory", 0)
    ]
    if short:
        hint = "give the container --shm-size, the pod an emptyDir of medium Memory, or Ray a smaller store"
        return Finding("warn", "shared memory", ", ".join(short[:3]), hint)
    return Finding("pass", "shared memory", "holds every node's object store")


def gpus(nodes: Sequence[Node], workers: int) -> Finding:
    """Whether torch sees the GPUs that Ray has, and there is one for each of `workers`, the fewest that would train."""
    blind = [
        f"{node.address}: Ray has {node.resources.get('GPU', 0):g}, torch sees {node.gpus}"
        for node in nodes
        if not node.silent and node.gpus < node.resources.get("GPU", 0)
    ]
    total = sum(node.resources.get("GPU", 0) for node in nodes)
    if blind:
        return Finding("fail", "GPUs", ", ".join(blind[:3]), "install torch for CUDA there, and look at the driver")
    if 0 < total < workers:
        return Finding("fail", "GPUs", f"{total:g} for {workers} workers", f"use --workers {max(1, int(total))}")
    return Finding("pass", "GPUs", f"{total:g}" if total else "none: training on CPUs")


def shared_storage(nodes: Sequence[Node], out: str) -> Finding:
    """Whether every node writes where the others read."""
    wrong = [f"{node.address}: {node.storage_error}" for node in nodes if node.storage_error]
    if wrong:
        hint = "give --out as s3://..., gs://... or a disk that all nodes share, and its credentials to each node"
        return Finding("fail", "shared storage", f"{out} from {', '.join(wrong[:3])}", hint)
    return Finding("pass", "shared storage", f"every node writes to {out} and reads the others")


def token(mode: str | None, status: int | None) -> Finding:
    """Whether the job API asks for a token: who reaches it without one runs what he likes.

    Args:
        mode: RAY_AUTH_MODE here.
        status: what the API answers to a call without a token; none: it was not reached.
    """
    if status == 401:
        return Finding("pass", "token", "the job API refuses calls without one")
    if status is None:
        return Finding("warn", "token", "no dashboard to ask", "start Ray with its dashboard")
    told = f"the job API answers calls without one (RAY_AUTH_MODE={mode or ''}, HTTP {status})"
    return Finding("warn", "token", told, "start every node with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")


def object_store(description: dict[str, Any], plan: CheckRequest) -> Finding:
    """Whether decoded images fit into the object store, or are read again in every epoch."""
    cells, free = plan.recipe.targets != "foreground", cache_budget_bytes()
    needed = description["splits"]["train"]["images"] * sample_bytes(plan.data, "train", cells)
    told = f"{needed / 2**30:.1f} GiB of decoded images, {free / 2**30:.1f} GiB for them"
    if needed > free:
        return Finding("warn", "object store", told, "they are decoded anew in every epoch: more CPUs, or more memory")
    return Finding("pass", "object store", told)


def trial_batch(plan: CheckRequest) -> Finding:
    """Whether the largest share of a batch that a worker may get takes a training step on a worker of the cluster."""
    gpu = min(1, placement.gpu_slots(session.machines()))
    share = max(1, plan.recipe.batch_size // plan.least)
    crop = plan.recipe.crop or max(shards.image_sizes(plan.data, "train"), default=(64, 64))
    hint = "lower batch_size or crop, or use more --workers"
    if plan.recipe.loop.compile:
        hint += ", or set loop.compile: false"
    try:
        task = ray.remote(num_cpus=0.5, num_gpus=gpu, max_retries=0)(train_once)
        used = ray.get(task.remote(plan.recipe, share, crop), timeout=BATCH_PATIENCE_S)
    except Exception as error:  # out of memory, in torch or killed by Ray; no place to run
        cause = getattr(error, "cause", None) or error  # of an error in the task: without its process and traceback
        hint = "" if isinstance(cause, UserError) else hint
        return Finding("fail", "trial batch", f"{share} of {crop[0]}x{crop[1]}: {_line(cause)}", hint)
    return Finding("pass", "trial batch", f"{share} of {crop[0]}x{crop[1]} take {used / 2**30:.2f} GiB")


def train_once(recipe: Recipe, images: int, crop: tuple[int, int]) -> int:
    """One step of the training loop on random pixels, computed as the recipe asks; the most memory that it took, bytes.

    Of the GPU, where there is one. UserError where Ray gives this process a GPU that torch does not see.
    """
    import resource

    from raylivecell.training.worker import wrap

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ray.get_gpu_ids() and device.type == "cpu":
        raise UserError(preflight.blind_gpu(ray.util.get_node_ip_address()))
    training = loop.start(segment.build(recipe, device), recipe.optimizer, 1)
    forward = wrap(training.model, recipe, 1, device)
    planes = torch.randint(0, 2, (images, sample_planes.count(recipe.targets), *crop), dtype=torch.uint8)
    plan = order.SampleSchedule(0, images, images, (PhaseConfig(steps=1),))
    for _ in loop.run(
        training, forward, iter([{"planes": planes}]), plan, recipe.loop, recipe.loss, recipe.targets, lambda _: {}
    ):
        pass
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_without_token() -> int | None:
    """The HTTP status of the job API for a stranger."""
    url = session.dashboard()
    if not url:
        return None
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _tried(what: str, attempt: Callable[[], Any], told: str) -> Finding:
    """A check of training/preflight.py, whose error names the thing and the mend."""
    try:
        attempt()
    except UserError as error:
        return Finding("fail", what, _line(error))
    return Finding("pass", what, told)


@contextlib.contextmanager
def _told(what: str, hint: str = "") -> Iterator[list[Finding]]:
    """Collects what goes wrong inside as a fail."""
    bad: list[Finding] = []
    try:
        yield bad
    except (UserError, OSError) as error:
        bad.append(Finding("fail", what, _line(error), hint))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
