"""The elastic stream inside torch's DataLoader, webdataset's pipelines and torchdata's StatefulDataLoader."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from elastic_tars import epoch, number_of, open_stream, write_tars
from torch.utils.data import DataLoader

from shards.edit.index_members import index_members
from uniemox_dist.core.errors import UserError
from uniemox_dist.data import ElasticShards


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tars(tmp_path_factory.mktemp("tars"))
    index_members(str(folder))
    return folder


@pytest.fixture(scope="module")
def epochs(tars: Path) -> list[list[list[int]]]:
    """The micro-batches of three epochs."""
    stream = open_stream(tars)
    return [epoch(stream) for _ in range(3)]


def numbers(batches: Any) -> list[list[int]]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else list(batch) for batch in batches]


# ---- torch

KINDS: dict[str, Callable[..., Any]] = {
    "sampler": lambda stream, **more: DataLoader(stream, batch_sampler=stream.sampler(6), **more),
    "source": lambda stream, **more: DataLoader(stream.source(6), batch_size=6, **more),
}
PROCESSES = {
    "none": {},
    "two": {"num_workers": 2},
    "living": {"num_workers": 2, "persistent_workers": True},
    "three": {"num_workers": 3, "prefetch_factor": 4},
}


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_of_a_torch_loader_are_those_of_the_stream(
    kind: str, processes: str, tracked: bool, tars: Path, epochs: list[list[list[int]]]
) -> None:
    stream = open_stream(tars)
    loader = KINDS[kind](stream, **PROCESSES[processes])
    if tracked:
        loader = stream.track(loader, 6)
    assert [numbers(loader) for _ in range(3)] == epochs
    if tracked:
        assert stream.state_dict()["samples"] == sum(len(batches) for batches in epochs) * 6


@pytest.mark.long
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", KINDS)
def test_loader_processes_that_do_not_fork_change_nothing(
    kind: str, method: str, tars: Path, epochs: list[list[list[int]]]
) -> None:
    stream = open_stream(tars)
    more = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": method}
    loader = KINDS[kind](stream, **more)
    assert [numbers(loader), numbers(loader)] == epochs[:2]
    stream.position.number = 0
    tracked = stream.track(loader, 6)
    assert [numbers(tracked), numbers(tracked), numbers(tracked)] == epochs


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_that_was_left_begins_again_or_where_it_was_tracked(
    kind: str, tars: Path, epochs: list[list[list[int]]]
) -> None:
    stream = open_stream(tars)
    loader = KINDS[kind](stream, num_workers=2)
    for _, batch in zip(range(3), loader):
        assert batch.tolist() in epochs[0]
    assert numbers(loader) == epochs[0]
    stream = open_stream(tars)
    tracked = stream.track(KINDS[kind](stream, num_workers=2, prefetch_factor=50), 6)
    first = [batch.tolist() for _, batch in zip(range(30), tracked)]
    assert first + numbers(tracked) == epochs[0]
    assert numbers(tracked) == epochs[1]


def test_pinned_memory_changes_nothing(tars: Path, epochs: list[list[list[int]]]) -> None:
    stream = open_stream(tars)
    assert numbers(KINDS["sampler"](stream, num_workers=2, pin_memory=True)) == epochs[0]


def test_a_state_of_any_loader_goes_on_in_any_other_with_other_ranks(
    tars: Path, epochs: list[list[list[int]]]
) -> None:
    stream = open_stream(tars)
    tracked = stream.track(KINDS["source"](stream, num_workers=2), 6)
    seen = [number for _, batch in zip(range(8), tracked) for number in batch.tolist()]
    state = json.loads(json.dumps(tracked.state_dict()))
    for kind in KINDS:
        rest = []
        for rank in range(3):
            other = open_stream(tars, rank=rank, world_size=3)
            loader = (
                DataLoader(other, batch_sampler=other.sampler(4), num_workers=rank)
                if kind == "sampler"
                else DataLoader(other.source(4), batch_size=4, num_workers=rank)
            )
            other.load_state_dict(state)
            rest += [number for batch in numbers(other.track(loader, 4)) for number in batch]
        assert Counter(seen + rest) == Counter(number for batch in epochs[0] for number in batch)


def test_a_source_refuses_a_step_that_ends_with_a_part_of_a_micro_batch(tars: Path) -> None:
    stream = open_stream(tars)
    stream.advance(18)
    with pytest.raises(UserError, match=r"^micro_batch=12: does not divide the 6 samples that this rank has"):
        list(stream.source(12))
    assert len(list(DataLoader(stream, batch_sampler=stream.sampler(12)))) == 17


# ---- webdataset


def test_stages_of_webdataset_work_on_the_stream(tars: Path, epochs: list[list[list[int]]]) -> None:
    raw = open_stream(tars, decode=None, transform=None)
    decoded = open_stream(tars, transform=None)
    for pipeline in (
        wds.DataPipeline(raw.source(6), wds.decode(), wds.to_tuple("json", "cls")),
        wds.DataPipeline(raw.source(6), wds.decode(), wds.map_dict(cls=str), wds.to_tuple("json", "cls")),
        wds.DataPipeline(decoded.source(6), wds.rename(label="cls"), wds.to_tuple("json", "label")),
    ):
        stream = pipeline.pipeline[0].stream
        stream.position.number = 0
        loader = wds.WebLoader(pipeline, batch_size=6, num_workers=2)
        assert [batch[0]["n"].tolist() for batch in stream.track(loader, 6)] == epochs[0]
    stream.position.number = 0
    batched = wds.DataPipeline(decoded.source(6), wds.to_tuple("json", "cls"), wds.batched(6))
    for loader in (batched, wds.WebLoader(batched, batch_size=None, num_workers=3)):
        stream.position.number = 0
        found = [[sample["n"] for sample in batch[0]] for batch in stream.track(loader, 6)]
        assert found == epochs[0]
    stream.position.number = 0
    again = wds.WebLoader(batched, batch_size=None, num_workers=2).unbatched().batched(12)
    assert [len(batch[0]) for batch in stream.track(again, 12)] == [12] * 18


def keep_even(sample: dict[str, Any]) -> bool:
    return number_of(sample) % 2 == 0


def drop_odd(samples: Any) -> Any:
    return (sample for sample in samples if keep_even(sample))


def test_stages_that_leave_out_or_move_samples_are_refused(tars: Path) -> None:
    stream = open_stream(tars, transform=None)
    stages = {
        "shuffle": wds.shuffle(100),
        "detshuffle": wds.detshuffle(),
        "select": wds.select(keep_even),
        "rsample": wds.rsample(0.5),
    }
    says = r"^loader: has webdataset's stage '{}', after which batches are not those of the stream"
    for name, stage in stages.items():
        pipeline = wds.DataPipeline(stream.source(6), stage, wds.to_tuple("json"), wds.batched(6))
        for loader in (pipeline, wds.WebLoader(pipeline, batch_size=None, num_workers=2)):
            with pytest.raises(UserError, match=says.format(name)):
                stream.track(loader, 6)
    with pytest.raises(UserError, match=says.format("shuffle")):
        stream.track(wds.WebLoader(stream.source(6), batch_size=6).unbatched().shuffle(100).batched(6), 6)
    # Without `track` they do what they do.
    kept = wds.DataPipeline(stream.source(6), wds.select(keep_even), wds.shuffle(50))
    assert {number_of(sample) for sample in kept} == set(range(0, 210, 2))


def test_a_loader_with_another_number_of_batches_is_an_error_at_the_end(tars: Path) -> None:
    stream = open_stream(tars, transform=None)
    fewer = stream.track(wds.DataPipeline(stream.source(6), drop_odd, wds.batched(6)), 6)
    with pytest.raises(
        UserError, match=r"^loader: yielded \d\d batches, and the rest of the pass has 36 micro"
    ):
        list(fewer)
    stream.position.number = 0
    with pytest.raises(
        UserError, match=r"^loader: yielded more than 36 batches, and the rest of the pass has 36"
    ):
        list(stream.track(wds.DataPipeline(stream.source(6), wds.batched(3)), 6))
    stream.position.number = 0
    with pytest.raises(UserError, match=r"^loader: yielded 10 batches, and the rest of the pass has 36"):
        list(stream.track(wds.WebLoader(stream.source(6), batch_size=6, collate_fn=list).with_epoch(10), 6))


# ---- torchdata


def stateful(stream: ElasticShards[Any], kind: str, micro_batch: int = 6, **options: Any) -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    if kind == "sampler":
        return loaders.StatefulDataLoader(stream, batch_sampler=stream.sampler(micro_batch), **options)
    return loaders.StatefulDataLoader(stream.source(micro_batch), batch_size=micro_batch, **options)


@pytest.mark.parametrize(("used", "every"), [(1, 1), (7, 1), (7, 4), (36, 1), (37, 4)])
@pytest.mark.parametrize("processes", ["none", "two", "living"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_torchdatas_loader_goes_on_exactly(
    kind: str, processes: str, used: int, every: int, tars: Path, epochs: list[list[list[int]]]
) -> None:
    options = {**PROCESSES[processes], "snapshot_every_n_steps": every}
    loader = stateful(open_stream(tars), kind, **options)
    seen: list[list[int]] = []
    while len(seen) < used:
        for batch in loader:
            seen.append(batch.tolist())
            if len(seen) == used:
                state = json.loads(json.dumps(loader.state_dict()))
    again = stateful(open_stream(tars), kind, **options)
    again.load_state_dict(state)
    rest = [numbers(again) for _ in range(2)]
    flat = [batch for batches in epochs for batch in batches]
    assert [len(batches) for batches in rest] == [-used % 36, 36]
    assert [batch for batches in rest for batch in batches] == flat[used : used + len(rest[0]) + len(rest[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_after_whole_epochs_begins_the_next(
    kind: str, tars: Path, epochs: list[list[list[int]]]
) -> None:
    for workers in (0, 2):
        loader = stateful(open_stream(tars), kind, num_workers=workers)
        assert numbers(loader) == epochs[0]
        state = loader.state_dict()
        again = stateful(open_stream(tars), kind, num_workers=workers)
        again.load_state_dict(state)
        assert [numbers(again), numbers(again)] == epochs[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_of_torchdatas_loader_over_the_sampler_goes_on_with_other_ranks(
    workers: int, tars: Path, epochs: list[list[list[int]]]
) -> None:
    seen = []
    for rank in range(2):
        loader = stateful(open_stream(tars, rank=rank, world_size=2), "sampler", num_workers=workers)
        for number, batch in enumerate(loader):
            if number < 6:
                seen += batch.tolist()
                state = loader.state_dict()
    for world in (1, 3):
        rest = []
        for rank in range(world):
            stream = open_stream(tars, rank=rank, world_size=world)
            loader = stateful(stream, "sampler", 2, num_workers=workers)
            loader.load_state_dict(state)
            rest += [number for batch in numbers(loader) for number in batch]
            assert stream.readers[0].origin.counts.reads <= 216 // world - 72 // world
        assert Counter(seen + rest) == Counter(number for batch in epochs[0] for number in batch)


def test_the_state_of_torchdatas_loader_over_a_source_belongs_to_its_ranks(tars: Path) -> None:
    loader = stateful(open_stream(tars, rank=0, world_size=2), "source")
    next(iter(loader))
    state = loader.state_dict()
    other = stateful(open_stream(tars), "source")
    other.load_state_dict(state)
    with pytest.raises(
        UserError, match=r"^state.world_size=2: is 1 now, and the state of an iterable data set"
    ):
        next(iter(other))


def test_a_tracked_loader_of_torchdata_over_a_source_goes_on_with_other_ranks(
    tars: Path, epochs: list[list[list[int]]]
) -> None:
    stream = open_stream(tars)
    tracked, seen = stream.track(stateful(stream, "source", num_workers=2), 6), []
    for number, batch in enumerate(tracked):
        if number < 8:
            seen += batch.tolist()
            state = stream.state_dict()
    for rank in range(3):
        other = open_stream(tars, rank=rank, world_size=3)
        other.load_state_dict(state)
        for batch in other.track(stateful(other, "source", 4, num_workers=rank), 4):
            seen += batch.tolist()
    assert Counter(seen) == Counter(number for batch in epochs[0] for number in batch)


def test_resuming_torchdatas_loader_reads_nothing_that_was_used(tars: Path) -> None:
    for kind in KINDS:
        loader = stateful(open_stream(tars), kind)
        for _ in zip(range(20), loader):
            state = loader.state_dict()
        stream = open_stream(tars)
        again = stateful(stream, kind)
        again.load_state_dict(state)
        assert len(numbers(again)) == 16
        assert stream.readers[0].origin.counts.reads == 96
