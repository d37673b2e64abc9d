"""Every sample occurs once per epoch; batches are the same for any number of ranks and from any step."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raylivecell.ingest import order
from raylivecell.ingest.order import EPOCH, SAMPLE, VARIANT, SampleSchedule
from raylivecell.recipe import PhaseConfig

schedules = st.builds(
    SampleSchedule,
    seed=st.integers(0, 5),
    samples=st.integers(1, 30),
    batch_size=st.sampled_from([1, 2, 4, 6, 12]),
    phases=st.lists(
        st.builds(PhaseConfig, epochs=st.integers(1, 4), originals=st.just(True), augmented_copies=st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


def all_rows(schedule: SampleSchedule) -> np.ndarray:
    return np.concatenate([schedule.rows(step) for step in range(schedule.steps)])


@given(schedules)
def test_a_complete_epoch_contains_every_variant_of_every_sample_once(schedule: SampleSchedule) -> None:
    rows, epoch, position = all_rows(schedule), 0, 0
    for phase in schedule.phases:
        size = phase.copies() * schedule.samples
        for number in range(phase.epochs or 0):
            epoch_rows = rows[position + number * size : position + (number + 1) * size]
            assert set(epoch_rows[:, EPOCH]) == {epoch + number}
            expected = {(s, v) for s in range(schedule.samples) for v in range(phase.copies())}
            assert {(r[SAMPLE], r[VARIANT]) for r in epoch_rows} == expected
        steps = -(-(phase.epochs or 0) * size // schedule.batch_size)
        position, epoch = position + steps * schedule.batch_size, epoch + -(-steps * schedule.batch_size // size)
    assert position == len(rows)


@given(schedules)
def test_no_row_occurs_twice(schedule: SampleSchedule) -> None:
    keys = [tuple(row) for row in all_rows(schedule)]
    assert len(keys) == len(set(keys))


@given(schedules, st.sampled_from([1, 2, 3, 6]))
def test_ranks_share_each_batch(schedule: SampleSchedule, ranks: int) -> None:
    if schedule.batch_size % ranks:
        return
    for step in range(min(schedule.steps, 7)):
        shares = [schedule.rank_rows(step, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        np.testing.assert_array_equal(np.concatenate(shares), schedule.rows(step))


@given(schedules)
def test_an_epoch_ends_at_the_step_of_its_last_sample(schedule: SampleSchedule) -> None:
    rows = [schedule.rows(step)[:, EPOCH] for step in range(schedule.steps)]
    last_step = {epoch: step for step, epochs in enumerate(rows) for epoch in epochs}
    unfinished = {rows[-1][-1]}
    expected = {step for epoch, step in last_step.items() if epoch not in unfinished} | {schedule.steps - 1}
    assert {step for step in range(schedule.steps) if schedule.epoch_ends(step)} == expected


@given(st.integers(1, 3000), st.integers(0, 3), st.integers(0, 3))
def test_the_order_without_a_table_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    with mock.patch.object(order, "MAX_TABLE", 0):
        items = order.permute(np.arange(size), seed, epoch, size)
    np.testing.assert_array_equal(np.sort(items), np.arange(size))


def test_the_order_without_a_table_is_uniform() -> None:
    size, epochs = 10, 3000
    with mock.patch.object(order, "MAX_TABLE", 0):
        permutations = np.array([order.permute(np.arange(size), 1, epoch, size) for epoch in range(epochs)])
    for position in range(size):  # at each position all items, and all pairs of successive items, are equally frequent
        assert stats.chisquare(np.bincount(permutations[:, position], minlength=size)).pvalue > 1e-5
    pairs = np.bincount(size * permutations[:, 3] + permutations[:, 4], minlength=size**2).reshape(size, size)
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-5


def test_twenty_million_items_need_no_table() -> None:
    before = order._table.cache_info().currsize
    schedule = SampleSchedule(0, 10**7, 64, (PhaseConfig(epochs=1, augmented_copies=1),))
    rows = np.concatenate([schedule.rows(step) for step in (0, 100_000, schedule.steps - 1)])
    assert order._table.cache_info().currsize == before
    assert len({tuple(row) for row in rows}) == len(rows)
    assert abs(np.mean(rows[:, SAMPLE]) / 10**7 - 0.5) < 0.1


def test_epochs_and_seeds_differ() -> None:
    def samples(seed: int, epochs: int) -> np.ndarray:
        return all_rows(SampleSchedule(seed, 50, 10, (PhaseConfig(epochs=epochs),)))[:, SAMPLE]

    assert (samples(0, 1) != samples(1, 1)).any()
    assert (samples(0, 2)[:50] != samples(0, 2)[50:]).any()
    np.testing.assert_array_equal(samples(0, 2)[:50], samples(0, 1))


def test_the_length_in_steps_does_not_depend_on_the_dataset() -> None:
    phases = (PhaseConfig(steps=7), PhaseConfig(steps=5, originals=False, augmented_copies=1))
    assert {SampleSchedule(0, samples, 4, phases).steps for samples in (1, 3, 1000)} == {12}
    assert set(SampleSchedule(0, 3, 4, phases).rows(8)[:, VARIANT]) == {1}


@pytest.mark.parametrize("wrong", [{}, {"epochs": 1, "steps": 1}, {"epochs": 1, "originals": False}])
def test_a_phase_without_a_length_or_images_is_rejected(wrong: dict) -> None:
    with pytest.raises(ValueError, match="phase"):
        PhaseConfig(**wrong)


weighted_schedules = st.builds(
    lambda seed, datasets, batch_size, phases: SampleSchedule(
        seed, sum(samples for samples, _ in datasets), batch_size, phases, datasets
    ),
    seed=st.integers(0, 5),
    datasets=st.lists(st.tuples(st.integers(1, 9), st.floats(0.5, 3)), min_size=2, max_size=3).map(tuple),
    batch_size=st.sampled_from([1, 2, 4, 6]),
    phases=st.lists(
        st.builds(PhaseConfig, epochs=st.integers(1, 4), originals=st.booleans(), augmented_copies=st.integers(1, 2)),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


@given(weighted_schedules)
def test_weights_are_the_shares_of_the_datasets_in_every_epoch(schedule: SampleSchedule) -> None:
    """No (epoch, sample, variant) occurs twice, although a small dataset is drawn several times per epoch."""
    rows, position = all_rows(schedule), 0
    assert len({tuple(row) for row in rows}) == len(rows)
    ends = np.cumsum([samples for samples, _ in schedule.datasets])
    total_weight = sum(weight for _, weight in schedule.datasets)
    for phase in schedule.phases:
        size = phase.copies() * schedule.samples
        for number in range(phase.epochs or 0):
            epoch_rows = rows[position + number * size : position + (number + 1) * size]
            counts = np.bincount(np.searchsorted(ends, epoch_rows[:, SAMPLE], side="right"), minlength=len(ends))
            assert counts.tolist() == schedule.draws(phase)
            for count, (_, weight) in zip(counts, schedule.datasets):
                assert abs(count - size * weight / total_weight) < 1
            variants = set(epoch_rows[:, VARIANT].tolist())
            assert variants <= set(range(0 if phase.originals else 1, phase.augmented_copies + 1))
        position += -(-(phase.epochs or 0) * size // schedule.batch_size) * schedule.batch_size


@given(weighted_schedules)
def test_within_a_dataset_every_sample_occurs_once_before_any_occurs_again(schedule: SampleSchedule) -> None:
    phase = schedule.phases[0]
    size = (phase.epochs or 0) * phase.copies() * schedule.samples
    steps, first = -(-size // schedule.batch_size), 0
    rows = np.concatenate([schedule.rows(step) for step in range(steps)])[:size]
    for samples, _ in schedule.datasets:
        own = rows[(first <= rows[:, SAMPLE]) & (rows[:, SAMPLE] < first + samples)]
        counts = np.bincount(own[:, EPOCH])
        assert (counts[:-1] == phase.copies() * samples).all(), "all epochs of a dataset but its last are complete"
        first += samples


@given(weighted_schedules, st.sampled_from([1, 2, 3]))
def test_ranks_share_weighted_batches(schedule: SampleSchedule, ranks: int) -> None:
    if schedule.batch_size % ranks == 0:
        for step in range(min(schedule.steps, 5)):
            shares = [schedule.rank_rows(step, rank, ranks) for rank in range(ranks)]
            np.testing.assert_array_equal(np.concatenate(shares), schedule.rows(step))


@given(schedules)
def test_the_number_of_completed_epochs_follows_the_rows(schedule: SampleSchedule) -> None:
    for step in range(schedule.steps):
        assert schedule.epochs_done(step) == schedule.rows(step)[-1, EPOCH] + schedule.epoch_ends(step)
