"""Split the images of a source into train, val and test by group, for sources without splits (`--split`).

The result depends only on the names, the fractions and the rule for groups: not on the order of the names, and not on
random numbers.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from raylivecell.core import console
from raylivecell.core.errors import UserError
from raylivecell.data import group_names
from raylivecell.data.config import FRAMES, PrepareConfig, chosen_rule
from raylivecell.data.defects import Entry
from raylivecell.data.shards import SPLITS

UNSPLIT = "all"
"""Split of annotation files whose images `with_splits` distributes."""
MAX_DEVIATION = 0.1
"""Difference between the requested and the actual fraction of a split above which a warning is printed."""
MAX_NAMES = 4
"""Maximum names in a message."""

Fractions = tuple[float, float, float]
"""Fractions of train, val and test."""


class Assignment(NamedTuple):
    """Split and group of each image."""

    split: dict[str, str]
    """Split by name."""
    groups: dict[str, str]
    """Group by name; a group is in one split."""
    warnings: tuple[str, ...] = ()

    def images_by_group(self, split: str) -> Counter[str]:
        """Count the images of each group of `split`."""
        return Counter(self.groups[name] for name in self.split if self.split[name] == split)


def check_settings(config: PrepareConfig) -> None:
    """UserError for settings of sources without splits if `split` is missing, and the opposite."""
    if config.split is None and (config.group_by is not None or UNSPLIT in config.annotations):
        setting = "--group-by" if config.group_by is not None else f"--annotations {UNSPLIT}"
        raise UserError(f"{setting} is for images that are to be split; add --split 0.8 0.1 0.1")
    if config.split is not None and (other := ", ".join(sorted(set(config.annotations) - {UNSPLIT}))):
        raise UserError(
            f"--split with --annotations {other}: leave out --split, or choose the file of all images with "
            f"--annotations {UNSPLIT} PATH"
        )


def assign(names: Sequence[str], fractions: Fractions, group_by: str | None = None) -> Assignment:
    """Assign each image to a split, so that no group is divided.

    Args:
        names: paths of the images with forward slashes; equal names count once. A plane of a file is `PATH#PLANE`.
        fractions: of train, val and test, in images: at least 0 with a sum of 1. Every split with a fraction above 0
            gets at least one group.
        group_by: regular expression searched in each name; the group is its captures, otherwise the entire match.
            `frames`: series (as by default) are cut into three ranges of frames. Default: `group_names.parse`.

    Raises:
        UserError: fewer groups than splits, a name without a match, an invalid expression.
    """
    unique = sorted(set(names))
    if not unique:
        return Assignment({}, {})
    if group_by == FRAMES:
        return _assign_frames(unique, fractions)
    parsed = {name: group_names.parse(name) for name in unique}
    groups = {name: parsed[name].group for name in unique} if group_by is None else _groups_by(unique, group_by)
    sizes = Counter(groups.values())
    split_of_group = _distribute(sizes, fractions)
    split = {name: split_of_group[group] for name, group in groups.items()}
    warnings = [*_deviations(Counter(split.values()), fractions)]
    lonely = [name for name in unique if sizes[groups[name]] == 1 and not parsed[name].certain]
    if group_by is None and 2 * len(lonely) > len(unique) and sum(fraction > 0 for fraction in fractions) > 1:
        warnings.append(
            f"no well, series or frame number is recognised in the names of {len(lonely)} of {len(unique)} images "
            f"({_first(lonely)}): each is a group of its own. If some show the same well or series, images of it may "
            "be in both train and test: set --group-by REGEX"
        )
    return Assignment(split, groups, tuple(warnings))


def _groups_by(names: Sequence[str], pattern: str) -> dict[str, str]:
    """Return the group of each name by the regular expression `pattern`."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by {pattern}: not a regular expression ({error}); example: '(.*)_t[0-9]+'") from error
    groups = {}
    for name in names:
        if match := expression.search(name):
            captures = [capture or "" for capture in match.groups()] or [match[0]]
            if any(captures):
                groups[name] = "_".join(captures)
    missing = [name for name in names if name not in groups]
    if missing:
        raise UserError(
            f"--group-by {pattern}: no match in {len(missing)} of {len(names)} names ({_first(missing)}); "
            "the expression is searched in the path inside the image folder and must find a group in each"
        )
    return groups


def _distribute(sizes: Mapping[str, int], fractions: Fractions) -> dict[str, str]:
    """Return the split of each group: the largest group first, into the split that lacks most images.

    Every split then exceeds its fraction by less than its last group. Groups of one size are ordered by a hash of
    their names, so that the splits do not follow the alphabet.
    """
    total = sum(sizes.values())
    missing = {split: fraction * total for split, fraction in zip(SPLITS, fractions) if fraction > 0}
    if len(sizes) < len(missing):
        raise UserError(_too_few(sizes, missing, fractions))
    empty = set(missing)
    split_of_group = {}
    ordered = sorted(sizes, key=lambda group: (-sizes[group], hashlib.sha256(group.encode()).digest()))
    for position, group in enumerate(ordered):
        choices = empty if len(ordered) - position == len(empty) else missing
        split = max((split for split in SPLITS if split in choices), key=lambda split: missing[split])
        split_of_group[group] = split
        missing[split] -= sizes[group]
        empty.discard(split)
    return split_of_group


def _too_few(sizes: Mapping[str, int], splits: Mapping[str, float], fractions: Fractions) -> str:
    """Return the message for fewer groups than splits."""
    count = f"{len(sizes)} group{'s' * (len(sizes) > 1)} ({_first(sorted(sizes))})"
    rest = fractions[1] + fractions[2]
    fewer = "--split 1 0 0 for training only" if len(sizes) == 1 else f"--split {1 - rest:g} 0 {rest:g}"
    return (
        f"the names of the {sum(sizes.values())} images form {count}, fewer than the {len(splits)} splits: set "
        f"--group-by REGEX to name smaller groups, --group-by {FRAMES} to cut each series into ranges of frames, or "
        f"{fewer}"
    )


def _assign_frames(names: Sequence[str], fractions: Fractions) -> Assignment:
    """Assign the first frames of each series to train, the next to val, the last to test.

    The frames of all series are ordered by their relative position in their series and cut twice. All images of one
    frame (channels, crops) are in one split.
    """
    frames: dict[str, dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        parsed = group_names.parse(name)
        frames[parsed.group][parsed.frame].append(name)
    ordered = sorted(
        ((2 * rank + 1) / (2 * len(series)), group, frame)
        for group, series in frames.items()
        for rank, frame in enumerate(sorted(series))
    )
    splits = [split for split, fraction in zip(SPLITS, fractions) if fraction > 0]
    if len(ordered) < len(splits):
        raise UserError(
            f"--group-by {FRAMES}: the names of the {len(names)} images contain {len(ordered)} different frame numbers "
            f"({_first(names)}), fewer than the {len(splits)} splits; set --group-by REGEX, or --split 1 0 0"
        )
    limits = dict(zip(SPLITS, (fractions[0], fractions[0] + fractions[1], 1.0)))
    split: dict[str, str] = {}
    ranges: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    current, taken, count = 0, 0, 0
    for position, (_, group, frame) in enumerate(ordered):
        members = frames[group][frame]
        # Cut where the number of images is nearest to the limit; each split gets a frame.
        following = len(splits) - current - 1
        full = taken and count + len(members) / 2 > limits[splits[current]] * len(names)
        if following and (full or (taken and len(ordered) - position == following)):
            current, taken = current + 1, 0
        taken, count = taken + 1, count + len(members)
        ranges[group, splits[current]].append(frame)
        split |= dict.fromkeys(members, splits[current])
    groups: dict[str, str] = {}
    for (group, _), block in ranges.items():
        first, last = (".".join(map(str, frame)) or "?" for frame in (block[0], block[-1]))
        label = f"{group}, frames {first} to {last}" if first != last else f"{group}, frame {first}"
        groups |= {name: label for frame in block for name in frames[group][frame]}
    warning = (
        f"--group-by {FRAMES}: train, val and test share {len(frames)} series; neighbouring frames are similar, so "
        "scores on val and test are higher than on new series"
    )
    return Assignment(split, groups, (warning, *_deviations(Counter(split.values()), fractions)))


def _deviations(images: Mapping[str, int], fractions: Fractions) -> Iterator[str]:
    """Yield a warning if the actual fractions differ much from those requested."""
    total = sum(images.values())
    actual = [images.get(split, 0) / total for split in SPLITS]
    if max(abs(a - b) for a, b in zip(actual, fractions)) > MAX_DEVIATION:
        yield (
            f"the groups are too large for --split {_text(fractions)}: train, val and test get {_text(actual)} of the "
            "images"
        )


def _text(fractions: Sequence[float]) -> str:
    return " ".join(f"{round(fraction, 2):g}" for fraction in fractions)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def with_splits(
    entries: Sequence[Entry], config: PrepareConfig, relative: Callable[[str], str]
) -> tuple[list[Entry], Assignment]:
    """Return `entries` with the splits of `config.split`, and their assignment; print its warnings and groups.

    Images without a file are assigned to train, where they are reported as defects. So are images without cells, unless
    the rule `no_annotations` is `keep`: in a source that is split here, they may not be annotated yet, and must neither
    fill a split nor be scored as background in test.

    Args:
        entries: images of the source, with any split.
        config: settings; `split` is set.
        relative: returns the path relative to the image folder, which contains the group, from that in the source.
    """
    assert config.split is not None
    keep_empty = chosen_rule(config.on_defect, "no_annotations") == "keep"
    names = [relative(entry.path) if entry.path and (entry.cells or keep_empty) else None for entry in entries]
    total = sum(config.split)
    train, val, test = (fraction / total for fraction in config.split)
    assignment = assign([name for name in names if name is not None], (train, val, test), config.group_by)
    _show(assignment)
    splits = [SPLITS[0] if name is None else assignment.split[name] for name in names]
    return [replace(entry, split=split) for entry, split in zip(entries, splits)], assignment


def _show(assignment: Assignment) -> None:
    for warning in assignment.warnings:
        console.console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    for split in SPLITS:
        if groups := assignment.images_by_group(split):
            images, count = groups.total(), len(groups)
            text = f"{images} image{'s' * (images > 1)} in {count} group{'s' * (count > 1)}"
            line = f"{split}: {text}: {_first(sorted(groups))}"
            console.console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(assignment: Assignment) -> dict[str, int]:
    """Return the number of groups by split, for dataset.json."""
    return {split: len(assignment.images_by_group(split)) for split in SPLITS}
