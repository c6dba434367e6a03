import pytest
import torch

from uniemox_dist.train.monitor.health import MIN_STEPS, LossSpikes
from uniemox_dist.train.monitor.stragglers import ComputeTimer, Stragglers


def named(stragglers: Stragglers, *intervals: tuple[list[float], int, float]) -> list[list[tuple[int, str]]]:
    return [[(s.rank, s.host) for s in stragglers.add(*interval)] for interval in intervals]


def test_a_slow_rank_is_named_once_with_its_host_until_it_has_been_fast_again() -> None:
    slow, fast = ([1.0, 1.1, 2.0], 10, 3.0), ([1.0, 1.1, 1.0], 10, 2.0)
    found = named(Stragglers(["a", "a", "b"], 1.5), fast, slow, slow, fast, slow)
    assert found == [[], [(2, "b")], [], [], [(2, "b")]]


def test_the_first_interval_counts_for_nothing() -> None:
    assert named(Stragglers(["a", "b"], 1.5), ([9.0, 1.0], 50, 10.0)) == [[]]


def test_of_two_ranks_the_slower_is_compared_with_the_faster() -> None:
    assert named(Stragglers(["a", "b"], 1.5), ([1.0, 1.0], 10, 2.0), ([1.0, 1.6], 10, 2.0)) == [
        [],
        [(1, "b")],
    ]


def test_short_intervals_are_judged_together() -> None:
    one = ([0.1, 0.3], 4, 0.4)
    assert named(Stragglers(["a", "b"], 1.5), one, one, one, one) == [[], [], [], [(1, "b")]]


def test_a_difference_that_is_small_relative_to_the_step_is_not_a_straggler() -> None:
    assert named(Stragglers(["a", "b"], 1.5), ([1.0, 1.0], 10, 9.0), ([0.1, 0.9], 10, 9.0)) == [[], []]


def test_the_seconds_of_a_straggler_are_per_step() -> None:
    stragglers = Stragglers(["a", "b"], 1.5)
    stragglers.add([1.0, 1.0], 10, 2.0)
    (found,) = stragglers.add([1.0, 4.0], 20, 5.0)
    assert found.facts() == {"rank": 1, "host": "b", "seconds": 0.2, "median_s": 0.05}
    assert str(found) == "rank 1 on b is slow: it computes 0.200 s per step, the median rank 0.050 s"


def test_own_time_is_taken_once() -> None:
    own = ComputeTimer(torch.device("cpu"))
    own.start()
    own.stop()
    assert own.read_and_reset() > 0
    assert own.read_and_reset() == 0


@pytest.mark.parametrize(("loss", "median"), [(31.0, 10.0), (29.0, None), (float("nan"), None)])
def test_a_loss_far_above_the_running_median_is_a_spike(loss: float, median: float | None) -> None:
    spikes = LossSpikes(3.0)
    assert [spikes.check(10.0) for _ in range(MIN_STEPS)] == [None] * MIN_STEPS
    assert spikes.check(loss) == median


def test_the_first_losses_are_no_spikes() -> None:
    spikes = LossSpikes(3.0)
    assert [spikes.check(loss) for loss in (1.0, 100.0, 1.0)] == [None] * 3
