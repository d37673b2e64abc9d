"""The order of samples: the run as one sequence of batches, a pure function of (seed, epoch).

1. An epoch of a phase contains every sample once per variant (original, augmented copy 1, augmented copy 2, ...).
2. Its order is the permutation drawn from (seed, epoch): global, without communication, the same on every machine.
3. Epochs follow one another without a gap, and a batch may span two epochs: every batch is full, every rank has the
   same number of steps, no sample is dropped. The last batch of a phase is filled from its next permutation.
4. With weights of datasets, an epoch still has as many samples, and each dataset its share of them, drawn from its own
   sequence of permutations: samples of a small dataset with a large weight occur several times, always with other
   augmentation.
5. Each rank computes its share of each batch; the union over ranks is the same for any number of ranks.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from raylivecell.recipe import PhaseConfig

EPOCH, SAMPLE, VARIANT = range(3)  # columns of `SampleSchedule.rows`
# Up to this many items, an epoch's order is a table (8 MiB); above, it is computed on demand: a table of ten million
# images and their copies would take 160 MB and 1 s in each process of a node, every epoch.
MAX_TABLE = 2**20
ROUNDS = 8


def permute(positions: np.ndarray, seed: int | tuple[int, int], epoch: int, size: int) -> np.ndarray:
    """Return the items, int64, at `positions` (int64, 0 to size - 1) of the permutation drawn from (seed, epoch)."""
    if size <= MAX_TABLE:
        return _table(seed, epoch, size)[positions]
    keys = np.random.default_rng(_entropy(seed, epoch)).integers(2**64, size=ROUNDS, dtype=np.uint64)
    items = _mix(positions.astype(np.uint64), keys, size)
    while (outside := items >= size).any():  # cycle walking; at most three quarters of the results are outside
        items[outside] = _mix(items[outside], keys, size)
    return items.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _table(seed: int | tuple[int, int], epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng(_entropy(seed, epoch)).permutation(size)


def _entropy(seed: int | tuple[int, int], epoch: int) -> tuple[int, ...]:
    return (seed, epoch) if isinstance(seed, int) else (*seed, epoch)


def _mix(values: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Permute integers of the bit length of `size`, rounded up to an even number, by a Feistel network (Luby and
    Rackoff 1988) whose round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        hashed = right + key
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((hashed ^ (hashed >> np.uint64(31))) & mask)
    return (left << half) | right


@dataclass(frozen=True)
class SampleSchedule:
    """Order of the samples of a run, in global batches of `batch_size` (over all ranks)."""

    seed: int
    samples: int
    batch_size: int
    phases: tuple[PhaseConfig, ...]
    datasets: tuple[tuple[int, float], ...] = ()
    """Samples and weight of each dataset, in the order of sample ids; empty: every sample once per variant."""

    def _phase_steps(self, phase: PhaseConfig) -> int:
        rows = (phase.epochs or 0) * phase.copies() * self.samples
        return phase.steps or -(-rows // self.batch_size)

    @functools.cached_property
    def _starts(self) -> list[tuple[int, int, PhaseConfig]]:
        """(first step, first epoch, phase) of each phase, then (steps, epochs, last phase) of the run."""
        starts, step, epoch = [], 0, 0
        for phase in self.phases:
            starts.append((step, epoch, phase))
            steps = self._phase_steps(phase)
            step += steps
            # The epoch that fills a phase's last batch counts as used, so that no (seed, epoch) occurs twice.
            epoch += -(-steps * self.batch_size // (phase.copies() * self.samples))
        return [*starts, (step, epoch, self.phases[-1])]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, the same for any number of ranks."""
        return self._starts[-1][0]

    def _phase_at(self, step: int) -> tuple[int, int, PhaseConfig]:
        return next(start for start in reversed(self._starts[:-1]) if start[0] <= step)

    def rows(self, step: int) -> np.ndarray:
        """Batch number `step` as int64 (batch_size, 3): epoch, sample id, variant (0 original, 1.. augmented)."""
        return self.rank_rows(step, 0, 1)

    def rank_rows(self, step: int, rank: int, ranks: int) -> np.ndarray:
        """Return the share of `rank` of `ranks` in `rows(step)`; `batch_size` must be a multiple of `ranks`."""
        first_step, first_epoch, phase = self._phase_at(step)
        size, share = phase.copies() * self.samples, self.batch_size // ranks
        position = (step - first_step) * self.batch_size + rank * share + np.arange(share)
        epochs, position_in_epoch = first_epoch + position // size, position % size
        item = np.empty_like(position)
        for epoch in np.unique(epochs).tolist():
            item[epochs == epoch] = permute(position_in_epoch[epochs == epoch], self.seed, epoch, size)
        if self.datasets:
            return self._weighted(epochs - first_epoch, item, phase, first_step)
        variant = item // self.samples + (0 if phase.originals else 1)
        return np.stack([epochs, item % self.samples, variant], axis=1)

    def draws(self, phase: PhaseConfig) -> list[int]:
        """Samples of each dataset in one epoch of a phase; their sum is the size of the epoch."""
        total = phase.copies() * self.samples
        exact = [total * weight / sum(weight for _, weight in self.datasets) for _, weight in self.datasets]
        counts = [int(value) for value in exact]
        # The largest remainders are rounded up; of equal ones, the first.
        by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
        for index in by_remainder[: total - sum(counts)]:
            counts[index] += 1
        return counts

    def _weighted(self, epochs: np.ndarray, item: np.ndarray, phase: PhaseConfig, first_step: int) -> np.ndarray:
        """Rows of the datasets' own sequences, as `rows`: the epoch is that of the dataset.

        Args:
            epochs: epoch of each row, counted from the start of the phase.
            item: place of each row in its epoch: the first `draws` belong to the first dataset, and so on.
            phase: the phase of the rows.
            first_step: its first step.
        """
        rows = np.empty((len(item), 3), np.int64)
        first_place = first_sample = 0
        for number, (count, (samples, _)) in enumerate(zip(self.draws(phase), self.datasets, strict=True)):
            chosen = (first_place <= item) & (item < first_place + count)
            index, size = epochs[chosen] * count + item[chosen] - first_place, phase.copies() * samples
            own_epochs, own_item = self._own_epochs_before(number, first_step) + index // size, index % size
            for epoch in np.unique(own_epochs).tolist():
                same = own_epochs == epoch
                own_item[same] = permute(own_item[same], (self.seed, number + 1), epoch, size)
            variant = own_item // samples + (0 if phase.originals else 1)
            rows[chosen] = np.stack([own_epochs, first_sample + own_item % samples, variant], axis=1)
            first_place, first_sample = first_place + count, first_sample + samples
        return rows

    def _own_epochs_before(self, number: int, step: int) -> int:
        """Epochs of dataset `number` that the phases before `step` use, the started ones included."""
        total = 0
        for (start, epoch, phase), (_, next_epoch, _) in itertools.pairwise(self._starts):
            if start < step:
                samples = (next_epoch - epoch) * self.draws(phase)[number]
                total += -(-samples // (phase.copies() * self.datasets[number][0]))
        return total

    def epochs_done(self, step: int) -> int:
        """Epochs completed after batch number `step`."""
        first_step, first_epoch, phase = self._phase_at(step)
        last = (step + 1 - first_step) * self.batch_size - 1
        return first_epoch + last // (phase.copies() * self.samples) + int(self.epoch_ends(step))

    def epoch_ends(self, step: int) -> bool:
        """Whether batch number `step` contains the last sample of an epoch or ends a phase."""
        first_step, _, phase = self._phase_at(step)
        if step + 1 in [start for start, _, _ in self._starts]:
            return True
        size, position = phase.copies() * self.samples, (step - first_step) * self.batch_size
        return (position + self.batch_size) // size > position // size
