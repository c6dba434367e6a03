"""WebDataset tars as a source and as they are: img2dataset's, our own, foreign and broken ones."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from tars import bytes_of, jpeg, records, write_tar

from shards.edit.index_tars import index_folder
from shards.format.index import index_path, read_index
from shards.format.manifest import find_manifest_folders, read_manifest
from shards.format.tars import read_groups
from shards.inspect.verify import verify
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A download by img2dataset: two tars with .jpg, .json and .txt, each with a table that also has failed rows."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for shard in range(2):
        rows = []
        with webdataset.ShardWriter(str(folder / f"{shard:05d}-%d.tar"), maxcount=100, verbose=0) as writer:
            for i in range(4):
                key = f"{shard:05d}{i:04d}"
                row = {
                    "key": key,
                    "url": f"http://x/{i}.jpg",
                    "caption": f"caption {key}",
                    "status": "success",
                }
                row |= {
                    "error_message": None,
                    "width": 64,
                    "height": 48,
                    "sha256": "0" * 64,
                    "pwatermark": 0.5,
                }
                rows.append(row)
                if i == 3:
                    row |= {"status": "failed_to_download", "error_message": "404"}
                    continue
                fields = {**row, "exif": "{}"}
                fields.pop("pwatermark")
                writer.write(
                    {"__key__": key, "jpg": jpeg(8 * shard + i), "json": fields, "txt": row["caption"]}
                )
        (folder / f"{shard:05d}-0.tar").rename(folder / f"{shard:05d}.tar")
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    return folder


def test_img2datasets_tars_give_captions_and_the_fields_of_json_and_parquet(downloaded: Path) -> None:
    found = records(downloaded)
    assert [record.name for record in found] == [
        f"{s:05d}.tar/{s:05d}{i:04d}" for s in (0, 1) for i in range(3)
    ]
    first = found[0]
    assert (first.captions, first.label, first.split) == (("caption 000000000",), None, None)
    assert first.attributes == {"url": "http://x/0.jpg", "pwatermark": 0.5, "exif": "{}"}
    assert [bytes_of(record) for record in found] == [jpeg(8 * s + i) for s in (0, 1) for i in range(3)]


def test_they_pack_and_stream_with_the_bytes_they_had(downloaded: Path, tmp_path: Path) -> None:
    result = pack(PackSettings(str(downloaded), "wds", persons="none"), tmp_path / "out")
    assert result.packed == {"": 6}
    reader = ShardReader.from_folder(tmp_path / "out", "data.path")
    images = {reader.read(0, row).captions[0]: reader.read(0, row).image for row in range(6)}
    assert images["caption 000010002"] == jpeg(10)


@pytest.mark.long
def test_our_own_shards_are_repacked_unchanged(tiny_data: Path, tmp_path: Path) -> None:
    result = pack(PackSettings(str(tiny_data), "wds", persons="source"), tmp_path / "out")
    assert result.packed == {"train": 60, "test": 20}
    columns = ["key", "label", "captions", "persons", "image_sha256", "width", "height"]
    for split in ("train", "test"):
        rows = [
            {
                row["key"]: row
                for entry in read_manifest(folder / split).shards
                for row in read_index(index_path(folder / split, entry.name), columns).to_pylist()
            }
            for folder in (tiny_data, tmp_path / "out")
        ]
        assert rows[0] == rows[1]
    one, two = (ShardReader.from_folder(folder / "test", "x") for folder in (tiny_data, tmp_path / "out"))
    before = {record["source"]: record for record in (one.record(0, row) for row in range(20))}
    assert before == {record["source"]: record for record in (two.record(0, row) for row in range(20))}


def test_splits_are_folders_of_tars_and_labels_come_from_cls(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/a.tar", {"x.jpg": jpeg(1), "x.cls": b"3.0"})
    write_tar(tmp_path / "Validation/b.tar", {"deep/y.jpg": jpeg(2), "deep/y.txt": b"\xef\xbb\xbf two \n"})
    write_tar(tmp_path / "__MACOSX/._b.tar", {})
    found = records(tmp_path)
    assert [(r.name, r.split, r.label, r.captions) for r in found] == [
        ("Validation/b.tar/deep/y", "val", None, ("two",)),
        ("train/a.tar/x", "train", "3", ()),
    ]
    assert [r.name for r in records(tmp_path / "*/a.tar")] == ["train/a.tar/x"]
    assert [r.name for r in records(tmp_path / "train/a.tar")] == ["a.tar/x"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(form: int, tmp_path: Path) -> None:
    name = f"{'ordner/' * 20}{'bild ü ' * 10}"
    tar = write_tar(
        tmp_path / "a.tar", {f"{name}.jpg": jpeg(1), f"{name}.txt": b"c", "z.jpg": jpeg(2)}, format=form
    )
    first, second = records(tar)
    assert (first.name, first.captions, bytes_of(first)) == (f"a.tar/{name}", ("c",), jpeg(1))
    assert bytes_of(second) == jpeg(2)
    manifest, _ = index_folder(tmp_path)
    assert manifest.samples == 2
    assert ShardReader(tmp_path, manifest).read(0, 0).image == jpeg(1)


BAD_MEMBERS = {
    "../../evil.jpg": jpeg(1),
    "/abs/evil.jpg": jpeg(2),
    "a.jpg": jpeg(3),
    "a.png": jpeg(4),
    "only.txt": b"no picture",
    "broken.jpg": jpeg(5),
    "broken.json": b"{",
    "list.jpg": jpeg(6),
    "list.json": b"[1]",
    "twice.jpg": jpeg(9),
    "twice.json": b'{"caption": "a", "caption": "b"}',
    "._b.jpg": b"resource fork",
    "b.jpg": jpeg(7),
    "README": b"hello",
    "v1.2.jpg": jpeg(8),
}
REASONS = {
    "a.tar/../../evil": "unsafe_name",
    "a.tar//abs/evil": "unsafe_name",
    "a.tar/a.png": "duplicate_key",
    "a.tar/only": "no_picture",
    "a.tar/broken": "annotation",
    "a.tar/list": "annotation",
    "a.tar/twice": "annotation",
    "a.tar/._b": "corrupt",
    "a.tar/README": "no_picture",
}


def test_unusable_members_are_refused_with_a_reason_and_nothing_is_extracted(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/deep/a.tar", BAD_MEMBERS)
    before = sorted(tmp_path.rglob("*"))
    result = pack(PackSettings(str(tmp_path / "in/deep/a.tar"), "wds", persons="none"), tmp_path / "out")
    assert {refused.source: refused.reason for refused in result.rejected} == REASONS
    assert result.packed == {"": 3}
    assert result.records == 3 + len(REASONS)
    assert (
        sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts[len(tmp_path.parts) :])
        == before
    )


def test_a_picture_with_dots_in_its_name_brings_the_texts_that_share_them(tmp_path: Path) -> None:
    members = {
        "photo.txt": b"of all",
        "photo.cls": b"7",
        "photo.v2.jpg": jpeg(1),
        "photo.v2.txt": b"its own",
        "photo.v3.jpg": jpeg(2),
        "mask.seg.png": jpeg(3),
        "mask.jpg": jpeg(4),
    }
    first, second, plain, mask = records(write_tar(tmp_path / "a.tar", members))
    assert (first.name, first.captions, first.label, bytes_of(first)) == (
        "a.tar/photo",
        ("its own", "of all"),
        "7",
        jpeg(1),
    )
    assert (second.name, second.refused) == (
        "a.tar/photo.v3.jpg",
        ("duplicate_key", "a second picture (.v3.jpg) of one key"),
    )
    assert (plain.name, plain.refused, bytes_of(plain)) == ("a.tar/mask", None, jpeg(4))
    assert (mask.name, mask.refused) == (
        "a.tar/mask.seg.png",
        ("duplicate_key", "a second picture (.seg.png) of one key"),
    )


def test_hard_links_inside_tars_are_read_and_other_links_are_refused_and_listed(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [
        ("real.jpg", jpeg(1)),
        ("hard.jpg", "real.jpg"),
        ("label.jpg", jpeg(2)),
        ("label.cls", "real.cls"),
        ("two.jpg", jpeg(3)),
        ("two.png", "real.jpg"),
        ("end.jpg", jpeg(4)),
    ]
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = kind, content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        found = records(tmp_path / "a.tar")
        assert {r.name: r.refused and r.refused[0] for r in found} == {
            "a.tar/real": None,
            "a.tar/hard": None if kind == tarfile.LNKTYPE else "no_picture",
            "a.tar/label": "annotation",
            "a.tar/two": None,
            "a.tar/two.png": "duplicate_key",
            "a.tar/end": None,
        }
        if kind == tarfile.LNKTYPE:
            assert bytes_of(found[1]) == jpeg(1)
        assert bytes_of(found[-1]) == jpeg(4)
        assert [group.offset for group in read_groups(tmp_path / "a.tar")][1:] == [
            group.end for group in read_groups(tmp_path / "a.tar")
        ][:-1]


def own(source: str) -> bytes:
    return json.dumps({"source": source, "image_sha256": "0" * 64, "captions": ["c"]}).encode()


def data_set(folder: Path, listing: str | None, source: str, number: int) -> None:
    """Two tars that look like ours."""
    for tar in ("000000", "000001"):
        write_tar(
            folder / f"{tar}.tar", {"k.jpg": jpeg(number + int(tar)), "k.json": own(f"{source}{int(tar)}")}
        )
    if listing is not None:
        (folder / "manifest.json").write_text(json.dumps({"provenance": {"source_sha256": listing}}))


@pytest.mark.parametrize(
    ("listings", "names"),
    [
        (("a", "a"), ["train#0", "train#1", "val#0", "val#1"]),
        (("a", "b"), [f"{folder}/00000{i}.tar/{folder}#{i}" for folder in ("train", "val") for i in (0, 1)]),
        (("a", None), [f"{folder}/00000{i}.tar/{folder}#{i}" for folder in ("train", "val") for i in (0, 1)]),
    ],
    ids=["one pack", "two packs", "unknown"],
)
def test_samples_of_one_pack_of_ours_keep_the_names_in_their_source(
    listings: tuple[str | None, ...], names: list[str], tmp_path: Path
) -> None:
    for split, listing, number in zip(("train", "val"), listings, (0, 10)):
        data_set(tmp_path / split, listing, f"{split}#", number)
    for source in (tmp_path, tmp_path / "*/*.tar"):
        assert [record.name for record in records(source)] == names
    assert [record.name for record in records(tmp_path / "train/000001.tar")] == ["train#1"]


def test_tars_with_the_same_name_in_several_folders_are_packed_completely(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 100)):
        write_tar(tmp_path / f"in/{split}/00000.tar", {f"{i}.jpg": jpeg(first + i) for i in range(4)})
    result = pack(PackSettings(str(tmp_path / "in"), "wds", persons="none"), tmp_path / "out")
    assert (result.packed, result.rejected) == ({"train": 4, "val": 4}, [])
    pattern = str(tmp_path / "in/*/00000.tar")
    assert pack(PackSettings(pattern, "wds", persons="none"), tmp_path / "all").packed == {"": 8}


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ('{"caption": 5}', ("5",)),
        ('{"caption": ["one", "", "two"]}', ("one", "two")),
        ('{"caption": NaN}', ()),
        ('{"persons": [{"box": [0, 0, 1, 1], "score": 1, "labels": {"valence": NaN}}]}', ()),
        ('{"caption": {"en": "x"}}', "holds an object, but a text is expected"),
        ('{"label": [1, 2]}', "holds 2 labels (1, 2), but a sample has one"),
        ('{"caption": "hi \\ud83d"}', "captions.0: "),
        ('{"x": "\\ud83d"}', "attributes.x: "),
        ("[" * 100_000, "its values are nested too deeply"),
        ('{"x": ' + "[" * 200 + "]" * 200 + "}", "its values are nested more than 64 deep"),
        (
            '{"persons": [{"box": [0, 0, 1, 1], "score": 1e300}]}',
            "a person's score is between 0 and 1, got 1e+300",
        ),
        (
            '{"persons": [{"box": [0, 0, 1, 1' + "0" * 400 + '], "score": 1}]}',
            "int too large to convert to float",
        ),
        ('{"persons": {"box": [0, 0, 1, 1]}}', "holds an object, but a list of persons is expected"),
        (
            '{"persons": [{"box": [0, 0, 1, 1], "labels": [1]}]}',
            "labels: holds a list, but an object is expected",
        ),
    ],
)
def test_odd_values_in_a_json_are_converted_to_texts_or_refused(
    text: str, becomes: tuple[str, ...] | str, tmp_path: Path
) -> None:
    [record] = records(write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(1), "x.json": text.encode()}))
    if isinstance(becomes, tuple):
        assert (record.refused, record.captions) == (None, becomes)
        assert [person.labels for person in record.persons or ()] in ([], [{"valence": None}])
    else:
        assert record.refused is not None
        assert record.refused[0] == "annotation"
        assert becomes in record.refused[1]


def test_numbers_in_the_table_beside_a_tar_are_captions_and_a_damaged_table_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(1)})
    pq.write_table(pa.table({"key": ["a"], "caption": [5]}), tmp_path / "0.parquet")
    assert [record.captions for record in records(tar)] == [("5",)]
    (tmp_path / "0.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"0\.parquet: not a readable table: .*; copy it again or remove it$"):
        records(tar)


def cut(path: Path, at: int) -> Path:
    path.write_bytes(path.read_bytes()[:at])
    return path


def test_a_truncated_tar_is_named_wherever_it_was_cut(tmp_path: Path) -> None:
    members = {f"{i}.{e}": jpeg(i) if e == "jpg" else b"c" for i in range(3) for e in ("jpg", "txt")}
    whole = write_tar(tmp_path / "a.tar", members)
    ends = [(group.offset, group.end) for group in read_groups(whole)]
    assert len(ends) == 3
    for at in (ends[1][0] + 700, ends[1][1], ends[1][1] + 100, ends[2][1], 100):
        path = write_tar(tmp_path / "a.tar", members)
        with pytest.raises(UserError, match=r"SOURCE=.*a\.tar: not a complete tar"):
            records(cut(path, at))


@pytest.mark.parametrize(("kind", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_tar_error_names_the_command_to_decompress_it(
    kind: str, tool: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(
        UserError, match=rf"compressed tar cannot be read by position; decompress it first \({tool}\)"
    ):
        records(tmp_path / "a.tar")


def test_folders_without_tars_and_empty_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        records(tmp_path / "no")
    with pytest.raises(UserError, match="has no tars"):
        records(tmp_path)
    assert records(write_tar(tmp_path / "a.tar", {})) == []


# ---- shards index


@pytest.mark.parametrize("workers", [0, 2])
def test_foreign_tars_become_streamable_as_they_are(workers: int, downloaded: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in downloaded.glob("*.tar")}
    manifest, rejected = index_folder(downloaded, workers=workers)
    assert (manifest.samples, rejected) == (6, [])
    assert {entry.name: entry.sha256 for entry in manifest.shards} == before
    assert {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in downloaded.glob("*.tar")
    } == before
    reader = ShardReader.from_folder(downloaded, "data.path")
    samples = [reader.read(shard, row) for shard in (0, 1) for row in range(3)]
    assert [sample.image for sample in samples] == [jpeg(8 * s + i) for s in (0, 1) for i in range(3)]
    assert samples[0].captions == ("caption 000000000",)
    assert reader.record(1, 2)["caption"] == "caption 000010002"
    assert len({sample.key for sample in samples}) == 6
    assert find_manifest_folders(downloaded) == [downloaded]
    assert all(not verdict.problems for verdict in verify([downloaded]))


def test_the_command_counts_what_it_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", BAD_MEMBERS)
    write_tar(tmp_path / "b.tar", {"x.txt": b"no picture at all"})
    assert run(["shards", "index", str(tmp_path)]) == EXIT_DONE
    assert f"{4 + len(REASONS)} records = 3 indexed + {1 + len(REASONS)} refused" in capfd.readouterr().out
    assert [entry.name for entry in read_manifest(tmp_path).shards] == ["a.tar"]
    refused = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in refused} == {**REASONS, "b.tar/x": "no_picture"}
    assert run(["shards", "index", str(tmp_path)]) == EXIT_USER
    assert "has a manifest.json already; delete it and index/" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["no folder", "no tars", "cut", "no pictures"])
def test_folders_that_cannot_be_indexed_get_no_manifest(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    says = {
        "no folder": "no such folder; give a folder with .tar files",
        "no tars": "has no .tar files",
        "cut": "a.tar: not a complete tar",
        "no pictures": "no usable sample in 1 tars; the first: a.tar/x: has no picture",
    }
    if kind != "no folder":
        folder.mkdir()
    if kind == "cut":
        cut(write_tar(folder / "a.tar", {"x.jpg": jpeg(1)}), 800)
    if kind == "no pictures":
        write_tar(folder / "a.tar", {"x.txt": b"c"})
    assert run(["shards", "index", str(folder)]) == EXIT_USER
    assert says[kind] in capfd.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_a_key_that_comes_twice_in_one_tar_is_the_first(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("x.jpg", jpeg(1)), ("y.jpg", jpeg(2)), ("x.jpg", jpeg(3))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest, rejected = index_folder(tmp_path)
    assert [refused.reason for refused in rejected] == ["duplicate_key"]
    reader = ShardReader(tmp_path, manifest)
    assert [reader.read(0, row).image for row in (0, 1)] == [jpeg(1), jpeg(2)]


def test_an_annotated_json_keeps_persons_and_several_captions(tmp_path: Path) -> None:
    fields = {
        "captions": ["one", "two"],
        "label": 4,
        "persons": [{"box": [0, 0, 0.5, 1], "score": 0.7}],
        "attributes": {"scene": "attic"},
        "extra": float("inf"),
    }
    write_tar(
        tmp_path / "a.tar", {"x.jpg": jpeg(1), "x.json": json.dumps(fields).encode(), "x.txt": b"other"}
    )
    [record] = records(tmp_path)
    assert (record.captions, record.label) == (("one", "two", "other"), "4")
    assert record.attributes == {"scene": "attic", "extra": "inf"}
    assert record.persons is not None
    assert record.persons[0].box == (0, 0, 0.5, 1)


# ---- tars whose members are not in order


SCATTERED = {
    **{f"d/{i}.jpg": jpeg(i) for i in range(8)},
    **{f"d/{i}.json": json.dumps({"scene": f"s{i}", "label": "joy"}).encode() for i in range(8)},
    **{f"d/{i}.txt": f"caption {i}".encode() for i in range(8)},
}


def test_captions_that_follow_all_pictures_are_packed(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", SCATTERED)
    result = pack(PackSettings(str(tmp_path / "in"), "wds", persons="none"), tmp_path / "out")
    assert (result.packed, result.rejected) == ({"": 8}, [])
    reader = ShardReader.from_folder(tmp_path / "out", "x")
    found = {raw.captions: (raw.image, raw.label) for raw in (reader.read(0, row) for row in range(8))}
    assert found == {(f"caption {i}",): (jpeg(i), "joy") for i in range(8)}
    assert {reader.record(0, row)["attributes"]["scene"] for row in range(8)} == {f"s{i}" for i in range(8)}


def test_an_index_of_such_a_tar_has_captions_pictures_and_the_right_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", SCATTERED)
    manifest, rejected = index_folder(tmp_path)
    assert (manifest.samples, rejected) == (8, [])
    reader = ShardReader.from_folder(tmp_path, "x")
    for row in range(8):
        raw = reader.read(0, row)
        assert (raw.image, raw.captions, raw.label) == (jpeg(row), (f"caption {row}",), "joy")
        assert reader.record(0, row)["scene"] == f"s{row}"
    assert not any(verdict.problems for verdict in verify([tmp_path]))


def test_files_that_macos_adds_are_one_line_and_pictures_of_other_names_are_read(tmp_path: Path) -> None:
    fork = b"\0\5\x16\7" + bytes(60)
    members = {
        "./._x.jpg": fork,
        "./x.jpg": jpeg(1),
        "./._x.txt": fork,
        "./x.txt": b"its caption",
        "./.DS_Store": b"\0\0\0\1Bud1",
        "__MACOSX/._x.jpg": fork,
        "./._y.jpg": jpeg(2),
        "./z.jpg_large": jpeg(3),
        "./without extension": jpeg(4),
    }
    write_tar(tmp_path / "a.tar", members)
    found = {record.name: record for record in records(tmp_path)}
    assert {name: record.refused for name, record in found.items()} == {
        "a.tar/x": None,
        "a.tar/._y": None,
        "a.tar/z": None,
        "a.tar/without extension": None,
        "a.tar/._*": ("no_picture", "4 files that macOS adds to archives (._…, .DS_Store, __MACOSX)"),
    }
    assert found["a.tar/x"].captions == ("its caption",)
    assert bytes_of(found["a.tar/z"]) == jpeg(3)


def test_joined_tars_are_read_to_the_end_and_repeated_keys_are_counted(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1", {"0.jpg": jpeg(1), "0.txt": b"one", "1.jpg": jpeg(2)})
    two = write_tar(tmp_path / "2", {"0.jpg": jpeg(3), "0.txt": b"two", "2.jpg": jpeg(4)})
    (tmp_path / "a.tar").write_bytes(one.read_bytes() + two.read_bytes())
    found = records(tmp_path / "a.tar")
    assert [(record.name, record.captions, bytes_of(record)) for record in found] == [
        ("a.tar/0", ("one",), jpeg(1)),
        ("a.tar/1", (), jpeg(2)),
        ("a.tar/0", ("two",), jpeg(3)),
        ("a.tar/2", (), jpeg(4)),
    ]
    result = pack(PackSettings(str(tmp_path / "a.tar"), "wds", persons="none"), tmp_path / "out")
    assert result.packed == {"": 3}
    assert [(refused.source, refused.reason) for refused in result.rejected] == [("a.tar/0", "duplicate_key")]


# ---- fields of the .json by name


def test_fields_of_the_json_can_be_named(tmp_path: Path) -> None:
    members = {
        "a.jpg": jpeg(1),
        "a.json": b'{"TEXT": ["one", "two"], "mood": "joy", "part": "Validation", "caption": "kept out", "x": 1}',
        "a.txt": b"text",
        "a.cls": b"7",
        "b.jpg": jpeg(2),
        "b.json": b'{"caption": "c"}',
        "b.txt": b"text",
        "c.jpg": jpeg(3),
        "c.json": b'{"TEXT": {"en": "c"}}',
    }
    columns = {"caption": "TEXT", "label": "mood", "split": "part"}
    first, second, third = records(write_tar(tmp_path / "t.tar", members), columns=columns)
    found = (first.captions, first.label, first.split, first.attributes)
    assert found == (("one", "two"), "joy", "val", {"x": 1})
    assert (second.captions, second.label, second.split) == (("text", "c"), None, None)
    assert third.refused is not None
    assert third.refused[0] == "annotation"


def test_a_named_field_that_no_sample_has_is_a_user_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": jpeg(1), "a.json": b'{"caption": "c"}'})
    with pytest.raises(UserError, match=r"--column caption=words: no sample has such a field in its \.json"):
        records(tar, columns={"caption": "words"})
    with pytest.raises(
        UserError,
        match=r"--column image=jpg: --layout wds takes it from the tar|--column image=…: --layout wds",
    ):
        records(tar, columns={"image": "jpg"})


def test_captions_of_every_usual_name_are_read_and_all_are_kept(tmp_path: Path) -> None:
    members = {
        "a.JPG": jpeg(1),
        "a.TXT": b"upper case",
        "b.jpg": jpeg(2),
        "b.caption": b"of a caption file",
        "c.jpg": jpeg(3),
        "c.jpg.txt": b"beside its whole name",
        "d.png": jpeg(4),
        "d.png.json": b'{"caption": "in JSON", "mood": "calm"}',
        "e.jpg": jpeg(5),
        "e.text": b"third",
        "e.caption": b"second",
        "e.txt": b"first",
        "f.v2.jpg": jpeg(6),
        "f.v2.jpg.txt": b"of version 2",
    }
    found = records(write_tar(tmp_path / "a.tar", members))
    assert [record.captions for record in found] == [
        ("upper case",),
        ("of a caption file",),
        ("beside its whole name",),
        ("in JSON",),
        ("first", "second", "third"),
        ("of version 2",),
    ]
    assert found[3].attributes == {"mood": "calm"}


def test_nothing_that_is_said_about_a_picture_is_lost(tmp_path: Path) -> None:
    members = {
        "a.jpg": jpeg(1),
        "a.json": b'{"captions": ["one"], "caption": "two", "label": "joy"}',
        "a.txt": b"three",
        "a.jpg.txt": b"four",
        "a.v2.txt": b"five",
        "a.caption.txt": b"six",
        "a.cls": b"sad",
        "b.jpg": jpeg(2),
        "b.json": b'{"text": "seven", "caption": ""}',
        "k.left.jpg": jpeg(3),
        "k.right.jpg": jpeg(4),
        "k.txt": b"both",
        "k.left.txt": b"left",
        "k.right.txt": b"right",
    }
    a, b, k, other = records(write_tar(tmp_path / "t.tar", members))
    assert a.captions == ("one", "four", "three", "five", "six", "two")
    assert (a.label, a.attributes) == ("joy", {"cls": "sad"})
    assert (b.captions, b.attributes) == (("seven",), {})
    assert k.captions == ("left", "both")
    assert other.refused is not None


def test_every_picture_beside_the_one_of_a_key_is_counted(tmp_path: Path) -> None:
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    members = {"d.jpg": jpeg(1), "d.img": jpeg(2), "d": jpeg(3), "d.svg": drawing, "d.npy": b"\x93NUMPY"}
    first, *others = records(write_tar(tmp_path / "t.tar", members))
    assert first.refused is None
    assert {record.name: record.refused for record in others} == {
        "t.tar/d.img": ("duplicate_key", "a second picture (.img) of one key"),
        "t.tar/d": ("duplicate_key", "a second picture (without extension) of one key"),
        "t.tar/d.svg": ("duplicate_key", "a second picture (.svg) of one key"),
    }
