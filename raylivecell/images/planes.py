"""Planes of files with several images: their names, and the choice of one.

A plane's name has the axes that vary in its file, each with its index from 0: `t03_z2`, `c1`; `p004` where the axes are
unknown. A file with one image has the plane "". FILE#NAME is the address of a plane in tables.

Axes: s series or position, t time, z depth, c channel, p unknown.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from raylivecell.core.errors import UnsupportedImageError

Position = dict[str, int]
"""Index by axis."""
AXES = "stzcp"
"""All axes, in the order of names."""
_NAME = re.compile(r"[a-z]\d{1,6}(_[a-z]\d{1,6})*")
_ADDRESS = re.compile(rf"(.+)#({_NAME.pattern})", re.DOTALL)


class Choice(NamedTuple):
    """The planes and the channel to read."""

    plane: str | None = None
    """Number of the plane in its file, from 0 (`3`), or indices of axes (`z2`, `t03_z2`). Default: all planes."""
    channel: int | None = None
    """Number of the channel, from 0. Default: the file must have one channel, or be a colour image."""


EVERYTHING = Choice()


class Place(NamedTuple):
    """Where a plane is in its stack, to compare with the slice that an annotation states."""

    name: str
    position: Position
    slices: tuple[int, ...]
    """Its numbers in ImageJ's stack (channels, then depths, then times), from 1: one per channel."""

    def is_at(self, z: int | None, t: int | None) -> bool:
        """Return whether the plane is at these indices, from 0; None is not stated."""
        if "p" in self.position:  # programs show an unknown axis as depth or as time
            return sorted(index for index in (z, t) if index is not None) in (
                [],
                [self.position["p"]],
                [0, self.position["p"]],
            )
        return z in (None, self.position.get("z", 0)) and t in (None, self.position.get("t", 0))


def place_of(positions: Sequence[Position], number: int) -> Place | None:
    """Return the place of plane `number`; None without several times or depths: a stated slice is that of another file.

    Channels and series are not compared: cells drawn in one channel are in the same place in the others.
    """
    if not set(_varying(positions)) & set("tzp"):
        return None
    position = positions[number]
    series = [other for other in positions if other.get("s", 0) == position.get("s", 0)]
    series.sort(key=lambda other: [other.get(axis, 0) for axis in "ptzc"])
    slices = [n for n, other in enumerate(series, 1) if {**other, "c": 0} == {**position, "c": 0}]
    return Place(names(positions)[number], position, tuple(slices))


def names(positions: Sequence[Position]) -> list[str]:
    """Return the name of each plane; "" for the only one."""
    if len(positions) == 1:
        return [""]
    sizes = {axis: 1 + max(p.get(axis, 0) for p in positions) for axis in _varying(positions)}
    return ["_".join(f"{a}{p.get(a, 0):0{len(str(n - 1))}d}" for a, n in sizes.items()) for p in positions]


def _varying(positions: Sequence[Position]) -> list[str]:
    return [axis for axis in AXES if len({position.get(axis, 0) for position in positions}) > 1]


def select(positions: Sequence[Position], choice: Choice) -> list[int]:
    """Return the indices in `positions` of the chosen planes.

    Raises:
        UnsupportedImageError: no such plane or channel; or planes of several channels.
    """
    indices = list(range(len(positions)))
    if choice.channel is not None and has_channels(positions):
        indices = [i for i in indices if positions[i].get("c", 0) == choice.channel]
        if not indices:
            count = 1 + max(position.get("c", 0) for position in positions)
            raise no_channel(choice.channel, count)
    chosen = [indices[i] for i in _select_plane([positions[i] for i in indices], choice.plane)]
    channels = {positions[i].get("c", 0) for i in chosen}
    if len(channels) > 1:
        raise UnsupportedImageError(
            f"contains {len(positions)} images ({extent(positions)}) of {len(channels)} channels; choose one with "
            f"--channel {min(channels)} to {max(channels)}"
        )
    return chosen


def _select_plane(positions: Sequence[Position], plane: str | None) -> Sequence[int]:
    if plane is None:
        return range(len(positions))
    if re.fullmatch(r"\d{1,9}", plane):
        chosen = [int(plane)] if int(plane) < len(positions) else []
    elif _NAME.fullmatch(plane):
        wanted = {part[0]: int(part[1:]) for part in plane.split("_")}
        # A series without an axis has the index 0 in names: s1_t0.
        default = dict.fromkeys(_varying(positions), 0)
        chosen = [i for i, p in enumerate(positions) if wanted.items() <= {**default, **p}.items()]
    else:
        raise UnsupportedImageError(f"no plane {plane!r}; give its number from 0, or axes such as t3, z2 or t3_z2")
    if not chosen:
        contents = f"{len(positions)} images ({extent(positions)})" if len(positions) > 1 else "1 image"
        raise UnsupportedImageError(f"contains {contents}, no plane {plane}")
    return chosen


def has_channels(positions: Sequence[Position]) -> bool:
    """Return whether planes are of several channels."""
    return "c" in _varying(positions)


def no_channel(channel: int, count: int) -> UnsupportedImageError:
    """Build the error for a channel that a file does not have."""
    last = f"s, 0 to {count - 1}" if count > 1 else ", 0"
    return UnsupportedImageError(f"no channel {channel}: the file has {count} channel{last}")


def extent(positions: Sequence[Position]) -> str:
    """Describe the axes: `t0 to t4, z0 to z2`."""
    indices = {axis: [position.get(axis, 0) for position in positions] for axis in _varying(positions)}
    return ", ".join(f"{axis}{min(numbers)} to {axis}{max(numbers)}" for axis, numbers in indices.items())


def address(file: str, name: str) -> str:
    """Return the address of a plane: its file if it is the only one, else FILE#NAME."""
    return f"{file}#{name}" if name else file


def split_address(text: str) -> tuple[str, str | None]:
    """Return the file and the name of a plane, None for a file's only one.

    An image file cannot have such a name: it ends in an image suffix.
    """
    match = _ADDRESS.fullmatch(text)
    return (match[1], match[2]) if match else (text, None)
