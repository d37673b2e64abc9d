"""Addresses of files and folders: local paths, and URIs that `pyarrow.fs` opens. Only this module parses and joins
them.

A URI is SCHEME://AUTHORITY/PATH?OPTIONS with a percent-encoded path. `join` encodes every name that it appends, and
`split` decodes it, so that every name is preserved. In a URI typed by a user, a space, a `#`, a `%` without two
hexadecimal digits and a `?` without options belong to the path. A local path is never decoded; a `file:` URI is a local
path.
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
"""Characters of a path that are not percent-encoded."""
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_SECRETS = (
    # KEY:SECRET@; the secret may contain slashes, and a port is not a secret.
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
"""Environment variable for a sweep's Optuna storage URL that contains a password."""
HINTS = {
    "--storage": f"{STORAGE} to the URL, with its password,",
    "--mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
}
"""Environment variables that replace a secret in the URI of a flag."""


class Parts(NamedTuple):
    """Parts of a URI."""

    scheme: str
    authority: str
    """Bucket or host."""
    path: str
    """Decoded, without leading and trailing slashes."""
    options: str
    """`region=eu-west-1&...`, or ""."""

    def root(self) -> str:
        """Return the URI of the filesystem."""
        return f"{self.scheme}://{self.authority}/" + (f"?{self.options}" if self.options else "")

    def text(self) -> str:
        """Return the URI."""
        path = f"/{quote(self.path, _SAFE)}" if self.path else ""
        return f"{self.scheme}://{self.authority}{path}" + (f"?{self.options}" if self.options else "")


def split(address: str) -> Parts | None:
    """Split a URI; None for a local path or a `file:` URI. UserError if it contains a password or an access key."""
    check_no_secrets(address)
    match = _URI.fullmatch(address)
    if match is None or _FILE.fullmatch(address):
        return None
    path, question_mark, options = match["rest"].partition("?")
    if not _OPTIONS.fullmatch(options):
        path, options = path + question_mark + options, ""
    if match["scheme"].lower() == "file":
        raise UserError(f"{address} is on another machine, {match['authority']}; give a path on this one")
    return Parts(match["scheme"], match["authority"], unquote(path).strip("/"), options)


def local_path(address: str) -> str:
    """Return the absolute path of a local path or a `file:` URI; UserError if it is not UTF-8."""
    check_no_secrets(address)
    match = _FILE.fullmatch(address)
    path = unquote(match["path"]) if match else os.path.expanduser(address)
    if not is_utf8(path):
        raise UserError(f"the name {shown(path)} is not UTF-8; rename it")
    return str(Path(path).absolute())


def absolute(address: str) -> str:
    """Normalise `address` so that it means the same in any process."""
    parts = split(address)
    return local_path(address) if parts is None else parts.text()


def join(address: str, *names: str) -> str:
    """Append plain `names`, each a path without leading and trailing slashes, to `address`."""
    parts = split(address)
    if parts is not None:
        return parts._replace(path="/".join([*([parts.path] if parts.path else []), *names])).text()
    root = local_path(address) if _FILE.fullmatch(address) else address
    return "/".join([root.rstrip("/") if root.strip("/") else root[:0], *names])


def name(address: str) -> str:
    """Last part of the path, decoded; the bucket or host if the path is empty."""
    parts = split(address)
    path = local_path(address) if parts is None else parts.path or parts.authority
    return path.rpartition("/")[2]


def parent(address: str) -> str:
    """Folder that contains `address`."""
    parts = split(address)
    if parts is None:
        return os.path.dirname(local_path(address))
    return parts._replace(path=parts.path.rpartition("/")[0]).text()


def relative(address: str, root: str) -> str | None:
    """Decoded path of `address` relative to the folder `root` ("" for the folder itself); None if it is outside."""
    parts, root_parts = split(address), split(root)
    if (parts and parts._replace(path="")) != (root_parts and root_parts._replace(path="")):
        return None
    path = parts.path if parts else local_path(address).strip("/")
    folder = root_parts.path if root_parts else local_path(root).strip("/")
    if path == folder or not folder:
        return path.removeprefix(folder)
    return path.removeprefix(folder + "/") if path.startswith(folder + "/") else None


def check_no_secrets(address: str, subject: str = "a URI", hint: str = CLOUD) -> None:
    """Raise a UserError, which does not show the URI, if it contains a password, an access key or a signature."""
    if any(secret.match(address) for secret in _SECRETS):
        raise UserError(
            f"{subject} contains a password or an access key, which files, logs and the dashboard would show; remove "
            f"it and set {hint} in the environment"
        )


def check_arguments(words: Sequence[str]) -> None:
    """Raise a UserError if an argument contains a URI with a secret: Ray's dashboard shows the command line."""
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if match := re.search(_SCHEME + ":/", word):
            check_no_secrets(word[match.start() :], f"the URI of {flag}" if flag else "a URI", HINTS.get(flag, CLOUD))


def redacted(text: str) -> str:
    """Replace user names and passwords of URIs in `text` by ***."""
    return re.sub(rf"({_SCHEME}://)[^/@\s]*:[^@\s]*@", r"\1***@", text)


def is_utf8(path: str) -> bool:
    """Whether a local file's name, as decoded by Python, is UTF-8 on the disk."""
    return path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)


def shown(path: str) -> str:
    r"""Return a name that is not UTF-8 as printable text: `zelle_\xfc.png`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
