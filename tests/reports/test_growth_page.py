"""growth.html: well-formed, self-contained, and laid out as the plate."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.growth.curves import Collector, ImageCount
from raylivecell.growth.fit import Fit
from raylivecell.growth.names import Position
from raylivecell.reports import growth_charts, growth_page


class Page(HTMLParser):
    """Counts tags, collects attributes and text, and checks that tags are closed in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(data.decode())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def with_class(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.tags)


def collected(wells: dict[str, float], condition: str = "A<b>", times: int = 8) -> Collector:
    """Wells with their doubling times in hours, imaged every 8 hours."""
    collector = Collector()
    for number, (well, doubling) in enumerate(wells.items()):
        for step in range(times):
            cells = round((50 + number) * 2 ** (8 * step / doubling))
            position = Position("p & q", condition, well, "1", "", 8.0 * step, False)
            collector.add(position, ImageCount(cells, min(cells / 3000, 1), 250.0))
    return collector


def test_the_page_shows_the_plate_the_fits_and_the_reasons() -> None:
    wells = {"A1": 24, "A2": 25, "H12": 26, "B3": 1e9}
    data = growth_page.render(collected(wells).curves(), ["3 images <left out>"])
    page = Page(data)
    assert b"http" not in data
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert page.with_class("empty") == 3 * (96 - 4)
    assert page.with_class("panel") == 3 * 96
    for text in (
        "p & q",
        "A<b>",
        "3 images <left out>",
        "Growth of 4 wells",
        "96 wells",
        "the interval includes zero growth",
    ):
        assert text in page.text
    assert "4 wells: A1 A2 B3 H12" in page.text
    assert "! > " in page.text
    assert data == growth_page.render(collected(wells).curves(), ["3 images <left out>"])


def test_wells_without_a_condition_have_their_own_charts() -> None:
    data = growth_page.render(collected({f"well {n}": 20 + n for n in range(30)}, "").curves(), [])
    page = Page(data)
    assert "6 more curves" in page.text
    assert page.with_class("empty") == 0  # these names are no places on a plate
    assert "well 29" in page.text


@pytest.mark.parametrize("cells", [0, 1, 7])
def test_curves_without_growth_or_with_one_time_can_be_drawn(cells: int) -> None:
    collector = Collector()
    collector.add(Position("", "", "A1", "1", "", 3.0, False), ImageCount(cells, 0.0))
    collector.add(Position("", "", "A2", "1", "", 3.0, False), ImageCount(None))
    assert "no fit" in Page(growth_page.render(collector.curves(), [])).text


def test_the_smallest_plate_that_is_half_full_else_96_wells() -> None:
    six = ["A1", "A2", "B3"]
    assert growth_page.plate_format(six) == (2, 3)
    assert growth_page.plate_format(["A3", "B3", "C3", "D3"]) == (8, 12)
    assert growth_page.plate_format(["H12"]) == (8, 12)
    assert growth_page.plate_format(["A1", "P24"]) == (16, 24)
    assert growth_page.plate_format(["AF48"]) == (32, 48)
    assert growth_page.plate_format(["AG1"]) is growth_page.plate_format(["left", "A1"]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.sampled_from(["cells", "confluence", "area"]))
def test_axes_contain_every_value_and_have_ticks(values: list[float], measure: str) -> None:
    collector = Collector()
    for hours, value in enumerate(values):
        position = Position("", "", "A1", "1", "", float(hours), False)
        collector.add(position, ImageCount(round(value), min(value, 1), value))
    curves = collector.curves().wells
    x, y = growth_charts.hours_axis(curves), growth_charts.value_axis(curves, measure)
    box = growth_page.LARGE
    chart = growth_charts.chart(curves[0], measure, x, y, box)
    shown = [value for value in values if not y.is_log or round(value) > 0]
    assert len(chart.points) == len(shown)
    assert 1 <= len(y.ticks) <= 20
    assert all(y.low <= tick <= y.high * (1 + 1e-9) for tick in y.ticks)
    assert all(box.left <= p.x <= box.right and box.top <= p.y <= box.bottom for p in chart.points)
    assert len({p.x for p in chart.points}) == len(chart.points)


@pytest.mark.parametrize(
    ("fit", "text"),
    [
        (Fit(0, None, None), "no fit"),
        (Fit(5, 0, 9, 0.0289, 0.027, 0.031), "24 h (22.4 to 25.7)"),
        (Fit(5, 0, 9, 0.01, -0.01, 0.03), "> 23.1 h"),
        (Fit(5, 0, 9, -0.01, -0.02, 0.03), "> 23.1 h"),
        (Fit(5, 0, 9, -0.01, -0.02, -0.005), "decreasing"),
        (Fit(5, 0, 9, 0.0289), "24 h"),
        (Fit(5, 0, 9, -0.01), "no growth"),
    ],
)
def test_doubling_times_in_words(fit: Fit, text: str) -> None:
    assert growth_page.doubling_text(fit) == text
