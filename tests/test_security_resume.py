"""A sweep goes on in a folder in which Ray Tune's own pickles are a stranger's."""

from pathlib import Path

import pytest
from hostile import pickled
from quick_trial import quick_trial

from raylivecell import sweep, tuner
from raylivecell.order import PhaseConfig
from raylivecell.recipe import Recipe
from raylivecell.space import Dimension, SweepConfig
from raylivecell.training_config import LoopConfig, ModelConfig

RECIPE = Recipe(
    batch_size=4,
    crop=(32, 32),
    phases=(PhaseConfig(steps=4),),
    model=ModelConfig(features=(4,), norm="group"),
    loop=LoopConfig(report_steps=2),
)
CONFIG = SweepConfig(space={"optimizer.lr": Dimension(low=1e-4, high=1e-2, log=True)})


def test_tunes_pickles_are_not_opened(
    tiny_dataset: str, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "OneWorker", quick_trial())
    out, marker = tmp_path / "out", tmp_path / "ran"
    sweep.sweep(tiny_dataset, str(out), RECIPE, CONFIG, trials=1)
    there = [path for path in (out / "tune").rglob("*") if path.is_file()]
    assert {"tuner", "searcher-state"} <= {path.stem.partition("-2")[0] for path in there}
    missing = [out / "tune" / "trainable.pkl", *(path.parent / "params.pkl" for path in there)]
    for path in (*there, *missing):
        path.write_bytes(pickled(marker))
    study = sweep.sweep(tiny_dataset, str(out), RECIPE, CONFIG, trials=2, resume=True)
    assert [trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials] == [True, True]
    assert not marker.exists()
