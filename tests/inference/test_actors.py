"""Pools of actors for batch inference."""

import pytest
import ray.data

from raylivecell.inference import actors


def doubler() -> type:
    """Return an actor that doubles its items; local, so that Ray sends it by value: workers cannot import tests."""

    class Doubler:
        def __call__(self, batch: dict) -> dict:
            return {"item": batch["item"], "double": batch["item"] * 2}

    return Doubler


def test_each_item_has_its_row(ray_cluster: None) -> None:
    rows = actors.run(doubler(), {}, list(range(20)), "double")
    assert [(row["item"], row["double"]) for row in rows] == [(item, 2 * item) for item in range(20)]


@pytest.mark.parametrize("gpus", [0.0, 0.5, 1.0])
def test_ray_accepts_a_pool_with_and_without_gpus(ray_cluster: None, gpus: float) -> None:
    # Built, not read: this machine may have no GPU. Ray refused pools with GPUs while batch_size was None.
    assert isinstance(actors._results(doubler(), {}, [1, 2, 3], (2, 0.5, gpus)), ray.data.Dataset)
