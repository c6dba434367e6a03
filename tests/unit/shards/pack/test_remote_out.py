"""Packing to a store: a real S3 server on loopback, and file systems of fsspec that rename."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_pack import KillAfter, Killed
from s3 import list_local, list_names, list_objects, serve_faults, serve_s3

import shards.remote_folder
from shards.pack.pipeline import PackSettings, pack
from shards.storage import parse_place
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER, Fault, UserError
from uniemox_dist.data.reader import ShardReader


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with serve_s3("data", "closed") as address:
        yield address


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR of the test."""
    folder = tmp_path / "tmpdir"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def settings(source: Path, layout: str = "folder", shard_samples: int = 8, **more: Any) -> PackSettings:
    return PackSettings(str(source), layout, persons="none", shard_samples=shard_samples, **more)


def test_a_pack_on_s3_has_the_same_files_as_on_disk(
    store: str, emoji_table: Path, tmp_path: Path, scratch: Path
) -> None:
    options = settings(emoji_table, "table", shard_samples=20)
    local = pack(options, tmp_path / "local")
    remote = pack(options, parse_place("s3://data/same"))
    assert list_objects("s3://data/same") == list_local(tmp_path / "local")
    assert remote.packed == local.packed
    assert [str(folder) for folder in remote.folders] == ["s3://data/same/test", "s3://data/same/train"]
    assert list(scratch.iterdir()) == []


def test_the_commands_pack_verify_stats_and_training_read_it(
    store: str, photo_folder: Path, photo_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "shards",
        "pack",
        str(photo_folder),
        "s3://data/cli",
        "--layout",
        "folder",
        "--persons",
        "none",
    ]
    assert run(command) == EXIT_DONE
    assert "s3://data/cli: 20 samples" in capsys.readouterr().out
    assert run(["shards", "verify", "s3://data/cli"]) == EXIT_DONE
    assert run(["shards", "stats", "s3://data/cli"]) == EXIT_DONE
    reader = ShardReader.from_folder("s3://data/cli", "data.path")
    local = ShardReader.from_folder(photo_shards, "data.path")
    keys = {
        local.read(s, r).key: local.read(s, r).image
        for s in range(3)
        for r in range(local.manifest.counts[s])
    }
    assert {reader.read(0, r).key: reader.read(0, r).image for r in range(20)} == keys
    capsys.readouterr()
    assert run(command) == EXIT_USER
    assert (
        "OUT=s3://data/cli: exists; give another folder, delete it, or use --resume"
        in capsys.readouterr().err
    )
    assert run([*command, "--resume"]) == EXIT_DONE
    assert "s3://data/cli is complete: 20 samples, nothing to do" in capsys.readouterr().out


def test_parts_on_s3_have_the_same_files_as_on_disk(store: str, photo_folder: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        pack(settings(photo_folder), tmp_path / f"p{part}", part=(part, 2))
        pack(settings(photo_folder), parse_place(f"s3://data/parts/p{part}"), part=(part, 2))
        assert list_objects(f"s3://data/parts/p{part}") == list_local(tmp_path / f"p{part}")
    again = pack(settings(photo_folder), parse_place("s3://data/parts/p1"), part=(1, 2), resume=True)
    assert again.reused
    with pytest.raises(UserError, match="was packed with other settings"):
        pack(settings(photo_folder), parse_place("s3://data/parts/p1"), part=(2, 2), resume=True)


def test_a_resumed_pack_uploads_only_missing_shards_and_gives_the_same_bytes(
    store: str, emoji_table: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = settings(emoji_table, "table", shard_samples=12), parse_place("s3://data/resumed")
    with pytest.raises(Killed):
        pack(options, out, progress=KillAfter(60))
    before = list_objects("s3://data/resumed")
    assert not any(name.endswith("manifest.json") for name in before)
    complete = [name for name in before if name.endswith(".tar")]
    assert 3 <= len(complete) <= 5
    with pytest.raises(
        UserError, match=r"OUT=s3://data/resumed: an interrupted pack is in \.partial/; continue"
    ):
        pack(options, out)
    with pytest.raises(UserError, match=r"cannot resume: other settings: seed=1 was 0"):
        pack(settings(emoji_table, "table", shard_samples=12, seed=1), out, resume=True)
    uploaded: list[str] = []
    upload = shards.remote_folder.RemoteFolder.upload

    def counted(self: Any, source: Path, name: str) -> None:
        uploaded.append(name)
        upload(self, source, name)

    monkeypatch.setattr(shards.remote_folder.RemoteFolder, "upload", counted)
    result = pack(options, out, resume=True)
    assert result.resumed >= 36
    pack(options, tmp_path / "local")
    assert list_objects("s3://data/resumed") == list_local(tmp_path / "local")
    assert not set(uploaded) & set(complete)
    assert list(scratch.iterdir()) == []


def test_shards_that_were_changed_or_deleted_meanwhile_are_packed_again(
    store: str, emoji_table: Path, tmp_path: Path
) -> None:
    import s3fs

    options, out = settings(emoji_table, "table", shard_samples=12), parse_place("s3://data/changed")
    with pytest.raises(Killed):
        pack(options, out, progress=KillAfter(70))
    fs = s3fs.S3FileSystem()
    tars = sorted(name for name in list_objects("s3://data/changed") if name.endswith(".tar"))
    content = bytearray(fs.cat_file(f"data/changed/{tars[1]}"))
    content[600] ^= 1
    fs.pipe_file(f"data/changed/{tars[1]}", bytes(content))
    fs.pipe_file("data/changed/notes.txt", b"mine")
    fs.pipe_file("data/changed/train/000099.tar", b"left")
    result = pack(options, out, resume=True)
    assert result.resumed == 12
    pack(options, tmp_path / "local")
    files = list_objects("s3://data/changed")
    assert files.pop("notes.txt") == b"mine"
    assert files == list_local(tmp_path / "local")


def test_kill_9_and_resume_on_a_machine_without_its_files(
    store: str, emoji_table: Path, tmp_path: Path, scratch: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "uniemox_dist.cli",
        "shards",
        "pack",
        str(emoji_table),
        "s3://data/killed",
    ]
    command += ["--persons", "none", "--shard-samples", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len([n for n in list_names("s3://data/killed") if "step-" in n]) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not any(name.endswith("manifest.json") for name in list_objects("s3://data/killed"))
    assert len(list(scratch.iterdir())) == 1
    assert run([*command[3:], "--resume"]) == EXIT_DONE
    assert list(scratch.iterdir()) == []  # the folder of the killed process is gone as well
    pack(settings(emoji_table, "table"), tmp_path / "local")
    assert list_objects("s3://data/killed") == list_local(tmp_path / "local")


def test_a_kill_between_the_manifests_and_the_end_leaves_a_pack_that_resumes(
    store: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = parse_place("s3://data/late"), settings(photo_folder)
    delete = shards.remote_folder.RemoteFolder.delete
    for call in ("first", "second"):  # before and after the plan is deleted
        with monkeypatch.context() as patch:

            def killed(self: Any, names: Any, call: str = call) -> None:
                names = list(names)
                if call == "second" and names == [".partial/plan.json"]:
                    delete(self, names)
                if ".partial/plan.json" in names:
                    raise Killed
                delete(self, names)

            patch.setattr(shards.remote_folder.RemoteFolder, "delete", killed)
            with pytest.raises(Killed):
                pack(options, out, resume=True)
        assert "manifest.json" in list_objects("s3://data/late")
    assert pack(options, out, resume=True).reused
    pack(options, tmp_path / "local")
    assert list_objects("s3://data/late") == list_local(tmp_path / "local")


def test_two_packs_into_one_place_do_not_mix(store: str, photo_folder: Path, tmp_path: Path) -> None:
    out, options = parse_place("s3://data/both"), settings(photo_folder, shard_samples=4)

    class Intruder(KillAfter):
        def update(self, count: float | None = 1) -> bool | None:
            if self.left:
                self.left = 0
                pack(options, out, resume=True)
            return None

    with pytest.raises(UserError, match="another process has started to write into it; this one ends"):
        pack(options, out, progress=Intruder(1))
    pack(options, tmp_path / "local")
    assert list_objects("s3://data/both") == list_local(tmp_path / "local")


def test_local_disk_use_is_two_shards(
    store: str, emoji_table: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    upload = shards.remote_folder.RemoteFolder.upload

    def watched(self: Any, source: Path, name: str) -> None:
        nonlocal most
        most = max(most, len(list(scratch.rglob("*.tar"))) + len(list(scratch.rglob("*.tar.tmp"))))
        time.sleep(0.05)
        upload(self, source, name)

    monkeypatch.setattr(shards.remote_folder.RemoteFolder, "upload", watched)
    pack(settings(emoji_table, "table", shard_samples=6), parse_place("s3://data/bounded"))
    assert most == 2


ERRORS = {
    "s3://nowhere/x": "OUT=s3://nowhere/x: no such bucket (The specified bucket does not exist); create it",
    "s3://Not_Valid!/x": "OUT=s3://Not_Valid!/x: not a valid address",
    "s3://k:s@data/x": "OUT=s3://…@data/x: keys are not part of such a URL; set them in the environment",
    "https://host/x?sig=abc": "OUT=https://host/x?…: https:// can only be read; give s3://, gs:// or a local folder",
    "s3://": "OUT=s3://: names no bucket; give a name such as s3://bucket/folder",
    "s3://data/x[1]": "OUT=s3://data/x[1]: has one of * ? [, which stand for patterns; give a name",
    "zz://x/y": "OUT=zz://x/y: Unsupported filesystem: 'zz'",
}


@pytest.mark.parametrize("url", list(ERRORS))
def test_a_wrong_out_is_one_line(
    url: str, store: str, photo_folder: Path, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["shards", "pack", str(photo_folder), url, "--layout", "folder", "--persons", "none"]
    assert run(command) == EXIT_USER
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert ERRORS[url] in lines[0]
    assert list(scratch.iterdir()) == []


def command_to(url: str, source: Path) -> list[str]:
    return [
        "shards",
        "pack",
        str(source),
        url,
        "--layout",
        "folder",
        "--persons",
        "none",
        "--shard-samples",
        "8",
    ]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("GET", "no permission to list (AccessDenied of the test); check the credentials, and that they may"),
        (
            "PUT",
            "no permission to write (AccessDenied of the test); check the credentials, and that they may",
        ),
    ],
)
def test_a_store_without_permission_is_one_line_before_the_work(
    method: str, says: str, store: str, photo_folder: Path, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_faults(store, lambda verb, path: (403, "AccessDenied") if verb == method else None):
        assert run(command_to("s3://closed/x", photo_folder)) == EXIT_USER
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"OUT=s3://closed/x: {says}" in lines[0]
    assert list_objects("s3://closed") == {}
    assert list(scratch.iterdir()) == []


def test_a_wrong_endpoint_and_missing_keys_are_one_line(
    store: str, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    assert run(command_to("s3://data/x", photo_folder)) == EXIT_USER
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "OUT=s3://data/x: cannot be reached (Could not connect to the endpoint URL" in lines[0]
    assert "AWS_ENDPOINT_URL" in lines[0]
    assert "list-type" not in lines[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    assert run(command_to("s3://data/x", photo_folder)) == EXIT_USER
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "OUT=s3://data/x: Unable to locate credentials; set AWS_ACCESS_KEY_ID and" in lines[0]
    s3fs.S3FileSystem.clear_instance_cache()


def test_passing_errors_of_a_store_are_retried(store: str, photo_folder: Path, tmp_path: Path) -> None:
    left = {"PUT": 3, "GET": 2}

    def choose(method: str, path: str) -> tuple[int, str] | None:
        left[method] = left.get(method, 0) - 1
        if left[method] < 0 or "/flaky/" not in path:
            return None
        return (0, "") if left[method] % 2 else (503, "SlowDown")

    with serve_faults(store, choose):
        pack(settings(photo_folder), parse_place("s3://data/flaky"))
    pack(settings(photo_folder), tmp_path / "local")
    assert list_objects("s3://data/flaky") == list_local(tmp_path / "local")


def test_a_store_that_goes_away_or_revokes_permission_is_one_line_and_the_pack_resumes(
    store: str,
    photo_folder: Path,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shards.remote_folder, "RETRY_S", 0.0)
    command = command_to("s3://data/gone", photo_folder)
    for fault, code, says in (
        (
            (503, "ServiceUnavailable"),
            EXIT_FAULT,
            "the store does not write any more (ServiceUnavailable of the test); continue with",
        ),
        ((403, "ExpiredToken"), EXIT_USER, "no permission to write (ExpiredToken of the test)"),
    ):

        def choose(method: str, path: str, fault: tuple[int, str] = fault) -> tuple[int, str] | None:
            return fault if method == "PUT" and path.endswith("000001.tar") else None

        with serve_faults(store, choose):
            assert run([*command, "--resume"]) == code
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert f"OUT=s3://data/gone: {says}" in lines[0]
        names = list_objects("s3://data/gone")
        assert {name for name in names if name[0] != "."} == {"000000.tar", "index/000000.parquet"}
        assert list(scratch.iterdir()) == []
    assert run([*command, "--resume"]) == EXIT_DONE
    assert "resumed after 8 records" in capfd.readouterr().out
    pack(settings(photo_folder), tmp_path / "local")
    assert list_objects("s3://data/gone") == list_local(tmp_path / "local")


def test_a_large_shard_is_uploaded_in_parts_and_a_failed_upload_leaves_none(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(shards.remote_folder, "RETRY_S", 0.0)
    monkeypatch.setattr(shards.remote_folder, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * (12 << 12))
    folder = shards.remote_folder.RemoteFolder(parse_place("s3://data/parts2"))
    folder.check_access("access")
    requests: list[str] = []

    def choose(method: str, path: str) -> tuple[int, str] | None:
        requests.append(f"{method} {path}")
        return (500, "InternalError") if "partNumber=3" in path else None

    with serve_faults(store, choose):
        folder = shards.remote_folder.RemoteFolder(parse_place("s3://data/parts2"))
        folder.check_access("access")
        with pytest.raises(Fault, match="the store does not write any more"):
            folder.upload(tmp_path / "large", "large")
    assert any("partNumber=2" in request for request in requests)
    assert list_objects("s3://data/parts2") == {}
    uploads = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket="data")
    assert not uploads.get("Uploads")
    folder = shards.remote_folder.RemoteFolder(parse_place("s3://data/parts2"))
    folder.upload(tmp_path / "large", "large")
    assert list_objects("s3://data/parts2") == {"large": (tmp_path / "large").read_bytes()}


def test_uploads_that_a_killed_process_left_are_aborted(store: str) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    for key in ("left/000000.tar", "left2/000000.tar"):
        fs.call_s3("create_multipart_upload", Bucket="data", Key=key)
    shards.remote_folder.RemoteFolder(parse_place("s3://data/left")).abort_uploads()
    found = fs.call_s3("list_multipart_uploads", Bucket="data").get("Uploads") or []
    assert [upload["Key"] for upload in found] == ["left2/000000.tar"]


def test_other_stores_of_fsspec(photo_folder: Path, tmp_path: Path) -> None:
    import fsspec

    pack(settings(photo_folder), tmp_path / "local")
    pack(settings(photo_folder), parse_place("memory://packs/x"))
    memory = fsspec.filesystem("memory")
    found = {name.removeprefix("/packs/x/"): memory.cat_file(name) for name in memory.find("/packs/x")}
    assert found == list_local(tmp_path / "local")


@pytest.mark.filterwarnings("ignore:UPath")
def test_files_of_stores_that_show_incomplete_ones_are_renamed(tmp_path: Path) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    written: list[str] = []

    class Renaming(MemoryFileSystem):
        """Like SFTP, where a file is visible while it is written."""

        protocol = "renaming"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
            written.append(path)
            super().pipe_file(path, value, mode, **options)

    fsspec.register_implementation("renaming", Renaming, clobber=True)
    place = parse_place("renaming://x/y")
    folder = shards.remote_folder.RemoteFolder(place)
    folder.write("a.json", b"1")
    assert [path.rpartition("/")[2] for path in written] == [".a.json.tmp"]
    assert list(folder.list_files()) == ["a.json"]
    assert folder.read("a.json") == b"1"


def test_files_of_neighbours_and_of_users_are_left_alone(
    store: str, photo_folder: Path, tmp_path: Path
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    others = {"near": b"an object with the name of OUT", "near2/manifest.json": b"{}", "nea/000000.tar": b"t"}
    for name, content in others.items():
        fs.pipe_file(f"data/quiet/{name}", content)
    pack(settings(photo_folder), parse_place("s3://data/quiet/near/"))
    pack(settings(photo_folder), tmp_path / "local")
    found = list_objects("s3://data/quiet")
    assert {name: found[name] for name in others} == others
    packed = {f"near/{name}": content for name, content in list_local(tmp_path / "local").items()}
    assert found == {**others, **packed}


def test_a_shard_is_uploaded_while_the_next_one_is_packed(
    store: str, emoji_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    further = threading.Event()
    waited: list[bool] = []

    class Position:
        total = 0
        done = 0

        def update(self, count: float | None = 1) -> bool | None:
            self.done += int(count or 0)
            if self.done > 10:  # the number of samples in a shard
                further.set()
            return None

    upload = shards.remote_folder.RemoteFolder.upload

    def slow(self: Any, source: Path, name: str) -> None:
        if name == "test/000000.tar":
            waited.append(further.wait(60))
        upload(self, source, name)

    monkeypatch.setattr(shards.remote_folder.RemoteFolder, "upload", slow)
    pack(
        settings(emoji_table, "table", shard_samples=10),
        parse_place("s3://data/overlap"),
        progress=Position(),
    )
    assert waited == [True]
