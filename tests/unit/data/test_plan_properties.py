"""Properties of the order of samples over shard sizes, mixes, ranks, micro-batches, resume points and workers."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_orders import SampleOrder

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.loader import MicroBatch, PlannedDataset, view_settings
from uniemox_dist.data.plan import Place, Plan
from uniemox_dist.data.rng import largest_remainder
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.step_batches import StepBatches

# Derandomised, so that a failure is everyone's failure.
properties = settings(derandomize=True, deadline=None, max_examples=100)


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


@dataclass(frozen=True)
class Run(SampleOrder):
    """An order of samples, and one way to divide it among ranks."""

    world_size: int
    micro_batch: int


# Uneven: most shards small, some up to sixty times as large; some data sets have fewer shards than streams.
shard_sizes = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 60)), min_size=1, max_size=40)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    sources = draw(st.lists(shard_sizes, min_size=1, max_size=3))
    streams = draw(st.sampled_from([12, 16, 24, 28, 39, 48]))
    turns = draw(st.integers(1, 3))
    world_size = draw(st.sampled_from(divisors(streams, 16)))
    return Run(
        sources,
        # The lightest of three still gets more than half a stream of twelve, and so a whole one.
        [draw(st.integers(1, 7)) for _ in sources],
        streams=streams,
        turns=turns,
        seed=draw(st.integers(0, 2**63)),
        window=draw(st.sampled_from([1, 2, 5, 16, 512])),
        world_size=world_size,
        micro_batch=draw(st.sampled_from(divisors(streams * turns // world_size, 64))),
    )


def micro_batches(plan: Plan, step: int, rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """A rank's slots of one step, cut into micro-batches."""
    own = plan.global_batch // world_size
    return list(islice(plan.walk(step * own, rank, world_size, micro_batch), -(-own // micro_batch)))


def step_of_all_ranks(plan: Plan, step: int, world_size: int, micro_batch: int) -> list[tuple[int, Place]]:
    """(slot, place) of a step, rank after rank, in the order in which the ranks take them."""
    return [
        (slot, plan.locate(slot))
        for rank in range(world_size)
        for slots in micro_batches(plan, step, rank, world_size, micro_batch)
        for slot in slots
    ]


# ---- (a) ranks and micro-batches


@properties
@given(runs(), st.integers(0, 10**6))
def test_a_global_batch_holds_the_same_samples_on_any_ranks_and_micro_batches(run: Run, step: int) -> None:
    plan = run.plan()
    alone = step_of_all_ranks(plan, step, 1, run.global_batch)
    assert [slot for slot, _ in alone] == list(range(step * run.global_batch, (step + 1) * run.global_batch))
    dealt = step_of_all_ranks(plan, step, run.world_size, run.micro_batch)
    assert len(dealt) == run.global_batch
    assert dict(dealt) == dict(alone)


# ---- (b) strict epochs


def slots_of(plan: Plan, source: int, first: int, count: int) -> list[int]:
    """The slots of `count` draws of a source, from its `first` on: its streams in turn."""
    own = [stream for stream, owner in enumerate(plan.owner_S.tolist()) if owner == source]
    draws = (divmod(number, len(own)) for number in range(first, first + count))
    return [turn * plan.streams + own[nth] for turn, nth in draws]


@properties
@given(runs(), st.integers(0, 10**5))
def test_each_epoch_of_a_source_draws_exactly_every_sample_once(run: Run, epoch: int) -> None:
    plan = run.plan()
    for number, counts in enumerate(run.sources):
        samples = sum(counts)
        everything = Counter((shard, row) for shard, count in enumerate(counts) for row in range(count))
        slots = slots_of(plan, number, epoch * samples, 2 * samples)
        assert slots == sorted(slots)
        places = [plan.locate(slot) for slot in slots]
        for of, part in ((epoch, places[:samples]), (epoch + 1, places[samples:])):
            assert {(place.source, place.epoch) for place in part} == {(number, of)}
            assert Counter((place.shard, place.row) for place in part) == everything


# ---- (c) resuming


@properties
@given(runs(), st.integers(0, 40), st.integers(1, 4), st.data())
def test_resuming_on_other_ranks_gives_the_samples_of_an_uninterrupted_run(
    run: Run, step: int, further: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.sampled_from(divisors(run.streams, 16)))
    walked, fresh = run.plan(), run.plan()
    whole = [step_of_all_ranks(walked, t, run.world_size, run.micro_batch) for t in range(step + further)]
    resumed = [
        step_of_all_ranks(fresh, t, world_size, run.global_batch // world_size)
        for t in range(step, step + further)
    ]
    assert [dict(batch) for batch in resumed] == [dict(batch) for batch in whole[step:]]
    assert fresh.source_samples(step) == [
        sum(place.source == number for batch in whole[:step] for _, place in batch)
        for number in range(len(run.sources))
    ]


@properties
@given(runs(), st.integers(0, 20), st.data())
def test_a_walk_from_a_later_step_continues_one_that_started_at_0(
    run: Run, step: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, run.world_size - 1))
    grad_accum = run.global_batch // (run.micro_batch * run.world_size)

    def walk(first_step: int, count: int) -> list[list[int]]:
        first = first_step * run.global_batch // run.world_size
        batches = run.plan().walk(first, rank, run.world_size, run.micro_batch)
        return list(islice(batches, count * grad_accum))

    assert walk(step, 3) == walk(0, step + 3)[step * grad_accum :]


@properties
@given(runs(), st.integers(0, 5), st.data())
def test_a_walk_from_the_middle_of_a_step_ends_at_the_same_place(
    run: Run, step: int, data: st.DataObject
) -> None:
    """Where the ranks have used whole turns of the streams, any number of ranks reads the rest of the step."""
    turns = data.draw(st.integers(0, run.global_batch // run.streams - 1))
    world_size = data.draw(st.sampled_from(divisors(run.streams, 16)))
    first = step * run.global_batch + turns * run.streams
    micro_batch = data.draw(st.integers(1, run.global_batch))
    rest = []
    for rank in range(world_size):
        for slots in run.plan().walk(first // world_size, rank, world_size, micro_batch):
            rest += slots
            if len(rest) * world_size >= (rank + 1) * ((step + 1) * run.global_batch - first):
                break
    assert sorted(rest) == list(range(first, (step + 1) * run.global_batch))


# ---- (d) mixes


@properties
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.sampled_from([12, 16, 24, 39, 48]),
    st.integers(0, 10**9),
)
def test_every_s_slots_hold_the_shares_of_largest_remainder(
    weights: list[int], streams: int, slot: int
) -> None:
    def plan() -> Plan:
        return Plan([[5, 9]] * len(weights), weights, streams=streams, global_batch=streams, seed=1, window=4)

    # In whole numbers, where the code works with floating point; so between equal remainders either may win.
    floors, rests = zip(*(divmod(weight * streams, sum(weights)) for weight in weights))
    shares = largest_remainder(weights, streams).tolist()
    assert sum(shares) == streams
    more = [share - floor for share, floor in zip(shares, floors)]
    assert set(more) <= {0, 1}
    raised, kept = ([rest for rest, m in zip(rests, more) if m == one] for one in (1, 0))
    assert not raised or not kept or min(raised) >= max(kept)
    if min(shares) == 0:
        with pytest.raises(
            UserError,
            match=rf"data\.sources\.\d: a share of .* % gives it none of batch\.streams={streams}",
        ):
            plan()
        return
    assert plan().shares == tuple(shares)
    owners = Counter(plan().locate(u).source for u in range(slot, slot + streams))  # from any slot on
    assert [owners[number] for number in range(len(weights))] == shares


# ---- (e) the loader


@pytest.fixture(scope="module")
def packed(emoji_shards: Path, photo_shards: Path) -> list[Path]:
    """A mix: 72 small pictures with alpha in 5 shards, 20 photographs in 3."""
    return [emoji_shards / "train", photo_shards]


def config(folders: list[Path], workers: int, micro_batch: int) -> Config:
    return Config.model_validate(
        {
            "run": {"max_steps": 1, "seed": 5},
            "data": {
                "sources": [{"path": str(folder), "weight": 2 - i} for i, folder in enumerate(folders)],
                "workers": workers,
                "shuffle_window": 4,
                "background": "random",
            },
            "batch": {"global_batch": 24, "micro_batch": micro_batch, "streams": 12},
            "model": {"image_size": 32, "patch_size": 8},
            "teacher": {"name": "shipped:demo"},
        }
    )


def rank_steps(of: Config, first_step: int, count: int, rank: int, world_size: int) -> list[MicroBatch]:
    sources = Sources(of, rank=rank, world_size=world_size)
    dataset = PlannedDataset(sources, None, view_settings(of))
    with StepBatches(dataset, of, first_step=first_step, pin=False) as batches:
        return [batch for _ in range(count) for batch in batches.next_step()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@settings(properties, max_examples=4)
@given(st.integers(0, 50), st.sampled_from([(1, 24), (1, 8), (2, 4), (3, 8)]), st.data())
@pytest.mark.parametrize(
    "workers", [1, 3, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 2, 4))]
)
def test_loader_processes_change_neither_slots_nor_keys_nor_pixels(
    packed: list[Path], workers: int, step: int, dealt: tuple[int, int], data: st.DataObject
) -> None:
    world_size, micro_batch = dealt
    rank = data.draw(st.integers(0, world_size - 1))
    plain = rank_steps(config(packed, 0, micro_batch), step, 2, rank, world_size)
    loaded = rank_steps(config(packed, workers, micro_batch), step, 2, rank, world_size)
    assert len(loaded) == len(plain) == 2 * 24 // (world_size * micro_batch)
    for a, b in zip(loaded, plain):
        assert (a.keys, a.sources, a.damaged) == (b.keys, b.sources, ())
        for name in ("slots_B", "scene_B3HW", "person_B3HW"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    # And they are the plan's.
    slots = [slot for batch in loaded for slot in batch.slots_B.tolist()]
    plan = Sources(config(packed, 0, micro_batch)).plan
    assert slots == plan.rank_slots(step, rank, world_size) + plan.rank_slots(step + 1, rank, world_size)
