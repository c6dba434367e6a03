"""Evaluation reads every sample once, over any number of ranks."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from shards.format.index import index_path, read_index
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import evaluation_batches, rank_range
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import evaluation_views

SETTINGS = ViewSettings(image_size=32)


def reader_of(folder: Path) -> ShardReader:
    return ShardReader.from_folder(folder, "DATA")


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16, 100])
@pytest.mark.parametrize("samples", [1, 7, 72])
def test_the_ranges_of_the_ranks_are_the_data_set(samples: int, world: int) -> None:
    ranges = [rank_range(samples, rank, world) for rank in range(world)]
    assert [number for own in ranges for number in own] == list(range(samples))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 16, 0), (1, 100, 2), (3, 7, 0), (5, 7, 1)])
def test_every_sample_is_seen_once_in_order(world: int, batch: int, workers: int, emoji_shards: Path) -> None:
    reader = reader_of(emoji_shards / "train")
    batches = [
        found
        for rank in range(world)
        for found in evaluation_batches(
            reader, SETTINGS, batch=batch, rank=rank, world_size=world, workers=workers
        )
    ]
    assert [number for found in batches for number in found.numbers] == list(range(72))
    places = [(s, row) for s, entry in enumerate(reader.manifest.shards) for row in range(entry.samples)]
    scenes = torch.cat([found.scene_B3HW for found in batches])
    people = torch.cat([found.person_B3HW for found in batches])
    records = [record for found in batches for record in found.records]
    assert len(scenes) == len(people) == len(records) == 72
    for i in range(0, 72, 11):
        raw = reader.read(*places[i])
        scene, person = evaluation_views(raw.image, raw.persons, SETTINGS)
        assert torch.equal(scenes[i], scene)
        assert torch.equal(people[i], person)
        assert records[i] == {**reader.record(*places[i]), "key": raw.key}


def test_loader_processes_outlive_the_thread_that_started_them(emoji_shards: Path) -> None:
    batches = evaluation_batches(reader_of(emoji_shards / "train"), SETTINGS, batch=4, workers=1)
    found = []
    thread = threading.Thread(target=lambda: found.append(next(batches)))
    thread.start()
    thread.join()
    found += batches
    assert [number for batch in found for number in batch.numbers] == list(range(72))


def test_a_rank_without_samples_has_no_batches(emoji_shards: Path) -> None:
    reader = reader_of(emoji_shards / "test")
    assert not list(evaluation_batches(reader, SETTINGS, batch=8, rank=0, world_size=100))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named_instead_of_left_out(
    workers: int, emoji_shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(emoji_shards / "test", tmp_path / "test"))
    row = read_index(index_path(folder, "000001.tar")).to_pylist()[2]
    with open(folder / "000001.tar", "r+b") as file:
        file.seek(row["image_offset"] + 20)
        file.write(bytes(4))
        file.flush()
        os.fsync(file.fileno())
    with pytest.raises(UserError) as caught:
        list(evaluation_batches(reader_of(folder), SETTINGS, batch=8, workers=workers))
    says = f"000001.tar, row 2: 000001.tar: {row['key']}: bytes differ from the index; pack again"
    assert str(caught.value) == f"DATA={folder}: {says}"
