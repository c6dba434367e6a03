"""Pictures at URLs, from a real server on loopback that misbehaves in every way that servers do."""

import base64
import contextlib
import gzip
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from killed_pack import KillAfter, Killed
from PIL import Image

from shards.format.manifest import read_manifest
from shards.format.rejected import read_rejected
from shards.inspect.verify import verify
from shards.pack.packer import Packer, PackResult
from shards.pack.pipeline import PackSettings, pack
from shards.pictures.formats import BadPicture
from shards.sources import answers
from shards.sources import download as downloads
from shards.sources.answers import Answers
from shards.sources.files import REMOTE_READS, fetch_images
from uniemox_dist.core.errors import Fault, UserError


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `/N.png`, and misbehaves at all other paths."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: Counter[str] = Counter()
        self.open = 0
        self.most_open = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path[1:]
        with self.server.lock:
            self.server.requests[name] += 1
        getattr(self, f"send_{name}", self.send_picture)()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_picture(self) -> None:
        number = self.path[1:].removesuffix(".png")
        if not number.isdecimal():
            return self.answer(404)
        with self.server.lock:
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        time.sleep(0.02)  # so that requests overlap
        with self.server.lock:
            self.server.open -= 1
        return self.answer(200, picture(int(number)), Content_Type="image/png")

    def send_html(self) -> None:
        self.answer(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8")

    def send_mislabelled(self) -> None:
        self.answer(200, picture(1), Content_Type="text/html")

    def send_gone(self) -> None:
        self.answer(410)

    def send_busy(self) -> None:
        self.answer(503)

    def send_once_busy(self) -> None:
        if self.server.requests["once_busy"] == 1:
            self.answer(429, Retry_After="0")
        else:
            self.answer(200, picture(2))

    def send_silent(self) -> None:
        time.sleep(2)

    def send_dripping(self) -> None:
        self.answer(200, Content_Length="1000000")
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def send_dripping_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def send_half(self) -> None:
        self.answer(200, b"x" * 10, Content_Length="20")

    def send_huge(self) -> None:
        self.answer(200, Content_Length=str(1 << 40))
        for _ in range(1000):
            self.wfile.write(b"x" * 65536)

    def send_to_file(self) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def send_to_ftp(self) -> None:
        self.answer(301, Location="ftp://127.0.0.1/x.png")

    def send_to_picture(self) -> None:
        self.answer(307, Location="/3.png")

    def send_circle(self) -> None:
        self.answer(302, Location="/circle")

    def send_endless_redirect(self) -> None:
        self.answer(302, Location="/3.png", Content_Length=str(1 << 40))
        for _ in range(50):
            self.wfile.write(b"x" * 65536)
            time.sleep(0.05)

    def send_gzip(self) -> None:
        self.answer(200, gzip.compress(picture(4)), Content_Encoding="gzip")

    def send_named_gzip(self) -> None:
        self.answer(200, picture(4), Content_Encoding="gzip")

    def send_bomb(self) -> None:
        self.answer(200, gzip.compress(bytes(8 << 20)), Content_Encoding="gzip")

    def send_half_gzip(self) -> None:
        self.answer(200, gzip.compress(picture(4))[:-20], Content_Encoding="gzip")

    def send_no_gzip(self) -> None:
        self.answer(200, b"x" * 99, Content_Encoding="gzip")

    def send_brotli(self) -> None:
        self.answer(200, b"x" * 99, Content_Encoding="br")

    def send_archive(self) -> None:
        self.answer(200, b"x" * 99, Content_Type="application/zip")

    def send_nothing(self) -> None:
        self.answer(200)

    def send_no_content(self) -> None:
        self.answer(204)

    def send_part(self) -> None:
        self.answer(206, picture(4)[:99], Content_Range="bytes 0-98/500")

    def send_private(self) -> None:
        if self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode():
            self.answer(200, picture(4))
        else:
            self.answer(401)

    def send_nonsense(self) -> None:
        self.wfile.write(b"220 mail server\r\n")

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE_S", 0.01)
    monkeypatch.setattr(downloads, "LARGEST_BYTES", 1 << 20)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def fetch(url: str) -> bytes | BadPicture:
    [found] = fetch_images([url])
    return found


@pytest.mark.parametrize(
    ("path", "expected", "requests"),
    [
        ("missing", ("unreadable", "the server answers 404 Not Found: {url}"), 1),
        ("gone", ("unreadable", "the server answers 410 Gone: {url}"), 1),
        (
            "busy",
            ("unreadable", "the server answers 503 Service Unavailable (tried 3 times): {url}"),
            3,
        ),
        ("html", ("format", "the server sent text/html, not a picture: {url}"), 1),
        ("silent", ("unreadable", "no answer within 0.3 s (tried 2 times): {url}"), 2),
        ("dripping", ("unreadable", "not complete after 0.7 s (tried 2 times): {url}"), 2),
        ("dripping_header", ("unreadable", "not complete after 0.7 s (tried 2 times): {url}"), 2),
        ("half", ("unreadable", "the server sent 10 of 20 bytes (tried 2 times): {url}"), 2),
        ("huge", ("too_large", "more than 1,048,576 bytes: {url}"), 1),
        ("to_file", ("unreadable", "redirects to file:///etc/passwd, which is not followed: {url}"), 1),
        ("to_ftp", ("unreadable", "redirects to ftp://127.0.0.1/x.png, which is not followed: {url}"), 1),
        ("circle", ("unreadable", "more than 5 redirects: {url}"), 6),
        ("bomb", ("too_large", "more than 1,048,576 bytes: {url}"), 1),
        (
            "half_gzip",
            ("unreadable", "the server sent only a part of the gzip data (tried 2 times): {url}"),
            2,
        ),
        (
            "no_gzip",
            ("unreadable", "the server sent bytes that are not in their Content-Encoding gzip: {url}"),
            1,
        ),
        ("brotli", ("format", "the server sent it in Content-Encoding br: {url}"), 1),
        (
            "archive",
            (
                "corrupt",
                "not a picture of a known format; the server answers 200 OK with application/zip: {url}",
            ),
            1,
        ),
        ("nothing", ("empty", "the server answers 200 OK without content: {url}"), 1),
        ("no_content", ("empty", "the server answers 204 No Content without content: {url}"), 1),
        ("part", ("unreadable", "the server answers 206 Partial Content, only a part of it: {url}"), 1),
        ("nonsense", ("unreadable", "220 mail server (tried 2 times): {url}"), 2),
    ],
)
def test_a_failure_is_refused_with_its_reason(
    server: Server, path: str, expected: tuple[str, str], requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "silent":
        monkeypatch.setattr(downloads, "SILENCE_S", 0.3)
    if path.startswith("dripping"):
        monkeypatch.setattr(downloads, "TOTAL_S", 0.7)
    found = fetch(f"{server.url}/{path}")
    assert isinstance(found, BadPicture)
    assert (found.reason, found.detail) == (expected[0], expected[1].format(url=f"{server.url}/{path}"))
    assert server.requests[path] == requests


@pytest.mark.parametrize(
    ("path", "number"),
    [("1.png", 1), ("mislabelled", 1), ("once_busy", 2), ("to_picture", 3), ("gzip", 4), ("named_gzip", 4)],
)
def test_a_picture_is_fetched_even_if_its_server_hesitates(server: Server, path: str, number: int) -> None:
    assert fetch(f"{server.url}/{path}") == picture(number)


@pytest.mark.parametrize(
    ("url", "encoded"),
    [
        ("http://bücher.de:80/ä b.jpg?q=ü", "http://xn--bcher-kva.de:80/%C3%A4%20b.jpg?q=%C3%BC"),
        ("https://h/a%20b/c::d.jpg", "https://h/a%20b/c::d.jpg"),
    ],
)
def test_urls_are_encoded(url: str, encoded: str) -> None:
    assert downloads._encode(url) == encoded


def test_the_body_of_a_redirect_is_not_read(server: Server) -> None:
    assert fetch(f"{server.url}/endless_redirect") == picture(3)


def test_hosts_and_urls_that_do_not_exist_are_refused(server: Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        refused = fetch(f"http://127.0.0.1:{port}/1.png")
    assert isinstance(refused, BadPicture)
    assert refused.detail == f"Connection refused (tried 2 times): http://127.0.0.1:{port}/1.png"
    for url in ("http://", "http://[", "http://h:port/", "http://a\0b/"):
        found = fetch(url)
        assert isinstance(found, BadPicture)
        assert found.reason == "unreadable"


def test_keys_in_urls_are_not_written_down(server: Server) -> None:
    found = fetch(f"{server.url}/missing?signature=secret")
    assert isinstance(found, BadPicture)
    assert found.detail == f"the server answers 404 Not Found: {server.url}/missing?…"


def test_users_in_urls_are_sent_as_basic_authentication_and_not_written_down(server: Server) -> None:
    host = server.url.removeprefix("http://")
    assert fetch(f"http://me:p%40ss@{host}/private") == picture(4)
    found = fetch(f"http://me:wrong@{host}/private")
    assert isinstance(found, BadPicture)
    assert found.detail == f"the server answers 401 Unauthorized: http://…@{host}/private"


def test_spaces_around_a_url_do_not_matter(server: Server, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"url,text\n  {server.url}/1.png ,one\n")
    assert pack(PackSettings(str(tmp_path / "t.csv"), persons="none"), tmp_path / "out").packed == {"": 1}


def test_connections_are_concurrent_and_bounded(server: Server) -> None:
    found = fetch_images([f"{server.url}/{i}.png" for i in range(100)])
    assert found == [picture(i) for i in range(100)]
    assert 1 < server.most_open <= REMOTE_READS


def pack_urls(server: Server, folder: Path, names: list[str], **options: bool) -> PackResult:
    table = folder / "t.csv"
    table.write_text("url,text\n" + "".join(f"{server.url}/{name},about {name}\n" for name in names))
    settings = PackSettings(str(table), persons="none", shard_samples=4)
    return pack(settings, folder / "out", **options)  # type: ignore[arg-type]


def test_a_table_of_urls_is_packed_and_its_failures_are_listed(server: Server, tmp_path: Path) -> None:
    result = pack_urls(server, tmp_path, ["1.png", "missing", "html", "to_file", "2.png", "gone", "huge"])
    assert (result.packed, result.contents["captions"]) == ({"": 2}, 2)
    rows = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in rows} == {
        "t.csv#1": "unreadable",
        "t.csv#2": "format",
        "t.csv#3": "unreadable",
        "t.csv#5": "unreadable",
        "t.csv#6": "too_large",
    }


def test_resume_fetches_only_what_is_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(48)]
    consume = Packer._consume

    def stop_after_two(self: Packer, *arguments: object) -> None:
        consume(self, *arguments)  # type: ignore[arg-type]
        if self.position >= 32:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Packer, "_consume", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            pack_urls(server, tmp_path, names)
    server.requests.clear()
    result = pack_urls(server, tmp_path, names, resume=True)
    assert result.packed == {"": 48}
    assert sum(server.requests.values()) == 48 - result.resumed
    assert result.resumed >= 28  # 32 were fetched, and the last shard may have been open


def test_refused_downloads_are_tried_again_and_appended(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(10)] + ["html", "once_busy", "gone"]
    send = Handler.send_picture

    def send_few(self: Handler) -> None:
        (send if self.path in ("/1.png", "/2.png", "/3.png", "/4.png") else Handler.send_busy)(self)

    with monkeypatch.context() as patched:
        patched.setattr(Handler, "send_picture", send_few)
        patched.setattr(Handler, "send_once_busy", Handler.send_busy)
        first = pack_urls(server, tmp_path, names)
    assert (first.packed, len(first.rejected)) == ({"": 4}, 9)
    before = files(tmp_path / "out")
    server.requests.clear()
    server.requests["once_busy"] = 1
    again = pack_urls(server, tmp_path, names, retry_refused=True)
    # Only the refused ones are requested. `once_busy` sends picture 2, which the data set has.
    assert sorted(server.requests) == sorted({*names} - {"1.png", "2.png", "3.png", "4.png"})
    assert (again.records, again.packed) == (9, {"": 6})
    assert {(row.source, row.reason) for row in again.rejected} == {
        ("t.csv#10", "format"),
        ("t.csv#11", "duplicate"),
        ("t.csv#12", "unreadable"),
    }
    after = files(tmp_path / "out")
    assert {name: after[name] for name in before if name.endswith(".tar")} == {
        name: content for name, content in before.items() if name.endswith(".tar")
    }
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.samples, manifest.provenance["records"]) == (10, 13)
    assert manifest.provenance["rejected"] == {"duplicate": 1, "format": 1, "unreadable": 1}
    [part] = manifest.provenance["appended"]
    assert (part["retried"], part["records"], part["samples"]) == (True, 9, 6)
    rows = read_rejected(tmp_path / "out") or []
    assert {row["source"] for row in rows} == {"t.csv#10", "t.csv#11", "t.csv#12"}
    assert not [verdict for verdict in verify([tmp_path / "out"]) if verdict.problems]
    # Two of them are tried once more; nothing changes.
    server.requests.clear()
    vain = pack_urls(server, tmp_path, names, retry_refused=True)
    assert (vain.reused, len(vain.rejected), sorted(server.requests)) == (True, 2, ["gone", "html"])
    assert files(tmp_path / "out") == after


def test_retrying_is_refused_with_another_source_or_other_settings(server: Server, tmp_path: Path) -> None:
    pack_urls(server, tmp_path, ["1.png", "gone"])
    settings = PackSettings(str(tmp_path / "t.csv"), persons="none", shard_samples=4, seed=1)
    phrase = "was not packed from this SOURCE with these settings alone; give the same ones, or use --append"
    with pytest.raises(UserError, match=phrase):
        pack(settings, tmp_path / "out", retry_refused=True)
    with pytest.raises(UserError, match=phrase):
        pack_urls(server, tmp_path, ["1.png", "gone", "2.png"], retry_refused=True)
    with pytest.raises(UserError, match="--append and --retry-refused: give only one of them"):
        pack(settings, tmp_path / "out", append=True, retry_refused=True)
    with pytest.raises(UserError, match="has no data set to append to"):
        pack(settings, tmp_path / "none", retry_refused=True)


def test_splits_that_the_pack_drew_stay_when_refused_pictures_are_tried_again(tmp_path: Path) -> None:
    """Also with replaced files of a folder, and if the first try is killed."""
    folders = [tmp_path / "in" / label for label in ("anger", "disgust")]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(40):
        (folders[number % 2] / f"{number}.png").write_bytes(picture(number))
    settings = PackSettings(
        str(tmp_path / "in"), "folder", persons="none", preset="emotion6", shard_samples=4
    )
    pack(settings, tmp_path / "whole", licence="MIT")
    expected = {key: split for split in SPLITS for key in keys_of(tmp_path / "whole" / split)}
    for number in range(0, 40, 2):
        (folders[0] / f"{number}.png").write_bytes(b"no picture")
    assert len(pack(settings, tmp_path / "out", licence="MIT").rejected) == 20
    for number in range(0, 40, 2):
        (folders[0] / f"{number}.png").write_bytes(picture(number))
    before = files(tmp_path / "out")
    with pytest.raises(Killed):
        pack(settings, tmp_path / "out", retry_refused=True, progress=KillAfter(15))
    assert before.items() <= files(tmp_path / "out").items()
    result = pack(settings, tmp_path / "out", retry_refused=True, resume=True)
    assert (result.records, sum(result.packed.values()), result.rejected) == (20, 20, [])
    assert {key: split for split in SPLITS for key in keys_of(tmp_path / "out" / split)} == expected
    assert read_rejected(tmp_path / "out") == []
    assert read_manifest(tmp_path / "out/train").provenance["licence"] == "MIT"
    assert pack(settings, tmp_path / "out", retry_refused=True).reused


SPLITS = ("train", "val", "test")


def keys_of(folder: Path) -> list[str]:
    return [key for path in (folder / "index").iterdir() for key in pq.read_table(path)["key"].to_pylist()]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_pack_ends_if_no_server_answers_any_more_and_can_resume(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "answers", Answers("web server", "the network"))
    monkeypatch.setattr(answers, "SILENT_PICTURES", 12)
    # Servers that never answered are refused picture by picture.
    assert all(isinstance(found, BadPicture) for found in fetch_images([f"{server.url}/busy"] * 16))
    send = Handler.send_picture

    def send_sixteen(self: Handler) -> None:
        (send if self.server.requests.total() <= 16 else Handler.send_busy)(self)

    monkeypatch.setattr(Handler, "send_picture", send_sixteen)
    server.requests.clear()
    names = [f"{i}.png" for i in range(48)]
    with pytest.raises(
        Fault, match=r"no web server answered for the last \d+ pictures, so the network may be"
    ):
        pack_urls(server, tmp_path, names)
    monkeypatch.setattr(Handler, "send_picture", send)
    assert pack_urls(server, tmp_path, names, resume=True).packed == {"": 48}


def test_hosts_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of names that fail for ever answer with "temporary failure" as well."""
    monkeypatch.setattr(downloads, "PAUSE_S", 0.01)
    for code, tried in ((socket.EAI_AGAIN, " (tried 2 times)"), (socket.EAI_NONAME, "")):

        def fail(*_: object, code: int = code, **__: object) -> None:
            raise socket.gaierror(code, "no address")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        found = fetch("http://h/1.png")
        assert isinstance(found, BadPicture)
        assert found.detail == f"no address{tried}: http://h/1.png"


# ---- the total time of a try


@contextlib.contextmanager
def answers_with(*pieces: bytes) -> Iterator[int]:
    """The port of a server that sends a piece every 50 ms, whatever it is asked, and then keeps the connection open."""
    ends = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
                if ends.wait(0.05):
                    return
            ends.wait()

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while not ends.is_set():
                with contextlib.suppress(OSError):
                    threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        ends.set()


TLS_RECORD = b"\x16\x03\x03\x40\x00"  # the head of a handshake record of 16 KiB
TRICKLE = [TLS_RECORD, *[b"x"] * 200]


@pytest.mark.parametrize(
    ("pieces", "silence_s", "detail"),
    [
        ([], 0.3, "no answer within 0.3 s"),
        ([], 30.0, "not complete after 0.7 s"),
        (TRICKLE, 30.0, "not complete after 0.7 s"),
    ],
    ids=["silent", "silent, total", "trickle"],
)
def test_a_server_that_never_begins_tls_is_given_up(
    pieces: list[bytes], silence_s: float, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PAUSE_S", 0.01)
    monkeypatch.setattr(downloads, "SILENCE_S", silence_s)
    monkeypatch.setattr(downloads, "TOTAL_S", 0.7)
    with answers_with(*pieces) as port:
        url = f"https://127.0.0.1:{port}/1.png"
        found = fetch(url)
    assert isinstance(found, BadPicture)
    assert (found.reason, found.detail) == ("unreadable", f"{detail} (tried 2 times): {url}")


@pytest.mark.parametrize(
    ("silence_s", "detail"), [(0.2, "no answer within 0.2 s"), (30.0, "not complete after 0.4 s")]
)
def test_a_name_that_is_looked_up_for_ever_is_given_up(
    silence_s: float, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resolver of the system has no time-out of ours."""
    ends = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [ends.wait()][:0])
    monkeypatch.setattr(downloads, "PAUSE_S", 0.01)
    monkeypatch.setattr(downloads, "SILENCE_S", silence_s)
    monkeypatch.setattr(downloads, "TOTAL_S", 0.4)
    found = fetch("http://h/1.png")
    ends.set()
    assert isinstance(found, BadPicture)
    assert found.detail == f"{detail} (tried 2 times): http://h/1.png"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_pictures_are_fetched_by_tls_and_a_certificate_of_nobody_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Server() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"https://127.0.0.1:{server.server_port}"
        refused = fetch(f"{url}/1.png")
        monkeypatch.setenv("SSL_CERT_FILE", f"{tmp_path}/cert.pem")
        found = fetch_images([f"{url}/{i}.png" for i in range(20)])
        server.shutdown()
    assert found == [picture(i) for i in range(20)]
    assert isinstance(refused, BadPicture)
    assert refused.detail == f"self-signed certificate: {url}/1.png"
