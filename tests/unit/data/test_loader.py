"""Micro-batches do not depend on workers and ranks, damaged samples are replaced by rule, processes end."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_parts import alive, config, dataset, wait_until_gone
from PIL import Image
from torch import Tensor
from web import serve

from shards.format.index import index_path, read_index
from shards.format.manifest import Manifest, combined_identity, read_manifest
from shards.format.sample import Sample
from shards.format.writer import ShardWriter
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.data.loader import MicroBatch, view_settings
from uniemox_dist.data.masks import (
    PERSON_VIEW,
    SCENE_VIEW,
    SlotDraws,
    choose_patch_order,
    draw_drop_paths,
    drop_path_factors,
)
from uniemox_dist.data.rng import Purpose, choice
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.data.stream import MAX_REPLACEMENTS
from uniemox_dist.data.views import training_views


def steps(of: Config, count: int, *, first: int = 0, rank: int = 0, world: int = 1) -> list[MicroBatch]:
    with StepBatches(dataset(of, ranks=(rank, world)), of, first_step=first, pin=False) as batches:
        return [batch for _ in range(count) for batch in batches.next_step()]


def assert_equal(a: MicroBatch, b: MicroBatch) -> None:
    for name in ("slots_B", "scene_B3HW", "person_B3HW", "texts_BE"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.keys, a.sources, a.damaged) == (b.keys, b.sources, b.damaged)


def samples(batches: list[MicroBatch]) -> dict[int, tuple[str, int, Tensor, Tensor, Tensor]]:
    """Slot -> everything about its sample."""
    found = {}
    for batch in batches:
        assert batch.person_B3HW is not None
        assert batch.texts_BE is not None
        for i, slot in enumerate(batch.slots_B.tolist()):
            assert slot not in found
            parts = (batch.scene_B3HW[i], batch.person_B3HW[i], batch.texts_BE[i])
            found[slot] = (batch.keys[i], batch.sources[i], *parts)
    return found


def assert_same_samples(a: dict[int, Any], b: dict[int, Any]) -> None:
    assert sorted(a) == sorted(b)
    for slot, (key, source, *tensors) in a.items():
        assert (key, source) == b[slot][:2]
        assert all(torch.equal(x, y) for x, y in zip(tensors, b[slot][2:]))


# ---- the same everywhere


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(workers: int, emoji_shards: Path) -> None:
    folder = emoji_shards / "train"
    plain, loaded = steps(config(folder), 4), steps(config(folder, workers=workers), 4)
    assert len(plain) == len(loaded) == 8
    for a, b in zip(plain, loaded):
        assert_equal(a, b)


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 4), (2, 3), (3, 4), (6, 1)])
def test_ranks_and_micro_batches_change_nothing(
    world: int, micro: int, emoji_shards: Path, photo_shards: Path
) -> None:
    folders = (emoji_shards / "train", photo_shards)
    expected = samples(steps(config(*folders), 3, first=5))
    assert sorted(expected) == list(range(60, 96))
    dealt = [
        batch
        for rank in range(world)
        for batch in steps(config(*folders, micro_batch=micro), 3, first=5, rank=rank, world=world)
    ]
    assert_same_samples(samples(dealt), expected)


def test_beginning_at_a_later_step_continues_the_same_order(emoji_shards: Path) -> None:
    folder = emoji_shards / "train"
    for a, b in zip(steps(config(folder), 5)[6:], steps(config(folder), 2, first=3)):
        assert_equal(a, b)


def test_a_micro_batch_holds_the_samples_of_the_plan(emoji_shards: Path) -> None:
    of = config(emoji_shards / "train")
    data = dataset(of)
    [batch] = [data[[7, 100, 3]]]
    assert batch.slots_B.tolist() == [7, 100, 3]
    assert (batch.scene_B3HW.shape, batch.scene_B3HW.dtype) == ((3, 3, 32, 32), torch.uint8)
    assert batch.person_B3HW is not None
    assert batch.texts_BE is not None
    assert batch.texts_BE.dtype == torch.float16  # as in the cache
    for i, slot in enumerate((7, 100, 3)):
        place = data.plan.locate(slot)
        raw = data.readers[0].read(place.shard, place.row)
        scene, person = training_views(raw.image, raw.persons, data.settings, of.run.seed, slot)
        assert person is not None
        assert batch.keys[i] == raw.key
        assert torch.equal(batch.scene_B3HW[i], scene)
        assert torch.equal(batch.person_B3HW[i], person)
        assert batch.texts_BE[i].tolist() == [place.shard, place.row, 0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mask", ["random", "block", "person"])
def test_micro_batches_bring_the_masks_and_drop_paths_of_their_slots(
    workers: int, mask: str, tiny_data: Path
) -> None:
    of = config(tiny_data / "train", workers=workers)
    of = of.model_copy(update={"model": of.model.model_copy(update={"mask": mask})})
    found = dataset(of)
    found.draws = SlotDraws(of.model, of.run.seed, drop_rates=(0.1, 0.5))
    with StepBatches(found, of, first_step=1, pin=False) as batches:
        loaded = [batch for _ in range(2) for batch in batches.next_step()]
    for batch in loaded:
        slots, seed = batch.slots_B, of.run.seed
        scene = choose_patch_order(of.model, slots, SCENE_VIEW, seed, batch.on_person_BN)
        assert batch.scene_order_BN is not None
        assert torch.equal(batch.scene_order_BN, scene)
        assert batch.person_order_BN is not None
        assert torch.equal(batch.person_order_BN, choose_patch_order(of.model, slots, PERSON_VIEW, seed))
        draws = draw_drop_paths(slots, seed, 2)
        assert batch.drop_factors_BL is not None
        assert torch.equal(batch.drop_factors_BL, drop_path_factors(draws, (0.1, 0.5)))


def test_a_caption_is_drawn_by_slot_from_all_of_them(tmp_path: Path) -> None:
    captions, digest = ("one", "two", "three"), sha256_bytes(png())
    write(tmp_path, [Sample("a", png(), "png", 4, 4, "a", captions, image_sha256=digest)])
    data = dataset(config(tmp_path, streams=1))
    drawn = [int(data[[slot]].texts_BE[0, 2]) for slot in range(60)]  # type: ignore[index]
    assert drawn == [choice(3, 3, slot, Purpose.CAPTION) for slot in range(60)]
    assert set(drawn) == {0, 1, 2}


def test_views_and_texts_that_no_loss_needs_are_not_made(emoji_shards: Path) -> None:
    batch = dataset(config(emoji_shards / "train"), vectors=False, with_person=False)[[0, 1]]
    assert batch.person_B3HW is None
    assert batch.texts_BE is None
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.scene_B3HW, batch.scene_B3HW)
    assert moved.person_B3HW is None


def test_the_identity_of_a_mix_is_that_of_its_sources_in_order(
    emoji_shards: Path, photo_shards: Path
) -> None:
    folders = (emoji_shards / "train", photo_shards)
    sources = Sources(config(*folders))
    assert sources.samples == 92
    assert sources.identity == combined_identity([read_manifest(folder).identity for folder in folders])
    assert Sources(config(photo_shards)).identity == read_manifest(photo_shards).identity


# ---- damage


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, items: list[Sample]) -> None:
    writer = ShardWriter(folder, shard_bytes=10**6, shard_samples=100)
    for item in items:
        writer.add(item)
    Manifest(tuple(writer.close()), {}).write(folder)


@pytest.fixture
def copy(emoji_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emoji_shards / "train", tmp_path / "train"))


def damage(folder: Path, shard: int, row: int) -> str:
    """Flips a byte of a picture inside its tar; returns `tar: key`."""
    name = f"{shard:06d}.tar"
    place = read_index(index_path(folder, name)).to_pylist()[row]
    with open(folder / name, "r+b") as file:
        file.seek(place["image_offset"] + place["image_length"] // 2)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return f"{name}: {place['key']}"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_replaced_by_the_next_of_its_stream_and_reported(
    workers: int, copy: Path
) -> None:
    of = config(copy, workers=workers)
    plan = dataset(of).plan
    before = samples(steps(of, 2))
    places = [plan.locate(8), plan.locate(8 + 6)]  # of slot 8, and of the first in its place
    names = [damage(copy, place.shard, place.row) for place in places]
    batches = steps(of, 2)
    after = samples(batches)
    substitute = plan.locate(8 + 12)
    reader = Sources(of).readers[0]
    raw = reader.read(substitute.shard, substitute.row)
    assert after[8][0] == raw.key
    scene, _ = training_views(raw.image, raw.persons, view_settings(of), of.run.seed, 8)
    assert torch.equal(after[8][2], scene)  # the other sample, by the draws of this slot
    assert after[8][4].tolist() == [substitute.shard, substitute.row, 0]
    assert after[14][0] == raw.key  # its own neighbour is replaced by the same rule
    hit = {8, 14}
    assert_same_samples(
        {s: v for s, v in after.items() if s not in hit}, {s: v for s, v in before.items() if s not in hit}
    )
    reported = [line for batch in batches for line in batch.damaged]
    assert reported == [
        f"slot 8: {names[0]}: bytes differ from the index",
        f"slot 8: {names[1]}: bytes differ from the index",
        f"slot 14: {names[1]}: bytes differ from the index",
    ]


def test_a_sample_that_cannot_be_decoded_is_replaced_and_named(tmp_path: Path) -> None:
    good = png()
    write(
        tmp_path,
        [
            Sample(f"k{i}", image, "png", 4, 4, "s", image_sha256=sha256_bytes(image))
            for i, image in enumerate([good, b"junk", good, good])
        ],
    )
    data = dataset(config(tmp_path, streams=1))
    slot = next(slot for slot in range(4) if data.plan.locate(slot).row == 1)
    batch = data[[slot]]
    assert batch.keys == (f"k{data.plan.locate(slot + 1).row}",)
    assert batch.damaged == (
        f"slot {slot}: 000000.tar: k1: cannot be decoded: not a picture of a known format",
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_ends_at_the_first_damaged_sample_and_names_it(workers: int, copy: Path) -> None:
    of = config(copy, workers=workers)
    strict = of.model_copy(update={"data": of.data.model_copy(update={"strict": True})})
    place = dataset(of).plan.locate(8)
    name = damage(copy, place.shard, place.row)
    batches = StepBatches(dataset(strict), strict, first_step=0, pin=False)
    with pytest.raises(Fault) as caught, batches:
        batches.next_step()
    assert str(caught.value) == f"data.strict: a damaged sample: slot 8: {name}: bytes differ from the index"


def test_each_rank_checks_its_own_part_of_the_shards(copy: Path) -> None:
    (copy / "000003.tar").unlink()
    for rank in (1, 2):
        assert Sources(config(copy), rank=rank, world_size=3).samples == 72
    with pytest.raises(UserError, match=r"shard 000003\.tar is missing"):  # shards 0 and 3
        Sources(config(copy), rank=0, world_size=3)


def test_an_unreachable_web_server_is_a_fault_and_not_a_missing_shard(copy: Path) -> None:
    with serve(copy.parent) as web:
        of = config(copy)
        data = of.data.model_copy(update={"path": f"{web.url}/train", "retry_s": 0.0})
        of = of.model_copy(update={"data": data})
        assert Sources(of).samples == 72
        web.away_after = 0
        with pytest.raises(Fault) as caught:
            Sources(of)
        says = (
            f"data.path={web.url}/train: its manifest and the sizes of its shards could not be read for 0 s ("
        )
        assert str(caught.value).startswith(says)
        assert "the server answers 503" in str(caught.value)
        web.away_after = None
        (copy / "000003.tar").unlink()
        with pytest.raises(UserError, match=r"shard 000003\.tar is missing"):
            Sources(of)


def test_a_data_set_without_an_intact_sample_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path, [Sample("k", b"junk", "png", 4, 4, "s", image_sha256=sha256_bytes(b"junk"))])
    with pytest.raises(RuntimeError, match="too many damaged samples in a row: slot 0: ") as caught:
        dataset(config(tmp_path))[[0]]
    assert str(caught.value).count("cannot be decoded") == MAX_REPLACEMENTS


def test_a_lost_index_ends_the_run_instead_of_replacing_samples(copy: Path) -> None:
    data = dataset(config(copy))
    shutil.rmtree(copy / "index")
    with pytest.raises(UserError, match="the index is missing"):
        data[list(range(12))]


@pytest.mark.parametrize("kind", ["missing", "cut", "folder", "empty"])
def test_errors_of_a_source_are_named_before_the_run(kind: str, copy: Path, photo_shards: Path) -> None:
    if kind == "missing":
        (copy / "000003.tar").unlink()
    elif kind == "cut":
        os.truncate(copy / "000003.tar", 512)
    elif kind == "folder":
        shutil.rmtree(copy)
    else:
        Manifest((), {}).write(copy)
    says = {
        "missing": "shard 000003.tar is missing",
        "cut": "shard 000003.tar has 512 bytes instead of ",
        "folder": "no such folder; build it",
        "empty": "has no samples; pack a source",
    }[kind]
    with pytest.raises(UserError) as caught:
        Sources(config(photo_shards, copy))
    assert str(caught.value).startswith(f"data.sources.1.path={copy}: {says}")


# ---- processes


def test_closing_ends_its_loader_processes_and_no_others(emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=2)
    expected = steps(config(emoji_shards / "train"), 6)
    first = StepBatches(dataset(of), of, first_step=0, pin=False)
    second = StepBatches(dataset(of), of, first_step=0, pin=False)
    pids = [[process.pid or 0 for process in batches._processes] for batches in (first, second)]
    assert [len(p) for p in pids] == [2, 2]
    first.next_step()
    first.close()
    assert wait_until_gone(pids[0])
    first.close()  # again: nothing happens
    for i in range(3):
        for a, b in zip(second.next_step(), expected[2 * i : 2 * i + 2]):
            assert_equal(a, b)
    assert all(map(alive, pids[1]))
    second.close()
    assert wait_until_gone(pids[1])


def test_an_error_in_a_loader_process_ends_all_of_them(tmp_path: Path) -> None:
    write(tmp_path, [Sample("k", b"junk", "png", 4, 4, "s", image_sha256=sha256_bytes(b"junk"))])
    of = config(tmp_path, workers=2)
    with StepBatches(dataset(of), of, first_step=0, pin=False) as batches:
        pids = [process.pid or 0 for process in batches._processes]
        with pytest.raises(RuntimeError, match="too many damaged samples in a row") as held:
            batches.next_step()
    assert held.tb is not None  # and with it the iterator, which would not let its processes go
    assert len(pids) == 2
    assert wait_until_gone(pids)
