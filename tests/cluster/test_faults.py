"""A run on four hosts, one of which is preempted; `make faults` injects nine more faults."""

import subprocess
import sys
from pathlib import Path

import hosts
import pytest


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_drained_node_loses_no_step() -> None:
    """faults.py checks that every report occurs once and that the scores equal those of the undisturbed run."""
    if reason := hosts.unsupported_reason():
        pytest.skip(reason)
    command = [sys.executable, str(Path(__file__).parents[1] / "faults.py"), "drain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| a node drained as a spot preemption |" in done.stdout
