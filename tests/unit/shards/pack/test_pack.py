"""Packing: what comes out for what goes in, the same bytes for any number of processes, and every refusal."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import DEMO
from PIL import Image
from skimage import data

import shards.pack.pipeline
from shards.format.index import index_path, read_index
from shards.format.manifest import find_manifest_folders, read_manifest
from shards.format.sample import parse_record
from shards.pack.pipeline import PackResult, PackSettings, pack
from shards.pictures.decode import check_picture, decode_picture
from shards.pictures.formats import BadPicture
from shards.sources import layout_names
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(data.astronaut()).resize((96, 64))
JPEG = encoded(PHOTO, "JPEG")


def huge_png() -> bytes:
    """A PNG of 83 bytes whose header promises 40,000 x 40,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "corrupt"),
    "empty": (b"", "empty"),
    "text": (b"this is no picture", "corrupt"),
    "eps": (encoded(PHOTO, "EPS"), "format"),
    "bomb": (huge_png(), "too_large"),
}


def jpeg(number: int) -> bytes:
    """A different picture for each number."""
    return encoded(PHOTO.crop((number, 0, number + 64, 64)), "JPEG")


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path


def pack_table(path: Path, out: Path, **options: Any) -> PackResult:
    workers = options.pop("workers", 0)
    return pack(PackSettings(str(path), "table", persons="none", **options), out, workers=workers)


def files(root: Path) -> dict[str, str]:
    """Path below the root -> SHA-256, of every file."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    shards_ = read_manifest(folder).shards
    return [row for entry in shards_ for row in read_index(index_path(folder, entry.name)).to_pylist()]


@pytest.fixture(scope="module")
def mixed_table(emoji_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 good pictures in two splits, and five bad ones between them: more than two workers have under way."""
    rows = pq.read_table(emoji_table).to_pylist()
    present = {row["key"] for row in rows}
    more = [row for row in pq.read_table(DEMO).slice(100, 400).to_pylist() if row["key"] not in present]
    rows += [row for row in more if row["split"] == "train"][:72] + [r for r in more if r["split"] == "test"][
        :24
    ]
    for i, (key, (image, _)) in enumerate(BAD.items()):
        rows.insert(7 * i, {**rows[0], "key": f"bad-{key}", "image": image})
    return table(tmp_path_factory.mktemp("mixed") / "t.parquet", rows)


def test_every_number_of_workers_and_every_run_writes_the_same_bytes(
    mixed_table: Path, tmp_path: Path
) -> None:
    for name, workers in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        result = pack_table(mixed_table, tmp_path / name, workers=workers, shard_samples=40)
        assert (result.records, len(result.rejected)) == (197, 5)
        assert result.packed == {"train": 144, "test": 48}
    first = files(tmp_path / "a")
    assert [first == files(tmp_path / name) for name in "bcd"] == [True, True, True]
    assert {"rejected.parquet", "test/manifest.json", "test/sizes.json", "train/000003.tar"} <= set(first)
    assert read_manifest(tmp_path / "a/train").identity == read_manifest(tmp_path / "d/train").identity


def test_another_seed_writes_the_same_samples_in_another_order(emoji_table: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack_table(emoji_table, tmp_path / str(seed), seed=seed)
    keys = [[row["key"] for row in rows_of(tmp_path / str(seed) / "train")] for seed in (0, 1)]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]


def test_pictures_pass_through_unchanged(emoji_table: Path, emoji_shards: Path) -> None:
    source = {row["key"]: row for row in pq.read_table(emoji_table).to_pylist()}
    assert sorted(source) == sorted(
        row["key"] for f in find_manifest_folders(emoji_shards) for row in rows_of(f)
    )
    for folder in find_manifest_folders(emoji_shards):
        for entry in read_manifest(folder).shards:
            with tarfile.open(folder / entry.name) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
            for row in read_index(index_path(folder, entry.name)).to_pylist():
                origin, key = source[row["key"]], row["key"]
                record = parse_record(json.loads(members[f"{key}.json"]))
                assert members[f"{key}.jpg"] == origin["image"]
                assert members[f"{key}.txt"].decode() == origin["caption"]
                assert (
                    row["image_sha256"]
                    == record["image_sha256"]
                    == hashlib.sha256(origin["image"]).hexdigest()
                )
                assert (row["label"], row["captions"]) == (origin["label"], [origin["caption"]])
                assert (row["width"], row["height"], row["persons"]) == (160, 160, [])
                attributes = {
                    n: origin[n] for n in ("subgroup", "polarity", "family") if origin[n] is not None
                }
                assert record["attributes"] == attributes


def test_each_bad_picture_is_refused_with_its_reason_and_the_rest_is_packed(
    mixed_table: Path, tmp_path: Path
) -> None:
    result = pack_table(mixed_table, tmp_path / "out")
    refused = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in refused} == {
        f"bad-{k}": reason for k, (_, reason) in BAD.items()
    }
    assert all(row["detail"] for row in refused)
    assert result.records == sum(result.packed.values()) + len(refused) == 197
    provenance = read_manifest(tmp_path / "out/train").provenance
    assert provenance["records"] == 197
    assert provenance["rejected"] == {"corrupt": 2, "empty": 1, "format": 1, "too_large": 1}
    assert provenance["settings"]["source"] == str(mixed_table)


def test_the_second_record_of_a_key_is_refused_in_any_split(tmp_path: Path) -> None:
    rows = [{"key": "same", "image": jpeg(i), "split": split} for i, split in enumerate(("train", "test"))]
    rows.append({"key": "other", "image": jpeg(2), "split": "train"})
    result = pack_table(table(tmp_path / "t.parquet", rows), tmp_path / "out")
    assert [(r.source, r.reason) for r in result.rejected] == [("same", "duplicate_key")]
    assert result.packed == {"train": 1, "test": 1}


def test_a_missing_file_of_a_csv_is_refused_and_the_rest_is_packed(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/ä.jpg").write_bytes(JPEG)
    long = "x" * 300
    (tmp_path / "t.csv").write_text(
        f"path,key,label\npics/ä.jpg,a,joy\npics/no.jpg,b,joy\npics,c,awe\npics/ä.jpg/x,d,awe\n{long},e,awe\n"
    )
    result = pack_table(tmp_path / "t.csv", tmp_path / "out")
    assert result.packed == {"": 1}
    assert {r.source: r.reason for r in result.rejected} == dict.fromkeys("bcde", "unreadable")
    details = {r.source: r.detail for r in result.rejected}
    assert details["b"] == f"No such file or directory: {tmp_path}/pics/no.jpg"
    [row] = rows_of(tmp_path / "out")
    assert (row["key"], row["label"], row["image_length"]) == ("a", "joy", len(JPEG))


def test_a_folder_of_splits_and_labels_is_packed(tmp_path: Path) -> None:
    for i, name in enumerate(("train/joy/ein bild.v2.jpg", "train/悲しみ/plain.jpg", "test/joy/1.jpg")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jpeg(i))
    (tmp_path / "in/test/joy/1.txt").write_text("an astronaut")
    result = pack(PackSettings(str(tmp_path / "in"), "folder", persons="none"), tmp_path / "out")
    assert result.packed == {"train": 2, "test": 1}
    assert result.folders == [tmp_path / "out/test", tmp_path / "out/train"]
    assert {row["label"] for row in rows_of(tmp_path / "out/train")} == {"joy", "悲しみ"}
    [row] = rows_of(tmp_path / "out/test")
    assert row["key"] == hashlib.sha256(b"test/joy/1.jpg").hexdigest()[:16]
    assert row["captions"] == ["an astronaut"]
    with tarfile.open(tmp_path / "out/test/000000.tar") as tar:
        record = json.load(tar.extractfile(f"{row['key']}.json"))  # type: ignore[arg-type]
    assert record["source"] == "test/joy/1.jpg"


@pytest.mark.parametrize("split", ["../x", "a/b", ".hidden", "..", "-x", "a b", "x\ny"])
def test_a_split_that_is_not_a_folder_name_is_refused(split: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [{"key": "a", "image": JPEG, "split": split}])
    with pytest.raises(UserError, match="not a folder name; use only letters, digits"):
        pack_table(path, tmp_path / "sub/out")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["t.parquet"]


def test_records_with_and_without_a_split_do_not_mix(tmp_path: Path) -> None:
    rows = [{"key": "a", "image": JPEG, "split": "train"}, {"key": "b", "image": JPEG, "split": None}]
    with pytest.raises(UserError, match="give every record a split, or no record"):
        pack_table(table(tmp_path / "t.parquet", rows), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def failing_cases(path: Path) -> dict[str, PackSettings]:
    return {
        "layout": PackSettings(str(path), "zip", persons="none"),
        "detector": PackSettings(str(path), "table", persons="yolo"),
        "source": PackSettings(str(path / "no"), "table", persons="none"),
        "column": PackSettings(str(path), "table", persons="none", columns={"image": "jpg"}),
    }


@pytest.mark.parametrize("case", ["layout", "detector", "source", "column"])
def test_a_wrong_setting_leaves_no_files(case: str, tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [{"image": JPEG}])
    with pytest.raises(UserError):
        pack(failing_cases(path)[case], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_source_where_nothing_can_be_packed_is_a_user_error(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [{"key": "a", "image": b"no"}])
    with pytest.raises(
        UserError, match="nothing to pack, all 1 records were refused; the first: a: not a picture"
    ):
        pack_table(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_the_rest_of_a_killed_pack_is_replaced(emoji_table: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial/train").mkdir(parents=True)
    (tmp_path / "out.partial/train/000000.tar").write_bytes(b"half")
    (tmp_path / "out.partial/train/999999.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty OUT is fine
    pack_table(emoji_table, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/train/999999.tar").exists()


def test_the_working_folder_can_be_packed_into(
    emoji_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pack_table(emoji_table, Path(".")).packed == {"train": 72, "test": 24}
    assert read_manifest(tmp_path / "here/test").samples == 24


# ---- the command


def packed_by_command(emoji_table: Path, out: Path, *more: str) -> int:
    return run(["shards", "pack", str(emoji_table), str(out), "--persons", "none", "--workers", "0", *more])


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr that are no progress bar."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("packing:")]


def test_the_command_packs_counts_and_does_not_overwrite(
    emoji_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert packed_by_command(emoji_table, out) == EXIT_DONE
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/test: 24 samples",
        f"{out}/train: 72 samples",
        "96 records = 96 packed + 0 refused; 0 with a person, 96 without",
        "the samples have 96 captions, 96 labels and 0 boxes; 0 have no caption, 0 no label, 96 no box",
    ]
    before = files(out)
    assert packed_by_command(emoji_table, out) == EXIT_USER
    assert error_lines(capsys) == [
        f"uniemox: error: OUT={out}: exists; "
        "give another folder, delete it, or use --resume to keep a complete pack"
    ]
    assert packed_by_command(emoji_table, out, "--seed", "1", "--resume") == EXIT_USER
    assert error_lines(capsys) == [
        f"uniemox: error: OUT={out}: was packed with other settings; give another folder, or delete it"
    ]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert packed_by_command(emoji_table, out, "--resume") == EXIT_DONE
    assert capsys.readouterr().out == f"{out} is complete: 96 samples, nothing to do\n"
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert files(out) == before


def test_an_out_that_is_a_file_or_a_foreign_folder_stays_untouched(emoji_table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_text("mine")
    for name in ("file", "folder"):
        for more in ((), ("--resume",)):
            assert packed_by_command(emoji_table, tmp_path / name, *more) == EXIT_USER
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "x"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--layout", "zip"], f"--layout=zip: not known; valid are {', '.join(layout_names())}"),
        (
            ["--persons", "yolo"],
            "--persons 'yolo': not a person detector; valid are nanodet, onnx:FILE (a YOLO-type export), source (only "
            "the boxes of the source), none",
        ),
        (["--shard-size", "0"], "--shard-size=0.0: give a positive number of MB"),
        (["--column", "image"], "--column=image: expected OURS=THEIRS, such as image=jpg"),
    ],
)
def test_a_wrong_option_ends_with_2_and_one_line(
    more: list[str], line: str, emoji_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert packed_by_command(emoji_table, tmp_path / "out", *more) == EXIT_USER
    assert error_lines(capsys) == [f"uniemox: error: {line}"]
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_pictures_ends_with_2_and_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.parquet", [{"jpg": JPEG, "text": "c"}])
    assert packed_by_command(path, tmp_path / "out") == EXIT_USER
    [line] = error_lines(capsys)
    assert "its columns are jpg, text; name one with --column image=NAME" in line
    assert (
        packed_by_command(path, tmp_path / "out", "--column", "image=jpg", "--column", "caption=text")
        == EXIT_DONE
    )
    assert [row["captions"] for row in rows_of(tmp_path / "out")] == [["c"]]


def test_stats_describe_each_split(emoji_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["shards", "stats", str(emoji_shards)]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{emoji_shards}/train: 72 samples in 5 shards, ")
    test = next(at for at, line in enumerate(lines) if line.startswith(f"{emoji_shards}/test: "))
    assert lines[test].startswith(f"{emoji_shards}/test: 24 samples in 2 shards, ")
    assert lines[test + 1].startswith("  captions: 24, ")
    assert lines[test + 1].endswith(" characters; 0 pictures without")
    assert lines[test + 2] == "  persons per picture: 0: 24"
    assert lines[test + 3].startswith("  sides: 160 by 160 pixels; pictures of ")


@pytest.mark.parametrize("kind", ["missing", "foreign", "empty"])
def test_stats_of_no_data_end_with_2_and_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    if kind != "missing":
        folder.mkdir()
    if kind == "empty":
        shards.pack.pipeline.Manifest((), {}).write(folder)
    assert run(["shards", "stats", str(folder)]) == EXIT_USER
    problem = "has no samples; pack a source with pictures"
    if kind != "empty":
        found = "no such folder" if kind == "missing" else "has no manifest.json"
        problem = f"{found}; build it with `uniemox shards pack`"
    assert error_lines(capsys) == [f"uniemox: error: DIR={folder}: {problem}"]


# ---- decoding before packing


@pytest.mark.parametrize(("data_", "reason"), BAD.values(), ids=BAD)
def test_decoding_names_the_problem(data_: bytes, reason: str) -> None:
    with pytest.raises(BadPicture) as caught:
        decode_picture(data_)
    assert caught.value.reason == reason


def test_a_jpeg_cut_by_a_single_byte_is_noticed() -> None:
    with pytest.raises(BadPicture, match="truncated"):
        decode_picture(JPEG[:-1])


def test_a_picture_of_several_frames_under_jpg_is_its_first() -> None:
    several = encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((32, 32))])
    assert check_picture(several).format == "JPEG"
    np.testing.assert_array_equal(decode_picture(several), decode_picture(JPEG))


def test_width_and_height_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    pack_table(
        table(tmp_path / "t.parquet", [{"image": encoded(PHOTO, "JPEG", exif=exif)}]), tmp_path / "out"
    )
    [row] = rows_of(tmp_path / "out")
    assert (row["width"], row["height"]) == (64, 96)
