"""Which samples are seen when: the whole run as one sequence of batches, a pure function of (seed, epoch).

1. A phase's epoch holds every sample once for each of its variants (plain, transformed 1, transformed 2, ...).
2. Its order is the permutation drawn from (seed, epoch): global, free, the same on every machine.
3. Epochs follow one another without a gap, and batches may straddle them: every batch is full, every rank has the
   same number of steps, no sample is dropped. The last batch of a phase is filled from its next permutation.
4. A rank takes its share of each batch: the union over ranks is the same batch for any number of ranks.
"""

import functools
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from raylivecell.recipe_base import StrictModel

EPOCH, SAMPLE, VARIANT = range(3)  # columns of `Plan.rows`


class PhaseConfig(StrictModel):
    """A part of the training. Its length is given in epochs or in steps."""

    epochs: int | None = Field(None, ge=1)
    """Length in passes over the set (its transformed copies included)."""
    steps: int | None = Field(None, ge=1)
    """Length in optimiser steps; the length in time is then the same for any size of set."""
    plain: bool = True
    """Each epoch holds every image as it is (cropped at random)."""
    transformed: int = Field(0, ge=0)
    """Each epoch holds so many transformed copies of every image, different ones every epoch."""

    @model_validator(mode="after")
    def _one_length_and_some_images(self) -> "PhaseConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give a phase either epochs or steps")
        if not self.plain and not self.transformed:
            raise ValueError("a phase needs images: plain: true, or transformed: 1 or more")
        return self

    def copies(self) -> int:
        """How often an epoch holds each image."""
        return int(self.plain) + self.transformed


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class Plan:
    """The order of a run over `samples` samples in batches of `batch_size` (global: over all ranks)."""

    seed: int
    samples: int
    batch_size: int
    phases: tuple[PhaseConfig, ...]

    def _phase_steps(self, phase: PhaseConfig) -> int:
        rows = (phase.epochs or 0) * phase.copies() * self.samples
        return phase.steps or -(-rows // self.batch_size)

    @functools.cached_property
    def _starts(self) -> list[tuple[int, int, PhaseConfig]]:
        """(first step, first epoch, phase) of each phase, and the end as (steps, epochs, last phase)."""
        starts, step, epoch = [], 0, 0
        for phase in self.phases:
            starts.append((step, epoch, phase))
            steps = self._phase_steps(phase)
            step += steps
            # An epoch begun by the fill of a phase's last batch counts, so that no (seed, epoch) is used twice.
            epoch += -(-steps * self.batch_size // (phase.copies() * self.samples))
        return [*starts, (step, epoch, self.phases[-1])]

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, the same for any number of ranks."""
        return self._starts[-1][0]

    def _phase_at(self, step: int) -> tuple[int, int, PhaseConfig]:
        return next(start for start in reversed(self._starts[:-1]) if start[0] <= step)

    def rows(self, step: int) -> np.ndarray:
        """Batch number `step` as int64 (batch_size, 3): epoch, sample id, variant (0 plain, 1.. transformed)."""
        first_step, first_epoch, phase = self._phase_at(step)
        size = phase.copies() * self.samples
        position = (step - first_step) * self.batch_size + np.arange(self.batch_size)
        epoch, place = first_epoch + position // size, position % size
        item = np.array([_permutation(self.seed, int(e), size)[p] for e, p in zip(epoch, place)])
        variant = item // self.samples + (0 if phase.plain else 1)
        return np.stack([epoch, item % self.samples, variant], axis=1)

    def rank_rows(self, step: int, rank: int, ranks: int) -> np.ndarray:
        """The part of `rows(step)` that `rank` of `ranks` computes; `batch_size` must be a multiple of `ranks`."""
        share = self.batch_size // ranks
        return self.rows(step)[rank * share : (rank + 1) * share]

    def epoch_ends(self, step: int) -> bool:
        """Whether the last sample of an epoch is in batch number `step`, or the run ends with it."""
        if step + 1 == self.steps:
            return True
        here, there = self.rows(step)[:, EPOCH], self.rows(step + 1)[:, EPOCH]
        return bool(there[0] > here[0])
