"""The same picture twice: in one pack, across splits, across parts."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from shards.edit.merge import merge
from shards.format.index import index_path, read_all_rows, read_index
from shards.format.manifest import find_manifest_folders, read_manifest
from shards.pack.pipeline import PackResult, PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import ShardReader

PHOTO = Image.fromarray(data.astronaut())


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    PHOTO.crop((number, 0, number + 64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> PackResult:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    settings = PackSettings(str(tmp_path / "t.parquet"), "table", persons="none")
    return pack(settings, tmp_path / options.pop("out", "out"), **options)


def reasons(result: PackResult) -> dict[str, str]:
    return {rejected.source: rejected.reason for rejected in result.rejected}


def keys(folder: Path) -> list[str]:
    shards = read_manifest(folder).shards
    return [
        key
        for entry in shards
        for key in read_index(index_path(folder, entry.name), ["key"])["key"].to_pylist()
    ]


def test_an_exact_copy_is_refused_and_another_encoding_of_the_same_picture_is_not(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PHOTO.crop((1, 0, 65, 64)).save(buffer, "JPEG", quality=80)
    rows = [
        {"key": "a", "image": picture(1)},
        {"key": "b", "image": picture(1)},
        {"key": "c", "image": buffer.getvalue()},
    ]
    result = packed(tmp_path, rows)
    assert result.packed == {"": 2}
    assert list(reasons(result).values()) == ["duplicate"]
    assert result.rejected[0].detail in ("the same picture as a", "the same picture as b")


def test_the_same_picture_with_another_label_is_a_conflict(tmp_path: Path) -> None:
    rows = [{"key": label, "image": picture(1), "label": label} for label in ("joy", "fear")]
    result = packed(tmp_path, [*rows, {"key": "other", "image": picture(2), "label": "joy"}])
    assert sum(result.packed.values()) == 2
    assert list(reasons(result).values()) == ["conflict"]
    assert "which is labelled" in result.rejected[0].detail


@pytest.mark.parametrize("seed", range(4))
def test_across_splits_the_test_copy_stays_in_any_order(seed: int, tmp_path: Path) -> None:
    rows = [
        {"key": f"{split}{i}", "image": picture(i), "split": split, "label": label}
        for i in range(3)
        for split, label in (("train", "joy"), ("val", "joy"), ("test", "fear"))
    ]
    rows.append({"key": "train9", "image": picture(9), "split": "train", "label": "joy"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    result = pack(
        PackSettings(str(tmp_path / "t.parquet"), "table", persons="none", seed=seed), tmp_path / "out"
    )
    assert sorted(keys(tmp_path / "out/test")) == ["test0", "test1", "test2"]
    assert keys(tmp_path / "out/train") == ["train9"]
    assert set(reasons(result).values()) == {"leak"}
    assert result.records == sum(result.packed.values()) + len(result.rejected) == 10


def test_the_copy_of_a_picture_that_was_refused_takes_its_place(tmp_path: Path) -> None:
    texts = {"a": "", "b": "long enough"}
    for key in texts:
        (tmp_path / key).write_bytes(picture(1))
    rows = [{"key": key, "path": key, "caption": text} for key, text in texts.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    from shards.pack.prepare import Filters

    settings = PackSettings(str(tmp_path / "t.parquet"), persons="none", filters=Filters(caption=(3, None)))
    result = pack(settings, tmp_path / "out")
    assert (reasons(result), keys(tmp_path / "out")) == ({"a": "caption"}, ["b"])


# ---- parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """40 pictures and 8 copies of some, in three parts; copies 0 and 1 have another label or split."""
    rows = [
        {"key": f"k{i}", "image": picture(i), "label": "joy", "split": "test" if i % 4 == 0 else "train"}
        for i in range(40)
    ]
    rows += [{**rows[i], "key": f"copy{i}"} for i in range(2, 8)]
    rows += [{**rows[0], "key": "copy0", "split": "train"}, {**rows[1], "key": "copy1", "label": "fear"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=7)
    settings = PackSettings(str(tmp_path / "t.parquet"), "table", persons="none", shard_samples=6)
    folders = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    results = [pack(settings, folder, part=(i, 3)) for i, folder in enumerate(folders, 1)]
    assert sum(result.records for result in results) == 48
    return folders


def test_merged_parts_contain_each_picture_once_and_count_the_rest(parts: list[Path], tmp_path: Path) -> None:
    result = merge(tmp_path / "out", parts)
    assert result.records == 48 == sum(result.packed.values()) + sum(result.refused.values())
    assert result.packed == {"test": 10, "train": 30}
    assert dict(result.refused) == {"duplicate": 6, "leak": 1, "conflict": 1}
    assert result.marked > 0  # some copies fell into other parts
    everything = []
    for folder in find_manifest_folders(tmp_path / "out"):
        manifest = read_manifest(folder)
        reader = ShardReader(folder, manifest)
        everything += [
            reader.read(s, r).image for s, entry in enumerate(manifest.shards) for r in range(entry.samples)
        ]
        raw = [read_all_rows(index_path(folder, entry.name)) for entry in manifest.shards]
        assert sum(table.num_rows for table in raw) >= manifest.samples
    assert len(everything) == len(set(everything)) == 40
    refused = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert len(refused) == 8
    assert all(row["detail"].startswith("the same picture as ") for row in refused)
    assert "copy0" not in keys(tmp_path / "out/train")  # the test copy stays
    assert "k0" in keys(tmp_path / "out/test")


def test_merging_links_tars_and_the_parts_can_go(parts: list[Path], tmp_path: Path) -> None:
    import shutil

    merge(tmp_path / "out", parts)
    names = [path.name for path in sorted((tmp_path / "out/train").glob("*.tar"))]
    assert [name[:5] for name in names] == sorted(name[:5] for name in names)
    assert {name[:4] for name in names} <= {"p001", "p002", "p003"}
    linked = (tmp_path / "out/train" / names[0]).stat().st_ino
    assert linked in {path.stat().st_ino for part in parts for path in part.rglob("*.tar")}
    before = read_manifest(tmp_path / "out/train").identity
    for part in parts:
        shutil.rmtree(part)
    reader = ShardReader.from_folder(tmp_path / "out/train", "data.path")
    assert reader.read(0, 0).image
    assert reader.manifest.identity == before


def test_merging_gives_the_same_identity_for_any_order_of_parts(parts: list[Path], tmp_path: Path) -> None:
    merge(tmp_path / "a", parts)
    merge(tmp_path / "b", parts[::-1])
    for split in ("train", "test"):
        assert (
            read_manifest(tmp_path / "a" / split).identity == read_manifest(tmp_path / "b" / split).identity
        )


@pytest.mark.parametrize(
    ("take", "says"),
    [
        (slice(0, 2), "3/3 are missing; give all 3 parts"),
        (slice(0, 0), "none given"),
    ],
)
def test_parts_that_are_missing_are_named(take: slice, says: str, parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        merge(tmp_path / "out", parts[take])
    assert not (tmp_path / "out").exists()


def test_a_part_twice_a_foreign_folder_and_another_source_are_refused(
    parts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is part 1/3, but so is .*part1; give each part once"):
        merge(tmp_path / "out", [*parts, parts[0]])
    with pytest.raises(UserError, match=r"has no manifest\.json; give data sets, or all folders that"):
        merge(tmp_path / "out", [*parts, tmp_path])
    other = tmp_path / "other"
    other.mkdir()
    packed(other, [{"key": "z", "image": picture(50)}], part=(3, 3))
    with pytest.raises(UserError, match="was packed with a different settings than"):
        merge(tmp_path / "out", [*parts[:2], other / "out"])
    assert not (tmp_path / "out").exists()


def test_a_part_without_any_picture_is_complete_all_the_same(tmp_path: Path) -> None:
    rows = [{"key": "only", "image": picture(1)}]
    results = [packed(tmp_path, rows, out=f"p{i}", part=(i, 3)) for i in (1, 2, 3)]
    assert [result.records for result in results] == [0, 0, 1]
    merge(tmp_path / "out", [tmp_path / f"p{i}" for i in (1, 2, 3)])
    assert keys(tmp_path / "out") == ["only"]


@pytest.mark.parametrize("seed", range(4))
def test_captions_that_only_a_refused_copy_has_are_counted(seed: int, tmp_path: Path) -> None:
    for key in "ab":
        (tmp_path / key).write_bytes(picture(1))
    rows = [{"key": "a", "path": "a", "caption": ["one", "two"]}, {"key": "b", "path": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    settings = PackSettings(str(tmp_path / "t.parquet"), "table", persons="none", seed=seed)
    [copy] = pack(settings, tmp_path / "out").rejected
    lost = "; 2 captions of this copy left out" if copy.source == "a" else ""
    assert copy.detail == f"the same picture as {'b' if copy.source == 'a' else 'a'}{lost}"


def test_the_summary_has_the_total_of_captions_lost_with_refused_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {"a": ["one", "two"], "b": ["three", "four"], "c": ["five", "six"], "d": ["seven", "eight"]}
    rows = [{"key": key, "path": f"{key}.png", "caption": texts} for key, texts in captions.items()]
    for number, key in enumerate("aabb"):
        (tmp_path / f"{'abcd'[number]}.png").write_bytes(picture(1 if key == "a" else 2))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    words = ["shards", "pack", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--persons", "none"]
    assert run([*words, "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "the samples have 4 captions, 0 labels and 0 boxes; 0 have no caption, 2 no label, 2 no box" in lines
    )
    assert "4 captions are in refused copies of packed pictures only, and left out" in lines
