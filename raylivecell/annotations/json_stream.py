"""JSON near 1 GB, record by record, in a few MB of memory.

One call of the standard library's C scanner a record, on a buffer refilled as it is spent. Measured on LIVECell's
records with their conversion to float32: 88 MB/s; ijson's yajl2_c backend 55; json.load 43, with memory to match.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from raylivecell.core.errors import UserError

CHUNK = 4 * 2**20
MAX_RECORD = 64 * 2**20
"""Characters of one record: more is refused rather than read into memory."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which is its beginning
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODE = json.JSONDecoder().raw_decode


class Reader(Protocol):
    """What has a binary file's `read`."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, about `size` of them; b"" at the end."""


class BrokenJsonError(UserError):
    """JSON that ends early or is no JSON; `position` is the byte where reading stopped."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class OtherJsonError(BrokenJsonError):
    """JSON of another kind than COCO's."""

    def __init__(self, name: str, kind: str) -> None:
        message = f"{name} is no COCO file but {kind}; export COCO instance segmentation, or choose another file"
        super().__init__(message, 0)


class JsonText:
    """The unread part of a JSON text over a binary stream, with its position and checksum."""

    def __init__(self, stream: Reader, name: str) -> None:
        self.stream, self.name = stream, name
        self.buffer, self.at = "", 0
        self.before = 0  # bytes of the file before `buffer`
        self.size = 0  # bytes read
        self.sha256 = hashlib.sha256()
        self.sections: list[str] = []  # names of the members that `walk` came to
        self.encoding = ""  # chosen by the first bytes
        self._decode: Callable[[bytes], str] = bytes.decode

    def refill(self) -> bool:
        """Drop what is spent and read on; False at the end of the file."""
        data = self.stream.read(CHUNK)
        if not data:
            return False
        self.sha256.update(data)
        if not self.size:
            data = self._start(data)
        self.size += len(data)
        try:
            text = self._decode(data)
        except UnicodeDecodeError as error:
            place = self.size - len(data) + error.start
            raise BrokenJsonError(
                f"{self.name} is not {self.encoding.upper()} text: byte 0x{error.object[error.start]:02x} near byte "
                f"{place}; save it as UTF-8 (it may be Latin-1 or Windows-1252)",
                place,
            ) from error
        self.before += self._length(self.buffer[: self.at])
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return True

    def _start(self, data: bytes) -> bytes:
        """Choose the encoding by the first bytes (UTF-8, 16 or 32, with or without a mark); `data` without the mark."""
        while len(data) < 4 and (more := self.stream.read(CHUNK)):
            self.sha256.update(more)
            data += more
        mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
        self.encoding = _MARKS[mark] if mark else json.detect_encoding(data)
        self._decode = codecs.getincrementaldecoder(self.encoding)().decode
        self.before = self.size = len(mark)
        return data[len(mark) :]

    def _length(self, text: str) -> int:
        """Bytes of `text` in the file."""
        return len(text.encode(self.encoding or "utf-8", "surrogatepass"))

    def peek(self) -> str:
        """The next character that is no white space, unspent; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # matches the empty text too
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.refill():
                return ""

    def take(self, allowed: str) -> str:
        """Spend the next character, which must be one of `allowed`."""
        found = self.peek()
        if not found:
            raise self.broken("ends too early")
        if found not in allowed:
            raise self.broken(f"is no JSON: {found!r} where one of {allowed!r} belongs")
        self.at += 1
        return found

    def value(self) -> Any:
        """Spend one whole JSON value and return it."""
        while True:
            self.peek()
            try:
                value, end = _DECODE(self.buffer, self.at)
            except json.JSONDecodeError as error:
                self._need_more(error)
                continue
            except (ValueError, RecursionError) as error:
                raise self.broken(f"holds a value that cannot be read ({error})") from error
            if end == len(self.buffer) and self.refill():
                continue  # a number may go on in the next chunk
            self.at = end
            return value

    def _need_more(self, error: json.JSONDecodeError) -> None:
        """Refill where `error` only means that the buffer ends inside the value."""
        cut = error.pos > len(self.buffer) - 64 or error.msg.startswith("Unterminated string")
        if not cut:
            self.at = error.pos
            raise self.broken(f"is no JSON: {error.msg}") from error
        if len(self.buffer) - self.at > MAX_RECORD:
            raise self.broken(f"holds a record of more than {MAX_RECORD} characters") from error
        if not self.refill():
            raise self.broken("ends too early") from error

    def broken(self, what: str) -> BrokenJsonError:
        """The error for this place."""
        position = self.before + self._length(self.buffer[: self.at])
        return BrokenJsonError(
            f"{self.name} {what}, at byte {position}; get the file again (a cut-off download?) or set "
            "--on-defect truncated_json=keep_complete_records",
            position,
        )


def walk(text: JsonText) -> Iterator[tuple[str, str | None, Any]]:
    """Every record of a COCO file in the order of the text: (section, its key where the section is a dict, record).

    A section that is neither a list nor a dict is one record. `BrokenJsonError` where the text ends early or is no
    JSON; what came before it has been yielded.
    """
    first = text.peek()
    if first == "[":
        raise OtherJsonError(text.name, f"a list{_kind_of_list(text)}")
    if first != "{":
        raise text.broken("is no COCO file: it does not begin with {" if first else "ends too early")
    for section in _members(text):
        text.sections.append(section)
        opening = text.peek()
        if opening == "[":
            for _ in _items(text):
                yield section, None, text.value()
        elif opening == "{":
            for key in _members(text):
                yield section, key, text.value()
        else:
            yield section, None, text.value()
    if text.peek():
        raise text.broken("goes on after its end")


def _members(text: JsonText) -> Iterator[str]:
    """Keys of the object that begins here; the caller spends each one's value."""
    text.take("{")
    if text.peek() == "}":
        text.take("}")
        return
    while True:
        if text.peek() != '"':
            text.take('"')
        key = text.value()
        text.take(":")
        yield key
        if text.take(",}") == "}":
            return


def _items(text: JsonText) -> Iterator[None]:
    """One None an item of the list that begins here; the caller spends each."""
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield None
        if text.take(",]") == "]":
            return


def _kind_of_list(text: JsonText) -> str:
    """What the list that begins here holds, by the keys of its first record."""
    text.take("[")
    try:
        record = {} if text.peek() in ("", "]") else text.value()
    except BrokenJsonError:  # it is no COCO file in any case
        return ""
    keys = set(record) if isinstance(record, dict) else set()
    if {"image_id", "segmentation"} <= keys:
        return " of COCO results, without images"
    if {"data", "annotations"} <= keys:
        return ", as Label Studio's own export is"
    return ""


_OTHER_KINDS = (
    ({"shapes", "imagePath"}, "a LabelMe file of one image"),
    ({"_via_img_metadata"}, "a project of VIA"),
    ({"objects", "size"}, "a Supervisely file of one image"),
    ({"features"}, "GeoJSON"),
    ({"samples"}, "a FiftyOne dataset"),
    ({"nbformat"}, "a notebook"),
)


def kind_of_other(sections: Iterable[str]) -> str:
    """What an object with the members `sections` but without COCO's is, in words."""
    names = list(sections)
    for needed, kind in _OTHER_KINDS:
        if needed <= set(names):
            return kind
    listed = ", ".join(name[:40] for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"an object of {listed}" if names else "an empty object"
