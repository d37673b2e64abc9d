"""Runs, measurements, colours and corrections of label images in JavaScript, compared with numpy's."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from page_driver import opened

from raylivecell.cells import measure
from raylivecell.serving.answers import runs

PROPERTIES = """
const done = arguments[arguments.length - 1], [width, height, values] = arguments;
import("/page/labels.js").then((labels) => {
  const fresh = () => ({width, height, data: Int32Array.from(values)});
  const image = fresh(), runs = labels.toRuns(image), cells = [...labels.measure(image).entries()];
  const colours = [...labels.colourNumbers(image, 6).entries()];
  const changes = [["remove", [1]], ["merge", [1, 2]], ["halve", 1]].map(([name, chosen]) => {
    const target = fresh();
    let change;
    try { change = labels[name](target, chosen, 100); } catch (error) { return [name, error.message]; }
    labels.apply(target, change);
    const after = [...target.data];
    labels.apply(target, change, true);
    return [name, after, [...target.data]];
  });
  done({runs, back: [...labels.fromRuns(width, height, runs).data], cells, colours, changes});
}).catch((error) => done({error: String(error)}));
"""


def random_labels(rng: np.random.Generator) -> NDArray[np.int32]:
    """Cells around random centres, with holes and diagonal parts where random pixels are background."""
    centres = rng.integers(0, 40, (int(rng.integers(3, 9)), 2))
    grid = np.stack(np.mgrid[:40, :40], axis=-1)[:, :, None]
    distance = np.linalg.norm(grid - centres, axis=-1)
    cell = (distance.min(axis=-1) < rng.integers(4, 20)) & (rng.random((40, 40)) > 0.05)
    return np.where(cell, distance.argmin(axis=-1) + 1, 0).astype(np.int32)


def test_labels_in_javascript_agree_with_numpy(browser: Any, random_checkpoint: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with opened(browser, random_checkpoint, tmp_path) as page:
        for _ in range(20):
            labels = random_labels(rng)
            result = page.browser.execute_async_script(PROPERTIES, 40, 40, labels.ravel().tolist())
            assert "error" not in result, result
            check_descriptions(labels, result)
            for name, after, *before in result["changes"]:
                check_change(labels, name, after, before)


def check_descriptions(labels: NDArray[np.int32], result: dict[str, Any]) -> None:
    assert result["runs"] == runs(labels).tolist()
    assert result["back"] == labels.ravel().tolist()
    measured = measure.measure(labels, np.zeros(labels.shape, np.uint8))
    cells = sorted(result["cells"])
    assert [label for label, _ in cells] == measured.label.tolist()
    assert [cell["area"] for _, cell in cells] == measured.area_px.tolist()
    np.testing.assert_allclose([cell["x"] for _, cell in cells], measured.centroid_x)
    assert [cell["border"] for _, cell in cells] == measured.touches_border.tolist()
    colours = dict(result["colours"])
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])):
        touching = {(int(p), int(q)) for p, q in zip(a.ravel(), b.ravel()) if p != q and p and q}
        assert all(colours[p] != colours[q] for p, q in touching)


def check_change(labels: NDArray[np.int32], name: str, after: Any, before: list[Any]) -> None:
    """`after`: pixels, or the reason of a refusal; `before`: pixels after undoing it."""
    if not before:
        assert "more than 8 pixels apart" in after or "too small, or too bent" in after
        return
    changed = np.array(after).reshape(labels.shape)
    assert before[0] == labels.ravel().tolist()
    others = labels > 2
    np.testing.assert_array_equal(changed[others], labels[others])
    if name == "remove":
        assert not (changed == 1).any()
    elif name == "merge":
        assert (changed[np.isin(labels, [1, 2])] == 100).all()
        assert cv2.connectedComponents((changed == 100).astype(np.uint8), connectivity=8)[0] == 2
    else:
        assert set(np.unique(changed[labels == 1])) >= {100, 101}
        assert (changed[labels == 1] != 0).all()
