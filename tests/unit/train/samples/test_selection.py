"""The samples that a run shows: the choice of pictures and captions, and the source of their embeddings."""

import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import EXIT_DONE
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.train.samples.selection import PICTURES, Shown, choose

TINY = ["model.image_size=32", "model.patch_size=8"]


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return Teacher(config(tiny_teacher).teacher)


def config(teacher: Path, *more: str) -> Config:
    return load_config("demo", [*TINY, f"teacher.name=local-dir:{teacher}", *more])


def reader(folder: Path) -> ShardReader:
    return ShardReader.from_folder(folder, "data.eval_path")


def chosen(folder: Path, settings: Config, teacher: Teacher | None, teacher_id: str | None = None) -> Shown:
    shown = choose(reader(folder), settings, teacher=teacher, teacher_id=teacher_id)
    assert shown is not None
    return shown


@pytest.fixture
def held_out(tmp_path: Path, tiny_data: Path) -> Path:
    """Held-out pictures without the caches that other tests may have left beside them."""
    return Path(shutil.copytree(tiny_data / "test", tmp_path / "d", ignore=shutil.ignore_patterns("cache")))


def test_the_first_pictures_and_all_captions_of_a_small_set_are_taken(
    held_out: Path, tiny_teacher: Path, teacher: Teacher
) -> None:
    shown = chosen(held_out, config(tiny_teacher), teacher)
    source = reader(held_out)
    raws = [source.read(0, row) for row in range(20)]
    assert shown.keys == tuple(raw.key for raw in raws[:PICTURES])
    assert shown.captions == tuple(raw.captions[0] for raw in raws[:PICTURES])
    assert shown.scene_B3HW.shape == shown.person_B3HW.shape == (PICTURES, 3, 32, 32)
    assert shown.texts is not None
    assert shown.texts.texts == tuple(dict.fromkeys(raw.captions[0] for raw in raws))
    expected = teacher.embed_texts(list(shown.texts.texts))
    torch.testing.assert_close(shown.texts.vectors_TE, expected)
    assert shown.texts.pictures_BE is not None
    torch.testing.assert_close(shown.texts.pictures_BE, teacher.embed_pictures(shown.scene_B3HW))


def test_persons_are_found_in_the_whole_picture(tiny_data: Path, tiny_teacher: Path) -> None:
    shown = chosen(tiny_data / "train", config(tiny_teacher, "loss.relation=0", "loss.similarity=0"), None)
    assert shown.texts is None
    assert any(shown.boxes)
    for box, on, scene, person in zip(shown.boxes, shown.on_person_BN, shown.scene_B3HW, shown.person_B3HW):
        assert bool(on.any()) == (box is not None)
        if box is None:
            assert torch.equal(scene, person)
        else:
            x1, y1, x2, y2 = box
            middle = int((y1 + y2) / 2 * 4) * 4 + int((x1 + x2) / 2 * 4)
            assert on[middle]


def test_damaged_pictures_are_skipped_and_without_an_intact_one_nothing_is_shown(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_data / "test", tmp_path / "d")
    keys = [reader(tmp_path / "d").read(0, row).key for row in range(20)]
    settings = config(tiny_teacher, "loss.relation=0", "loss.similarity=0")
    tar = tmp_path / "d" / "000000.tar"
    data = bytearray(tar.read_bytes())
    row = reader(tmp_path / "d").read(0, 2).image
    at = data.index(row)
    data[at : at + 40] = bytes(40)
    tar.write_bytes(data)
    assert chosen(tmp_path / "d", settings, None).keys == (*keys[:2], *keys[3 : PICTURES + 1])
    tar.write_bytes(bytes(len(data)))
    with caplog.at_level(logging.WARNING, "uniemox"):
        assert choose(reader(tmp_path / "d"), settings, teacher=None) is None
    assert caplog.messages == [f"{tmp_path / 'd'}: has no intact picture to show during training"]


def test_without_a_teacher_texts_come_from_the_cache_beside_the_shards_or_are_left_out(
    held_out: Path,
    tiny_teacher: Path,
    teacher: Teacher,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = config(tiny_teacher)
    live = chosen(held_out, settings, teacher).texts
    with caplog.at_level(logging.INFO, "uniemox"):
        assert chosen(held_out, settings, None, teacher.id).texts is None
    assert caplog.messages == [
        f"nearest texts are not shown: {held_out} has no cached captions; `uniemox teach` stores them"
    ]
    assert uniemox(["teach", str(held_out), "--teacher", f"local-dir:{tiny_teacher}"]) == EXIT_DONE
    cached = chosen(held_out, settings, None, teacher.id).texts
    assert cached is not None
    assert live is not None
    assert (cached.texts, cached.pictures_BE) == (live.texts, None)
    torch.testing.assert_close(cached.vectors_TE, live.vectors_TE, rtol=0, atol=2e-3)  # fp16
    assert chosen(held_out, settings, None, "another").texts is None


def test_a_set_of_few_captions_is_not_searched_to_its_end(
    emoji_shards: Path, tiny_teacher: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uniemox_dist.train.samples.selection.SCANNED", 20)
    shown = chosen(emoji_shards / "train", config(tiny_teacher), teacher)
    assert shown.texts is not None
    sizes = [shard.samples for shard in reader(emoji_shards / "train").manifest.shards]
    assert sum(sizes[:2]) == len(shown.texts.texts) >= 20 > sizes[0]  # whole shards: their indexes are read


def test_distinct_captions_are_single_lines_and_pictures_without_one_are_shown_too(
    tmp_path: Path, emoji_table: Path, tiny_teacher: Path, teacher: Teacher
) -> None:
    rows = pq.read_table(emoji_table).slice(0, 12).to_pylist()
    for i, row in enumerate(rows):
        row["caption"] = [[], ["twice\n here"], [f"caption {i}", "never asked for"]][i % 3]
        row.pop("split")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    pack(PackSettings(str(tmp_path / "t.parquet"), "table", persons="none"), tmp_path / "d")
    shown = chosen(tmp_path / "d", config(tiny_teacher), teacher)
    assert shown.texts is not None
    assert sorted(shown.texts.texts) == ["caption 11", "caption 2", "caption 5", "caption 8", "twice here"]
    assert "" in shown.captions
    assert set(shown.captions) <= {"", *shown.texts.texts}
