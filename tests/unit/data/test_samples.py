"""Samples of any tars in webdataset's form: the same as webdataset's own, through both kinds of indexes."""

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from s3 import serve_s3, upload
from tars import jpeg, write_tar

from shards.edit.index_members import index_members
from shards.edit.index_tars import index_folder
from shards.format.manifest import MEMBERS
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, Fault, UserError
from uniemox_dist.data.indexed_reader import DamagedSample
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.samples import MAX_GAP, MemberReader, PackedReader, join_spans, open_samples

Sample = dict[str, Any]


def by_webdataset(tar: Path | str) -> list[Sample]:
    """The samples that webdataset reads. At a second member of one extension it raises an error unless a handler goes
    on, so that the first one counts."""
    found = webdataset.WebDataset(
        str(tar), shardshuffle=False, empty_check=False, handler=webdataset.ignore_and_continue
    )
    samples = [{k: v for k, v in sample.items() if k != "__local_path__"} for sample in found]
    return [sample for sample in samples if len(sample) > 2]


def read_all(reader: MemberReader | PackedReader) -> list[Sample]:
    return [reader.read(shard, row) for shard, rows in enumerate(reader.counts) for row in range(rows)]


def in_order(samples: list[Sample]) -> list[list[tuple[str, Any]]]:
    return [list(sample.items()) for sample in samples]


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of three tars with a sound, a class, an array and two pictures for each of four samples."""
    for tar in range(3):
        members = {
            f"{'train/' if tar else ''}{tar}-{i:02d}.{extension}": os.urandom(100 + 7 * i)
            for i in range(4)
            for extension in ("flac", "cls", "left.jpg", "right.JPG", "npy")
        }
        write_tar(tmp_path / "sounds" / f"00{tar}.tar", members)
    return tmp_path / "sounds"


# ---- webdataset's own reading

PARTS = st.sampled_from(
    ["a", "b", "A", ".", "..", "./", "a/", "é", "中/", "x y", ".jpg", ".JPG", ".cls", ".seg.png", ".tar.gz", "__",
     "__m__/", "long" * 30, "ü" * 70]
)  # fmt: skip
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("".join)
TYPES = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
CONTENTS = st.one_of(st.binary(max_size=20), st.sampled_from([512, 513, 3000]).map(lambda n: b"." * n))
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(max_examples=120, deadline=None)
@given(members=st.lists(st.tuples(NAMES, TYPES, CONTENTS), max_size=12), form=FORMATS)
def test_samples_of_arbitrary_tars_are_those_of_webdataset(
    members: list[tuple[str, bytes, bytes]], form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    with tarfile.open(folder / "any.tar", "w", format=form) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    theirs = by_webdataset(folder / "any.tar")
    if not theirs:
        with pytest.raises(UserError, match="no sample in 1 tars"):
            index_members(str(folder))
    else:
        index_members(str(folder))
        assert in_order(read_all(open_samples(folder, field="data"))) == in_order(theirs)
    shutil.rmtree(folder)


def test_samples_of_several_tars_are_those_of_webdataset_and_are_read_at_once(sounds: Path) -> None:
    index_members(str(sounds))
    reader = pickle.loads(pickle.dumps(open_samples(sounds, field="data")))
    samples = read_all(reader)
    pattern = str(sounds / "{000..002}.tar")
    assert in_order(samples) == in_order(by_webdataset(pattern))
    assert list(samples[4]) == ["__key__", "__url__", "flac", "cls", "left.jpg", "right.jpg", "npy"]
    assert (samples[4]["__key__"], samples[4]["__url__"]) == ("train/1-00", str(sounds / "001.tar"))
    assert reader.origin.counts.reads == 12
    assert in_order(samples[4:8]) == in_order(read_all(open_samples(sounds / "001.tar", field="data")))


@pytest.mark.parametrize("folder", ["emoji_shards", "photo_shards"])
def test_samples_of_a_packed_data_set_are_those_of_webdataset(
    folder: str, request: pytest.FixtureRequest
) -> None:
    packed: Path = request.getfixturevalue(folder)
    packed = packed / "test" if folder == "emoji_shards" else packed
    reader = open_samples(packed, field="data")
    assert isinstance(reader, PackedReader)
    pattern = str(packed / f"{{000000..{len(reader.counts) - 1:06d}}}.tar")
    assert in_order(read_all(reader)) == in_order(by_webdataset(pattern))
    assert reader.origin.counts.reads == reader.samples


# ---- reads


def test_members_close_to_each_other_are_read_together() -> None:
    assert join_spans([512, 2048, 2048 + 600 + MAX_GAP], [100, 600, 5]) == [
        (512, 2648 + MAX_GAP + 5, [0, 1, 2])
    ]
    assert join_spans([512, 700 + MAX_GAP], [100, 5]) == [
        (512, 612, [0]),
        (700 + MAX_GAP, 705 + MAX_GAP, [1]),
    ]
    assert join_spans([], []) == []


def test_a_large_member_that_is_left_out_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.txt": b"one", "README": bytes(3 * MAX_GAP), "x.cls": b"7"})
    index_members(str(tmp_path))
    reader = open_samples(tmp_path, field="data")
    assert reader.read(0, 0) == {
        "__key__": "x", "__url__": str(tmp_path / "a.tar"), "txt": b"one", "cls": b"7"
    }  # fmt: skip
    assert reader.origin.counts == ReadCounts(reads=2, bytes=4)


def test_a_sample_of_empty_members_needs_no_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.txt": b"", "y.txt": b"1"})
    index_members(str(tmp_path))
    reader = open_samples(tmp_path, field="data")
    assert reader.read(0, 0)["txt"] == b""
    assert reader.origin.counts.reads == 0


# ---- damage


def test_a_tar_of_the_same_size_with_other_content_has_damaged_samples(sounds: Path) -> None:
    index_members(str(sounds))
    tar = sounds / "001.tar"
    data = bytearray(tar.read_bytes())
    place = data.find(b"train/1-02.cls") + 512
    data[place] ^= 1
    tar.write_bytes(data)
    reader = open_samples(sounds, field="data")
    with pytest.raises(DamagedSample) as caught:
        reader.read(1, 2)
    assert str(caught.value) == "001.tar: train/1-02: bytes differ from the index"
    assert reader.read(1, 3)["__key__"] == "train/1-03"
    assert open_samples(sounds, field="data", verify_hash=False).read(1, 2)["cls"][0] == data[place]


def test_a_replaced_tar_is_named_before_anything_is_read(sounds: Path) -> None:
    index_members(str(sounds))
    size = (sounds / "001.tar").stat().st_size
    write_tar(sounds / "001.tar", {"a.txt": bytes(50_000)})
    with pytest.raises(UserError) as caught:
        open_samples(sounds, field="data.path")
    assert str(caught.value) == (
        f"data.path={sounds}: shard 001.tar has 61440 bytes instead of {size}; it is not the tar that was indexed; "
        f"copy it again, or delete the index ({sounds / 'members'}) and run `uniemox shards index {sounds} --members`"
    )
    open_samples(sounds, field="data.path", share=(0, 2))  # the second rank checks that tar
    open_samples(sounds / "{000,002}.tar", field="data.path")
    (sounds / "001.tar").unlink()
    with pytest.raises(UserError, match=r"shard 001\.tar is missing; it is not the tar that was indexed"):
        open_samples(sounds, field="data.path", share=(1, 2))


def test_a_tar_that_is_cut_while_it_is_read_is_a_fault(sounds: Path) -> None:
    index_members(str(sounds))
    reader = open_samples(sounds, field="data", verify_hash=False)
    os.truncate(sounds / "000.tar", 1000)
    with pytest.raises(Fault, match=r"shard 000\.tar could not be read .* is the file truncated\?"):
        reader.read(0, 3)


@pytest.mark.parametrize("at", [0, 512 + 40])
def test_a_changed_header_or_picture_of_a_packed_sample_is_damage(
    at: int, photo_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(photo_shards, tmp_path / "set")
    reader = open_samples(tmp_path / "set", field="data")
    tar = tmp_path / "set/000001.tar"
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedSample, match=r"000001\.tar: .*: bytes differ from the index"):
        reader.read(1, 0)
    assert reader.read(1, 1)


# ---- which index


def test_without_an_index_the_command_that_writes_it_is_named(sounds: Path, tmp_path: Path) -> None:
    for data in (sounds, str(sounds / "{000..001}.tar"), sounds / "000.tar"):
        with pytest.raises(UserError) as caught:
            open_samples(data, field="data")
        assert str(caught.value) == (
            f"data={sounds}: has no index; run `uniemox shards index {sounds} --members`"
        )
    with pytest.raises(UserError, match=r"nowhere: no such folder; give a folder of tars"):
        open_samples(tmp_path / "nowhere", field="data")
    with pytest.raises(UserError, match="names tars in 2 folders"):
        open_samples("{a,b}/000.tar", field="data")


def test_a_folder_of_splits_names_them(emoji_shards: Path) -> None:
    with pytest.raises(UserError, match=r"has no index; name one of its splits: test, train"):
        open_samples(emoji_shards, field="data")


def test_a_pattern_selects_tars_in_the_order_of_the_index(sounds: Path) -> None:
    index_members(str(sounds / "{000..001}.tar"))
    reader = open_samples(str(sounds / "{001,000}.tar"), field="data")
    assert [entry.name for entry in reader.manifest.shards] == ["000.tar", "001.tar"]
    assert reader.manifest.identity == open_samples(sounds, field="data").manifest.identity
    one = open_samples(sounds / "001.tar", field="data")
    assert (one.samples, one.manifest.identity != reader.manifest.identity) == (4, True)
    with pytest.raises(UserError) as caught:
        open_samples(str(sounds / "{000..002}.tar"), field="data")
    assert str(caught.value) == (
        f"data={sounds}/{{000..002}}.tar: 002.tar is not in the index ({sounds / 'members'}); index it too, or correct "
        "the pattern"
    )


def test_a_manifest_of_the_other_kind_is_refused(sounds: Path, photo_shards: Path, tmp_path: Path) -> None:
    index_members(str(sounds), index=tmp_path / "index")
    with pytest.raises(
        UserError, match="is an index of members, not a data set of pictures; name a folder that"
    ):
        open_samples(tmp_path / "index", field="data")
    with pytest.raises(
        UserError, match="is a data set of pictures, not an index of members; write one with `uniemox"
    ):
        open_samples(sounds, index=photo_shards, field="data")
    assert run(["shards", "stats", str(tmp_path / "index")]) == 2


def test_an_index_of_pictures_that_lacks_members_is_refused_with_the_fix(tmp_path: Path) -> None:
    """Members of other samples lie between: the ranges in the index have one member each."""
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(1), "y.jpg": jpeg(2), "x.txt": b"one", "y.txt": b"two"})
    index_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        open_samples(tmp_path, field="data").read(0, 0)
    assert str(caught.value).endswith(
        "the index of pictures does not list all members of this sample; run `uniemox shards index "
        f"{tmp_path} --members`"
    )
    assert run(["shards", "index", str(tmp_path), "--members", "--workers", "0"]) == EXIT_DONE
    reader = open_samples(tmp_path, field="data")
    assert in_order(read_all(reader)) == in_order(by_webdataset(tmp_path / "a.tar"))
    assert reader.samples == 4  # webdataset groups neighbours only


def test_an_indexed_folder_whose_samples_are_whole_needs_no_second_index(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {"x.jpg": jpeg(1), "x.txt": b"one", "y.jpg": jpeg(2), "y.json": b"{}", "y.cls": b"1"},
    )
    index_folder(tmp_path)
    reader = open_samples(tmp_path, field="data")
    assert isinstance(reader, PackedReader)
    assert in_order(read_all(reader)) == in_order(by_webdataset(tmp_path / "a.tar"))


# ---- stores


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3("sounds", "indexes"):
        yield "s3://sounds"


def test_tars_on_a_store_are_read_through_an_index_elsewhere(
    bucket: str, sounds: Path, tmp_path: Path
) -> None:
    upload(sounds, f"{bucket}/a")
    for place in (str(tmp_path / "index"), "s3://indexes/a"):
        command = [
            "shards",
            "index",
            f"{bucket}/a/{{000..002}}.tar",
            "--members",
            "--index",
            place,
            "--workers",
            "0",
        ]
        assert run(command) == EXIT_DONE
        reader = open_samples(f"{bucket}/a", index=place, field="data")
        samples = read_all(reader)
        assert reader.origin.counts.reads == 12
        local = by_webdataset(str(sounds / "{000..002}.tar"))
        assert [s["__url__"] for s in samples[::4]] == [f"{bucket}/a/00{i}.tar" for i in range(3)]
        without_url = [
            [item for item in sample.items() if item[0] != "__url__"] for sample in (*samples, *local)
        ]
        assert without_url[:12] == without_url[12:]
    with pytest.raises(UserError) as caught:
        open_samples(f"{bucket}/a", field="data")
    assert str(caught.value) == (
        f"data={bucket}/a: has no index; run `uniemox shards index {bucket}/a --members --index FOLDER`, and name that "
        "folder as the index"
    )


def test_an_index_beside_the_tars_of_a_store_is_found(bucket: str, sounds: Path) -> None:
    index_members(str(sounds))
    upload(sounds, f"{bucket}/b")
    reader = open_samples(f"{bucket}/b", field="data")
    assert reader.samples == 12
    assert reader.index_origin.url == f"{bucket}/b/{MEMBERS}"
    assert reader.read(2, 3)["__key__"] == "train/2-03"
