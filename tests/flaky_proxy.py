"""HTTP proxy for the S3 server of hosts.py that answers 503 SlowDown while a given file exists."""

import http.client
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GATEWAY, S3_PORT, PROXY_PORT = "10.77.0.1", 5555, 5556
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"


class Proxy(BaseHTTPRequestHandler):
    """Forwards requests unchanged."""

    protocol_version = "HTTP/1.1"
    down: Path

    def handle_any(self) -> None:
        body = self._body()
        if self.down.exists():
            self._respond(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        server = http.client.HTTPConnection(GATEWAY, S3_PORT, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        server.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        response = server.getresponse()
        data = response.read()
        self._respond(response.status, dict(response.getheaders()), data)
        server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _respond(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", headers.get("content-length"))
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *words: object) -> None:
        """Log nothing."""


if __name__ == "__main__":
    Proxy.down = Path(sys.argv[1])
    ThreadingHTTPServer((GATEWAY, PROXY_PORT), Proxy).serve_forever()
