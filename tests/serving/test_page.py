"""The page in Chromium: drop, look, thresholds, corrections, reference, growth, downloads, token. No Ray."""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hosts import wait_until
from in_process import Service
from page_driver import DISKS, Page, disks, image, maps_of_disks, opened, png, served
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from raylivecell.data import pairing
from raylivecell.inference.image_file import label_tiff

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def page(browser: Any, random_checkpoint: str, tmp_path: Path) -> Iterator[Page]:
    with opened(browser, random_checkpoint, tmp_path) as connected:
        yield connected


def downloaded(folder: Path, name: str) -> zipfile.ZipFile:
    path = folder / name
    wait_until(name, path.exists, 30)
    return zipfile.ZipFile(io.BytesIO(path.read_bytes()))


def test_dropped_images_and_their_thresholds(page: Page) -> None:
    truth = disks(DISKS)
    page.drop({"a.png": png(image(truth)), "b.png": png(image(disks(DISKS[:2]))), "notes.png": b"no image"})
    page.wait_for_cells(len(DISKS))
    page.wait("three rows", "document.querySelectorAll('#rows tr').length === 3")
    page.wait("an error", "document.getElementById('rows').innerText.includes('unsupported')")
    # Numbers of a cell under the pointer.
    ActionChains(page.browser).move_to_element_with_offset(page.find("canvas"), *page.at(100, 75)).perform()
    assert f"{(truth == 4).sum()} px" in page.find("tip").text
    # Enlarged by 1.5 around the centre, the cell is farther from it.
    page.find("zoom-in").click()
    offset = [round(1.5 * distance) for distance in page.at(100, 75)]
    ActionChains(page.browser).move_to_element_with_offset(page.find("canvas"), *offset).click().perform()
    assert f"{(truth == 4).sum()} px" in page.find("status").text
    page.find("zoom-fit").click()
    # Another threshold needs no network; the small cell is the only one below 200 pixels.
    images = page.service.images
    move_slider(page, "min_area", 200)
    page.wait_for_cells(len(DISKS) - 1)
    page.find("reset").click()
    page.wait_for_cells(len(DISKS))
    assert page.service.images == images


def correct_cells(page: Page) -> None:
    """Delete a cell, split one, cut one, draw one, undo, redo, and merge the halves of the cut one."""
    page.click(130, 25)
    page.find("delete").click()
    page.wait_for_cells(4)
    page.click(30, 30)
    page.click(70, 30, shift=True)
    page.find("merge").click()
    assert "more than 8 pixels apart" in page.find("status").text
    page.click(100, 75)
    page.find("split").click()
    page.wait_for_cells(5)
    page.find("mode-cut").click()
    page.drag((30, 10), (30, 50))
    page.wait_for_cells(6)
    page.find("mode-draw").click()
    page.drag((125, 40), (145, 40), (145, 60), (125, 60))
    page.wait_for_cells(7)
    page.press("d", Keys.ESCAPE)
    page.press(Keys.CONTROL + "z")
    page.wait_for_cells(6)
    page.press(Keys.CONTROL + "y")
    page.wait_for_cells(7)
    page.press("n")  # the left half of the cut disk, the first cell in the order of rows
    page.click(36, 30, shift=True)
    page.press("m")
    page.wait_for_cells(6)


def test_corrections_and_downloads(page: Page, tmp_path: Path) -> None:
    truth = disks(DISKS)
    page.drop({"a.png": png(image(truth)), "b.png": png(image(disks(DISKS[:2]))), "notes.png": b"no image"})
    page.wait_for_cells(len(DISKS))
    correct_cells(page)
    assert not page.find("threshold").is_enabled()  # other thresholds would discard the corrections
    # Everything, as predict writes it.
    page.find("download").click()
    with downloaded(tmp_path, "raylivecell.zip") as everything:
        names = set(everything.namelist())
        expected = {f"{kind}/{name}" for name in "ab" for kind in ("labels", "overlays", "rois", "geojson")}
        assert {name.rpartition(".")[0] for name in names} == expected | {"cells", "images", "model"}
        assert everything.testzip() is None
        assert everything.read("labels/b.tif") == label_tiff(disks(DISKS[:2]))
        rows = list(csv.DictReader(everything.read("images.csv").decode().splitlines()))
        cells = list(csv.DictReader(everything.read("cells.csv").decode().splitlines()))
    results = [(row["file"], row["cells"], row["corrected"]) for row in rows[:2]]
    assert results == [("a.png", "6", "yes"), ("b.png", "2", "no")]
    assert "unsupported" in rows[2]["error"]
    assert sum(cell["file"] == "a.png" for cell in cells) == 6
    # The corrections, as prepare reads them.
    page.find("download-corrections").click()
    with downloaded(tmp_path, "corrections.zip") as corrections:
        assert corrections.read("images/a.png") == png(image(truth))
        labels = tifffile.imread(io.BytesIO(corrections.read("masks/a.tif")))
        pairs = pairing.find_pairs(corrections.namelist(), "labels").pairs
    assert [(pair.image, pair.annotations) for pair in pairs] == [("images/a.png", ("masks/a.tif",))]
    assert len(np.unique(labels)) == 7
    assert len(np.unique(labels[truth == 1])) == 1  # cut and merged again
    assert len(np.unique(labels[truth == 4])) == 2
    halves = np.unique(labels[truth == 4], return_counts=True)[1]
    assert max(halves) < 1.2 * min(halves)
    assert not labels[truth == 5].any()
    assert (labels[42:58, 127:143] != 0).all()


def test_a_reference_is_compared_and_its_scores_follow_corrections(page: Page) -> None:
    page.drop({"a.png": png(image(disks(DISKS))), "a_masks.png": png(disks(DISKS).astype(np.uint8))})
    page.wait("scores", "document.getElementById('reference-text').textContent.includes('mSA 1.000')")
    page.find("canvas").click()
    page.press("n", Keys.DELETE)
    page.wait("other scores", "document.getElementById('reference-text').textContent.includes('mSA 0.800')")
    assert "4 cells, 5 in the reference" in page.find("reference-text").text


def test_growth_curves_of_named_images_and_planes(page: Page, tmp_path: Path) -> None:
    files = {f"A172_Phase_A7_1_0{day}d00h00m_1.png": png(image(disks(DISKS[: day + 1]))) for day in range(4)}
    page.drop(files)
    page.wait("curves", "document.querySelectorAll('#curves svg').length === 3")
    assert "well A7" in page.find("curves").text
    page.find("download").click()
    with downloaded(tmp_path, "raylivecell.zip") as everything:
        assert b"Growth of 1 well" in everything.read("growth.html")
    stack = io.BytesIO()
    planes = np.stack([image(disks(DISKS[:count])) for count in (1, 3)])
    tifffile.imwrite(stack, planes, imagej=True, metadata={"axes": "TYX"})
    page.drop({"stack.tif": stack.getvalue()})
    page.wait("planes", "document.getElementById('rows').innerText.includes('stack.tif#t1')")
    rows = page.find("rows").text.splitlines()
    assert [row.split()[1] for row in rows if row.startswith("stack")] == ["1", "3"]


def test_the_page_asks_for_the_token(browser: Any, random_checkpoint: str, tmp_path: Path) -> None:
    with served(browser, Service(random_checkpoint, maps_of_disks, token=TOKEN), tmp_path) as page:
        page.wait("a form", "!document.getElementById('token-form').hidden")
        page.drop({"a.png": png(image(disks(DISKS))), "b.png": png(image(disks(DISKS[:2])))})
        page.find("token").send_keys("wrong", Keys.ENTER)
        page.wait("a message", "document.getElementById('message').innerText.includes('not the token')")
        page.find("token").clear()
        page.find("token").send_keys(TOKEN, Keys.ENTER)
        page.wait_for_cells(len(DISKS))
        page.wait("both images", "document.querySelectorAll('#rows tr').length === 2")
        assert not page.find("token-form").is_displayed()
        browser.execute_script("sessionStorage.clear()")


def move_slider(page: Page, name: str, value: float) -> None:
    page.browser.execute_script(
        "const [name, value] = arguments, slider = document.getElementById(name);"
        "slider.value = value; slider.oninput({target: slider})",
        name,
        value,
    )


def test_a_correction_outlives_an_answer_to_an_earlier_request(page: Page) -> None:
    page.drop({"a.png": png(image(disks(DISKS))), "b.png": png(image(disks(DISKS)))})
    page.wait_for_cells(len(DISKS))
    page.wait("both images", "!document.getElementById('download').disabled")
    page.service.gate.clear()
    move_slider(page, "min_area", 200)
    page.wait("an outdated row", "document.getElementById('rows').innerText.includes('thresholds changed')")
    assert not page.find("download").is_enabled()  # it would mix cells of two thresholds
    page.click(30, 30)
    page.find("delete").click()
    page.wait_for_cells(len(DISKS) - 1)
    page.service.gate.set()
    page.wait("the other image", "!document.getElementById('download').disabled")
    counts = [row.split()[1] for row in page.find("rows").text.splitlines()]
    assert counts == [str(len(DISKS) - 1)] * 2  # without the deleted cell; without the small one
    assert page.find("undo").is_enabled()


def test_a_folder_with_labels_and_its_corrections(page: Page, tmp_path: Path) -> None:
    for folder in ("images", "masks", "test/images"):
        (tmp_path / "plate" / folder).mkdir(parents=True)
        (tmp_path / "plate" / folder / "a.png").write_bytes(png(disks(DISKS).astype(np.uint8)))
    for folder in ("images", "test/images"):
        (tmp_path / "plate" / folder / "a.png").write_bytes(png(image(disks(DISKS))))
    page.find("folder").send_keys(str(tmp_path / "plate"))
    page.wait("scores", "document.getElementById('reference-text').textContent.includes('mSA 1.000')")
    page.wait("both images", "!document.getElementById('download').disabled")
    page.browser.execute_script("for (const box of document.querySelectorAll('#rows input')) box.click()")
    page.find("download-corrections").click()
    with downloaded(tmp_path, "corrections.zip") as corrections:
        pairs = pairing.find_pairs(corrections.namelist(), "labels")
    assert len(pairs.pairs) == 2
    assert (pairs.images, pairs.annotations, pairs.ambiguous) == ([], [], [])
    page.browser.execute_script(
        "for (const button of document.querySelectorAll('[aria-label^=remove]')) button.click()"
    )
    page.wait("the start", "!document.getElementById('start').hidden")


def test_a_selection_and_a_line_end_with_what_they_belong_to(page: Page) -> None:
    page.drop({"a.png": png(image(disks(DISKS)))})
    page.wait_for_cells(len(DISKS))
    page.click(130, 25)
    assert page.find("delete").is_enabled()
    move_slider(page, "min_area", 200)
    page.wait_for_cells(len(DISKS) - 1)
    assert not page.find("delete").is_enabled()  # its label is that of another cell now
    page.press("x")
    canvas = page.find("canvas")
    ActionChains(page.browser).move_to_element_with_offset(canvas, *page.at(30, 10)).click_and_hold().perform()
    ActionChains(page.browser).move_to_element_with_offset(canvas, *page.at(30, 50)).perform()
    page.press(Keys.ESCAPE)
    ActionChains(page.browser).release().perform()
    assert page.find("count").text == str(len(DISKS) - 1)
    assert not page.find("undo").is_enabled()


def test_a_damaged_plane_and_another_channel(page: Page) -> None:
    stack = io.BytesIO()
    with tifffile.TiffWriter(stack) as writer:
        for count in (1, 2, 3):
            writer.write(image(disks(DISKS[:count])), compression="zlib", rowsperstrip=100)
    data = bytearray(stack.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        for plane in (0, 2):
            data[tiff.pages[plane].dataoffsets[0]] ^= 0xFF
    page.drop({"planes.tif": bytes(data)})
    page.wait("an intact plane", "!document.getElementById('download').disabled")
    rows = page.find("rows").text.splitlines()
    assert [("damaged" in row) or row.split()[1] for row in rows] == [True, "2", True]
    channels = io.BytesIO()
    pixels = np.stack([image(disks(DISKS[:count])) for count in (3, 4)])
    tifffile.imwrite(channels, pixels, imagej=True, metadata={"axes": "CYX"})
    page.drop({"channels.tif": channels.getvalue()})
    counts = "[...document.querySelectorAll('#rows tr')].filter(r => r.innerText.startsWith('channels'))"
    for channel, count in ((0, 3), (1, 4)):
        page.browser.execute_script(
            "const field = document.getElementById('channel');"
            "field.value = arguments[0]; field.onchange({target: field})",
            channel,
        )
        page.wait(f"channel {channel}", f"{counts}.some(r => r.children[1].innerText === '{count}')")
