"""A real S3 server on loopback."""

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


@contextmanager
def serve_s3(*buckets: str) -> Iterator[str]:
    """Starts a server with empty buckets; its address is in the environment. Yields the address."""
    import s3fs
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        urlopen(
            Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        )  # of an earlier server of this process
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        for bucket in buckets:
            s3fs.S3FileSystem().mkdir(bucket)
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def upload(source: Path, url: str) -> None:
    """Uploads a file or a folder."""
    import s3fs

    s3fs.S3FileSystem().put(str(source), url.removeprefix("s3://"), recursive=True)


def list_names(url: str) -> list[str]:
    """The names below a URL."""
    import s3fs

    store: Any = s3fs.S3FileSystem()
    store.invalidate_cache()
    root = url.removeprefix("s3://")
    return [path.removeprefix(f"{root}/") for path in store.find(root)] if store.exists(root) else []


def list_objects(url: str) -> dict[str, bytes]:
    """The names below a URL, and their contents."""
    import s3fs

    root = url.removeprefix("s3://")
    return {name: s3fs.S3FileSystem().cat_file(f"{root}/{name}") for name in list_names(url)}


def list_local(folder: Path) -> dict[str, bytes]:
    """The same of a local folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def serve_faults(address: str, choose: Callable[[str, str], tuple[int, str] | None]) -> Iterator[str]:
    """Starts a server that passes requests on to the one at `address`, except those for which `choose(method, path)`
    returns an error: (status, code of S3), or (0, "") to close the connection. It becomes the store of the environment.
    """
    import s3fs

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if (fault := choose(self.command, self.path)) is not None:
                status, code = fault
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                text = f"<Error><Code>{code}</Code><Message>{code} of the test</Message></Error>".encode()
                self.answer(status, [("Content-Type", "application/xml")], text)
                return
            server = http.client.HTTPConnection(address.removeprefix("http://"))
            server.request(self.command, self.path, body, dict(self.headers))
            response = server.getresponse()
            self.answer(response.status, response.getheaders(), response.read())
            server.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"http://127.0.0.1:{server.server_port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
