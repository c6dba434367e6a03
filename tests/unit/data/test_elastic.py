"""The elastic stream over plain tars, as any training loop uses it."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from elastic_tars import SAMPLES, epoch, number_of, open_stream, write_tars
from loader_parts import wait_until_gone
from torch.utils.data import DataLoader

from shards.edit.index_members import index_members
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data import DamagedSample, ElasticShards, Source


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tars(tmp_path_factory.mktemp("tars"))
    index_members(str(folder))
    return folder


def test_samples_are_webdatasets(tars: Path) -> None:
    stream = ElasticShards(str(tars / "{000..004}.tar"), global_batch=24, streams=12)
    expected = {
        sample["__key__"]: {key: value for key, value in sample.items() if key != "__local_path__"}
        for sample in wds.WebDataset([str(tar) for tar in sorted(tars.glob("*.tar"))], shardshuffle=False)
    }
    found = [sample for batch in epoch(stream) for sample in batch]
    assert {sample["__key__"] for sample in found} == expected.keys()
    assert all(sample == expected[sample["__key__"]] for sample in found)


def test_an_epoch_has_every_sample_and_the_next_begins_within_its_last_step(tars: Path) -> None:
    stream = open_stream(tars)
    batches = epoch(stream)
    assert [len(batch) for batch in batches] == [6] * 36  # 9 steps of 24 samples for 210
    seen = [number for batch in batches for number in batch]
    assert sorted(seen[:SAMPLES]) == list(range(SAMPLES))
    second = [number for batch in epoch(stream) for number in batch]
    assert sorted([*seen[SAMPLES:], *second][:SAMPLES]) == list(range(SAMPLES))
    assert seen[:24] != sorted(seen[:24])  # shuffled
    assert stream.state_dict()["samples"] == 432


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_change_nothing(workers: int, tars: Path) -> None:
    expected, loader = open_stream(tars), open_stream(tars).loader(6, workers=workers)
    for _ in range(2):
        assert list(loader) == epoch(expected)
    loader.close()


@pytest.mark.parametrize(("micro_batch", "world"), [(12, 2), (4, 3), (2, 12), (1, 4)])
def test_global_batches_are_the_same_on_any_ranks(micro_batch: int, world: int, tars: Path) -> None:
    alone = epoch(open_stream(tars), 24)
    ranks = [epoch(open_stream(tars, rank=rank, world_size=world), micro_batch) for rank in range(world)]
    flat = [[number for batch in batches for number in batch] for batches in ranks]
    for step, batch in enumerate(alone):
        own = 24 // world
        dealt = [number for one in flat for number in one[step * own : (step + 1) * own]]
        assert sorted(dealt) == sorted(batch)


@pytest.mark.parametrize("used", [4, 6, 18])  # micro-batches of 6: one step, one and a half, 4 and a half
@pytest.mark.parametrize("world", [1, 2, 6])
def test_a_state_goes_on_with_other_ranks(used: int, world: int, tars: Path) -> None:
    stream, seen = open_stream(tars), []
    loader = stream.loader(6, workers=2)
    for batch, _ in zip(loader, range(used)):
        seen += batch
        state = json.loads(json.dumps(stream.state_dict()))
    loader.close()
    rest = []
    for rank in range(world):
        resumed = open_stream(tars, rank=rank, world_size=world)
        resumed.load_state_dict(state)
        rest += [number for batch in epoch(resumed, 2, workers=rank % 2) for number in batch]
    whole = [number for batch in epoch(open_stream(tars)) for number in batch]
    assert len(seen) == 6 * used
    assert Counter(seen + rest) == Counter(whole)


def test_a_state_within_a_turn_goes_on_with_its_ranks_only(tars: Path) -> None:
    stream, seen = open_stream(tars), []
    for batch, _ in zip(stream.micro_batches(6), range(3)):
        seen += batch
        state = stream.state_dict()
    again = open_stream(tars)
    again.load_state_dict(state)
    whole = [number for batch in epoch(open_stream(tars)) for number in batch]
    assert seen + [number for batch in epoch(again) for number in batch] == whole
    with pytest.raises(
        UserError, match=r"^state.samples=18: was saved by 1 rank within a turn .* only 1 rank can"
    ):
        open_stream(tars, rank=0, world_size=2).load_state_dict(state)


def test_resuming_reads_nothing_that_was_used(tars: Path) -> None:
    stream = open_stream(tars)
    stream.advance(120)
    epoch(stream)
    assert stream.readers[0].origin.counts.reads == 96


def test_torch_and_webdataset_loaders_give_the_same_batches(tars: Path) -> None:
    expected = epoch(open_stream(tars))
    stream = open_stream(tars)
    loader = stream.track(
        DataLoader(stream, batch_sampler=stream.sampler(6), num_workers=2, collate_fn=list), 6
    )
    assert list(loader) == expected
    assert stream.state_dict()["samples"] == 216
    raw = open_stream(tars, decode=None, transform=None)
    pipeline = wds.DataPipeline(raw.source(6), wds.decode(), wds.to_tuple("json", "cls"))
    second = epoch(stream)
    for persistent in (False, True):
        raw.position.number = 0
        web = raw.track(
            wds.WebLoader(pipeline, batch_size=6, num_workers=2, persistent_workers=persistent), 6
        )
        assert [batch[0]["n"].tolist() for batch in web] == expected
        assert [batch[0]["n"].tolist() for batch in web] == second


def test_a_shorter_micro_batch_at_the_end_of_a_step_counts_as_such(tars: Path) -> None:
    stream = open_stream(tars)
    stream.advance(18)
    loader = stream.track(DataLoader(stream, batch_sampler=stream.sampler(12), collate_fn=list), 12)
    assert len(loader) == 18
    assert [len(batch) for batch in loader] == [6, *[12] * 16]
    assert stream.state_dict()["samples"] == 216


def test_a_mix_by_weight_and_by_repeat(tars: Path, tmp_path: Path) -> None:
    other = write_tars(tmp_path / "other", (30,), first=1000)
    stream = open_stream([Source(tars, weight=3), Source(other, weight=1)], build_index=True)
    assert (other / "members" / "manifest.json").is_file()
    counts = Counter(number >= 1000 for batch in epoch(stream, 24) for number in batch)
    assert counts[True] * 3 == counts[False]
    stream = open_stream([Source(tars, repeat=1), Source(other, repeat=2)])
    assert stream.epoch_samples == 270


def damage(folder: Path, number: int) -> None:
    """Changes the JSON of one sample in its tar."""
    for tar in folder.glob("*.tar"):
        data = tar.read_bytes()
        text = json.dumps({"n": number}).encode()
        if text in data:
            tar.write_bytes(data.replace(text, b"[" + text[1:-1] + b"]"))


def test_a_damaged_sample_is_replaced_by_the_next_of_its_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tars(tmp_path / "tars")
    index_members(str(folder))
    whole = [number for batch in epoch(open_stream(folder)) for number in batch]
    damage(folder, whole[30])
    for workers in (0, 2):
        stream = open_stream(folder)
        found = [number for batch in epoch(stream, workers=workers) for number in batch]
        assert found == [*whole[:30], whole[42], *whole[31:]]
        assert stream.damaged == 1
        assert f"s{whole[30]:05}: bytes differ from the index" in caplog.text
        caplog.clear()
    with pytest.raises(Fault, match=r"^strict: a damaged sample: slot 30: .*bytes differ"):
        epoch(open_stream(folder, strict=True))


def test_many_damaged_samples_end_reading(tars: Path) -> None:
    def refuse(sample: dict[str, Any]) -> int:
        if (number := number_of(sample)) % 5 == 0:
            raise DamagedSample("a number that is divided by 5")
        return number

    stream = open_stream(tars, transform=refuse)
    with pytest.raises(
        Fault, match=r"^9 of \d+ samples are damaged, more than max_bad_share=0.01; the last: slot"
    ):
        epoch(stream)
    with pytest.raises(Fault, match=r"^too many damaged samples in a row: .*s\d{5}: none"):
        epoch(open_stream(tars, transform=_refuse_all))


def _refuse_all(_: object) -> None:
    raise DamagedSample("none")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_member_that_the_function_wants_is_named(workers: int, tars: Path) -> None:
    says = r"/00\d.tar: s\d{5}: has no member 'txt', which `transform` wants, nor has its json such an entry"
    with pytest.raises(UserError, match=says):
        epoch(open_stream(tars, transform=lambda sample: sample["txt"]), workers=workers)
    with pytest.raises(ZeroDivisionError):
        epoch(open_stream(tars, transform=lambda sample: 1 // 0), workers=workers)


def test_a_member_that_cannot_be_decoded_is_damage_and_pickles_are_refused(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(20):
            text = b"{" if number == 3 else json.dumps({"n": number}).encode()
            writer.write({"__key__": f"k{number}", "json": text})
    stream = open_stream(tmp_path, build_index=True, global_batch=4, streams=2)
    assert 3 not in {number for batch in epoch(stream, 2) for number in batch}
    assert stream.damaged >= 1
    with wds.TarWriter(str(tmp_path / "sub.tar")) as writer:
        writer.write({"__key__": "evil", "pyd": pickle.dumps({"n": 1})})
    (tmp_path / "pickles").mkdir()
    (tmp_path / "sub.tar").rename(tmp_path / "pickles" / "0.tar")
    options = {"build_index": True, "global_batch": 1, "streams": 1}
    with pytest.raises(UserError, match=r"^decode: a member \.pyd holds a pickle, which can run code"):
        epoch(open_stream(tmp_path / "pickles", **options), 1)
    trusted = open_stream(
        tmp_path / "pickles",
        decode=[lambda key, data: pickle.loads(data) if key == ".pyd" else None],
        transform=lambda sample: sample["pyd"]["n"],
        **options,
    )
    assert epoch(trusted, 1) == [[1]]


def test_a_loader_process_that_dies_is_named_with_its_sample(tars: Path) -> None:
    def die(sample: dict[str, Any]) -> int:
        if number_of(sample) == 77:
            os.kill(os.getpid(), signal.SIGKILL)
        return number_of(sample)

    loader = open_stream(tars, transform=die).loader(6, workers=2)
    iterator = iter(loader)
    next(iterator)
    assert loader._batches is not None
    pids = [process.pid or 0 for process in loader._batches._processes]
    with pytest.raises(
        Fault, match=r"loader process \d \(pid \d+\) died of SIGKILL .* at slot \d+: .*/001.tar, row 37"
    ):
        list(iterator)
    assert wait_until_gone(pids)


def test_loader_processes_end_with_their_loader(tars: Path) -> None:
    loader = open_stream(tars).loader(6, workers=2)
    next(iter(loader))
    assert loader._batches is not None
    pids = [process.pid or 0 for process in loader._batches._processes]
    del loader
    assert wait_until_gone(pids)


@pytest.mark.parametrize("text", ["stack expects each tensor to be equal size", "read timed out"])
def test_an_error_of_the_users_function_has_its_traceback_and_skips_nothing(text: str, tars: Path) -> None:
    def fail_once(sample: Any) -> int:
        if number_of(sample) == doomed:
            raise RuntimeError(text)
        return number_of(sample)

    doomed = epoch(open_stream(tars))[2][3]
    stream = open_stream(tars, transform=fail_once)
    loader = stream.loader(6, workers=1)
    with pytest.raises(RuntimeError, match=text) as caught:
        list(loader)
    assert "in fail_once" in str(caught.value)
    assert not isinstance(caught.value, Fault)
    assert stream.state_dict()["samples"] == 12


def test_loader_processes_outlive_the_thread_that_started_them(tars: Path) -> None:
    stream, found = open_stream(tars), []
    loader = stream.loader(6, workers=2)
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(list(loader)))
        thread.start()
        thread.join()
    expected = open_stream(tars)
    assert found == [epoch(expected), epoch(expected)]
    loader.close()


def test_loader_processes_that_a_thread_started_end_with_the_training_process(tars: Path) -> None:
    script = f"""
import os, signal, threading
from uniemox_dist.data import ElasticShards
loader = ElasticShards({str(tars)!r}, global_batch=24, streams=12).loader(6, workers=2)
thread = threading.Thread(target=lambda: next(iter(loader)))
thread.start()
thread.join()
print(*(process.pid for process in loader._batches._processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(pids) == 2
    assert wait_until_gone(pids)


def test_a_micro_batch_that_cannot_be_sent_is_explained(
    tars: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = open_stream(tars, transform=lambda sample: lambda: sample).loader(6, workers=1, timeout_s=1)
    with pytest.raises(
        Fault, match=r"no loader process is busy.* cannot be pickled; no micro-batch within timeout_s=1"
    ):
        list(loader)
    assert "Can't pickle" in capfd.readouterr().err


def test_loaders_that_ended_with_an_error_print_nothing_in_later_loader_processes(tars: Path) -> None:
    script = f"""
import gc
from uniemox_dist.data import ElasticShards
def fail(sample): raise ValueError("mine")
try:
    next(iter(ElasticShards({str(tars)!r}, global_batch=24, streams=12, transform=fail).loader(6, workers=1)))
except ValueError as error:
    kept = error  # with its traceback
def collect(sample):
    global kept
    kept = None
    gc.collect()
loader = ElasticShards({str(tars)!r}, global_batch=24, streams=12, transform=collect).loader(6, workers=1)
print(next(iter(loader)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[None, None, None, None, None, None]\n"
    assert "Exception ignored" not in done.stderr


def test_collate_makes_the_micro_batch_in_the_loader_process(tars: Path) -> None:
    expected = [torch.tensor(batch) for batch in epoch(open_stream(tars))]
    found = epoch(open_stream(tars), workers=1, collate=torch.tensor)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_images_of_a_packed_data_set(emoji_shards: Path) -> None:
    stream = ElasticShards(
        emoji_shards / "train",
        global_batch=8,
        streams=4,
        decode="pil",
        transform=lambda s: (s["__key__"], s["jpg"].size),
    )
    found = dict(sample for batch in epoch(stream, 4) for sample in batch)
    assert len(found) == stream.samples
    assert all(min(size) > 0 for size in found.values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"streams": 7},
            r"^global_batch=24 is not a multiple of streams=7; try 21, or a streams that divides 24$",
        ),
        (
            {"rank": 0, "world_size": 5},
            r"^streams=12 is not a multiple of the 5 ranks; use 6 ranks, or a streams",
        ),
        ({"global_batch": 0}, r"^global_batch=0: is not a whole number of at least 1$"),
        ({"window": 2.5}, r"^window=2.5: is not a whole number"),
        ({"rank": 3, "world_size": 3}, r"^rank=3, world_size=3: a rank is one of 0…world_size-1$"),
        ({"rank": 1}, r"^rank=1, world_size=None: give both or none$"),
        ({"decode": "jpeg"}, r"^decode='jpeg': is not a handler of webdataset \(.*pil"),
        ({"transform": "int"}, r"^transform='int': is not a function"),
        ({"index": "/nowhere"}, r"/nowhere"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], says: str, tars: Path) -> None:
    with pytest.raises(UserError, match=says):
        open_stream(tars, **options)


def test_slots_may_be_numbers_of_numpy(tars: Path) -> None:
    stream = open_stream(tars)
    assert [stream[slot] for slot in np.arange(430, 433)] == [stream[slot] for slot in range(430, 433)]


def test_wrong_micro_batches_are_named(tars: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^global_batch=24 is not a multiple of micro_batch x world_size = 5 x 1; try micro_batch=4$",
    ):
        open_stream(tars).loader(5)
    for options in ({"workers": -1}, {"prefetch": 0}):
        with pytest.raises(UserError, match=r": is not a whole number of at least"):
            open_stream(tars).loader(6, **options)


def test_sources_that_do_not_fit_are_named(tars: Path) -> None:
    for data, says in (
        ([], r"^data=\[\]: names no tars"),
        ([Source(tars, weight=1, repeat=1)], r"^data\[0\]: has a weight and a repeat"),
        ([Source(tars, repeat=1), Source(tars)], r"^data\[1\]: has no repeat where others have one"),
        ([Source(tars, weight=-1)], r"^data\[0\].weight=-1: is not a number above 0$"),
        (
            [Source(tars, weight=1000), Source(tars)],
            r"^data\[1\]: a share of 0.1 % gives it none of streams=12",
        ),
        (tars / "005.tar", r"005.tar"),
    ):
        with pytest.raises(UserError, match=says):
            open_stream(data)


def test_a_state_of_another_stream_is_refused_with_what_differs(tars: Path, tmp_path: Path) -> None:
    state = open_stream(tars).state_dict()
    other = write_tars(tmp_path / "other", (30,))
    for options, says in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"streams": 6}, "streams was 12 and is 6"),
        ({"global_batch": 12}, "global_batch was 24 and is 12"),
        ({"window": 8}, "window was 16 and is 8"),
        ({"data": other}, r"data was [0-9a-f]{12} and is [0-9a-f]{12}"),
    ):
        data = options.pop("data", tars)
        with pytest.raises(UserError, match=rf"^state: is of another stream: {says}"):
            open_stream(data, build_index=True, **options).load_state_dict(state)
    stream = open_stream(tars)
    for broken, says in (
        ({}, "lacks 'data'"),
        (None, "state=NoneType"),
        ({**state, "version": 2}, "state.version=2"),
        ({**state, "samples": -1}, "state.samples=-1"),
        ({**state, "world_size": 0}, "state.world_size=0"),
    ):
        with pytest.raises(UserError, match=says):
            stream.load_state_dict(broken)  # type: ignore[arg-type]


def test_another_rank_than_that_of_the_environment_is_refused(
    tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert open_stream(tars).world.rank == 1
    with pytest.raises(UserError, match=r"^rank=0: this process has rank 1 of 2 by its environment"):
        open_stream(tars, rank=0, world_size=2)
    assert open_stream(tars, rank=0, world_size=1).world.size == 1


def test_a_stream_can_be_pickled_with_its_position(tars: Path) -> None:
    stream = ElasticShards(tars, global_batch=24, streams=12, decode=[])
    stream.advance(12)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.state_dict() == stream.state_dict()
    assert [s["__key__"] for s in next(iter(copy.loader(6)))] == [
        s["__key__"] for s in next(iter(stream.loader(6)))
    ]


def test_all_passes_over_a_loader_have_the_same_number_of_steps(tars: Path) -> None:
    stream = open_stream(tars)
    loader = stream.loader(6)
    assert [len(list(loader)) for _ in range(4)] == [36] * 4 == [len(loader)] * 4
    # Four passes of 216 samples: four epochs of 210, and 24 samples of the fifth.
    assert stream.state_dict()["samples"] == 864


def test_set_epoch_goes_forward_to_a_pass_and_never_back(tars: Path) -> None:
    expected = open_stream(tars)
    first, second = epoch(expected), epoch(expected)
    stream = open_stream(tars)
    loader = stream.loader(6)
    loader.sampler.set_epoch(0)
    assert next(iter(loader)) == first[0]
    loader.sampler.set_epoch(1)
    assert next(iter(loader)) == second[0]
    loader.sampler.set_epoch(0)
    loader.sampler.set_epoch(1)
    assert next(iter(loader)) == second[1]


def test_a_loader_within_a_pass_refuses_a_state_of_other_micro_batches_in_a_step(tars: Path) -> None:
    saved = open_stream(tars).loader(6)
    saved.stream.advance(48)
    state = json.loads(json.dumps(saved.state_dict()))
    others = [open_stream(tars).loader(12), open_stream(tars, rank=1, world_size=2).loader(6)]
    for loader in others:
        with pytest.raises(
            UserError, match=r"^micro_batch=\d+: a step has 2 micro-batches here and had 4 where the state"
        ):
            loader.load_state_dict(state)
        assert loader.state_dict()["samples"] == 0
        loader.stream.load_state_dict(state)
    again = open_stream(tars, rank=1, world_size=2).loader(3)
    again.load_state_dict(state)
    assert again.stream.position.number == 24
    saved.stream.advance(216 - 48)
    for loader in others:
        loader.load_state_dict(saved.state_dict())  # between two passes any number will do


def test_a_stream_that_was_opened_before_the_ranks_met_is_refused(tars: Path) -> None:
    code = f"""
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from uniemox_dist.data import ElasticShards
options = dict(global_batch=24, streams=12)
early, alone = ElasticShards({str(tars)!r}, **options), ElasticShards({str(tars)!r}, rank=0, world_size=1, **options)
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
next(iter(alone.loader(12)))
next(iter(early.loader(12)))  # one rank is what it found
dist.destroy_process_group()
dist.init_process_group("fake", rank=1, world_size=2)
next(iter(alone.loader(12)))
for batches in (early.loader(12), early.sampler(12)):
    try:
        next(iter(batches))
    except Exception as error:
        print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    says = (
        "UserError rank=0, world_size=1: were found before torch.distributed was initialised, where this is rank 1 of "
        "2; open the stream after that (in Lightning in train_dataloader()), or give rank and world_size"
    )
    assert result.stdout.splitlines() == [says] * 2, result.stderr
