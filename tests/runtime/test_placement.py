"""Placement: every reservation fits on a machine and leaves space for a task of Ray Data."""

import itertools
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raylivecell import recipe
from raylivecell.cli import demo
from raylivecell.core.errors import UserError
from raylivecell.inference import actors
from raylivecell.recipe import LoopConfig, ModelConfig
from raylivecell.runtime import placement
from raylivecell.runtime.placement import Machine
from raylivecell.sweep import tune
from raylivecell.sweep.space import SweepConfig
from raylivecell.training import preflight

MACHINES = st.lists(
    st.builds(Machine, st.integers(0, 64).map(float), st.sampled_from([0.0, 0.0, 1.0, 2.0, 8.0])),
    min_size=1,
    max_size=5,
)


def fill(machines: list[Machine], cpus: float, gpus: float, count: int) -> list[float] | None:
    """Free CPUs per machine after first-fit placement of `count` processes; None if they do not fit."""
    free = [list(machine) for machine in machines]
    for _ in range(count):
        target = next((machine for machine in free if machine[0] >= cpus - 1e-6 and machine[1] >= gpus - 1e-6), None)
        if target is None:
            return None
        target[0], target[1] = target[0] - cpus, target[1] - gpus
    return [machine[0] for machine in free]


@given(MACHINES, st.integers(1, 40), st.sampled_from([1.0, 0.5, 0.25]))
def test_workers_and_a_data_task_fit(machines: list[Machine], workers: int, share: float) -> None:
    cpus, task = placement.worker_cpus(workers, machines, share), placement.task_cpus(machines)
    slots = placement.gpu_slots(machines, share)
    active = min(workers, slots) if slots else workers
    assert (cpus > 0) == (active <= placement.most_workers(machines, share))
    assume(cpus > 0)
    assert cpus >= placement.MIN_WORKER_CPU
    free = fill(machines, cpus, share if slots else 0.0, active)
    assert free is not None, "each worker fits on a machine"
    assert max(free) >= task - 1e-6


@pytest.mark.parametrize(
    ("machines", "workers", "expected"),
    [
        ([Machine(1)], 1, 0.5),  # the smallest machine: half for training, half for data
        ([Machine(1)], 2, 0.0),
        ([Machine(2)], 1, 1.0),
        ([Machine(2)], 2, 0.5),
        ([Machine(16, 1)], 1, 1.0),
        ([Machine(1, 1)], 1, 0.5),
        ([Machine(8, 8)], 8, 0.8),
        ([Machine(4, 8)], 8, 0.0),  # half a CPU for each leaves none for data
        ([Machine(4, 8)], 6, 0.5),
        ([Machine(2, 8), Machine(32)], 8, 0.0),  # the free CPUs are on the machine without GPUs
        ([Machine(2, 8), Machine(32)], 4, 0.5),
        ([Machine(1, 1), Machine(1, 1)], 2, 0.5),
        ([Machine(0), Machine(4, 1)], 1, 1.0),  # a head without CPUs does not count as a second machine
        ([Machine(4), Machine(4)], 2, 0.5),
    ],
)
def test_cpus_per_worker_of_example_clusters(machines: list[Machine], workers: int, expected: float) -> None:
    assert placement.worker_cpus(workers, machines) == expected


@given(st.integers(1, 3000), MACHINES, st.booleans())
def test_a_pool_of_actors_fits(items: int, machines: list[Machine], use_gpus: bool) -> None:
    assume(any(machine.cpus for machine in machines))
    count, cpus, gpus = placement.actor_pool(items, actors.BLOCK, machines, use_gpus)
    assert count >= 1
    assert (count - 1) * actors.BLOCK < items, "every actor gets a block"
    assert gpus == 0 or use_gpus
    free = fill(machines, cpus, gpus, count)
    assert free is not None, "each actor fits on a machine"
    if sum(machine.cpus for machine in machines) > 1 and not gpus:
        assert sum(free) >= 1, "one CPU is left for Ray Data"


@pytest.mark.parametrize(
    ("machines", "workers", "share", "max_concurrent", "expected"),
    [
        ([Machine(1)], 1, 1.0, None, (1, 0.5, 0.0, 1)),
        ([Machine(2)], 1, 1.0, None, (1, 1.0, 0.0, 2)),
        ([Machine(4)], 2, 1.0, None, (1, 1.0, 0.0, 2)),
        ([Machine(16)], 1, 1.0, None, (12, 1.0, 0.0, 1)),
        ([Machine(16)], 1, 1.0, 3, (3, 1.0, 0.0, 5)),
        ([Machine(16, 4)], 1, 1.0, None, (4, 1.0, 1.0, 4)),
        ([Machine(16, 4)], 2, 1.0, None, (2, 1.0, 1.0, 4)),
        ([Machine(16, 1)], 1, 0.25, None, (4, 1.0, 0.25, 4)),
        ([Machine(4, 8)], 1, 1.0, None, (6, 0.5, 1.0, 1)),  # limited by CPUs
        ([Machine(8, 1), Machine(8, 1)], 1, 0.6, None, (2, 1.0, 0.6, 8)),  # a trial needs its 0.6 on one GPU
    ],
)
def test_the_cluster_is_shared_among_trials(
    machines: list[Machine],
    workers: int,
    share: float,
    max_concurrent: int | None,
    expected: tuple[int, float, float, int],
) -> None:
    config = SweepConfig(workers_per_trial=workers, gpus_per_worker=share)
    resources = tune.capacity(config, machines, max_concurrent)
    assert (resources.max_concurrent, resources.cpus, resources.gpus, resources.threads) == expected


@pytest.mark.parametrize(
    ("config", "machines", "max_concurrent", "line"),
    [
        (SweepConfig(), [Machine(16, 4)], 5, "--max-concurrent 5 needs more than the cluster's 4 GPUs; use 4"),
        (SweepConfig(workers_per_trial=2), [Machine(16, 1)], None, "more than the cluster's 1 GPUs; lower --sweep.w"),
        (SweepConfig(), [Machine(4)], 7, "--max-concurrent 7 would leave no CPU for Ray Data on 4 CPUs; use 6"),
        (SweepConfig(workers_per_trial=2), [Machine(1)], None, "leaves no CPU for Ray Data on 1 CPUs; lower --sweep.w"),
    ],
)
def test_more_trials_than_fit_are_refused(
    config: SweepConfig, machines: list[Machine], max_concurrent: int | None, line: str
) -> None:
    with pytest.raises(UserError) as error:
        tune.capacity(config, machines, max_concurrent)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("machines", "batch_size", "expected"),
    [
        ([Machine(1)], 4, 1),
        ([Machine(2)], 4, 2),
        ([Machine(64)], 4, 2),
        ([Machine(64)], 3, 1),  # not divisible by two workers
        ([Machine(4, 1)], 4, 1),
        ([Machine(32, 8)], 4, 2),
        ([Machine(2, 2)], 4, 2),
        ([Machine(1, 2)], 4, 1),
    ],
)
def test_the_demo_uses_at_most_two_workers_that_fit(
    monkeypatch: pytest.MonkeyPatch, machines: list[Machine], batch_size: int, expected: int
) -> None:
    monkeypatch.setattr(preflight.session, "machines", lambda: machines)
    workers = preflight.demo_workers(batch_size)
    assert workers == expected
    assert preflight.worker_cpus(workers) >= placement.MIN_WORKER_CPU
    assert preflight.worker_gpus(workers) == float(machines[0].gpus > 0)
    preflight.batch_divides(batch_size, workers)


def test_a_recipe_for_gpus_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    base, machines = recipe.Recipe(), [Machine(4)]
    monkeypatch.setattr(preflight.session, "machines", lambda: machines)
    preflight.hardware(base)
    cuda = base.model_copy(update={"augment": base.augment.model_copy(update={"device": "cuda"})})
    sync = base.model_copy(update={"model": ModelConfig(norm="sync_batch")})
    for gpu_recipe, line in ((cuda, "set augment.device: cpu"), (sync, "set model.norm: group")):
        with pytest.raises(UserError, match=line):
            preflight.hardware(gpu_recipe)
    machines[0] = Machine(4, 1)
    for any_recipe in (base, cuda, sync):
        preflight.hardware(any_recipe)
    with pytest.raises(UserError, match=r"2 workers, but 1 GPUs; use --workers 1"):
        preflight.worker_gpus(2)
    assert preflight.worker_gpus((1, 8)) == 1.0, "an elastic run starts with the GPUs that are available"


@pytest.mark.parametrize("gpu", [False, True])
def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool) -> None:
    class LocalRay:
        """Ray that runs tasks in this process."""

        exceptions = preflight.ray.exceptions

        def remote(self, **_: object) -> object:
            return lambda function: type("Task", (), {"remote": staticmethod(function)})

        def get(self, value: object, timeout: float) -> object:
            return value

    monkeypatch.setattr(preflight, "ray", LocalRay())
    monkeypatch.setattr(preflight.session, "machines", lambda: [Machine(4, float(gpu))])
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    compiled = recipe.Recipe(loop=LoopConfig(compile=True))
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    preflight.hardware(compiled)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"loop\.compile needs a compiler and Python.s header files on each machine; install g"
    ):
        preflight.hardware(compiled)
    preflight.hardware(recipe.Recipe())


def test_every_number_of_workers_up_to_most_workers_fits() -> None:
    for cpus, gpus in itertools.product(range(1, 20), (0, 1, 8)):
        machines = [Machine(cpus, gpus)]
        most = placement.most_workers(machines)
        for workers in range(1, most + 1):
            assert placement.worker_cpus(workers, machines) > 0
        assert gpus or not placement.worker_cpus(most + 1, machines)


def test_the_demo_checks_before_it_draws_or_deletes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU that torch does not detect, a recipe for GPUs, a folder with other files: an earlier demo is kept."""
    out, file = tmp_path / "demo", tmp_path / "recipe.yaml"
    (out / "cells").mkdir(parents=True)
    (out / demo.MARK).touch()
    (out / "cells" / "a.tif").touch()
    monkeypatch.setattr(demo.session, "connect", lambda: None)
    monkeypatch.setattr(demo.writer, "write_dataset", lambda *_, **__: pytest.fail("the demo has drawn images"))
    machines = [Machine(4, 1)]
    monkeypatch.setattr(preflight.session, "machines", lambda: machines)

    def blind() -> None:
        raise UserError(preflight.blind_gpu("10.0.0.1"))

    monkeypatch.setattr(preflight, "gpus_work", blind)
    file.write_text("batch_size: 4\n")
    with pytest.raises(UserError, match=r"Ray has a GPU on 10\.0\.0\.1, but torch sees none; install"):
        demo.demo(out, str(file))
    machines[0] = Machine(4)
    file.write_text("model: {norm: sync_batch}\n")
    with pytest.raises(UserError, match="sync_batch"):
        demo.demo(out, str(file))
    assert (out / "cells" / "a.tif").exists()
    (out / demo.MARK).unlink()
    with pytest.raises(UserError, match="contains files not written by the demo"):
        demo.demo(out, str(file))
