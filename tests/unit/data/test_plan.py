"""The order of samples is the same on any number of ranks and after any restart."""

import tracemalloc
from collections import Counter, defaultdict
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_orders import SampleOrder

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.plan import Place, Plan
from uniemox_dist.data.rng import largest_remainder, permutation


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def cases(draw: st.DrawFn) -> SampleOrder:
    # Shards without samples are legal, a source without any is not. Weights within a factor of two leave
    # each of up to three sources at least one of six streams.
    counts = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)
    sources = draw(st.lists(counts, min_size=1, max_size=3))
    return SampleOrder(
        sources,
        [draw(st.floats(0.5, 1.0)) for _ in sources],
        streams=draw(st.sampled_from([6, 8, 12])),
        turns=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**31 - 1)),
        window=draw(st.sampled_from([1, 2, 3, 512])),
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 10**6), st.data())
def test_a_step_of_all_ranks_is_the_global_batch_once(
    case: SampleOrder, step: int, data: st.DataObject
) -> None:
    plan = case.plan()
    world = data.draw(st.sampled_from(divisors(case.streams)))
    micro = data.draw(st.sampled_from(divisors(case.global_batch // world)))
    dealt = []
    for rank in range(world):
        per_rank = case.global_batch // world
        batches = list(islice(plan.walk(step * per_rank, rank, world, micro), per_rank // micro))
        assert [len(batch) for batch in batches] == [micro] * (case.global_batch // world // micro)
        slots = [slot for batch in batches for slot in batch]
        assert slots == sorted(slots) == plan.rank_slots(step, rank, world)
        own = case.streams // world
        assert {slot % case.streams // own for slot in slots} == {rank}  # neighbouring streams
        dealt += slots
    assert sorted(dealt) == list(range(step * case.global_batch, (step + 1) * case.global_batch))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_sample_of_a_source_is_seen_once_per_epoch_and_epochs_do_not_overlap(case: SampleOrder) -> None:
    plan = case.plan()
    drawn: dict[int, list[Place]] = defaultdict(list)
    longest = max(map(sum, case.sources))
    for slot in range(3 * longest * case.streams):  # a source has at least one stream
        place = plan.locate(slot)
        if len(drawn[place.source]) < 3 * sum(case.sources[place.source]):
            drawn[place.source].append(place)
    for number, counts in enumerate(case.sources):
        everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
        samples = len(everything)
        for epoch in range(3):
            places = drawn[number][epoch * samples : (epoch + 1) * samples]
            assert [place.epoch for place in places] == [epoch] * samples
            assert Counter((place.shard, place.row) for place in places) == Counter(everything)


@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(st.integers(0, 2000), min_size=1, max_size=5))
def test_a_fresh_plan_at_any_slot_equals_one_that_reached_it_step_by_step(
    case: SampleOrder, slots: list[int]
) -> None:
    walked = case.plan()
    walk = [walked.locate(slot) for slot in range(max(slots) + 1)]
    assert [case.plan().locate(slot) for slot in slots] == [walk[slot] for slot in slots]
    assert [walked.locate(slot) for slot in slots] == [
        walk[slot] for slot in slots
    ]  # going back changes nothing


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_weights_decide_the_number_of_streams_for_the_whole_run(case: SampleOrder) -> None:
    plan = case.plan()
    shares = largest_remainder(case.weights, case.streams).tolist()
    for turn in (0, 1, 1000):
        owners = [plan.locate(turn * case.streams + stream).source for stream in range(case.streams)]
        assert owners == plan.owner_S.tolist()
        assert [owners.count(number) for number in range(len(shares))] == shares


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_global_batch_is_only_the_cut_into_steps(case: SampleOrder) -> None:
    slots = range(200)
    other = Plan(
        case.sources,
        case.weights,
        streams=case.streams,
        global_batch=7 * case.global_batch,
        seed=case.seed,
        window=case.window,
    )
    plan = case.plan()
    assert [plan.locate(slot) for slot in slots] == [other.locate(slot) for slot in slots]


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 60))
def test_the_samples_of_each_source_are_counted_as_drawn(case: SampleOrder, step: int) -> None:
    plan = case.plan()
    drawn = Counter(plan.locate(slot).source for slot in range(step * case.global_batch))
    assert plan.source_samples(step) == [drawn[number] for number in range(len(case.sources))]
    assert plan.shares == tuple(largest_remainder(case.weights, case.streams))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_each_stream_walks_the_range_stated_for_it(case: SampleOrder) -> None:
    plan = case.plan()
    walked: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for slot in range(3 * max(map(sum, case.sources)) * case.streams):
        place, stream = plan.locate(slot), slot % case.streams
        order, ends = plan.sources[place.source].shard_order(place.epoch)
        row = int(ends[order.tolist().index(place.shard)]) + place.row
        walked[place.source, place.epoch, int(plan.nth_S[stream])].add(row)
    for number, source in enumerate(plan.sources):
        for epoch in range(3):
            for nth, (first, end) in enumerate(zip(*source.ranges(epoch))):
                assert walked[number, epoch, nth] == set(range(first, end))


def test_the_order_of_samples_keeps_its_values() -> None:
    plan = Plan([[5, 0, 7], [3, 2]], [2, 1], streams=6, global_batch=6, seed=3, window=4)
    assert plan.owner_S.tolist() == [0, 1, 0, 0, 1, 0]
    places = [plan.locate(slot) for slot in (*range(12), 10**6)]
    assert [(p.source, p.epoch, p.shard, p.row) for p in places] == [
        (0, 0, 0, 2),
        (1, 0, 1, 1),
        (0, 0, 0, 4),
        (0, 0, 2, 2),
        (1, 0, 0, 1),
        (0, 0, 2, 6),
        (0, 0, 0, 1),
        (1, 0, 1, 0),
        (0, 0, 0, 3),
        (0, 0, 2, 3),
        (1, 0, 0, 2),
        (0, 0, 2, 4),
        (1, 66666, 0, 1),
    ]


def test_another_seed_or_epoch_gives_another_order() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = Plan([[1] * 80], [1], streams=8, global_batch=8, seed=seed, window=16)
        return [(p.shard, p.row) for p in (plan.locate(epoch * 80 + i) for i in range(80))]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(a) == sorted(orders[0]) for a in orders)
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b)) < 8  # about one of 80 by chance


def test_a_stream_stays_within_few_shards_for_a_whole_window() -> None:
    plan = Plan([[1000] * 64], [1], streams=16, global_batch=16, seed=0, window=512)
    for stream in (0, 7, 15):
        shards = {plan.locate(turn * 16 + stream).shard for turn in range(512)}
        assert len(shards) <= 2
    assert len({plan.locate(stream).shard for stream in range(16)}) == 16  # and streams read different ones


def test_a_plan_of_a_billion_samples_in_100_000_shards_is_small() -> None:
    tracemalloc.start()
    plan = Plan([[10_000] * 100_000], [1], streams=768, global_batch=6144, seed=0, window=512)
    first = [plan.locate(slot) for slot in plan.rank_slots(0, rank=5, world_size=64)]
    late = [plan.locate(slot) for slot in plan.rank_slots(150_000, rank=63, world_size=64)]
    bytes_ = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({(p.shard, p.row) for p in first}) == len({(p.shard, p.row) for p in late}) == 96
    assert all(0 <= p.shard < 100_000 and 0 <= p.row < 10_000 for p in first + late)
    assert {p.epoch for p in first + late} == {0}
    assert bytes_ < 32e6


def test_starting_at_step_a_million_costs_as_much_as_at_step_0(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[int] = []
    monkeypatch.setattr(
        "uniemox_dist.data.plan.permutation", lambda n, *keys: shuffled.append(n) or permutation(n, *keys)
    )

    def start(step: int) -> list[int]:
        shuffled.clear()
        plan = Plan([[10_000] * 1000], [1], streams=768, global_batch=6144, seed=0, window=512)
        for slot in plan.rank_slots(step, rank=5, world_size=64):
            plan.locate(slot)
        return sorted(shuffled)

    # The streams' owners, the epoch's shards, and a window of each of the rank's 12 streams.
    assert start(0) == start(10**6) == sorted([768, 1000] + [512] * 12)


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    plan = Plan([[1000] * 1000], [1], streams=96, global_batch=96, seed=0, window=512)

    def walk(steps: range) -> int:
        for step in steps:
            for slot in plan.rank_slots(step, rank=0, world_size=48):
                plan.locate(slot)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    early, late = walk(range(1000)), walk(range(1000, 22_000))  # over two ends of epochs, 41 windows a stream
    tracemalloc.stop()
    assert late < early + 60_000  # a second epoch's shards; 41 windows of two streams would be 84 kB


def test_fewer_samples_than_streams_still_give_whole_epochs() -> None:
    plan = Plan([[2, 0, 1]], [1], streams=8, global_batch=8, seed=0, window=4)
    places = [plan.locate(slot) for slot in range(9)]
    for epoch in range(3):
        part = places[3 * epoch : 3 * epoch + 3]
        assert sorted((p.epoch, p.shard, p.row) for p in part) == [
            (epoch, 0, 0),
            (epoch, 0, 1),
            (epoch, 2, 0),
        ]


def test_a_source_without_a_stream_is_a_user_error_that_names_its_weight() -> None:
    with pytest.raises(UserError) as caught:
        Plan([[5], [5]], [1.0, 0.001], streams=6, global_batch=6, seed=0, window=4)
    says = (
        "data.sources.1: a share of 0.1 % gives it none of batch.streams=6; raise its weight or repeat, or "
    )
    assert str(caught.value) == f"{says}batch.streams"


def test_streams_that_do_not_divide_the_global_batch_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"batch\.global_batch=10 is not a multiple of batch\.streams=6"):
        Plan([[5]], [1.0], streams=6, global_batch=10, seed=0, window=4)
