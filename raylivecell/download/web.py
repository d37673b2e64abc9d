"""Requests over HTTP and what their answers say: which failures may pass, which file this is.

Status and header rules are those of RFC 9110; proxies are the environment's (http_proxy, https_proxy, no_proxy).
"""

import datetime
import email.utils
import http.client
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any

from raylivecell.core.errors import UserError
from raylivecell.core.settings import StrictModel
from raylivecell.core.version import __version__

BLOCK = 1 << 16
"""Bytes read at a time: the most that a broken connection can lose."""
TIMEOUT_S = 60.0
"""Without a byte."""
LONGEST_WAIT_S = 300.0
"""Retry-After above this is not waited for in full."""
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that a later request may not meet."""


class Interrupted(Exception):
    """The transfer stopped; another request may go on (`over`: from the first byte, `wait_s`: not before)."""

    def __init__(self, reason: str, over: bool = False, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.over, self.wait_s = over, wait_s


class Note(StrictModel):
    """What the server said of a file when it sent the first byte."""

    url: str
    """Where it came from."""
    length: int | None
    """Bytes; None where the server did not say."""
    etag: str | None
    """As sent, quotes and W/ included."""
    md5: str | None
    """The ETag, where it is the file's MD5."""

    @property
    def validator(self) -> str | None:
        """What If-Range may carry: a strong ETag."""
        return self.etag if self.etag and self.etag.startswith('"') else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not from HTTPS to anything less, nor to ftp://."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The request that follows `req`; UserError where none should."""
        if urllib.parse.urlsplit(newurl).scheme not in ("https", urllib.parse.urlsplit(req.full_url).scheme):
            fp.close()
            raise UserError(f"{req.full_url} redirects to {newurl}; choose another --base-url")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def request(url: str, headers: Mapping[str, str], method: str = "GET") -> Any:
    """The response to a request, its status 2xx or 416, to be closed by the caller.

    Interrupted where a later request may fare better, UserError where the user must mend something.
    """
    sent = {"User-Agent": f"raylivecell/{__version__}", "Accept-Encoding": "identity", **headers}
    asked = urllib.request.Request(url, headers=sent, method=method)
    try:
        response = urllib.request.build_opener(_Redirects).open(asked, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        raise _refusal(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(f"{url}: {reason.verify_message}; set SSL_CERT_FILE to your network's CA file") from error
        words = " ".join(str(reason).split()) or type(error).__name__
        raise Interrupted(f"no answer ({words})") from error
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        response.close()
        raise UserError(f"{url} is sent as {encoding}, though not asked for; choose another --base-url")
    return response


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """What a status other than 2xx and 416 means."""
    with error:
        if error.code in TRANSIENT:
            return Interrupted(f"HTTP {error.code}", wait_s=_retry_after(error.headers))
    if error.code == 407:
        return UserError("the proxy asks for a name and password; set https_proxy=http://NAME:PASSWORD@HOST:PORT")
    return UserError(f"{url}: HTTP {error.code} {error.reason}; check --base-url")


def _retry_after(headers: Message) -> float | None:
    """Seconds that Retry-After asks for, given as seconds or as a date; None where it says nothing."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return min(float(text), LONGEST_WAIT_S)
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    wait = (until - datetime.datetime.now(until.tzinfo or datetime.timezone.utc)).total_seconds()
    return min(max(wait, 0.0), LONGEST_WAIT_S)


def note_from(url: str, headers: Message) -> Note:
    """What a response's headers say of the file.

    S3's ETag is the MD5 of an object put in one piece without KMS encryption; in several pieces it ends in -N. Other
    servers' ETags are anything, 32 hexadecimal digits too: only S3's is taken for a checksum.
    """
    etag = headers.get("ETag")
    length = headers.get("Content-Length", "")
    is_s3 = any(name.lower().startswith("x-amz") for name in headers) or headers.get("Server") == "AmazonS3"
    sealed = "aws:kms" in headers.get("x-amz-server-side-encryption", "")
    plain = re.fullmatch(r'"([0-9a-f]{32})"', etag or "")
    return Note(
        url=url,
        length=int(length) if length.isdecimal() else None,
        etag=etag,
        md5=plain[1] if plain and is_s3 and not sealed else None,
    )


def read_block(response: Any) -> bytes:
    """The next bytes of a response's body, b"" at its end; Interrupted where the connection breaks."""
    try:
        return bytes(response.read(BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke ({type(error).__name__})") from error
