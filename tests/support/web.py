"""A web server on loopback that sends ranges of files, records the requests, and can be switched off."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Web:
    """The requests that a running server has answered."""

    root: Path
    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, first byte and number of bytes of each request that was answered with content."""
    away_after: int | None = None
    """Requests for tars after which the server answers 503 to all of them; None: never."""

    def tar_requests(self) -> int:
        return sum(name.endswith(".tar") for name, _, _ in self.asked)


@contextmanager
def serve(root: Path) -> Iterator[Web]:
    web = Web(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            path = web.root / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                return self._say(404, b"", send)
            is_tar = path.suffix == ".tar"
            if is_tar and web.away_after is not None and web.tar_requests() >= web.away_after:
                return self._say(503, b"", send)
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None:
                first, piece = 0, data
            else:
                first = int(wanted[1])
                piece = data[first : int(wanted[2]) + 1 if wanted[2] else None]
            if send:
                web.asked.append((path.name, first, len(piece)))
            span = f"bytes {first}-{first + len(piece) - 1}/{len(data)}" if wanted else None
            return self._say(206 if wanted else 200, piece, send, span)

        def _say(self, status: int, body: bytes, send: bool, span: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Accept-Ranges", "bytes")
            if span is not None:
                self.send_header("Content-Range", span)
            self.end_headers()
            if send:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Ignores connections that killed clients have closed."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
