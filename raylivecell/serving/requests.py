"""The body and the query of a request to `/segment`. Nothing is written to disk."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal, NamedTuple, get_args

from pydantic import Field
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from raylivecell.core.settings import StrictModel

Format = Literal["json", "geojson", "coco", "labels", "overlay", "rois", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "geojson": "application/geo+json",
    "coco": "application/vnd.coco+json",
    "labels": "image/tiff",
    "overlay": "image/png",
    "rois": "application/zip",
    "csv": "text/csv",
}
UNNAMED = "image"


class RequestError(Exception):
    """A request that is refused: an HTTP status, and one line with the cause and the fix."""

    def __init__(self, status: int, line: str, planes: Sequence[str] = ()) -> None:
        super().__init__(line)
        self.status, self.line = status, line
        self.planes = planes
        """All planes of the file, if they are known: the others may be intact."""


class Upload(NamedTuple):
    """A file of a request."""

    name: str
    """As the client named it, without folders."""
    data: bytes


class Options(StrictModel):
    """Query of `/segment`; thresholds default to those of the checkpoint."""

    format: Format | None = None
    """Default: by the header Accept, else json."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """A pixel belongs to a cell if its foreground probability is above this."""
    smoothing: float | None = Field(None, ge=0, le=20)
    """Sigma of the Gaussian that smooths the height map, pixels."""
    prominence: float | None = Field(None, ge=0, le=1)
    """Depth of the saddle between two cells."""
    min_area: int | None = Field(None, ge=0, le=10**6)
    """Cells of fewer pixels are removed."""
    min_score: float | None = Field(None, ge=0, le=1)
    """Cells with a lower score are removed."""
    plane: str | None = Field(None, max_length=100)
    """Of files with several: its number from 0, or indices of axes such as t3_z0; default: every plane."""
    channel: int | None = Field(None, ge=0, le=1000)
    """Of files with several: its number from 0."""
    diameter: float | None = Field(None, gt=0, le=10**5)
    """Typical diameter of the cells, pixels."""
    tta: bool = False
    """Average eight versions of the image, in eight times the time."""
    view: bool = False
    """Also return the image as PNG, the labels as runs, and the names of all planes, for a page (format json)."""

    def thresholds(self) -> dict[str, float]:
        """Thresholds set in the query, by name."""
        names = ("threshold", "smoothing", "prominence", "min_area", "min_score")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def chosen_format(options: Options, accept: str) -> Format:
    """The format of the answer: that of the query, else the first of `FORMATS` in the header Accept, else JSON."""
    if options.format:
        return options.format
    wanted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    return next((name for name in FORMATS if MEDIA_TYPES[name] in wanted), "json")


class _InMemory(MultiPartParser):
    spool_max_size = 2**62  # Starlette would write parts above 1 MiB to a temporary file


async def uploads(
    headers: Headers, body: AsyncIterator[bytes], name: str | None, max_bytes: int, max_files: int
) -> list[Upload]:
    """Read the files of a request: a form (multipart/form-data), or one file as the body.

    Args:
        headers: of the request.
        body: its chunks.
        name: of the file, if it is the body.
        max_bytes: RequestError 413 for a larger body, as soon as that is known.
        max_files: RequestError 413 for more files.

    Raises:
        RequestError: 413, or 422 without a file or for a damaged form.
    """
    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        files = [Upload(_base_name(name), await whole_body(headers, body, max_bytes))]
    else:
        limited = _limited(headers, body, max_bytes)
        try:
            form = await _InMemory(headers, limited, max_files=max_files, max_fields=max_files).parse()
        except MultiPartException as error:
            status = 413 if error.message.startswith("Too many") else 422
            raise RequestError(status, f"{error.message} Send fewer files, or repeat the request") from error
        parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        files = [Upload(_base_name(part.filename), await part.read()) for part in parts]
        await form.close()
    if not any(file.data for file in files):
        raise RequestError(
            422, "no file, or an empty one, in the request; send one, such as curl -F file=@image.tif URL/segment"
        )
    return files


async def whole_body(headers: Headers, body: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """The body of a request; RequestError 413 if it is larger than `max_bytes`."""
    return b"".join([chunk async for chunk in _limited(headers, body, max_bytes)])


async def _limited(headers: Headers, body: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes, None]:
    too_large = RequestError(413, f"more than {max_bytes / 2**20:g} MiB in one request; send fewer or smaller files")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    total = 0
    async for chunk in body:
        total += len(chunk)
        if total > max_bytes:
            raise too_large
        yield chunk


def _base_name(name: str | None) -> str:
    """The last part of a file name, at most 255 printable characters."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:255] or UNNAMED
