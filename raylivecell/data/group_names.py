"""Group and frame of an image, from its file name: images of one well or one time series form a group.

Sites and crops of one well, and neighbouring frames of one series, show the same cells or neighbouring ones. Where a
name is ambiguous, the larger group is chosen: it keeps related images in one split.
"""

import re
from typing import NamedTuple

from raylivecell.data.image_names import splits_of_folder

_START, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_SEPARATORS = "_-. ,()[]"

WELL = re.compile(rf"{_START}(?:[A-P](?:0?[1-9]|1\d|2[0-4]){_END}|r\d{{2}}c\d{{2}}(?=f\d))")
"""A well of a plate with up to 384 wells (`A7`, `B03`), or Opera's `r02c03f01...`."""
DATE = re.compile(rf"{_START}(?:\d{{4}}-\d{{2}}-\d{{2}}|20\d{{6}}|\d{{4}}y\d{{1,2}}m\d{{1,2}}d){_END}")
TIME = re.compile(
    rf"{_START}(?:"
    r"\d{4}y\d{1,2}m\d{1,2}d[_-]?\d{1,2}h\d{1,2}m"  # Incucyte: 2024y05m01d_08h00m
    r"|\d{1,3}d[_-]?\d{1,2}h(?:[_-]?\d{1,2}m(?:in)?)?"  # Incucyte: 01d08h00m
    rf"|(?:t|tp|time|timepoint|frame)[_-]?\d+){_END}",
    re.IGNORECASE,
)
"""The time or frame of one image: what comes before it is the name of the series."""
MINOR = re.compile(
    rf"{_START}(?:"
    r"\d{1,4}(?:d|days?|h|hrs?|hours?|min|sec|s)|(?:day|hour)s?[_-]?\d+"  # may also be a treatment
    r"|(?:c|ch|channel|w|z|slice|crop|tile|patch|x|y)[_-]?\d+"
    rf"|crop|tile|patch){_END}",
    re.IGNORECASE,
)
"""Channel, focal plane, part of an image, or a time that may as well be a treatment."""
IMAGEJ_CHANNEL = re.compile(r"^C\d-")
ROBOFLOW = re.compile(r"[._](?:png|jpe?g|tiff?|bmp)\.rf\.[0-9A-Za-z]+$")
"""Roboflow's copies of one image, augmented ones too, differ only in this part."""
HASH = re.compile(r"^[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}$|^(?=.*\d)(?=.*[a-f])[0-9a-f]{16,}$", re.IGNORECASE)
NUMBER = re.compile(r"[_\-. ]*\(?\d+\)?$")


class GroupName(NamedTuple):
    """Group and frame of one image."""

    group: str
    frame: tuple[int, ...]
    """Numbers that order the images of the group: its time if the name has one, otherwise its frame number; () if
    neither."""
    certain: bool = False
    """Whether the name contains a well and something after it, such as a site or a time."""


def parse(name: str) -> GroupName:
    """Return group and frame of the image at path `name`.

    - `A172_Phase_A7_1_01d08h00m_2.tif`: group `A172_Phase_A7`, the well; site, time and crop do not count.
    - `plate1/B03_s2_w1.tif`: group `plate1/B03`.
    - `Pos1_t003.tif`: group `Pos1`; `01/t000.tif`: group `01`.
    - Folders named after a split do not count: `train/A7_1.tif` and `test/A7_2.tif` are in group `A7`.
    - `set18.tif`, `img_003.png`, `001.png`: groups `set`, `img` and `*`: consecutive numbers are frames of one series.

    Args:
        name: path with forward slashes; a plane of a file is `PATH#PLANE`, and all planes are in the file's group.
    """
    path, _, plane = name.partition("#")
    *folders, file_name = path.split("/")
    folders = [folder for folder in folders if not splits_of_folder(f"{folder}/")]
    stem = re.sub(r"\.ome$", "", re.sub(r"\.[A-Za-z]\w{0,4}$", "", file_name), flags=re.IGNORECASE)
    stem = IMAGEJ_CHANNEL.sub("", ROBOFLOW.sub("", stem))
    well = _well(stem)
    if well:
        rest = stem[well.end() :]
        time = TIME.search(rest)
        frame = _numbers(time[0] if time else rest)
        folders = [MINOR.sub("", DATE.sub("", folder)) for folder in folders]
        stem = TIME.sub("", DATE.sub("", stem[: well.start()])) + well[0]
        certain = bool(rest.strip(_SEPARATORS)) or bool(plane)
    else:
        stem, frame = _series(stem, bool(plane))
        certain = False
    parts = [_clean(TIME.sub("", folder)) for folder in folders] + [_clean(stem)]
    return GroupName("/".join(part for part in parts if part) or "*", (*frame, *_numbers(plane)), certain)


def _well(stem: str) -> re.Match[str] | None:
    """Return the well in a name: the one before a time if there are several candidates (`H9_Phase_B3_1_00d04h00m`)."""
    candidates = list(WELL.finditer(stem))
    before_time = [well for well in candidates if re.match(rf"(?:[_-]\d+)?[_-]{TIME.pattern}", stem[well.end() :])]
    return next(iter(before_time or candidates), None)


def _series(stem: str, is_stack: bool) -> tuple[str, tuple[int, ...]]:
    """Return the name of the series and the frame of a name without a well; `is_stack`: its planes are the frames."""
    times = list(TIME.finditer(stem))
    if times:
        before, after = (MINOR.sub("", part) for part in (stem[: times[-1].start()], stem[times[-1].end() :]))
        return TIME.sub("", before) + NUMBER.sub("", _clean(after)), _numbers(times[-1][0])
    if is_stack or HASH.match(stem):
        return stem, ()
    stem = _clean(MINOR.sub("", stem))
    number = NUMBER.search(stem)
    return (stem[: number.start()], _numbers(number[0])) if number else (stem, ())


def _clean(text: str) -> str:
    """Remove separators at the ends, and repeated ones in between."""
    return re.sub(r"([_\-. ])[_\-. ]+", r"\1", text.strip(_SEPARATORS))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"[0-9]+", text))
