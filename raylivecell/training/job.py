"""What each training worker is given. Apart from worker.py, so that a driver need not import torch."""

from dataclasses import dataclass, field

from ray.actor import ActorHandle

from raylivecell.core import addresses
from raylivecell.ingest import stream as ingest
from raylivecell.ingest.blocks import Source
from raylivecell.ingest.dataset import Samples
from raylivecell.ingest.order import SampleSchedule
from raylivecell.recipe import Recipe

SCORE_COLUMN = "rank"
"""Column of a worker's report by which Ray Train keeps the best checkpoint: its validation score."""


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told."""

    recipe: Recipe
    out: str
    samples: Samples = field(repr=False)  # Ray's dashboard keeps the job's repr
    stream_memory: int
    """Bytes of the object store for the streams of all workers together."""
    threads: int | None = None
    """torch's threads in each worker; none: the machine's cores shared among the workers on it."""
    progress: ActorHandle | None = None
    """A `messages.Mailbox` that rank 0 sends its progress to."""
    watched: bool = False
    """Whether the cluster is asked for nodes that are about to go away."""
    marks: tuple[tuple[str, float], ...] = ()
    """What the driver had done by when, seconds since 1970."""
    resumed: bool = False
    """Whether the run in `out` is continued."""
    sweep: str | None = None
    """Folder of the sweep that the run is a trial of."""

    def name(self) -> str:
        """The name of the run's folder; of a trial, from the sweep's on."""
        return addresses.relative(self.out, addresses.parent(self.sweep or self.out)) or addresses.name(self.out)

    def plan(self) -> SampleSchedule:
        """The order of the run."""
        return SampleSchedule(self.recipe.seed, len(self.samples.train), self.recipe.batch_size, self.recipe.phases)

    def stream(self, step: int, rank: int = 0, ranks: int = 1) -> ingest.Stream:
        """The batches of `rank` from `step` on: it starts its tasks at once."""
        samples, recipe = self.samples, self.recipe
        source = Source(
            samples.train,
            self.plan(),
            recipe.augment,
            recipe.crop,
            samples.frame,
            samples.cached_train,
            recipe.targets,
            samples.task_cpus,
            samples.intensity.background_level,
        )
        return ingest.Stream(source, step, rank, ranks, self.stream_memory // ranks)
