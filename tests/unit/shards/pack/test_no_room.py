"""Targets that cannot be written: one line that names them and the fix, exit code 2, nothing half-written."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of our own with room for the photographs."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=False)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def fill(disk: Path) -> None:
    """Takes all the room that is left."""
    with open(disk / "filler", "wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
    assert shutil.disk_usage(disk).free == 0


def one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == EXIT_USER
    [line] = capfd.readouterr().err.splitlines()
    return line.removeprefix("uniemox: error: ")


@pytest.fixture
def parts(photo_folder: Path, tmp_path: Path) -> list[str]:
    folders = [tmp_path / f"p{i}" for i in (1, 2)]
    for i, folder in enumerate(folders, 1):
        pack(PackSettings(str(photo_folder), "folder", persons="none"), folder, part=(i, 2))
    return [str(folder) for folder in folders]


def test_a_read_only_file_system(disk: Path, photo_shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(photo_shards, disk / "data")
    (disk / "data/000001.tar").write_bytes(b"damaged")
    (disk / "tars").mkdir()
    shutil.copy(photo_shards / "000000.tar", disk / "tars")
    before = sorted(disk.rglob("*"))
    remount(disk, "ro")
    data, why = str(disk / "data"), "cannot be written (Read-only file system); "
    commands = {
        f"DIR={disk}/tars: {why}copy the tars to": ["index", str(disk / "tars")],
        f"--out={data}/report.html: {why}give a file": ["report", data],
        f"DIR={data}: {why}verify a copy": ["verify", data, "--quarantine"],
        f"--json={data}/x.json: {why}give a file": ["stats", data, "--json", f"{data}/x.json"],
        f"OUT={disk}/out: {why}give another folder": ["select", str(photo_shards), str(disk / "out")],
    }
    for says, command in commands.items():
        assert one_line(["shards", *command], capfd).startswith(says)
    assert sorted(disk.rglob("*")) == before


def test_a_full_disk(
    disk: Path, photo_shards: Path, parts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = str(photo_shards)
    (disk / "tars").mkdir()
    shutil.copy(photo_shards / "000000.tar", disk / "tars")
    shutil.copytree(photo_shards, disk / "data")
    (disk / "data/000001.tar").write_bytes(b"damaged")
    fill(disk)
    before = {path: path.stat().st_size for path in disk.rglob("*") if path.is_file()}
    why = "cannot be written (No space left on device); free disk space, then start again"
    commands = {
        f"OUT={disk}/out: No space left on device; nothing was kept; free some space, then start again": [
            ["merge", str(disk / "out"), *parts],
            ["select", data, str(disk / "out"), "--copy"],
            ["select", data, str(disk / "out"), "--label", "people"],
            ["split", data, str(disk / "out"), "--copy"],
        ],
        f"DIR={disk}/tars: {why}": [
            ["index", str(disk / "tars")],
            ["index", str(disk / "tars"), "--workers", "1"],
        ],
        f"DIR={disk}/data: {why}": [["verify", str(disk / "data"), "--quarantine"]],
        f"--out={disk}/x.html: {why}": [["report", data, "--out", str(disk / "x.html")]],
    }
    for says, some in commands.items():
        for command in some:
            assert one_line(["shards", *command], capfd) == says
    assert {path: path.stat().st_size for path in disk.rglob("*") if path.is_file()} == before
    (disk / "filler").unlink()
    assert run(["shards", "select", data, str(disk / "out"), "--copy"]) == EXIT_DONE


@pytest.mark.parametrize("option", ["report --out", "stats --json", "verify --json"])
def test_a_folder_or_a_file_in_the_way(
    option: str, photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, name = option.split()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for target, why in (
        ("folder", "is a folder; give a file"),
        ("file/x", "cannot be written (Not a directory); give a file in a folder"),
        ("file/x/y", "cannot be written (Not a directory); give a file in a folder"),
    ):
        more = ["--workers", "0"] if command == "verify" else []
        line = one_line(["shards", command, str(photo_shards), name, str(tmp_path / target), *more], capfd)
        assert line.startswith(f"{name}={tmp_path / target}: {why}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"
