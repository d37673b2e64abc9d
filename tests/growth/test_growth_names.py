"""Names of images: plate, condition, well, site and time."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylivecell.core.errors import UserError
from raylivecell.growth import names
from raylivecell.growth.names import NamePattern, Position
from raylivecell.synthetic import layout

ROWS, COLUMNS = st.integers(0, 31), st.integers(0, 47)


@st.composite
def wells(draw: st.DrawFn) -> str:
    row = draw(ROWS)
    return ("A" if row >= 26 else "") + chr(65 + row % 26) + str(draw(COLUMNS) + 1)


@given(
    st.sampled_from(["A172", "SHSY5Y", "my_cells", "B7"]),
    wells(),
    st.integers(1, 99),
    st.integers(0, 99),
    st.integers(0, 23),
    st.integers(0, 59),
    st.integers(0, 9),
    st.sampled_from(["", "run 1/", "a/A7_1/"]),
)
def test_names_of_livecell_and_incucyte_are_parsed_back(
    condition: str, well: str, site: int, d: int, h: int, m: int, crop: int, folder: str
) -> None:
    name = f"{folder}{condition}_Phase_{well}_{site}_{d:02d}d{h:02d}h{m:02d}m{f'_{crop}' if crop else ''}.tif"
    position = NamePattern().parse(name)
    assert position is not None
    assert position[:5] == (folder.rstrip("/"), condition, well, str(site), str(crop) if crop else "")
    assert position.hours == pytest.approx(24 * d + h + m / 60)
    assert not position.dated


@given(st.datetimes(), st.sampled_from(["VID7", "plate"]))
def test_names_of_incucytes_export_have_a_date(date: object, prefix: str) -> None:
    name = f"{prefix}_A07_1_{date:%Yy%mm%dd_%Hh%Mm}.tif"
    if re.search(r"_\d{4}y", name) is None:
        return  # strftime writes years before 1000 with fewer digits
    position = NamePattern().parse(name)
    assert position is not None
    assert position[:4] == (("VID7", "", "A7", "1") if prefix == "VID7" else ("", "plate", "A7", "1"))
    assert position.dated
    later = NamePattern().parse(re.sub(r"_(\d\d)h(\d\d)m", "_00h00m", name))
    assert later is not None
    assert position.hours - later.hours == pytest.approx(date.hour + date.minute / 60)


@pytest.mark.parametrize(
    "name",
    [
        "frame-01.png",
        "A172_Phase_A7_1.tif",
        "A172_Phase_A7_1_01d08h.tif",
        "A172_Phase_a7_1_01d08h00m_2.tif",
        "VID1_A7_1_2020y02m31d_08h00m.tif",
        "VID1_A7_1_2020y13m01d_08h00m.tif",
        "A7_1.tif#t3",
        "",
        "/",
    ],
)
def test_other_names_do_not_match(name: str) -> None:
    assert NamePattern().parse(name) is None


@given(st.text(max_size=60))
def test_any_name_is_parsed_or_not_but_never_an_error(name: str) -> None:
    for pattern in (NamePattern(), NamePattern(r"(?P<well>.)(?P<hours>.*)"), NamePattern(None, 0.5)):
        position = pattern.parse(name)
        assert position is None or abs(position.hours) <= names.MAX_HOURS
    names.sort_key(name)
    names.normalised_well(name)


def test_own_patterns() -> None:
    frames = NamePattern(r"(?P<condition>\w+)/(?P<well>[A-H]\d+)/t(?P<frame>\d+)$", 0.25)
    assert frames.parse("exp 1/drug/b03/t0008.png") is None
    assert frames.parse("exp 1/drug/B03/t0008.png") == Position("exp 1", "drug", "B3", None, "", 2.0, False)
    hours = NamePattern(r"(?P<plate>P\d)-(?P<well>\w+)-(?P<site>\d)-(?P<hours>-?[\d.]+)h")
    assert hours.parse("x/P2-left-1-7.5h.ome.tif") == Position("P2", "", "left", "1", "", 7.5, False)
    assert hours.parse("x/P2-left-1-.h.tif") is None
    clock = NamePattern(r"(?P<well>[A-H]\d)_(?P<d>\d)\.(?P<h>\d\d)\.(?P<m>\d\d)\.(?P<s>\d\d)")
    assert clock.parse("C2_1.02.30.36.tif").hours == pytest.approx(26.51)


def test_planes_of_time_stacks() -> None:
    assert NamePattern(None, 2).parse("p/A172_Phase_A7_1.tif#t3").hours == 6
    assert NamePattern(None, 2).parse("p/A172_Phase_A7_1_01d00h00m.tif#t3").hours == 30
    assert NamePattern(None).parse("p/A172_Phase_A7_1_01d00h00m.tif#t3") is None  # all planes would have one time
    assert NamePattern(r"(?P<well>\w+)$", 2).parse("left.tif#t2_z1").hours == 4
    assert NamePattern(r"(?P<well>\w+)$", 2).parse("left.tif") is None
    assert NamePattern(None, 2).parse("A_A7_1.ome.tif#s1_t03_z0")[:6] == ("", "A", "A7", "1s1", "", 6.0)
    assert NamePattern().parse("#1/a#_A7_1_00d04h00m.tif").plate == "#1"


@pytest.mark.parametrize(
    ("pattern", "frame_hours", "message"),
    [
        ("(?P<well>[A-H]", None, "is not a regular expression"),
        (r"(?P<well>\w)(?P<well>\w)", None, "is not a regular expression"),
        (r"(?P<site>\d+)_(?P<hours>\d+)", None, "lacks well;"),
        (r"(?P<well>\w+)", None, "lacks time: hours, or d, h, m"),
        (r"(\w+)_(\d+)", None, "lacks well; time"),
        (r"(?P<well>\w+)_(?P<year>\d+)_(?P<h>\d+)", None, "lacks month; day"),
        (r"(?P<well>\w+)_(?P<hour>\d+)", None, "unknown group hour; the groups are well"),
        (r"(?P<well>\w+)_(?P<hours>\d+)_(?P<m>\d+)", None, "two kinds of time"),
        (r"(?P<well>\w+)_(?P<frame>\d+)", None, "--frame-hours"),
        (None, 0.0, "--frame-hours 0:"),
        (None, float("nan"), "--frame-hours nan:"),
    ],
)
def test_wrong_patterns_are_reported_in_one_line(pattern: str | None, frame_hours: float | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        NamePattern(pattern, frame_hours)
    assert "\n" not in str(error.value)


@given(ROWS, COLUMNS)
def test_wells_have_a_row_and_a_column(row: int, column: int) -> None:
    letters = ("A" if row >= 26 else "") + chr(65 + row % 26)
    for text in (f"{letters}{column + 1}", f"{letters.lower()}{column + 1:02d}"):
        assert names.row_and_column(names.normalised_well(text)) == (row, column)


def test_wells_are_sorted_by_number() -> None:
    assert sorted(["B1", "A10", "A2", "A1"], key=names.sort_key) == ["A1", "A2", "A10", "B1"]
    assert names.row_and_column("left") is names.row_and_column("A0") is None


def test_every_real_and_every_synthetic_name_matches(livecell_mini: Path) -> None:
    paths = [path.relative_to(livecell_mini).as_posix() for path in livecell_mini.rglob("*.tif")]
    positions = [NamePattern().parse(path) for path in paths]
    assert len(paths) == 20
    assert all(
        position and position.condition == Path(path).name.split("_")[0] for position, path in zip(positions, paths)
    )
    for kind in range(8):
        position = NamePattern().parse(layout.file_name(3, kind, 41 + kind))
        assert position is not None
        assert names.row_and_column(position.well) is not None
