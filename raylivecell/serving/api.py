"""The REST interface: an ASGI application, without Ray. `application` connects it to the deployments."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raylivecell.core.errors import UserError
from raylivecell.core.version import __version__
from raylivecell.serving import answers, requests
from raylivecell.serving.answers import Answer
from raylivecell.serving.guard import Guard
from raylivecell.serving.page_data import MAX_BYTES, Task
from raylivecell.serving.requests import Format, Options, RequestError, Upload
from raylivecell.serving.settings import ServeSettings

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("raylivecell.serving"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {path.name for path in PAGE.iterdir()}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
RETRY_AFTER_S = 2
SOON_S = 3
CLIENT_GONE = 499
"""Recorded for a request whose client closed the connection."""


class UnavailableError(Exception):
    """The service cannot answer now; the message is one line."""


_STATUSES: dict[type[Exception], int] = {RequestError: 0, UserError: 422, UnavailableError: 503}
"""Status of each expected error; a RequestError has its own."""


@dataclass(frozen=True)
class Backend:
    """What the interface needs from the deployments."""

    segment: Callable[[Upload, Options, Format], Coroutine[Any, Any, list[Answer]]]
    """Answers of one file; UnavailableError, UserError."""
    page: Callable[[Task, bytes], Coroutine[Any, Any, bytes]]
    """The answer to a request of the page (`page_data.answer`); UnavailableError, UserError."""
    model: Callable[[], Awaitable[Mapping[str, Any]]]
    """Facts about the network; UnavailableError while it is not loaded."""
    ready: Callable[[], Awaitable[None]]
    """UnavailableError unless every deployment has a process."""
    metrics: Callable[[], Awaitable[str]]
    """Prometheus' text format; OSError."""
    record: Callable[[int, int, float], None]
    """Called after each request to /segment: HTTP status, images, seconds."""


def build(settings: ServeSettings, token_sha256: str | None, backend: Backend) -> FastAPI:
    """Build the application; `token_sha256` is that of the token which requests must have, None: none."""
    app = FastAPI(
        title="raylivecell",
        version=__version__,
        description="Segments cells in microscopy images.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, token_sha256=token_sha256)
    _handle_errors(app)
    queue = _Queue(settings.max_queue, int(settings.max_queue_mib * 2**20))

    @app.post("/segment", openapi_extra=_REQUEST_BODY, responses=_RESPONSES, response_class=Response)
    async def segment(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Segment the files of the request."""
        began, status, images = time.monotonic(), 500, 0
        try:
            work = _segment(request, options, settings, queue, backend)
            response, images = await asyncio.wait_for(work, settings.timeout_s)
            status = response.status_code
            return response
        except asyncio.TimeoutError:  # TimeoutError since Python 3.11
            status = 503
            return _late(settings)
        except tuple(_STATUSES) as error:
            status = _status_of(error)
            raise
        except (asyncio.CancelledError, ClientDisconnect):
            status = CLIENT_GONE
            raise
        finally:
            backend.record(status, images, time.monotonic() - began)

    @app.get("/model")
    async def model() -> JSONResponse:
        """The network: fingerprint, targets, thresholds, intensities and scale of its images."""
        return JSONResponse(dict(await _soon(backend.model())))

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """`ok` once images can be segmented, else 503."""
        await _soon(backend.ready())
        return "ok\n"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Metrics of the machine that answers, for Prometheus."""
        try:
            return await backend.metrics()
        except OSError as error:
            raise UnavailableError("Ray's metrics do not answer on this machine") from error

    _add_page(app, settings, queue, backend)
    _add_documentation(app)
    return app


def _add_page(app: FastAPI, settings: ServeSettings, queue: "_Queue", backend: Backend) -> None:
    """Add the page at / with its files, and its requests."""
    max_bytes = min(int(settings.max_request_mib * 2**20), MAX_BYTES)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse((PAGE / "index.html").read_bytes())

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _PAGE_FILES:
            raise HTTPException(404, "Not Found")
        return Response((PAGE / name).read_bytes(), media_type=_MEDIA_TYPES[Path(name).suffix])

    @app.post("/page-data/{task}", include_in_schema=False)
    async def work(task: Task, request: Request) -> Response:
        size = _size(request, max_bytes)
        queue.enter(1, size)
        try:
            body = await requests.whole_body(request.headers, request.stream(), max_bytes)
            answer = await asyncio.wait_for(backend.page(task, body), settings.timeout_s)
        except asyncio.TimeoutError:
            return _late(settings)
        finally:
            queue.leave(1, size)
        return Response(answer, media_type="application/json")


def _add_documentation(app: FastAPI) -> None:
    """Add /docs, without scripts or other hosts."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_TEMPLATES.get_template("docs.html.j2").render(schema=app.openapi(), version=__version__))


def _late(settings: ServeSettings) -> JSONResponse:
    """The answer to a request that takes too long; without Retry-After, because it would take as long again."""
    return JSONResponse({"error": f"not finished after {settings.timeout_s:g} s; send fewer or smaller files"}, 503)


async def _soon(answer: Awaitable[Any]) -> Any:
    """The answer; UnavailableError if it takes more than `SOON_S`."""
    try:
        return await asyncio.wait_for(answer, SOON_S)
    except asyncio.TimeoutError as error:
        raise UnavailableError(f"no answer within {SOON_S} s: the service is starting or overloaded") from error


class _Queue:
    """Counts the bytes and files in work."""

    def __init__(self, files: int, size: int) -> None:
        self.max_files, self.max_size = files, size
        self.files = self.size = 0

    def enter(self, files: int, size: int) -> None:
        """Add files; RequestError 429 beyond a limit. An empty queue accepts any first request."""
        if self.files and (self.files + files > self.max_files or self.size + size > self.max_size):
            raise RequestError(429, f"{self.files} files are in work or waiting; repeat the request in some seconds")
        self.files += files
        self.size += size

    def leave(self, files: int, size: int) -> None:
        """Remove a request."""
        self.files -= files
        self.size -= size


async def _segment(
    request: Request, options: Options, settings: ServeSettings, queue: _Queue, backend: Backend
) -> tuple[Response, int]:
    kind = requests.chosen_format(options, request.headers.get("accept", ""))
    max_bytes = int(settings.max_request_mib * 2**20)
    size = _size(request, max_bytes)
    queue.enter(1, size)  # before the body is read
    files = 1
    try:
        name = request.headers.get("x-file-name")
        uploads = await requests.uploads(request.headers, request.stream(), name, max_bytes, settings.max_files)
        queue.enter(len(uploads) - 1, 0)
        files = len(uploads)
        results = await _all([backend.segment(upload, options, kind) for upload in uploads])
    finally:
        queue.leave(files, size)
    images = [answer for answers_of_file in results for answer in answers_of_file]
    stack = len(uploads) > 1 or len(images) > 1
    body, suffix = await asyncio.to_thread(answers.combine, images, kind, stack)
    zipped = suffix == ".zip" and kind != "rois"
    headers = {"content-disposition": f'inline; filename="{kind}{suffix}"'} if kind != "json" else {}
    media_type = requests.MEDIA_TYPES["rois" if zipped else kind]
    return Response(body, media_type=media_type, headers=headers), len(images)


def _size(request: Request, max_bytes: int) -> int:
    """Bytes of the body that a request declares, or the limit if it does not."""
    declared = request.headers.get("content-length", "")
    return min(int(declared), max_bytes) if declared.isdigit() else max_bytes


async def _all(calls: list[Coroutine[Any, Any, list[Answer]]]) -> list[list[Answer]]:
    """The results in order; if one fails, the others are cancelled and awaited before its error is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:  # also CancelledError, when the client has gone
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with JSON of one line."""
    for kind in _STATUSES:

        @app.exception_handler(kind)
        async def _expected(_: Request, error: Exception) -> JSONResponse:
            planes = error.planes if isinstance(error, RequestError) else ()
            return error_response(_status_of(error), " ".join(str(error).split()), planes)

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"{type(error).__name__} in the service; its log has the details")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "query"
        return error_response(422, f"{name}: {first['msg']}; the options are at /docs")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, f"{error.detail}; the addresses are at /docs")


def _status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    return next(status for kind, status in _STATUSES.items() if isinstance(error, kind))


def error_response(status: int, line: str, planes: Sequence[str] = ()) -> JSONResponse:
    """An error as JSON, maybe with the planes of its file; after 429 and 503 a client may try again."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return JSONResponse({"error": line} | ({"planes": list(planes)} if planes else {}), status, headers)


_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "description": "One or several files, as a form or one as the body; every format that `predict` reads.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The cells, in the format of `format` or of the header Accept",
        "content": {media_type: {} for media_type in requests.MEDIA_TYPES.values()},
    },
    401: {"description": "No token, or a wrong one"},
    413: {"description": "Too many bytes, files or pixels"},
    415: {"description": "An intact file of an unsupported kind"},
    422: {"description": "A damaged file, no file, or an invalid option"},
    429: {"description": "Too many files are waiting"},
    503: {"description": "Not ready, or not finished in time"},
}
