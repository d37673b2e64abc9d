"""Addresses of files and folders: local paths, and URIs that `pyarrow.fs` opens. They are parsed and joined here only.

A URI is SCHEME://AUTHORITY/PATH?OPTIONS, its path percent-encoded; `join` encodes each name that it appends, so that
`split` gives the name back, whatever is in it. In a URI that a user types, a space, a `#`, a `%` without two
hexadecimal digits and a `?` without options are characters of the path. Nothing in a local path is decoded; a `file:`
URI is a local path.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from raylivecell.core.errors import UserError

_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?]*)(?P<rest>.*)", re.DOTALL)
_FILE = re.compile(r"file:(?://(?:localhost)?(?=/)|(?!//))(?P<path>/.*)", re.DOTALL | re.IGNORECASE)
_OPTIONS = re.compile(r"[A-Za-z][\w.-]*=[^&]*(?:&[A-Za-z][\w.-]*=[^&]*)*", re.DOTALL)
_SAFE = "/!$&'()*+,;=:@~"
"""Characters that a URI's path may hold as they are."""
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_SECRETS = (
    # KEY:SECRET@, where a secret may hold slashes; a port is no secret.
    re.compile(_SCHEME + r":/+[^/?@]*:(?!\d*(?:[/?]|$))[^@]*@"),
    # s3:// has neither ports nor users.
    re.compile(r"s3:/+[^/?]*[@:]", re.IGNORECASE),
    re.compile(
        _SCHEME + r":/[^?]*\?(?:.*&)?"
        r"(?:[\w.-]*(?:secret|passw|token|signature|access_?key|account_?key|api_?key)[\w.-]*"
        r"|[\w.-]*credential|sig|key)=",
        re.IGNORECASE | re.DOTALL,
    ),
)


CLOUD = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or AZURE_CLIENT_SECRET"
)
STORAGE = "RAYLIVECELL_STORAGE"
"""Environment variable with the Optuna storage of a sweep, where its URL holds a password."""
HINTS = {
    "--storage": f"{STORAGE} to the URL, with its password,",
    "--mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}
"""Where a secret goes instead, by flag."""


class Parts(NamedTuple):
    """A URI, split."""

    scheme: str
    authority: str
    """The bucket, or the host."""
    path: str
    """Decoded, without slashes at its ends."""
    options: str
    """`region=eu-west-1&...`; "" without any."""

    def root(self) -> str:
        """The URI of the filesystem itself."""
        return f"{self.scheme}://{self.authority}/" + (f"?{self.options}" if self.options else "")

    def text(self) -> str:
        """The URI."""
        path = f"/{quote(self.path, _SAFE)}" if self.path else ""
        return f"{self.scheme}://{self.authority}{path}" + (f"?{self.options}" if self.options else "")


def split(address: str) -> Parts | None:
    """The parts of a URI; none of a local path or of a `file:` URI. UserError where it holds a password or a key."""
    check_no_secrets(address)
    found = _URI.fullmatch(address)
    if found is None or _FILE.fullmatch(address):
        return None
    path, mark, options = found["rest"].partition("?")
    if not _OPTIONS.fullmatch(options):
        path, options = path + mark + options, ""
    if found["scheme"].lower() == "file":
        raise UserError(f"{address} is on another machine, {found['authority']}; give a path on this one")
    return Parts(found["scheme"], found["authority"], unquote(path).strip("/"), options)


def local_path(address: str) -> str:
    """The absolute path that a local path or a `file:` URI means; UserError where it is not UTF-8."""
    check_no_secrets(address)
    in_uri = _FILE.fullmatch(address)
    path = unquote(in_uri["path"]) if in_uri else os.path.expanduser(address)
    if not is_utf8(path):
        raise UserError(f"the name {shown(path)} is not UTF-8; rename it")
    return str(Path(path).absolute())


def absolute(address: str) -> str:
    """`address` as it means the same in another process, in its one spelling."""
    parts = split(address)
    return local_path(address) if parts is None else parts.text()


def join(address: str, *names: str) -> str:
    """`address` with plain `names` appended, each a path without slashes at its ends."""
    parts = split(address)
    if parts is not None:
        return parts._replace(path="/".join([*([parts.path] if parts.path else []), *names])).text()
    root = local_path(address) if _FILE.fullmatch(address) else address
    return "/".join([root.rstrip("/") if root.strip("/") else root[:0], *names])


def name(address: str) -> str:
    """The last part of the path, decoded; the bucket's or host's name where there is no path."""
    parts = split(address)
    path = local_path(address) if parts is None else parts.path or parts.authority
    return path.rpartition("/")[2]


def parent(address: str) -> str:
    """The folder that holds `address`."""
    parts = split(address)
    if parts is None:
        return os.path.dirname(local_path(address))
    return parts._replace(path=parts.path.rpartition("/")[0]).text()


def relative(address: str, root: str) -> str | None:
    """The plain path of `address` in the folder `root`, "" where they are the same; none where it is elsewhere."""
    one, other = split(address), split(root)
    if (one and one._replace(path="")) != (other and other._replace(path="")):
        return None
    path = one.path if one else local_path(address).strip("/")
    folder = other.path if other else local_path(root).strip("/")
    if path == folder or not folder:
        return path.removeprefix(folder)
    return path.removeprefix(folder + "/") if path.startswith(folder + "/") else None


def check_no_secrets(address: str, what: str = "a URI", hint: str = CLOUD) -> None:
    """UserError, which does not show it, where a URI holds a password, an access key or a signature."""
    if any(secret.match(address) for secret in _SECRETS):
        raise UserError(
            f"{what} holds a password or an access key, which files, logs and the dashboard would show; leave it out "
            f"and set {hint} in the environment"
        )


def check_arguments(words: Sequence[str]) -> None:
    """UserError where a word of a command line, which Ray's dashboard shows, holds a URI with a secret."""
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if found := re.search(_SCHEME + ":/", word):
            check_no_secrets(word[found.start() :], f"the URI of {flag}" if flag else "a URI", HINTS.get(flag, CLOUD))


def redacted(text: str) -> str:
    """`text` for people to see: what may be a password in a URI is left out."""
    return re.sub(rf"({_SCHEME}://)[^/@\s]*:[^@\s]*@", r"\1***@", text)


def is_utf8(path: str) -> bool:
    """Whether a local file's name, as Python reads it, is UTF-8 on the disk."""
    return path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)


def shown(path: str) -> str:
    r"""A name that is not UTF-8 as text: `zelle_\xfc.png`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
