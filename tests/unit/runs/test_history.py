"""What the lines of a run amount to, on a made-up run that has seen everything."""

from typing import Any

import pytest
from told_run import BEGAN, told_run

from uniemox_dist.runs.attempts import Attempt, attempts, numbers
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import Length, ends_attempt, history, run_length, steps_done


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return told_run(tmp_path_factory.mktemp("runs") / "told")


def test_each_attempt_has_its_steps_its_end_and_what_was_lost(told: RunFolder) -> None:
    found = attempts(read_lines(told.metrics), read_lines(told.events))
    assert [(a.first_step, a.last_step, a.lost_steps, a.last_word) for a in found] == [
        (0, 3247, 247, "fault"),
        (3000, 5706, 0, "signal"),
        (5706, 7220, 220, ""),
        (7000, 8200, 0, ""),
    ]
    # 162 lines in 40 s each, then the fault 5 s later; the restart 20 s later is no work of that attempt.
    assert (found[0].began, found[0].ended) == (BEGAN, BEGAN + 162 * 40 + 5)


def test_counts_and_medians_of_a_run(told: RunFolder) -> None:
    found = numbers(read_lines(told.metrics), read_lines(told.events))
    assert (found.lost_steps, found.restarts, found.stops, len(found.killed)) == (467, 1, 1, 1)
    assert (found.faults, found.damaged, found.skipped, found.spikes) == (2, 1, 2, 1)
    assert (found.saves, found.save_s, found.blocked_s, found.save_bytes) == (17, 3.1, 0.42, 1_340_000_000)
    assert found.stragglers == [
        ("node02", 2, pytest.approx(4.0 / 1.9)),
        ("node01", 1, pytest.approx(3.0 / 1.9)),
    ]
    assert found.worked_s == pytest.approx((162 * 40 + 5) + (135 * 40 + 8.1) + 76 * 40 + 60 * 40, abs=0.01)


def test_numbers_of_lines_without_any_facts_are_none_or_0() -> None:
    kinds = ("start", "resume", "convert", "init", "save", "fault", "skip", "spike", "straggler", "signal", "restart", "end")  # fmt: skip  # noqa: E501
    found = numbers([{}, {"step": "x", "time": "y"}], [{"event": kind} for kind in kinds] + [{}])
    assert (found.attempts, found.save_s, found.save_bytes, found.lost_steps) == ([], None, None, 0)
    assert (found.saves, found.restarts, found.stragglers) == (1, 1, [("?", 1, None)])


def test_a_straggler_of_unknown_times_does_not_hide_the_others() -> None:
    slow = [
        {"event": "straggler", "host": "a"},
        {"event": "straggler", "host": "a", "seconds": 3, "median_s": 1},
    ]
    assert numbers([], slow).stragglers == [("a", 2, 3.0)]
    assert numbers([], slow[::-1]).stragglers == [("a", 2, 3.0)]


def test_work_is_from_each_start_to_the_last_sign_of_life_before_the_next() -> None:
    events: list[dict[str, Any]] = [
        {"time": 100, "event": "start", "step": 0},
        {"time": 130, "event": "signal", "step": 9, "saved": True},
        {
            "time": 900,
            "event": "fault",
            "error": "no sound checkpoint",
            "ends": True,
        },  # before a start of its own
        {"time": 1000, "event": "start", "step": 9},
    ]
    assert attempts([{"time": 1010, "step": 11}], events) == [
        Attempt(100, 0, 130, 9, "signal"),
        Attempt(1000, 9, 1010, 11),
    ]


def test_what_the_launcher_says_of_an_end_is_no_silent_kill() -> None:
    def restart(**facts: Any) -> list[dict[str, Any]]:
        return [
            {"time": 100, "event": "start", "step": 0},
            {"time": 130, "event": "restart", "step": 0, **facts},
            {"time": 140, "event": "fault", "error": "no such folder", "ends": True, "restart": False},
            {"time": 200, "event": "start", "step": 0},
        ]

    told = numbers([], restart(reason="rank 1 was killed by signal 9"))
    assert told.attempts[0] == Attempt(100, 0, 100, 0, "", 0, "rank 1 was killed by signal 9")
    assert told.killed == []
    assert numbers([], restart()).killed == [100]
    assert numbers([], restart(), over=True).killed == [100, 200]


def test_a_signal_that_ranks_and_launcher_tell_of_is_one_stop() -> None:
    kinds = ("start", "signal", "signal", "start", "save", "signal")
    assert numbers([], [{"time": i, "event": kind} for i, kind in enumerate(kinds)]).stops == 2


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        ({"event": "fault", "error": "x", "ends": True, "step": 3}, True),
        ({"event": "fault", "error": "save failed", "step": 3}, False),
        ({"event": "fault", "error": "step_00000003 is damaged", "ends": False}, False),
        ({"event": "fault", "error": "of an earlier version"}, True),
        ({"event": "fault", "damaged": "train.tar 7"}, False),
        ({"event": "fault", "error": "it was altered", "set_aside": "step_00000003.damaged"}, False),
        ({"event": "fault", "error": "it was altered", "set_aside": None}, False),
        ({"event": "signal"}, True),
        ({"event": "end"}, True),
        ({"event": "restart"}, False),
        ({}, False),
    ],
)
def test_what_ends_an_attempt(event: dict[str, Any], ends: bool) -> None:
    assert ends_attempt(event) is ends


def test_steps_done_are_those_of_the_last_attempt(told: RunFolder) -> None:
    events, lines = read_lines(told.events), read_lines(told.metrics)
    assert steps_done(events, history(lines, events).lines) == 8200
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    began = events[starts[1]]["time"]
    before = [line for line in lines if line["time"] < began]
    # Just resumed from 3,000 where 3,247 had been reached.
    assert steps_done(events[: starts[1] + 1], history(before, events[: starts[1] + 1]).lines) == 3000
    # A restart names the newest checkpoint, and a save is told later than the steps beyond it.
    assert steps_done(events[: starts[1]], before) == 3247


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"run": {"max_steps": 70}}, Length(70)),
        ({"run": {"epochs": 10}, "batch": {"global_batch": 24}}, Length(500, exact=False)),
        (
            {"run": {"epochs": 10}, "batch": {"global_batch": 24}, "data": {"epoch_samples": 1190}},
            Length(496),
        ),
        ({"run": {"epochs": 10}}, Length()),
        ({}, Length()),
    ],
)
def test_the_length_of_a_run(config: dict[str, Any], length: Length) -> None:
    lines = [{"step": 20, "epoch": 20 * 24 / 1200, "slots": 20 * 24}]
    assert run_length(config, [], lines, 20) == length


def test_a_run_in_epochs_that_has_ended_had_the_length_of_its_end() -> None:
    assert run_length({"run": {"epochs": 2}}, [{"event": "end", "step": 49}], [], 49) == Length(49)
