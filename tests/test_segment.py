"""Networks on images of any size, flipped and not; and how many actors do that."""

import numpy as np
import pytest
import torch

from raylivecell import checkpoint, segment, segmenter
from raylivecell.model import build_model
from raylivecell.recipe import Recipe
from raylivecell.run_state import State
from raylivecell.training_config import ModelConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(3)
    recipe = Recipe(model=ModelConfig(features=(4, 8)), targets="distance")
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    checkpoint.save(folder, build_model(recipe.model, recipe.outputs), {}, State(), recipe)
    return folder


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 2), (33, 57)])
def test_any_size_goes_through(saved: str, shape: tuple[int, int]) -> None:
    network, _ = segment.load(saved, torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for flips in (False, True):
        found = segment.maps(network, image, flips)
        assert found.shape == (3, *shape)
        assert found.dtype == np.float32
        assert ((found >= 0) & (found <= 1)).all()
        cells = segmenter.load(saved, flips).segment(image)
        assert cells.labels.shape == cells.foreground.shape == shape
        assert cells.labels.max() == len(cells.scores)
        np.testing.assert_array_equal(cells.foreground, found[0] > 0.5)


def test_flips_make_the_answer_follow_the_image(saved: str) -> None:
    network, _ = segment.load(saved, torch.device("cpu"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 48, 64), np.uint8))
    plain, averaged = segment.logits(network, images), segment.logits(network, images, flips=True)
    assert not torch.allclose(plain, averaged)
    for axes in segment.FLIPS:
        turned = segment.logits(network, images.flip(axes), flips=True).flip(tuple(a + 1 for a in axes))
        torch.testing.assert_close(turned, averaged, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4), np.int16), np.zeros((3, 4))])
def test_only_grey_images_are_segmented(saved: str, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give a grey image"):
        segmenter.load(saved).segment(wrong)
