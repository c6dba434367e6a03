"""Random access to samples, and compatibility of our tars with other readers."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from shards.detect.types import Person
from shards.format.index import index_path, read_index
from shards.format.manifest import Manifest, read_manifest
from shards.format.sample import Sample, parse_record
from shards.format.writer import ShardWriter
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data import origin
from uniemox_dist.data.reader import DamagedSample, ShardReader


@pytest.fixture
def copy(emoji_shards: Path, tmp_path: Path) -> Path:
    """A copy of the training split, to be damaged."""
    return Path(shutil.copytree(emoji_shards / "train", tmp_path / "train"))


def open_reader(folder: Path, **options: bool) -> ShardReader:
    return ShardReader.from_folder(folder, "data.path", **options)


def flip_byte(folder: Path, shard: str, row: int, at: int = 40) -> str:
    """Changes one byte of a picture inside a tar; returns the sample's key."""
    place = read_index(index_path(folder, shard)).to_pylist()[row]
    with open(folder / shard, "r+b") as file:
        file.seek(place["image_offset"] + at)
        [byte] = file.read(1)
        file.seek(place["image_offset"] + at)
        file.write(bytes([byte ^ 0xFF]))
    return str(place["key"])


def test_every_sample_is_read_as_it_was_packed(emoji_table: Path, emoji_shards: Path) -> None:
    source = {row["key"]: row for row in pq.read_table(emoji_table).to_pylist()}
    reader = open_reader(emoji_shards / "train")
    seen = set()
    for shard, entry in enumerate(reader.manifest.shards):
        for row in range(entry.samples):
            raw = reader.read(shard, row)
            origin = source[raw.key]
            assert raw.image == origin["image"]
            assert (raw.captions, raw.label, raw.persons) == ((origin["caption"],), origin["label"], ())
            seen.add(raw.key)
        assert reader.captions(shard) == [[source[raw]["caption"]] for raw in keys(reader, shard)]
    assert seen == {key for key, row in source.items() if row["split"] == "train"}


def keys(reader: ShardReader, shard: int) -> list[str]:
    return [reader.read(shard, row).key for row in range(reader.manifest.shards[shard].samples)]


def test_a_record_holds_fields_that_the_index_lacks(emoji_table: Path, emoji_shards: Path) -> None:
    source = {row["key"]: row for row in pq.read_table(emoji_table).to_pylist()}
    reader = open_reader(emoji_shards / "test")
    for row in (0, 7, 15):
        key = reader.read(0, row).key
        record = reader.record(0, row)
        assert record["source"] == key
        assert record["attributes"]["family"] == source[key]["family"]


def test_persons_and_captions_are_read_as_packed(tmp_path: Path) -> None:
    person = Person((0.1, 0.2, 0.3, 0.4), 0.5, {"mood": "calm"})
    writer = ShardWriter(tmp_path, shard_bytes=10**6, shard_samples=10)
    digest = hashlib.sha256(b"x").hexdigest()
    writer.add(Sample("a", b"x", "jpg", 1, 1, "s", ("one", "two"), "l", {}, (person,), digest))
    writer.add(Sample("b", b"x", "jpg", 1, 1, "s", image_sha256=digest))
    Manifest(tuple(writer.close()), {}).write(tmp_path)
    reader = open_reader(tmp_path)
    first, second = reader.read(0, 0), reader.read(0, 1)
    assert (first.captions, first.label) == (("one", "two"), "l")
    assert [(p.box, p.score) for p in first.persons] == [((0.1, 0.2, 0.3, 0.4), 0.5)]
    assert (second.captions, second.label, second.persons) == ((), None, ())
    assert reader.captions(0) == [["one", "two"], []]
    assert reader.record(0, 0)["persons"] == [person.to_json()]


def test_a_changed_byte_is_noticed_unless_hashes_are_switched_off(copy: Path) -> None:
    key = flip_byte(copy, "000001.tar", 3)
    with pytest.raises(DamagedSample) as caught:
        open_reader(copy).read(1, 3)
    assert str(caught.value) == f"000001.tar: {key}: bytes differ from the index"
    assert open_reader(copy, verify_hash=False).read(1, 3).key == key
    assert open_reader(copy).read(1, 2).key != key  # its neighbours are whole


def test_a_tar_cut_while_it_is_open_is_noticed_even_without_hashes(copy: Path) -> None:
    reader = open_reader(copy, verify_hash=False)
    last = reader.manifest.shards[0].samples - 1
    os.truncate(copy / "000000.tar", 20_000)
    with pytest.raises(Fault, match=r"shard 000000\.tar could not be read .* is the file truncated\?"):
        reader.read(0, last)


def test_a_missing_or_cut_shard_is_named_before_anything_is_read(copy: Path) -> None:
    size = (copy / "000002.tar").stat().st_size
    os.truncate(copy / "000002.tar", size - 512)
    with pytest.raises(UserError) as caught:
        open_reader(copy)
    state = f"has {size - 512} bytes instead of {size}"
    assert str(caught.value) == f"data.path={copy}: shard 000002.tar {state}; copy it again or pack again"
    (copy / "000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard 000002\.tar is missing; copy it again or pack again"):
        open_reader(copy)


def test_a_missing_or_foreign_index_is_a_user_error(copy: Path) -> None:
    index_path(copy, "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.parquet: the index is missing; copy index/"):
        open_reader(copy).read(0, 0)
    shutil.copy(index_path(copy, "000004.tar"), index_path(copy, "000000.tar"))
    with pytest.raises(UserError, match=r"000000\.parquet: the index is not the one that was written"):
        open_reader(copy).read(0, 0)


def test_a_reader_travels_to_another_process_without_its_open_files(emoji_shards: Path) -> None:
    reader = open_reader(emoji_shards / "train")
    before = reader.read(0, 0)
    again = pickle.loads(pickle.dumps(reader))
    assert again._rows is None
    assert not again.origin._handles
    assert again.read(0, 0) == before


def test_only_so_many_shards_are_open_at_a_time(emoji_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_files() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(
            os.path.realpath(link).startswith(str(emoji_shards)) for link in links if os.path.islink(link)
        )

    monkeypatch.setattr(origin, "HANDLES", 2)
    reader = open_reader(emoji_shards / "train")
    before = open_files()
    first = [reader.read(shard, 0) for shard in range(5)]
    assert [reader.read(shard, 0) for shard in range(5)] == first
    assert open_files() - before == 2


# ---- other readers


def test_plain_webdataset_reads_our_tars(emoji_shards: Path) -> None:
    folder = emoji_shards / "train"
    urls = [str(folder / shard.name) for shard in read_manifest(folder).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    reader = open_reader(folder)
    places = [(shard, row) for shard, e in enumerate(reader.manifest.shards) for row in range(e.samples)]
    assert len(samples) == len(places) == 72
    for found, place in zip(samples, places):
        raw = reader.read(*place)
        assert found["__key__"] == raw.key
        assert {name for name in found if not name.startswith("__")} == {"jpg", "json", "txt"}
        assert found["jpg"] == raw.image
        assert found["txt"].decode() == raw.captions[0]
        assert parse_record(json.loads(found["json"])) == reader.record(*place)


def test_webdataset_decodes_our_jpegs_and_jsons(photo_shards: Path) -> None:
    urls = [str(path) for path in sorted(photo_shards.glob("*.tar"))]
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg", "json", "txt")
    )
    assert len(samples) == 20
    for picture, record, caption in samples:
        assert picture.shape == (record["height"], record["width"], 3)
        assert caption == record["captions"][0]  # [""] without a caption
        assert record["label"] == record["source"].split("/")[0]


def test_tar_lists_the_members_in_the_order_of_the_index(emoji_shards: Path) -> None:
    tar = emoji_shards / "train/000001.tar"
    expected = [
        f"{key}.{extension}"
        for key in read_index(index_path(tar.parent, tar.name), ["key"])["key"].to_pylist()
        for extension in ("jpg", "json", "txt")
    ]
    assert subprocess.check_output(["tar", "tf", tar], text=True).split() == expected


def test_a_picture_can_be_cut_out_of_the_tar_by_its_offset_alone(
    photo_folder: Path, photo_shards: Path
) -> None:
    for path in sorted(photo_shards.glob("*.tar")):
        data = path.read_bytes()
        for row in read_index(index_path(photo_shards, path.name)).to_pylist():
            image = data[row["image_offset"] : row["image_offset"] + row["image_length"]]
            assert hashlib.sha256(image).hexdigest() == row["image_sha256"]
            with Image.open(io.BytesIO(image)) as picture:
                assert picture.size == (row["width"], row["height"])
    sources = {hashlib.sha256(path.read_bytes()).hexdigest() for path in photo_folder.rglob("*.jpg")}
    packed = {
        digest
        for path in sorted(photo_shards.glob("*.tar"))
        for digest in read_index(index_path(photo_shards, path.name))["image_sha256"].to_pylist()
    }
    assert packed == sources
    assert len(np.unique(list(packed))) == 20
