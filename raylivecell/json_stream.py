"""JSON near 1 GB, record by record, in a few MB of memory.

One call of the standard library's C scanner a record, on a buffer refilled as it is spent. Measured on LIVECell's
records with their conversion to float32: 88 MB/s; ijson's yajl2_c backend 55; json.load 43, with memory to match.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

from raylivecell.errors import UserError

CHUNK = 4 * 2**20
MAX_RECORD = 64 * 2**20
"""Characters of one record: more is refused rather than read into memory."""

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


class JsonText:
    """The unread part of a JSON text over a binary stream, with its position and checksum."""

    def __init__(self, stream: Reader, name: str) -> None:
        self.stream, self.name = stream, name
        self.buffer, self.at = "", 0
        self.before = 0  # bytes of the text that lie before `buffer`
        self.sha256 = hashlib.sha256()
        self.utf8 = codecs.getincrementaldecoder("utf-8")()

    def refill(self) -> bool:
        """Drop what is spent and read on; False at the end of the file."""
        data = self.stream.read(CHUNK)
        if not data:
            return False
        if not self.before and not self.buffer and data.startswith(codecs.BOM_UTF8):
            self.before, data = len(codecs.BOM_UTF8), data[len(codecs.BOM_UTF8) :]
            self.sha256.update(codecs.BOM_UTF8)
        self.sha256.update(data)
        try:
            text = self.utf8.decode(data)
        except UnicodeDecodeError as error:
            raise self.broken("is not UTF-8 text") from error
        self.before += len(self.buffer[: self.at].encode())
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        return True

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
        position = self.before + len(self.buffer[: self.at].encode())
        return BrokenJsonError(
            f"{self.name} {what}, at byte {position}; get the file again (a cut-off download?) or set "
            "--truncated-json keep_whole_records",
            position,
        )


def walk(text: JsonText) -> Iterator[tuple[str, str | None, Any]]:
    """Every record of a COCO file in the order of the text: (section, its key where the section is a dict, record).

    A section that is neither a list nor a dict is one record. `BrokenJsonError` where the text ends early or is no
    JSON; what came before it has been yielded.
    """
    if text.peek() != "{":
        raise text.broken("is no COCO file: it does not begin with {" if text.peek() else "ends too early")
    for section in _members(text):
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
