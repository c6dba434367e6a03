"""Loader processes that die, hang or cannot read data end the step with one line that names the cause."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_parts import alive, config, dataset, wait_until_gone

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.step_batches import StepBatches


def with_data(of: Config, **changes: Any) -> Config:
    return of.model_copy(update={"data": of.data.model_copy(update=changes)})


def open_batches(data: PlannedDataset, of: Config) -> StepBatches:
    return StepBatches(data, of, first_step=0, pin=False)


def take(batches: StepBatches, steps: int) -> None:
    for _ in range(steps):
        batches.next_step()


class Trap:
    """A renderer that does something else at one picture of its process."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self.left, self.action = number, action

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()


def die(of: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), of)


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSEGV])
def test_a_loader_process_that_dies_is_named_with_its_sample(what: int, emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=2)
    data = dataset(of)
    data.renderer = Trap(4, die(what))  # each process has its own copy: both die at their fourth picture
    batches = open_batches(data, of)
    pids = [process.pid or 0 for process in batches._processes]
    with pytest.raises(Fault) as caught, batches:
        take(batches, 2)
    found = re.search(r"loader process (\d) \(pid (\d+)\) died of (\w+)", str(caught.value))
    assert found, str(caught.value)
    assert int(found[2]) in pids
    assert found[3] == signal.Signals(what).name
    slot = {0: 3, 1: 9}[int(found[1])]  # whose death is noticed first depends on the machine
    place = data.plan.locate(slot)
    name = data.readers[0].manifest.shards[place.shard].name
    assert f"at slot {slot}: {emoji_shards}/train/{name}, row {place.row}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert wait_until_gone(pids)


def test_a_loader_process_that_dies_during_the_step_is_named(emoji_shards: Path) -> None:
    """torch's signal handler raises wherever the training process is at that moment; the next step reports it, too."""
    of = config(emoji_shards / "train", workers=1)
    data = dataset(of)
    data.renderer = Trap(20, die(signal.SIGKILL))  # in the second step's micro-batches, which are made ahead

    def work_between_batches() -> None:
        with open_batches(data, of) as batches:
            take(batches, 1)
            for _ in range(300):
                time.sleep(0.01)
            take(batches, 2)

    with pytest.raises(Fault, match=r"loader process 0 \(pid \d+\) died of SIGKILL .*slot 19: "):
        work_between_batches()


def test_a_loader_process_that_is_stuck_is_named_with_its_sample_within_the_time(emoji_shards: Path) -> None:
    of = with_data(config(emoji_shards / "train", workers=2), timeout_s=2, retry_s=0.0)
    data = dataset(of)
    data.renderer = Trap(8, lambda: time.sleep(3600))  # as a read from a dead file system
    batches = open_batches(data, of)
    pids = [process.pid or 0 for process in batches._processes]
    with pytest.raises(Fault) as caught, batches:
        take(batches, 2)
    says = str(caught.value)
    assert re.search(r"loader process 0 \(pid \d+\) has been stuck for \d+ s at slot 13: ", says), says
    assert says.endswith("no micro-batch within data.timeout_s=2")
    assert wait_until_gone(pids)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_process_arrives_as_one_line(workers: int, emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=workers)
    for kind in (UserError, Fault):
        data = dataset(of)

        def fail(*_: object, kind: type[Exception] = kind) -> None:
            raise kind("what is wrong")

        data.renderer = fail if kind is Fault else _damaged_index(data)
        says = "what is wrong" if kind is Fault else "the index is missing"
        with pytest.raises(kind, match=says) as caught, open_batches(data, of) as batches:
            batches.next_step()
        assert "\n" not in str(caught.value)


def _damaged_index(data: PlannedDataset) -> Any:
    data.readers[0].origin.url += "/elsewhere"
    return data.renderer


@pytest.mark.parametrize("workers", [0, 2])
def test_read_counts_travel_with_the_micro_batches(workers: int, emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=workers)
    data = dataset(of)
    with open_batches(data, of) as batches:
        found: list[MicroBatch] = [batch for _ in range(4) for batch in batches.next_step()]
    for batch in found:
        lengths = []
        for slot in batch.slots_B.tolist():
            place = data.plan.locate(slot)
            lengths.append(len(data.readers[0].read(place.shard, place.row).image))
        assert batch.counts == ReadCounts(reads=6, bytes=sum(lengths), hits=0, retries=0)


def test_signals_that_slurm_sends_do_not_reach_loader_processes(emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=2)
    with open_batches(dataset(of), of) as batches:
        first = batches.next_step()
        for process in batches._processes:
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                os.kill(process.pid or 0, name)
        again = [batch for _ in range(5) for batch in batches.next_step()]
        assert all(process.is_alive() for process in batches._processes)
    assert [batch.slots_B.tolist() for batch in [*first, *again]] == [
        list(range(start, start + 6)) for start in range(0, 72, 6)
    ]


def test_loader_processes_die_with_a_training_process_that_is_killed(
    emoji_shards: Path, tmp_path: Path
) -> None:
    """They share its lock on the run's folder, which the next attempt wants at once."""
    of = config(emoji_shards / "train", workers=2)
    pids = tmp_path / "pids"
    trainer = os.fork()
    if trainer == 0:
        batches = open_batches(dataset(of), of)
        batches.next_step()
        (tmp_path / "made").write_text(" ".join(str(process.pid) for process in batches._processes))
        (tmp_path / "made").rename(pids)
        time.sleep(3600)
    while not pids.exists():
        time.sleep(0.01)
    loaders = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, loaders))
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert wait_until_gone(loaders)


def test_a_view_buffer_is_reused_only_when_no_tensor_refers_to_it(emoji_shards: Path) -> None:
    of = config(emoji_shards / "train", workers=1)
    plain = config(emoji_shards / "train")
    steps = 12
    with open_batches(dataset(plain), plain) as batches:
        expected = [batch.scene_B3HW.clone() for _ in range(steps) for batch in batches.next_step()]
    with open_batches(dataset(of), of) as batches:
        pointers, kept = set(), []
        for step in range(steps):
            for batch in batches.next_step():
                pointers.add(batch.scene_B3HW.data_ptr())
                if step % 3 == 0:
                    kept.append(batch.scene_B3HW[2:])  # a view of a view keeps the buffer
        assert len(pointers) < 2 * steps
    wanted = [expected[2 * step + i][2:] for step in range(0, steps, 3) for i in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))


def test_more_micro_batches_than_buffers_are_held_without_harm(emoji_shards: Path) -> None:
    of, plain = config(emoji_shards / "train", workers=2), config(emoji_shards / "train")
    with open_batches(dataset(of), of) as batches, open_batches(dataset(plain), plain) as others:
        held = [batch for _ in range(20) for batch in batches.next_step()]
        expected = [batch for _ in range(20) for batch in others.next_step()]
    for a, b in zip(held, expected, strict=True):
        assert torch.equal(a.scene_B3HW, b.scene_B3HW)
        assert a.person_B3HW is not None
        assert b.person_B3HW is not None
        assert torch.equal(a.person_B3HW, b.person_B3HW)
        assert a.keys == b.keys
