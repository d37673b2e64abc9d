"""Curves of wells: means over crops and sites, spreads, plates, replicates, and reasons about images."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.growth.curves import Collector, Curves, ImageCount, Point, Value
from raylivecell.growth.names import NamePattern, Position


def curves_of(images: dict[str, ImageCount], pattern: NamePattern | None = None) -> Curves:
    collector = Collector()
    for file, image in images.items():
        position = (pattern or NamePattern()).parse(file)
        assert position is not None, file
        collector.add(position, image)
    return collector.curves()


def count(cells: int, **values: object) -> ImageCount:
    return ImageCount(cells, cells / 1000, **values)


def name(well: str, hours: int, site: int = 1, crop: int = 1, kind: str = "A172", folder: str = "") -> str:
    return f"{folder}{kind}_Phase_{well}_{site}_{hours // 24:02d}d{hours % 24:02d}h00m_{crop}.tif"


def test_a_site_has_the_same_weight_with_any_number_of_crops() -> None:
    images = {
        name("A1", 0, 1, 1): count(10, area=100.0),
        name("A1", 0, 1, 2): count(30, area=None),
        name("A1", 0, 2, 1): count(50, area=200.0, has_warning=True),
        name("A1", 0, 2, 2): ImageCount(None),
    }
    (point,) = curves_of(images).wells[0].points
    assert point[:5] == (0, 3, 2, 1, 1)
    assert point.cells == Value(35, statistics.stdev([20, 50]))
    assert point.confluence.mean == pytest.approx(0.035)
    assert point.area == Value(150, statistics.stdev([100, 200]))


def test_times_without_a_readable_image_are_kept_without_values() -> None:
    wells = curves_of({name("A1", 0): ImageCount(None), name("A1", 4): count(5)}).wells
    assert wells[0].points[0] == Point(0, 0, 0, 1, 0, None, None, None)
    assert wells[0].fits["cells"].times == 1


def test_wells_of_one_name_belong_to_different_plates() -> None:
    images = {
        name("A1", h, folder=folder, kind=kind): count(9) for h in (0, 4) for folder, kind in [("x/", "A"), ("y/", "A")]
    }
    wells = curves_of(images).wells
    assert [(well.plate, well.condition, well.well) for well in wells] == [("x", "A", "A1"), ("y", "A", "A1")]
    images |= {name("A1", 0, kind="B", folder="y/"): count(9), name("A2", 0, kind="C", folder="y/"): count(9)}
    plates = [(well.plate, well.well) for well in curves_of(images).wells]
    assert plates == [("x", "A1"), ("y A", "A1"), ("y B", "A1"), ("y C", "A2")]  # two conditions cannot share a well


def test_dates_count_from_the_first_image_of_the_plate() -> None:
    images = {f"VID{plate}_A{well}_1_2020y02m{day}d_12h30m.tif": count(9) for plate in (1, 2) for well in (1, 2)
              for day in range(27 + plate - 1, 30) if (well, day) != (2, 27)}  # fmt: skip
    wells = {(well.plate, well.well): [point.hours for point in well.points] for well in curves_of(images).wells}
    assert wells == {("VID1", "A1"): [0, 24, 48], ("VID1", "A2"): [24, 48]} | {
        ("VID2", f"A{n}"): [0, 24] for n in (1, 2)
    }
    assert curves_of(images).replicates == []  # a vessel is no condition


def test_replicates_are_the_wells_of_a_condition_on_a_plate() -> None:
    images = {
        name(well, h, folder=f): count(10 * n + h)
        for f in ("x/", "y/")
        for n, well in enumerate(("B2", "A10"), 1)
        for h in (0, 4)
    }
    first, second = curves_of(images).replicates
    assert (first.plate, first.condition, first.well, first.wells) == ("x", "A172", "", ("A10", "B2"))
    assert second.plate == "y"
    assert first.points[1].cells == Value(19, statistics.stdev([14, 24]))
    assert (first.points[1].images, first.points[1].parts) == (2, 2)


def test_images_that_make_a_fit_doubtful() -> None:
    full = {name("A1", 6 * h, site): count(10 * 2**h) for h in range(6) for site in (1, 2)}
    fit = curves_of(full).wells[0].fits["cells"]
    assert fit.reasons == ()
    assert fit.doubling == pytest.approx(6)
    missing = {file: image for number, (file, image) in enumerate(full.items()) if number not in (3, 6)}
    assert curves_of(missing).wells[0].fits["cells"].reasons == ("2 of 12 images are missing or could not be read",)
    failed = full | {file: ImageCount(None) for file in list(full)[4:6]}
    assert curves_of(failed).wells[0].fits["cells"].reasons == ("2 of 12 images are missing or could not be read",)
    warned = full | {file: full[file]._replace(has_warning=True) for file in list(full)[4:6]}
    assert "2 of 12 images have a warning" in curves_of(warned).wells[0].fits["cells"].reasons[0]
    smaller = {
        file: image._replace(area=100.0 + 250 * (number > 5)) for number, (file, image) in enumerate(full.items())
    }
    fits = curves_of(smaller).wells[0].fits
    assert fits["cells"].reasons == (
        "the median cell area varies between 100 and 350 pixels: the segmentation may be wrong",
    )
    assert fits["confluence"].reasons == ()
    late = {**smaller, **{file: image._replace(confluence=0.9) for file, image in smaller.items() if image.area == 350}}
    assert not any("area" in reason for reason in curves_of(late).wells[0].fits["cells"].reasons)  # after the window
    resized = full | {file: full[file]._replace(size=(9, 9)) for file in list(full)[4:5]}
    assert curves_of(resized).wells[0].fits["cells"].reasons == ("the images have different sizes",)


def test_images_without_a_site_are_different_sites() -> None:
    pattern = NamePattern(r"(?P<well>[A-H]\d)-(?P<hours>\d+)")
    (point,) = curves_of({f"A1-0-{i}.tif": count(i) for i in range(3)}, pattern).wells[0].points
    assert point.parts == 3
    collector = Collector()
    for _ in range(2):
        collector.add(Position("", "", "A1", None, "", 0, False), count(1))
        collector.add(Position("", "", "A1", "1", "", 0, False), count(1))
    assert collector.duplicates == 1


@given(st.permutations([name(w, h, s) for w in ("A1", "B1") for h in (0, 12, 24, 36, 48) for s in (1, 2)]))
def test_curves_do_not_depend_on_the_order_of_wells_and_times(files: list[str]) -> None:
    ordered = {file: count(sum(map(ord, file)) % 97 + 5) for file in sorted(files)}
    assert curves_of({file: ordered[file] for file in files}) == curves_of(ordered)
