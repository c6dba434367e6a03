"""Pictures in stores that stop answering, from a real S3 server and from ports of loopback without a server."""

import io
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs
from PIL import Image
from s3 import serve_faults, serve_s3, upload

from shards.format.rejected import read_rejected
from shards.pack.pipeline import PackSettings, pack
from shards.pictures.formats import BadPicture
from shards.sources import answers, stores
from shards.sources.files import fetch_images
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, Fault

PICTURES = 64


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        buffer = io.BytesIO()
        pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels_HW3).save(buffer, "PNG")
        (folder / f"{number:02}.png").write_bytes(buffer.getvalue())
    return folder


@pytest.fixture(scope="module")
def store(pictures: Path) -> Iterator[str]:
    """The address of a server with the pictures at s3://bucket/src."""
    with serve_s3("bucket") as address:
        upload(pictures, "s3://bucket/src")
        yield address


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has answered yet, and pauses are short."""
    monkeypatch.setattr(stores, "_by_protocol", {})
    monkeypatch.setattr(stores, "PAUSE_S", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


class Outage:
    """Answers an error to all requests for pictures after the first `first`."""

    def __init__(self, first: int, status: int, code: str) -> None:
        self.left, self.fault = first, (status, code)

    def __call__(self, method: str, path: str) -> tuple[int, str] | None:
        if method != "GET" or ".png" not in path or "list-type" in path:
            return None
        self.left -= 1
        return self.fault if self.left < 0 else None


def write_table(folder: Path, urls: list[str]) -> Path:
    table = folder / "t.csv"
    table.write_text("path,caption\n" + "".join(f"{url},about {url}\n" for url in urls))
    return table


@pytest.mark.parametrize("fault", [(0, ""), (503, "ServiceUnavailable"), (500, "InternalError")], ids=str)
@pytest.mark.parametrize("kind", ["table", "folder"])
def test_the_pack_ends_if_a_store_does_not_answer_any_more_and_can_resume(
    kind: str,
    fault: tuple[int, str],
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(answers, "SILENT_PICTURES", 12)
    source = "s3://bucket/src"
    if kind == "table":
        source = str(write_table(tmp_path, [f"s3://bucket/src/{i:02}.png" for i in range(PICTURES)]))
    out = tmp_path / "out"
    command = ["shards", "pack", source, str(out), "--layout", kind, "--persons", "none"]
    command += ["--shard-samples", "8", "--workers", "0"]
    with serve_faults(store, Outage(20, *fault)):
        assert run(command) == EXIT_FAULT
    [line] = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    # Pictures that were being read at that moment may fail, too, and count.
    found = re.search(r"error: no s3:// server answered for the last (\d+) pictures", line)
    assert found is not None
    assert 12 <= int(found[1]) <= 32
    assert line.endswith("continue with --resume")
    assert not out.exists()
    # A new process has met no server; that this one answered before is known from the records it packed.
    monkeypatch.setattr(stores, "_by_protocol", {})
    with serve_faults(store, Outage(0, *fault)):
        assert run([*command, "--resume"]) == EXIT_FAULT
    assert not out.exists()
    monkeypatch.setattr(stores, "_by_protocol", {})
    assert run([*command, "--resume"]) == EXIT_DONE
    assert f"{PICTURES} records = {PICTURES} packed + 0 refused" in capfd.readouterr().out


def test_a_folder_whose_store_stops_right_after_it_was_listed_ends_the_pack(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SILENT_PICTURES", 12)
    settings = PackSettings("s3://bucket/src", "folder", persons="none")
    with (
        serve_faults(store, Outage(0, 503, "SlowDown")),
        pytest.raises(Fault, match="no s3:// server answered"),
    ):
        pack(settings, tmp_path / "out", workers=0)


def test_missing_and_forbidden_pictures_of_a_store_are_refused_however_many(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SILENT_PICTURES", 4)
    urls = ["s3://bucket/src/00.png", *(f"s3://bucket/none/{i}.png" for i in range(8)), "s3://nowhere/x.png"]
    urls += [f"s3://bucket/src/{i:02}.png" for i in range(10, 18)]

    def forbid(method: str, path: str) -> tuple[int, str] | None:
        return (403, "AccessDenied") if "/src/1" in path else None

    with serve_faults(store, forbid):
        result = pack(
            PackSettings(str(write_table(tmp_path, urls)), persons="none"), tmp_path / "out", workers=0
        )
    assert result.packed == {"": 1}
    found = {row["source"]: (row["reason"], row["detail"]) for row in read_rejected(tmp_path / "out")}
    assert found["t.csv#1"] == ("unreadable", "no such file: s3://bucket/none/0.png")
    assert found["t.csv#9"] == ("unreadable", "no such bucket: s3://nowhere/x.png")
    assert found["t.csv#10"][1].endswith(": s3://bucket/src/10.png")
    assert len(found) == 17


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def test_a_row_of_a_host_that_cannot_be_reached_is_refused(pictures: Path, tmp_path: Path) -> None:
    url = f"ftp://user:secret@127.0.0.1:{unused_port()}/x.png"
    (tmp_path / "00.png").write_bytes((pictures / "00.png").read_bytes())
    table = write_table(tmp_path, ["00.png", url])
    result = pack(PackSettings(str(table), persons="none"), tmp_path / "out", workers=0)
    assert result.packed == {"": 1}
    [row] = read_rejected(tmp_path / "out")
    host = url.partition("@")[2]
    assert (row["source"], row["reason"]) == ("t.csv#1", "unreadable")
    assert row["detail"] == f"Connection refused (tried 2 times): ftp://…@{host}"


def test_servers_that_never_answered_are_refused_picture_by_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SILENT_PICTURES", 4)
    found = fetch_images([f"ftp://127.0.0.1:{unused_port()}/{i}.png" for i in range(8)])
    assert all(isinstance(bad, BadPicture) and bad.reason == "unreadable" for bad in found)


def test_a_server_that_hangs_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ftplib raises EOFError, which is no OSError."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            for _ in range(stores.TRIES):
                listening.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        [found] = fetch_images([f"ftp://127.0.0.1:{listening.getsockname()[1]}/x.png"])
    assert isinstance(found, BadPicture)
    assert found.reason == "unreadable"
    assert "(tried 2 times): ftp://127.0.0.1:" in found.detail


def test_a_table_without_keys_for_its_store_is_refused_row_by_row(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("HOME", os.devnull)
        s3fs.S3FileSystem.clear_instance_cache()
        [found] = fetch_images(["s3://bucket/src/00.png"])
    s3fs.S3FileSystem.clear_instance_cache()
    assert isinstance(found, BadPicture)
    assert "credentials" in found.detail
    assert found.detail.endswith(": s3://bucket/src/00.png")
