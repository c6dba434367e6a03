"""Cases that the tests of MosaicML Streaming and of webdataset check of their readers, tried on the elastic stream.

Each test names the cases of theirs that it stands for. docs/stream.md lists those that have no counterpart here.
"""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from elastic_tars import epoch, number_of, open_stream, write_tars

from shards.edit.index_members import index_members
from uniemox_dist.core.errors import UserError
from uniemox_dist.data import ElasticShards, Source


def make(folder: Path, counts: tuple[int, ...], first: int = 0) -> Path:
    write_tars(folder, counts, first)
    index_members(str(folder))
    return folder


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


# ---- MosaicML Streaming


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("world", [1, 4])
def test_fewer_samples_than_a_batch_or_than_ranks(count: int, world: int, tmp_path: Path) -> None:
    """test_tiny_dataset_exception, test_partition_small_num_samples, test_partition_samples_less_than_ncn: theirs
    raises for some; here a batch repeats samples, and each comes equally often."""
    folder = make(tmp_path / "tars", (count,))
    seen: Counter[int] = Counter()
    for rank in range(world):
        stream = open_stream(folder, global_batch=8, streams=8, rank=rank, world_size=world)
        batches = stream.micro_batches(8 // world)
        seen.update(number for _ in range(count) for number in next(batches))
    assert seen == dict.fromkeys(range(count), 8)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_order_and_another_does_not(
    micro_batch: int, workers: int, tmp_path: Path
) -> None:
    """test_dataloader_determinism, test_is_deterministic, webdataset's test_seed."""
    folder = make(tmp_path / "tars", (30, 31))
    first, again, other = (
        epoch(open_stream(folder, global_batch=12, seed=seed), micro_batch, workers=workers)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert flat(first) != flat(other)
    assert set(flat(first)) == set(flat(other)) == set(range(61))


@pytest.mark.parametrize("nodes", [1, 2, 6])
@pytest.mark.parametrize("ranks_of_a_node", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_dropped_or_repeated(
    nodes: int, ranks_of_a_node: int, workers: int, tmp_path: Path
) -> None:
    """test_partition_walk, test_partition_drop_all, test_partition_nodrop_norepeat, test_dataloader_single_device,
    webdataset's test_splitting."""
    folder = make(tmp_path / "tars", (17, 3, 28))
    world = nodes * ranks_of_a_node
    seen: Counter[int] = Counter()
    for rank in range(world):
        stream = open_stream(folder, global_batch=24, rank=rank, world_size=world)
        for _ in range(2):
            seen.update(flat(epoch(stream, 2, workers=workers if rank < 2 else 0)))
    assert seen == dict.fromkeys(range(48), 2)


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_resuming_in_mid_epoch(micro_batch: int, workers: int, world: int, tmp_path: Path) -> None:
    """test_streamingdataloader_mid_epoch_resumption, test_partition_relaxed_resumption."""
    folder = make(tmp_path / "tars", (50, 46))
    streams = [open_stream(folder, rank=rank, world_size=world) for rank in range(world)]
    before: list[int] = []
    for stream in streams:
        loader = stream.loader(micro_batch, workers=workers)
        for _, batch in zip(range(24 // world // micro_batch), loader):
            before += batch
        loader.close()
        states = [json.dumps(stream.state_dict()) for stream in streams]
    assert len(set(states)) == 1
    after: list[int] = []
    for rank in range(2):
        resumed = open_stream(folder, rank=rank, world_size=2)
        resumed.load_state_dict(json.loads(states[0]))
        after += flat(epoch(resumed, 12, workers=workers))
    assert sorted(before + after) == list(range(96))


def test_leaving_an_epoch_and_coming_back(tmp_path: Path) -> None:
    """test_dataloader_mid_epoch_exit: theirs must not hang; here the rest of the epoch follows."""
    folder = make(tmp_path / "tars", (48,))
    loader = open_stream(folder).loader(6, workers=2)
    seen = [batch for _, batch in zip(range(3), loader)]
    seen += list(loader)
    assert sorted(flat(seen)) == list(range(48))
    assert len(loader) == 8
    loader.close()


@pytest.mark.parametrize(("first", "second"), [(1, 2), (5, 1)])
@pytest.mark.parametrize("world", [1, 3])
def test_every_batch_has_the_shares_of_the_mix(first: int, second: int, world: int, tmp_path: Path) -> None:
    """test_dataloader_stratified_batching, …_user_set, test_stratified_batching_Exception, test_mixing.py,
    webdataset's test_mix.py."""
    one, other = make(tmp_path / "one", (40,)), make(tmp_path / "other", (23, 20), 1000)
    data = [Source(one, weight=first), Source(other, weight=second)]
    ranks = [
        epoch(open_stream(data, rank=rank, world_size=world), 24 // world, workers=rank % 2)
        for rank in range(world)
    ]
    for parts in zip(*ranks):
        counts = Counter(number >= 1000 for batch in parts for number in batch)
        assert counts[True] * first == counts[False] * second
    with pytest.raises(UserError, match=r"^data\[1\]: a share of 1 % gives it none of streams=12"):
        open_stream([Source(one, weight=99), Source(other, weight=1)])


def test_a_part_of_a_data_set_takes_turns_over_epochs(tmp_path: Path) -> None:
    """test_dataloader_fixed_balanced_sampling, test_balance, test_choose_per_shard_adds_up: with `repeat` below 1 each
    epoch has other samples until all have come ("balanced")."""
    one, other = make(tmp_path / "one", (48,)), make(tmp_path / "other", (96,), 1000)
    stream = open_stream([Source(one, repeat=1), Source(other, repeat=0.5)])
    assert stream.epoch_samples == 96
    twice = [flat(epoch(stream)) for _ in range(2)]
    for numbers in twice:
        assert sorted(number for number in numbers if number < 1000) == list(range(48))
    parts = [number for numbers in twice for number in numbers if number >= 1000]
    assert sorted(parts) == list(range(1000, 1096))


def test_several_streams_in_one_process(tmp_path: Path) -> None:
    """test_multiple_dataset_instantiation, test_same_local_no_remote: they share no state."""
    folder = make(tmp_path / "tars", (48,))
    streams = [open_stream(folder, seed=seed, cache_dir=tmp_path / "cache") for seed in (1, 2)]
    loaders = [stream.loader(6, workers=1) for stream in streams]
    pairs = list(zip(*loaders))
    for loader in loaders:
        loader.close()
    for number, seed in enumerate((1, 2)):
        assert [pair[number] for pair in pairs] == epoch(open_stream(folder, seed=seed))


def test_ranks_that_hold_parts_of_one_model_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_replication_samples: theirs has an argument; here such ranks are given the same rank."""
    folder = make(tmp_path / "tars", (48,))
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        found.append(epoch(open_stream(folder, rank=rank // 2, world_size=2)))
    assert found[0] == found[1] != found[2] == found[3]


# ---- webdataset


def test_members_can_be_chosen_and_renamed(tmp_path: Path) -> None:
    """test_select_files, test_rename_files, test_dataset_rename_keep, test_dataset_rename_keys,
    test_dataset_extract_keys, test_dataset_map: by `transform`."""
    folder = make(tmp_path / "tars", (12,))
    stream = open_stream(
        folder,
        decode=None,
        transform=lambda s: {key: value for key, value in s.items() if key in ("__key__", "cls")},
    )
    assert {tuple(sample) for batch in epoch(stream) for sample in batch} == {("__key__", "cls")}


def test_a_truncated_tar_is_refused_before_training(tmp_path: Path) -> None:
    """test_dataset_eof, test_dataset_eof_handler: theirs ends at the tar, or goes on without its rest."""
    folder = write_tars(tmp_path / "tars", (30,))
    whole = (folder / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match=r"000.tar"):
        open_stream(folder, build_index=True)
    (folder / "000.tar").write_bytes(whole)
    index_members(str(folder))
    (folder / "000.tar").write_bytes(whole[:-1024])
    with pytest.raises(
        UserError, match=r"shard 000.tar has \d+ bytes instead of \d+; it is not the tar that was"
    ):
        open_stream(folder)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    """test_nonempty, test_nonempty2, test_check_empty_throws_ValueError."""
    for name in ("none", "empty"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "empty" / "0.tar", "w"):
        pass
    for name in ("none", "empty"):
        with pytest.raises(UserError, match=rf"{name}"):
            open_stream(tmp_path / name, build_index=True)


def test_a_missing_member_and_one_that_cannot_be_decoded(tmp_path: Path) -> None:
    """test_dataset_missing_totuple_raises, test_dataset_missing_rename_raises, test_dataset_decode_nohandler,
    test_dataset_decode_handler, test_dataset_map_dict_handler."""
    folder = make(tmp_path / "tars", (60,))
    with pytest.raises(
        UserError,
        match=r"has no member 'jpg', which `transform` wants, nor has its json such an entry; it has: cls, json",
    ):
        epoch(open_stream(folder, transform=lambda sample: sample["jpg"]))

    def fail(key: str, data: bytes) -> Any:
        if key == ".cls" and int(data) == 3:
            raise ValueError("three")

    stream = open_stream(folder, decode=[fail], max_bad_share=0.5)
    numbers = flat(epoch(stream))
    assert {number for number in range(60) if number % 7 != 3} <= set(numbers)
    assert not any(number % 7 == 3 for number in numbers)
    assert stream.damaged >= 8


def test_decoders(tmp_path: Path) -> None:
    """test_rgb8, test_pil, test_raw, test_gz, test_float_np_vs_torch, test_decode_handlers, test_decoder."""
    pixels = torch.randint(0, 255, (5, 7, 3), dtype=torch.uint8).numpy()
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({
            "__key__": "a", "png": pixels, "txt": "text", "json": {"n": 1},
            "json.gz": {"z": 2}, "raw": b"\x00\x01",
        })  # fmt: skip
    index_members(str(tmp_path))

    def read(decode: Any) -> Any:
        return ElasticShards(tmp_path, global_batch=1, streams=1, decode=decode)[0]

    for handler in ("rgb8", "pil", "torchrgb", "rgb"):
        expected = next(iter(wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode(handler)))
        found = read(handler)
        assert found.keys() == expected.keys() - {"__local_path__"}
        for name in ("png", "txt", "json", "json.gz", "raw"):
            same = found[name] == expected[name]
            assert same if isinstance(same, bool) else bool(same.all()), (handler, name)
    assert read(None)["json"] == b'{"n": 1}'
    assert read([wds.handle_extension(".raw", list)])["raw"] == [0, 1]


def test_batches_and_single_samples(tmp_path: Path) -> None:
    """test_batched, test_unbatched, test_dataloader, test_webloader, test_webloader_unbatched, test_with_epoch,
    test_repeat, test_slice."""
    folder = make(tmp_path / "tars", (48,))
    stream = open_stream(folder)
    expected = epoch(open_stream(folder))
    assert flat(expected) == list(open_stream(folder).source(6))
    endless = stream.micro_batches(6)
    assert [next(endless) for _ in range(8)] == expected
    assert sorted(flat([next(endless) for _ in range(8)])) == list(range(48))


def test_some_tars_of_a_folder(tmp_path: Path) -> None:
    """test_pytorchshardlist, test_reader1 to 3, test_trivial: brace patterns, single tars, folders."""
    folder = make(tmp_path / "tars", (8, 9, 10))
    for data, numbers in (
        (folder, range(27)),
        (folder / "001.tar", range(8, 17)),
        (f"{folder}/{{000..001}}.tar", range(17)),
        (f"{folder}/{{000,002}}.tar", [*range(8), *range(17, 27)]),
        (f"file://{folder}/00{{0..2}}.tar", range(27)),
    ):
        stream = open_stream(data, global_batch=1, streams=1)
        assert sorted(flat(epoch(stream, 1))) == list(numbers)
        assert number_of({"json": {"n": 1}}) == 1
