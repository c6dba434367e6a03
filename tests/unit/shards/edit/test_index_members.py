"""`shards index --members`: all files or none, what is left out, and where the index goes."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3 import list_names, list_objects, serve_s3, upload
from tars import jpeg, write_tar

from shards.edit.index_members import index_members
from shards.edit.index_tars import index_folder
from shards.format.index import rows_sha256
from shards.format.manifest import find_manifest_folders, is_members, read_manifest
from shards.format.rejected import read_rejected
from shards.format.sample import MEMBERS_NAME
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two tars of two samples each."""
    for name in "ab":
        members = {f"{name}{i}.{e}": f"{name}{i}{e}".encode() * 99 for i in range(2) for e in ("txt", "cls")}
        write_tar(tmp_path / "tars" / f"{name}.tar", members)
    return tmp_path / "tars"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def line(captured: str) -> str:
    [found] = captured.splitlines()
    return found.removeprefix("uniemox: error: ")


INDEX = [
    "members/index/a.parquet",
    "members/index/b.parquet",
    "members/manifest.json",
    "members/rejected.parquet",
]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_index_states_positions_and_hashes(
    workers: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "index", str(folder), "--members", "--workers", workers]) == EXIT_DONE
    assert names(folder) == ["a.tar", "b.tar", *INDEX]
    manifest = read_manifest(folder / "members", format=MEMBERS_NAME)
    assert capfd.readouterr().out.splitlines() == [
        f"{folder}: 2 shards, 4 samples, identity {manifest.identity[:12]}",
        f"wrote the index to {folder}/members",
    ]
    for entry in manifest.shards:
        data = (folder / entry.name).read_bytes()
        index = folder / "members/index" / f"{entry.name[0]}.parquet"
        rows = pq.read_table(index).to_pylist()
        assert (entry.samples, entry.bytes) == (2, len(data))
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert entry.index_sha256 == hashlib.sha256(index.read_bytes()).hexdigest()
        assert entry.rows_sha256 == rows_sha256(rows)
        for i, row in enumerate(rows):
            assert row["key"] == f"{entry.name[0]}{i}"
            digest = hashlib.sha256()
            for member, extension in zip(row["members"], ("txt", "cls"), strict=True):
                content = data[member["offset"] : member["offset"] + member["length"]]
                assert content == f"{row['key']}{extension}".encode() * 99
                assert member["name"] == extension
                digest.update(extension.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
            assert row["sha256"] == digest.hexdigest()


def test_rows_are_stored_in_groups_of_1024(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i:04d}.cls": b"1" for i in range(1500)})
    index_members(str(tmp_path))
    file = pq.ParquetFile(tmp_path / "members/index/a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1024, 476]


def test_an_index_of_pictures_stays_and_does_not_notice_that_of_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(1), "x.txt": b"one"})
    index_folder(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    index_members(str(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert run(["shards", "verify", str(tmp_path)]) == EXIT_DONE
    (tmp_path / "manifest.json").unlink()
    assert is_members(tmp_path / "members")
    assert find_manifest_folders(tmp_path) == []


# ---- what is left out


def test_members_that_cannot_be_read_by_position_are_left_out_and_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in {
            "x.txt": {},
            "x.TXT": {},
            "x.cls": {},
            "y.bin": {"GNU.sparse.map": "0,4", "GNU.sparse.size": "4"},
            "caf\udce9.txt": {},
            "z.txt": {},
        }.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 4, headers
            if "\udce9" in name:  # as a program with Latin-1 writes it
                tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))  # type: ignore[union-attr]
                tar.fileobj.write(b"1234".ljust(512, b"\0"))  # type: ignore[union-attr]
                tar.offset += 1024
                continue
            tar.addfile(info, io.BytesIO(b"1234"))
    with open(tmp_path / "a.tar", "ab") as end:
        end.write((tmp_path / "a.tar").read_bytes())
    assert run(["shards", "index", str(tmp_path), "--members", "--workers", "0"]) == EXIT_DONE
    assert [(row["source"], row["reason"]) for row in read_rejected(tmp_path / "members") or []] == [
        ("a.tar/x.TXT", "duplicate_member"),
        ("a.tar/y.bin", "sparse"),
        ("a.tar/caf\\udce9.txt", "member_name"),
        ("a.tar", "after_end"),
    ]
    rows = pq.read_table(tmp_path / "members/index/a.parquet").to_pylist()
    assert [(row["key"], [m["name"] for m in row["members"]]) for row in rows] == [
        ("x", ["txt", "cls"]),
        ("z", ["txt"]),
    ]
    out = capfd.readouterr().out.splitlines()
    left_out = "after_end 1, duplicate_member 1, member_name 1, sparse 1"
    assert out[2] == f"left out 4 members: {left_out}; {tmp_path}/members/rejected.parquet lists them"
    assert out[3].startswith("  left out a.tar/x.TXT: duplicate_member: an earlier member of the sample")
    manifest = json.loads((tmp_path / "members/manifest.json").read_text())
    assert manifest["provenance"]["left_out"] == {
        "after_end": 1, "duplicate_member": 1, "member_name": 1, "sparse": 1
    }  # fmt: skip


def test_a_tar_without_samples_is_listed_with_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"__meta__": b"x", "README": b"y"})
    with pytest.raises(UserError, match=r"no sample in 1 tars; members need names such as 0001\.jpg"):
        index_members(str(tmp_path))
    write_tar(tmp_path / "b.tar", {"1.txt": b"z"})
    manifest, _ = index_members(str(tmp_path))
    assert list(manifest.counts) == [0, 1]


# ---- bad tars


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header of a tar, with a block of content if it is an extended one."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    content = b"11 path=aa\n".ljust(512, b"\0") if kind == b"x" else b""
    return info.tobuf(tarfile.GNU_FORMAT) + content


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: data[:-9000], "a.tar: not a complete tar (unexpected end of data); copy it again"),
        (lambda data: data[: 3 * 1024], "a.tar: not a complete tar (has no end mark); copy it again"),
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], "(no valid header at byte 1024); copy it again"),
        (lambda data: b"", "a.tar: not a complete tar (empty file); copy it again"),
        (lambda data: header("a.txt", -1) + bytes(1024), "(a.txt has a size that is negative); copy it again"),
        (lambda data: header("x", 512, b"x") * 2000 + data, "(too many extended headers in a row); copy it again"),
        (lambda data: b"\x1f\x8b" + data, "a compressed tar cannot be read by position; decompress it first (gunzip)"),
    ],
)  # fmt: skip
def test_a_bad_tar_ends_with_one_line_and_leaves_no_file(
    damage: Callable[[bytes], bytes],
    problem: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    members = {f"{i}.txt": b"x" * (9_000 if i == 3 else 9) for i in range(4)}
    data = write_tar(folder / "a.tar", members).read_bytes()
    (folder / "a.tar").write_bytes(damage(data))
    assert run(["shards", "index", str(folder), "--members", "--workers", "0"]) == EXIT_USER
    assert problem in line(capfd.readouterr().err)
    assert names(folder) == ["a.tar", "b.tar"]
    assert not (folder / ".members.tmp").exists()


# ---- places


def test_wrong_places_end_with_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.tar.gz").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, expected in {
        (str(tmp_path / "c.tar.gz"),): f"DIR={tmp_path}/c.tar.gz: is a file; give a folder with .tar files",
        (str(folder / "{a,c}.tar"),): f"DIR={folder}/{{a,c}}.tar: c.tar is missing; correct the pattern",
        (
            f"{tmp_path}/{{tars/a,b}}.tar",
        ): f"names tars in 2 folders, such as {tmp_path}/tars/ and {tmp_path}/;",
        (str(folder / "{a,a}.tar"),): "a.tar is listed twice; list each tar once",
        (str(folder / "{a,b}.tgz"),): "a.tgz is not called .tar; give a folder, or a pattern such as",
        (str(tmp_path / "none/{a,b}.tar"),): f"{tmp_path}/none: no such folder; correct the pattern",
        (str(tmp_path),): "c.tar.gz: only files called .tar can be indexed; decompress it",
        (
            str(folder),
            "--index",
            str(tmp_path / "full"),
        ): "full is not empty; delete that folder to index the tars",
        (str(folder), "--index", str(folder / "a.tar")): "a.tar is a file; give a folder",
        (
            str(folder),
            "--index",
            str(folder / "a.tar/x"),
        ): "a.tar/x: cannot be written (Not a directory); give another",
        (
            str(folder),
            "--check",
            "header",
        ): "--check: is for pictures, and --members reads no pictures; leave one",
        ("s3://none/tars",): "DIR=s3://none/tars: is remote; add --index FOLDER, a place for the index",
    }.items():
        assert run(["shards", "index", *arguments, "--members"]) == EXIT_USER
        assert expected in line(capfd.readouterr().err), arguments
    assert run(["shards", "index", str(folder), "--index", "x"]) == EXIT_USER
    expected = "--index: needs --members; an index of pictures is always beside the tars"
    assert line(capfd.readouterr().err) == expected
    assert names(folder) == ["a.tar", "b.tar"]


def test_an_existing_index_is_not_replaced(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index_members(str(folder))
    assert run(["shards", "index", str(folder / "{a,b}.tar"), "--members"]) == EXIT_USER
    assert line(capfd.readouterr().err) == (
        f"DIR={folder}: has an index already: {folder}/members; delete that folder to index the tars again, or name "
        "another one with --index"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_needs_another_place(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.chmod(0o555)
    assert run(["shards", "index", str(folder), "--members"]) == EXIT_USER
    assert "add --index FOLDER, a place that can be written" in line(capfd.readouterr().err)
    folder.chmod(0o755)


def test_a_missing_webdataset_is_named_with_the_command_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert run(["shards", "index", str(folder), "--members"]) == EXIT_USER
    expected = 'webdataset is not installed; run pip install -e ".[stream]" in your clone of uniemox-dist'
    assert line(capfd.readouterr().err) == expected


@pytest.mark.long
def test_a_killed_command_leaves_no_index_and_succeeds_when_it_is_run_again(tmp_path: Path) -> None:
    for i in range(12):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{n}.bin": bytes(100_000) for n in range(40)})
    command = [
        sys.executable,
        "-m",
        "uniemox_dist.cli",
        "shards",
        "index",
        str(tmp_path),
        "--members",
        "--workers",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / ".members.tmp"
    while process.poll() is None and len(list(unfinished.glob("index/*.parquet"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert unfinished.exists()
    assert not (tmp_path / "members").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert not unfinished.exists()
    assert read_manifest(tmp_path / "members", format=MEMBERS_NAME).samples == 480


# ---- stores


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with serve_s3("data"):
        yield "s3://data"


def test_tars_on_a_store_get_the_index_of_the_same_tars_on_disk(
    store: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index_members(str(folder), index=tmp_path / "local")
    upload(folder, f"{store}/tars")
    for index in (str(tmp_path / "index"), f"{store}/index"):
        assert (
            run(["shards", "index", f"{store}/tars", "--members", "--index", index, "--workers", "0"])
            == EXIT_DONE
        )
    assert list_names(f"{store}/tars") == ["a.tar", "b.tar"]
    local = {name: (tmp_path / "local" / name).read_bytes() for name in names(tmp_path / "local")}
    assert {name: (tmp_path / "index" / name).read_bytes() for name in names(tmp_path / "index")} == local
    assert list_objects(f"{store}/index") == local
    capfd.readouterr()
    for arguments, expected in {
        (f"{store}/tars", "--index", f"{store}/index"): "has a manifest.json already; delete that folder",
        (
            f"{store}/nowhere",
            "--index",
            "x",
        ): f"DIR={store}/nowhere: no such folder; correct the address, or give",
        (f"{store}/tars/{{a,c}}.tar", "--index", "x"): "c.tar is missing; correct the pattern",
    }.items():
        assert run(["shards", "index", *arguments, "--members"]) == EXIT_USER
        assert expected in line(capfd.readouterr().err)
