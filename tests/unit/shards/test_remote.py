"""Sources and shards that lie elsewhere: a real S3 server and a plain HTTP server, both on loopback."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from published_sets import SETS
from s3 import list_objects, serve_faults, serve_s3, upload
from torch.utils.data import DataLoader, Dataset

from shards.format.manifest import read_manifest
from shards.pack.pipeline import PackSettings, pack
from shards.sources import SourceOptions, open_source
from shards.storage import parse_place
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket of a real S3 server; its address is in the environment, as with any S3 store."""
    with serve_s3("pictures"):
        yield "s3://pictures"


@pytest.fixture(scope="module")
def website(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and where a plain HTTP server serves it. That server knows nothing of byte ranges."""
    root = tmp_path_factory.mktemp("website")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def identities(out: Path) -> list[str]:
    return [read_manifest(path.parent).identity for path in sorted(out.rglob("manifest.json"))]


def packed(source: object, layout: str, out: Path, workers: int = 0) -> list[str]:
    pack(PackSettings(str(source), layout, persons="none", shard_samples=8), out, workers=workers)
    return identities(out)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_on_s3_packs_to_the_same_bytes_as_on_disk(
    workers: int, bucket: str, photo_folder: Path, tmp_path: Path
) -> None:
    upload(photo_folder, f"{bucket}/photos{workers}")
    remote = packed(f"{bucket}/photos{workers}", "folder", tmp_path / "remote", workers)
    assert remote == packed(photo_folder, "folder", tmp_path / "local")


@pytest.mark.parametrize(
    ("source", "preset"), [("UnBiasedEmo", "ube"), ("HECO", "heco"), ("EMOTIC", "emotic")]
)
def test_a_published_set_on_s3_packs_to_the_same_bytes_as_on_disk(
    source: str, preset: str, bucket: str, tmp_path: Path
) -> None:
    SETS[source](tmp_path / "sets" / source)
    upload(tmp_path / "sets", f"{bucket}/sets-{preset}")
    for place, out in ((f"{bucket}/sets-{preset}", "remote"), (str(tmp_path / "sets"), "local")):
        pack(PackSettings(place, None, persons="none", preset=preset), tmp_path / out, workers=0)
    assert identities(tmp_path / "remote") == identities(tmp_path / "local")


def test_a_table_and_tars_on_s3_pack_to_the_same_bytes_as_on_disk(
    bucket: str, emoji_table: Path, photo_shards: Path, tmp_path: Path
) -> None:
    upload(emoji_table, f"{bucket}/tables/emoji.parquet")
    upload(photo_shards, f"{bucket}/tars")
    table = packed(f"{bucket}/tables/emoji.parquet", "table", tmp_path / "a")
    assert table == packed(emoji_table, "table", tmp_path / "b")
    assert packed(f"{bucket}/tars", "wds", tmp_path / "c") == packed(photo_shards, "wds", tmp_path / "d")


def test_a_table_on_the_web_and_the_pictures_it_names(
    website: tuple[Path, str], photo_folder: Path, tmp_path: Path
) -> None:
    root, url = website
    shutil.copytree(photo_folder, root / "photos")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    lines = [
        "path,key,label",
        *(f"{name},k{i},{Path(name).parts[1]}" for i, name in enumerate(names)),
        "no.jpg,none,x",
    ]
    (root / "list.csv").write_text("\n".join(lines))
    result = pack(PackSettings(f"{url}/list.csv", "table", persons="none"), tmp_path / "out")
    assert result.packed == {"": 20}
    assert [(r.source, r.reason) for r in result.rejected] == [("none", "unreadable")]
    manifest = read_manifest(tmp_path / "out")
    reader = ShardReader(tmp_path / "out", manifest)
    pictures = {reader.read(0, row).key: reader.read(0, row).image for row in range(20)}
    assert pictures["k3"] == (root / names[3]).read_bytes()


def test_remote_files_of_one_name_in_several_folders_get_unique_names(bucket: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / f"{folder}.csv").write_text(f"path,label\n{folder}.jpg,x\n")
        upload(tmp_path / f"{folder}.csv", f"{bucket}/two/{folder}/list.csv")
    names = [record.name for record in open_source("table", f"{bucket}/two/*/list.csv", SourceOptions())]
    assert names == ["a/list.csv#0", "b/list.csv#0"]


class Pictures(Dataset[bytes]):
    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.places = [(s, r) for s, shard in enumerate(reader.manifest.shards) for r in range(shard.samples)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> bytes:
        return self.reader.read(*self.places[number]).image


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_shards_elsewhere_are_read_by_ranges_in_this_process_and_in_loader_workers(
    kind: str,
    bucket: str,
    website: tuple[Path, str],
    photo_shards: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if kind == "s3":
        upload(photo_shards, f"{bucket}/shards")
        url = f"{bucket}/shards"
    else:
        shutil.copytree(photo_shards, website[0] / "shards")
        url = f"{website[1]}/shards"
    local = Pictures(ShardReader.from_folder(photo_shards, "data.path"))
    remote = Pictures(ShardReader.from_folder(url, "data.path"))
    assert not remote.reader.is_local
    expected = [local[i] for i in range(len(local))]
    assert [remote[i] for i in range(len(remote))] == expected
    loader = DataLoader(remote, batch_size=None, num_workers=2)
    assert list(loader) == expected
    assert remote.reader.record(0, 0) == local.reader.record(0, 0)
    warnings = [text for text in caplog.messages if "sends no byte ranges" in text]
    assert len(warnings) == (kind == "http")
    assert all(text.startswith(f"{website[1].removeprefix('http://')}: ") for text in warnings)


def test_invalid_urls_are_one_line_errors(
    bucket: str, website: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for source, layout, says in (
        (f"{bucket}/nowhere", "folder", f"SOURCE={bucket}/nowhere: no such folder"),
        ("s3://nowhere/src", "folder", "SOURCE=s3://nowhere/src: no such bucket; correct its name"),
        (f"{website[1]}/nowhere.parquet", "table", f"SOURCE={website[1]}/nowhere.parquet: no such table"),
        ("zz://x", "folder", "SOURCE=zz://x: Unsupported filesystem"),
    ):
        assert (
            run(["shards", "pack", source, str(tmp_path / "out"), "--layout", layout, "--persons", "none"])
            == EXIT_USER
        )
        error = capfd.readouterr().err
        assert says in error
        assert "Traceback" not in error
    with pytest.raises(UserError, match=f"data.path={bucket}/nowhere: has no manifest.json"):
        ShardReader.from_folder(f"{bucket}/nowhere", "data.path")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "package"), [("az://data/x", "adlfs"), ("abfs://data/x", "adlfs"), ("oss://data/x", "ossfs")]
)
def test_a_store_whose_package_is_missing_names_the_package_to_install(url: str, package: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    protocol = url.partition("://")[0]
    with pytest.raises(UserError) as caught:
        parse_place(url, "OUT")
    assert (
        str(caught.value)
        == f"OUT={url}: {protocol}:// needs {package}; install it with: pip install {package}"
    )


def test_a_dry_run_of_a_training_command_checks_data_on_stores(
    bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for url in ("s3://no-such-bucket/data", f"{bucket}/nowhere"):
        assert run(["pretrain", "demo", "--dry-run", f"data.path={url}"]) == EXIT_USER
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith(f"uniemox: error: data.path={url}: has no manifest.json")
    assert run(["pretrain", "demo", "--dry-run", "data.path=/on/the/nodes/only"]) == EXIT_DONE


@pytest.mark.parametrize(
    "command",
    [
        ["shards", "stats", "s3://pictures/x"],
        ["shards", "verify", "s3://pictures/x"],
        ["shards", "merge", "OUT", "s3://pictures/a", "s3://pictures/b"],
        ["shards", "pack", "s3://pictures/x", "OUT", "--layout", "folder", "--persons", "none"],
        ["shards", "pack", "s3://pictures/x", "OUT", "--persons", "none"],
    ],
)
def test_a_store_that_refuses_or_does_not_answer_is_one_line_for_readers(
    command: list[str],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import s3fs

    words = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    with serve_faults(os.environ["AWS_ENDPOINT_URL"], lambda method, path: (403, "AccessDenied")):
        assert run(words) == EXIT_USER
        [line] = capfd.readouterr().err.strip().splitlines()
        assert "remote storage: no permission (AccessDenied of the test); check the credentials" in line
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        s3fs.S3FileSystem.clear_instance_cache()
        assert run(words) == EXIT_FAULT
        [line] = capfd.readouterr().err.strip().splitlines()
        assert "remote storage: Could not connect to the endpoint URL" in line
        assert "list-type" not in line
    s3fs.S3FileSystem.clear_instance_cache()
    assert list(tmp_path.iterdir()) == []


def test_file_addresses_are_local_paths(photo_shards: Path) -> None:
    assert parse_place(f"file://{photo_shards}") == photo_shards
    assert run(["shards", "stats", f"file://{photo_shards}"]) == EXIT_DONE


def test_the_page_about_shards_is_written_to_a_store(
    bucket: str, photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upload(photo_shards, f"{bucket}/reported")
    assert run(["shards", "report", f"{bucket}/reported"]) == EXIT_DONE
    assert run(["shards", "report", f"{bucket}/reported", "--out", f"{bucket}/pages/a.html"]) == EXIT_DONE
    shutil.copytree(photo_shards, tmp_path / "reported")
    assert run(["shards", "report", str(tmp_path / "reported")]) == EXIT_DONE
    page = (tmp_path / "reported/report.html").read_bytes()
    assert list_objects(f"{bucket}/reported")["report.html"] == page
    assert list_objects(f"{bucket}/pages") == {"a.html": page}
    capfd.readouterr()
    assert run(["shards", "report", f"{bucket}/reported", "--out", "s3://nowhere/a.html"]) == EXIT_USER
    [line] = capfd.readouterr().err.strip().splitlines()
    assert "--out=s3://nowhere: no such bucket (The specified bucket does not exist)" in line
