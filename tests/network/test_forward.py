"""Networks on images of any size, with and without test-time augmentation, and on images with padding."""

import itertools
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from raylivecell.images.intensity import Frame
from raylivecell.inference import segmenter
from raylivecell.ingest.blocks import ValidationSample
from raylivecell.network import averaging, forward
from raylivecell.network.unet import build_model
from raylivecell.recipe import ModelConfig, Recipe
from raylivecell.runs import checkpoint
from raylivecell.runs.progress import Progress
from raylivecell.scoring import instance_scores
from raylivecell.training.ranks import RankContext
from raylivecell.training.validation import Validation


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(3)
    recipe = Recipe(model=ModelConfig(features=(4, 8)), targets="distance")
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    checkpoint.save(folder, build_model(recipe.model, recipe.outputs), {}, Progress(), recipe)
    return folder


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 2), (33, 57)])
def test_images_of_any_size(saved: str, shape: tuple[int, int]) -> None:
    network, _ = checkpoint.load_network(saved, torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for tta in (False, True):
        maps = forward.maps(network, image, tta)
        assert maps.shape == (3, *shape)
        assert maps.dtype == np.float32
        assert ((maps >= 0) & (maps <= 1)).all()
        cells = segmenter.load(saved, tta).segment(image)
        assert cells.labels.shape == cells.foreground.shape == shape
        assert cells.labels.max() == len(cells.scores)
        np.testing.assert_array_equal(cells.foreground, maps[0] > 0.5)


def test_averaged_maps_have_all_flips_and_turns_and_any_scale(saved: str) -> None:
    network, _ = checkpoint.load_network(saved, torch.device("cpu"))
    small, image = (np.random.default_rng(0).integers(0, 256, shape, np.uint8) for shape in ((48, 63), (96, 130)))
    symmetries = list(itertools.product(range(4), (False, True)))
    assert sorted(version[1:] for version in averaging.VERSIONS) == symmetries

    expected = np.zeros((3, *small.shape), np.float32)  # below 64 pixels nothing is scaled
    for turns, mirrored in symmetries:
        seen = np.rot90(small[:, ::-1] if mirrored else small, turns)
        maps = np.rot90(forward.maps(network, seen), -turns, (1, 2))
        expected += (maps[..., ::-1] if mirrored else maps) / 8
    np.testing.assert_allclose(forward.maps(network, small, tta=True), expected, atol=1e-6)

    sizes: list[tuple[int, ...]] = []

    def the_image(seen: np.ndarray) -> np.ndarray:
        sizes.append(seen.shape)
        return seen[None].astype(np.float32) / 255

    blurred = cv2.GaussianBlur(image, (0, 0), 6)
    maps = averaging.averaged(the_image)(blurred)
    assert np.abs(maps[0] - blurred / 255.0).max() < 0.02  # every version is brought back to its place
    assert (77, 104) in sizes
    assert (162, 120) in sizes


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((3, 4, 5), np.uint8), np.full((3, 4), -1, np.int16), np.full((3, 4), 1.5), np.zeros((3, 4), np.bool_)],
)
def test_only_grey_images_are_segmented(saved: str, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"give a grey image|convert all images of the series"):
        segmenter.load(saved).segment(wrong)


@pytest.mark.parametrize("kind", ["none", "strip", "corner"])
def test_padding_is_neither_given_to_the_network_nor_scored(saved: str, kind: str) -> None:
    """The same in validation, `--calibrate`, the run report, `evaluate` and `predict`."""
    network, recipe = checkpoint.load_network(saved, torch.device("cpu"))
    rng = np.random.default_rng(1)
    unpadded = rng.integers(90, 170, (40, 56), np.uint8)
    image, labels = np.full((64, 56), 128, np.uint8), np.zeros((64, 56), np.uint16)
    image[:40], labels[3:30, 5:45] = unpadded, 1
    padding = np.zeros(image.shape, bool)
    padding[40:] = True
    if kind == "corner":
        padding[:8, :8], labels[:8, :8] = True, 0
    if kind == "none":
        image, labels, padding = unpadded, labels[:40], padding[:40]
    frame = Frame(image, padding if padding.any() else None)
    maps = forward.maps_of_frame(network, frame)
    assert not maps[:, padding].any()
    if kind != "corner":
        np.testing.assert_array_equal(maps[:, :40], forward.maps(network, unpadded))
    assert not forward.maps_of_frame(network, frame._replace(usable=False)).any()
    assert_scored_as_segmented(network, recipe, saved, frame, labels)


def assert_scored_as_segmented(
    network: torch.nn.Module, recipe: Recipe, saved: str, frame: Frame, labels: np.ndarray
) -> None:
    """A worker's validation scores the same cells that `Segmenter` returns."""
    sample = ValidationSample(frame.levels, labels, frame.padding)
    samples = SimpleNamespace(val=[None], val_sample=lambda number: sample)
    context = RankContext(0, 1, torch.device("cpu"), 1)
    scores = Validation(samples, context, recipe.targets).scores(network)  # type: ignore[arg-type]
    cells = segmenter.load(saved).segment_frame(frame)
    predicted, truth = cells.foreground, labels != 0
    assert scores["val_dice"] == pytest.approx(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    msa = instance_scores.segmentation_accuracy(instance_scores.overlaps(cells.labels, labels)).mean()
    assert scores["val_msa"] == pytest.approx(msa)
