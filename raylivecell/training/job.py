"""The job that each training worker receives. Separate from worker.py, so that the driver need not import torch."""

from dataclasses import dataclass, field
from typing import Any

from ray.actor import ActorHandle

from raylivecell.core import addresses
from raylivecell.ingest.blocks import Source
from raylivecell.ingest.dataset import Samples
from raylivecell.ingest.order import SampleSchedule
from raylivecell.ingest.stream import Stream
from raylivecell.recipe import Recipe
from raylivecell.runs.parents import Parent
from raylivecell.runs.teachers import Teacher

SCORE_COLUMN = "rank"
"""Column of the validation score in a worker's report, by which Ray Train selects the best checkpoint."""


@dataclass(frozen=True)
class TrainJob:
    """A run's recipe, samples and settings, the same for every worker."""

    recipe: Recipe
    out: str
    samples: Samples = field(repr=False)  # Ray's dashboard keeps the job's repr
    stream_memory: int
    """Bytes of the object store for the streams of all workers."""
    threads: int | None = None
    """torch's threads in each worker; None: the machine's cores divided among its workers."""
    mailbox: ActorHandle | None = None
    """`messages.Mailbox` for rank 0's progress."""
    poll_preemption: bool = False
    """Whether workers poll for nodes that are about to be removed."""
    startup: tuple[tuple[str, float], ...] = ()
    """Start-up phases of the driver: name and end time, seconds since 1970."""
    resumed: bool = False
    """Whether the run in `out` is resumed."""
    parents: tuple[Parent, ...] = ()
    """The network from which the run started, stored in its folder, and that network's own parents."""
    teacher: Teacher | None = None
    """The network whose maps the run learns, stored in its folder."""
    sweep: str | None = None
    """Folder of the sweep to which the run belongs as a trial."""

    def name(self) -> str:
        """The name of the run's folder; for a trial SWEEP/PATH, its path within the sweep's folder."""
        return addresses.relative(self.out, addresses.parent(self.sweep or self.out)) or addresses.name(self.out)

    def schedule(self) -> SampleSchedule:
        """The run's sample order."""
        recipe, samples = self.recipe, self.samples
        return SampleSchedule(recipe.seed, len(samples.train), recipe.batch_size, recipe.phases, samples.datasets)

    def stream(self, step: int, rank: int = 0, ranks: int = 1) -> Stream:
        """Stream of the batches of `rank`, starting at `step`; its Ray Data tasks start immediately."""
        samples, recipe = self.samples, self.recipe
        source = Source(
            samples.train,
            self.schedule(),
            recipe.augment,
            recipe.crop,
            samples.frame,
            samples.cached_train,
            recipe.targets,
            samples.task_cpus,
            samples.intensity.background_level,
        )
        return Stream(source, step, rank, ranks, self.stream_memory // ranks)

    def send_progress(self, message: dict[str, Any]) -> None:
        """Send a message to the driver without waiting for its delivery."""
        if self.mailbox is not None:
            self.mailbox.send.remote(message)
