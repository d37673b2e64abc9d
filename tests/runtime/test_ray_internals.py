"""Ray's private names: used only in ray_internals.py, valid in this release of Ray, and not required.

The guard tests are named after the entries of that file: if one fails after an upgrade of Ray, update its entry.
"""

import importlib
import inspect
import io
import logging
import re
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_python
from ray.train import BackendConfig

import raylivecell
from raylivecell.runtime import ray_internals
from raylivecell.runtime.ray_errors import as_user_errors

PACKAGE = Path(raylivecell.__file__).parent
PRIVATE = re.compile(
    r"ray\._private|ray\.[a-z.0-9]*_internal|ray\._common|ray\._raylet|ray\.autoscaler\._private|_global_node|\._ot_"
    r"|inspect\.unwrap|sys\.getrefcount|(study|trial|optuna|torch|ray|pa|pyarrow|np|executor|dataset)\._[a-z]"
)
ALLOWED = {"ray_internals.py"}


@pytest.fixture(autouse=True)
def warn_again() -> None:
    """Reset the warnings of other tests: each is logged once per process."""
    ray_internals._warn_missing.cache_clear()


@pytest.fixture
def other_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a release of Ray without the private names."""

    def missing(name: str) -> Any:
        raise ImportError(f"no module {name}")

    ray_internals._throttle.cache_clear()
    monkeypatch.setattr(ray_internals, "importlib", SimpleNamespace(import_module=missing))


def code_of(file: Path) -> str:
    """Code of the file without comments and strings, which may contain any name."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    ignored = (tokenize.COMMENT, tokenize.STRING, tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return "".join(f"{token.string} " if token.type not in ignored else "\n" for token in tokens).replace(" . ", ".")


def test_private_names_are_in_one_file() -> None:
    assert PRIVATE.search("x = study._storage\n")
    assert PRIVATE.search("from ray.data._internal import x\n")
    matches = {str(file): PRIVATE.search(code_of(file)) for file in PACKAGE.rglob("*.py") if file.name not in ALLOWED}
    assert {name: match[0] for name, match in matches.items() if match} == {}


def test_guard_scheduler_pace() -> None:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    state = ray_internals._executor_state()
    assert state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S > ray_internals.ROUND_WAITING_S
    assert f"timeout={ray_internals._Wait.NAME}" in inspect.getsource(state.process_completed_tasks), "read each round"
    assert "callback.on_execution_step(self)" in inspect.getsource(StreamingExecutor)
    assert "self._output_node = dag, self._topology[dag]" in inspect.getsource(StreamingExecutor)
    assert "output_queue" in inspect.getsource(state.OpState.__init__)
    assert issubclass(ray_internals._throttle(), ray_internals._callback_base())


def test_guard_data_parallel_trainer() -> None:
    done = run_python(
        "import sys; from raylivecell.runtime import ray_internals; cls = ray_internals.data_parallel_trainer()\n"
        "assert cls.__name__ == 'DataParallelTrainer', cls\n"
        "assert 'torch' not in sys.modules, 'it imports torch'\n"
        "from ray.train.torch import TorchTrainer; assert issubclass(TorchTrainer, cls)"
    )
    assert done.returncode == 0, done.stderr


def test_guard_progress_logger() -> None:
    package = importlib.import_module(ray_internals.PROGRESS_LOGGER)
    files = Path(package.__file__ or "").parent.glob("*.py")
    assert any("getLogger(__name__)" in file.read_text() for file in files)


def test_guard_execution_logger(caplog: pytest.LogCaptureFixture) -> None:
    source = inspect.getsource(importlib.import_module(ray_internals.EXECUTION_LOGGER))
    assert "getLogger(__name__)" in source
    logged, _, raised = source.partition("logger.error(error_message, exc_info=e)\n            raise e")
    assert logged
    assert raised, "the logged error is also raised"
    logger = logging.getLogger(ray_internals.EXECUTION_LOGGER)
    with as_user_errors():
        logger.error("twice")
        logger.warning("once")
    logger.error("again")
    assert [record.message for record in caplog.records] == ["once", "again"]


def test_the_scheduler_sleeps_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [100.0], []
    monkeypatch.setattr(ray_internals, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=pauses.append))
    throttle, ready = ray_internals.SchedulerThrottle(), SimpleNamespace(output_queue=["block"])
    waiting_s, ready_s = ray_internals.ROUND_WAITING_S, ray_internals.ROUND_READY_S
    for work, queue in ((0, ready), (0.2, ready), (0.2, SimpleNamespace(output_queue=[])), (3, ready)):
        now[0] += work * waiting_s
        throttle.on_execution_step(SimpleNamespace(_output_node=(None, queue)))
    expected = [0, ready_s - 0.2 * waiting_s, 0.8 * waiting_s, max(0, ready_s - 3 * waiting_s)]
    assert pauses == pytest.approx(expected, abs=1e-6)


def test_two_concurrent_streams_restore_rays_wait() -> None:
    state = ray_internals._executor_state()
    before = state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S
    first, second = ray_internals.scheduler_pace(), ray_internals.scheduler_pace()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S == ray_internals.ROUND_WAITING_S
    second.__exit__(None, None, None)
    assert before == state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S


def test_without_the_private_names_ray_works_and_a_warning_is_logged_once(
    other_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.train.torch import TorchTrainer

    with caplog.at_level(logging.WARNING, ray_internals.__name__):
        for _ in range(2):
            with ray_internals.scheduler_pace() as callbacks:
                assert callbacks == []
            trainer = ray_internals.data_parallel_trainer()(lambda: None, backend_config=BackendConfig())
            assert isinstance(trainer, TorchTrainer)
        for _ in range(2):
            ray_internals.SchedulerThrottle().on_execution_step(SimpleNamespace())
    entries = [message.split(" does not work")[0] for message in caplog.messages]
    assert entries == [
        "raylivecell.runtime.ray_internals.scheduler_pace",
        "raylivecell.runtime.ray_internals.data_parallel_trainer",
        "raylivecell.runtime.ray_internals.scheduler_pace",
    ], "one warning per consequence"
