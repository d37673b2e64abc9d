"""Files with several planes in `predict`: the driver lists the planes, an actor reads one at a time.

Only the directories of a file are read to list its planes, and only the bytes of a plane to decode it.
"""

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs as pafs

from raylivecell.core import storage
from raylivecell.core.console import console
from raylivecell.core.errors import UnreadableImageError, UserError
from raylivecell.images import formats, planes
from raylivecell.images.formats import DecodedImage, ImageFile
from raylivecell.images.planes import Choice
from raylivecell.images.ranges import RangeReader

READERS = 16
"""Files opened at the same time: each request to an object store takes about 20 ms."""


def expand(
    root: str, files: Mapping[str, pafs.FileInfo], choice: Choice, reasons: dict[str, str] | None = None
) -> dict[str, pafs.FileInfo]:
    """Replace each file with several planes by the addresses of the chosen ones, in the order of its axes.

    A file that cannot be read remains, so that its row in images.csv gives the reason.

    Args:
        root: folder of the files.
        files: their paths.
        choice: planes and channel to read.
        reasons: receives the reason of each file whose planes cannot be listed.
    """

    def names(file: str) -> list[str]:
        if not file.lower().endswith(formats.STACK_SUFFIXES):
            return [""]
        try:
            return _names(storage.join(root, file), choice)
        except (UnreadableImageError, UserError, OSError) as error:
            if reasons is not None:
                reasons[file] = str(error)
            return [""]  # `read` raises it again, where it is reported

    with ThreadPoolExecutor(READERS) as pool:
        names_by_file = dict(zip(files, pool.map(names, files)))
    stacks = {file: len(members) for file, members in names_by_file.items() if len(members) > 1}
    if stacks:
        console.print(f"{len(stacks)} files contain {sum(stacks.values())} images, one per plane", markup=False)
    return {planes.address(file, name): files[file] for file, members in names_by_file.items() for name in members}


def _names(uri: str, choice: Choice) -> list[str]:
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as stream:
        image = ImageFile(RangeReader(stream))
        return sorted(image.names[number] for number in image.select(choice))


def read(root: str, address: str, choice: Choice, max_pixels: int) -> DecodedImage:
    """Decode the image at an address of `expand`.

    Raises:
        UnreadableImageError: unsupported or damaged.
        OSError, MachineError: the file cannot be read.
    """
    file, plane = planes.split_address(address)
    uri = storage.join(root, file)
    if plane is None:
        return formats.decode(storage.read_bytes(uri), max_pixels, choice)
    return _open(uri).decode(Choice(plane, choice.channel), max_pixels)


@functools.lru_cache(maxsize=1)
def _open(uri: str) -> ImageFile:
    """Open a file for its planes; the last one stays open, since actors read the planes of a file in order."""
    filesystem, path = storage.open_uri(uri)
    return ImageFile(RangeReader(filesystem.open_input_file(path)))
