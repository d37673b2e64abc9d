"""Which requests are admitted: token, host, origin; and headers that protect a browser."""

import hashlib
import hmac
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/healthz", "/docs", "/openapi.json")
"""Answered without a token: they contain nothing of a user."""
PAGE = "/page/"
"""Files of the page, answered without a token too; its requests are at other paths."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware that refuses requests without the token, or from pages of other origins.

    Without a token the service is for this machine alone: a name other than a loopback one in the header Host is a
    web page whose name was pointed at this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token_sha256: str | None) -> None:
        self.app, self.token_sha256 = app, token_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal:
            await _refuse(*refusal, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, path: str) -> tuple[int, str] | None:
        host = _host_name(headers.get("host", ""))
        if self.token_sha256 is None and host not in LOOPBACK_NAMES:
            return 403, f"this service answers at 127.0.0.1 alone, not as {host}; start it with a token for others"
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != headers.get("host"):
            return 403, "requests from pages of other origins are refused"
        if self.token_sha256 is None or path in OPEN_PATHS or path.startswith(PAGE):
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1")).hexdigest()
        if scheme.lower() == "bearer" and hmac.compare_digest(given, self.token_sha256):
            return None
        return 401, "no token, or a wrong one; send the header 'Authorization: Bearer TOKEN'"


def _host_name(host: str) -> str:
    """The name or address in a header Host, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(status: int, line: str, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": line}).encode()})
