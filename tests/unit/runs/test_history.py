"""The history of a run, folded from the lines of a made-up run with events of every kind."""

from typing import Any

import pytest
from told_run import BEGAN, told_run

from launch.job.attempts import count_attempts
from uniemox_dist.runs.events.jobs import Restart
from uniemox_dist.runs.events.reading import ends_attempt, find_fault
from uniemox_dist.runs.events.training import Save, Spike
from uniemox_dist.runs.folder import Lock, RunFolder, read_lines
from uniemox_dist.runs.history import Attempt, History, Length
from uniemox_dist.runs.status import summarize


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return told_run(tmp_path_factory.mktemp("runs") / "told")


def test_each_attempt_has_its_steps_its_end_and_its_lost_steps(told: RunFolder) -> None:
    found = History(read_lines(told.metrics), read_lines(told.events)).attempts
    assert [(a.first_step, a.last_step, a.lost_steps, a.last_kind) for a in found] == [
        (0, 3247, 247, "fault"),
        (3000, 5706, 0, "signal"),
        (5706, 7220, 220, ""),
        (7000, 8200, 0, ""),
    ]
    # 162 lines in 40 s each, then the fault 5 s later; the restart 20 s later does not belong to that attempt.
    assert (found[0].began, found[0].ended) == (BEGAN, BEGAN + 162 * 40 + 5)


def test_counts_and_medians_of_a_run(told: RunFolder) -> None:
    found = History(read_lines(told.metrics), read_lines(told.events))
    assert (found.lost_steps, len(found.select(Restart)), found.stops, len(found.find_killed())) == (
        467,
        1,
        1,
        1,
    )
    assert (found.faults, found.bad_samples, len(found.skips), len(found.select(Spike))) == (2, 1, 2, 1)
    assert len(found.select(Save)) == 17
    assert [found.median_of(Save, key) for key in ("seconds", "blocked_s")] == [3.1, 0.42]
    assert found.median_of(Save, "bytes") == 1_340_000_000
    assert found.stragglers == [
        ("node02", 2, pytest.approx(4.0 / 1.9)),
        ("node01", 1, pytest.approx(3.0 / 1.9)),
    ]
    assert found.work_s == pytest.approx((162 * 40 + 5) + (135 * 40 + 8.1) + 76 * 40 + 60 * 40, abs=0.01)


def test_numbers_without_any_lines_are_none_or_0() -> None:
    kinds = ("start", "resume", "convert", "init", "save", "fault", "skip", "spike", "straggler", "signal", "restart", "end")  # fmt: skip  # noqa: E501
    found = History([{}, {"step": "x", "time": "y"}], [{"event": kind} for kind in kinds] + [{}])
    assert (
        found.attempts,
        found.median_of(Save, "seconds"),
        found.median_of(Save, "bytes"),
        found.lost_steps,
    ) == ([], None, None, 0)
    assert (len(found.select(Save)), len(found.select(Restart)), found.stragglers) == (1, 1, [("?", 1, None)])


def test_a_straggler_of_unknown_times_does_not_hide_the_others() -> None:
    slow = [
        {"event": "straggler", "host": "a"},
        {"event": "straggler", "host": "a", "seconds": 3, "median_s": 1},
    ]
    assert History([], slow).stragglers == [("a", 2, 3.0)]
    assert History([], slow[::-1]).stragglers == [("a", 2, 3.0)]


def test_work_is_from_each_start_to_the_last_sign_of_life_before_the_next() -> None:
    events: list[dict[str, Any]] = [
        {"time": 100, "event": "start", "step": 0},
        {"time": 130, "event": "signal", "step": 9, "saved": True},
        {
            "time": 900,
            "event": "fault",
            "error": "no sound checkpoint",
            "ends": True,
        },  # before its own start
        {"time": 1000, "event": "start", "step": 9},
    ]
    assert History([{"time": 1010, "step": 11}], events).attempts == [
        Attempt(100, 0, 130, 9, "signal"),
        Attempt(1000, 9, 1010, 11),
    ]


def test_an_end_that_the_launcher_reports_is_not_a_silent_kill() -> None:
    def restart(**facts: Any) -> list[dict[str, Any]]:
        return [
            {"time": 100, "event": "start", "step": 0},
            {"time": 130, "event": "restart", "step": 0, **facts},
            {"time": 140, "event": "fault", "error": "no such folder", "ends": True, "restart": False},
            {"time": 200, "event": "start", "step": 0},
        ]

    told = History([], restart(reason="rank 1 was killed by signal 9"))
    assert told.attempts[0] == Attempt(100, 0, 100, 0, "", 0, "rank 1 was killed by signal 9")
    assert told.find_killed() == []
    assert History([], restart()).find_killed() == [100]
    assert History([], restart()).find_killed(over=True) == [100, 200]


def test_a_signal_reported_by_ranks_and_launcher_is_one_stop() -> None:
    kinds = ("start", "signal", "signal", "start", "save", "signal")
    assert History([], [{"time": i, "event": kind} for i, kind in enumerate(kinds)]).stops == 2


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
def test_events_that_end_an_attempt(event: dict[str, Any], ends: bool) -> None:
    assert ends_attempt(event) is ends


def test_steps_done_are_those_of_the_last_attempt(told: RunFolder) -> None:
    events, lines = read_lines(told.events), read_lines(told.metrics)
    assert History(lines, events).step == 8200
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    began = events[starts[1]]["time"]
    before = [line for line in lines if line["time"] < began]
    # Just resumed from 3,000 where 3,247 had been reached.
    assert History(before, events[: starts[1] + 1]).step == 3000
    # A restart names the newest checkpoint, and the event of a save comes later than steps beyond it.
    assert History(before, events[: starts[1]]).step == 3247


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
    assert History(lines, []).length(config) == length


def test_a_run_in_epochs_that_has_ended_had_the_length_of_its_end() -> None:
    assert History([], [{"event": "end", "step": 49}]).length({"run": {"epochs": 2}}) == Length(49)


LOST = "lost contact with another rank; see that rank's log or the launcher's"
OLD_LOST = "another rank is gone; its own fault, or the launcher, says why"
CUDA = "RuntimeError: CUDA error: an illegal memory access"
DEATH = "rank 1 (pid 7) died of SIGKILL (possibly out of memory)"


def fault(error: str, **fields: Any) -> dict[str, Any]:
    return {"event": "fault", "error": error, "ends": True, **fields}


@pytest.mark.parametrize(
    ("events", "death", "cause"),
    [
        # An error beats lost contact, whichever was written first, and in the words of any version.
        ([fault(LOST, rank=0), fault(CUDA, rank=1)], "", CUDA),
        ([fault(CUDA, rank=1), fault(LOST, rank=0)], "", CUDA),
        ([fault(OLD_LOST), fault("RuntimeError: Connection closed by peer"), fault(CUDA)], "", CUDA),
        # Of two errors the first, on one line.
        ([fault("ValueError: a\n b"), fault(CUDA)], "", "ValueError: a b"),
        # How a rank died beats lost contact, and is added to an error.
        ([fault(LOST)], DEATH, DEATH),
        ([fault(CUDA)], DEATH, f"{CUDA}; {DEATH}"),
        ([fault(LOST), {"event": "restart", "reason": DEATH}], "", DEATH),
        ([fault(CUDA), {"event": "restart", "reason": OLD_LOST}], "", CUDA),
        # Lost contact is better than nothing.
        ([fault(LOST)], "", LOST),
        ([], DEATH, DEATH),
        ([], "", None),
        # Faults that training survived count only if nothing else is known; replaced pictures never do.
        ([{"event": "fault", "error": "save failed: full", "step": 3}, fault(CUDA)], "", CUDA),
        ([{"event": "fault", "error": "save failed: full", "step": 3}], "", "save failed: full"),
        ([{"event": "fault", "damaged": "a.tar b", "step": 3}], "", None),
        # A fault that another attempt would repeat.
        ([fault(CUDA), fault(f"given up at once: {CUDA}", restart=False)], "", f"given up at once: {CUDA}"),
        ([{"event": "fault", "error": None}, {"event": "restart", "reason": 3}, {}], "", "None"),
    ],
)
def test_the_most_specific_cause_of_an_end(
    events: list[dict[str, Any]], death: str, cause: str | None
) -> None:
    assert find_fault(events, death) == cause


def test_everyone_names_the_same_cause() -> None:
    """The attempts of the report, `uniemox status`, and the job and the launcher when they start again."""
    events = [
        {"event": "job", "time": 0.0, "job_id": 7},
        {"event": "start", "time": 1.0, "step": 0},
        {**fault(CUDA, rank=1), "time": 2.0},
        {**fault(LOST, rank=0), "time": 3.0},
    ]
    history = History([], events)
    assert history.last_fault == CUDA
    assert history.attempts[-1].reason == CUDA
    assert count_attempts(events).reason(1) == CUDA
    state = summarize("r", {}, history, Lock(False, "", 0.5), None, 9.0)
    assert (state["state"], state["remark"]) == ("failed", f"{CUDA}; has no checkpoint to continue from")
    restarted = History([], [*events, {"event": "restart", "time": 4.0, "reason": LOST}])
    assert restarted.last_fault == CUDA
    state = summarize("r", {}, restarted, Lock(False, "", 0.5), None, 9.0)
    assert state["remark"] == f"by the launcher after: {CUDA}; has no checkpoint to continue from"


def test_a_fault_before_the_start_of_an_attempt_is_the_last_one() -> None:
    events = [
        {"event": "start", "time": 1.0},
        {**fault(CUDA), "time": 2.0},
        {"event": "restart", "time": 3.0, "reason": CUDA},
        {**fault("data.path=x: no such folder", restart=False), "time": 4.0},
    ]
    assert History([], events).last_fault == "data.path=x: no such folder"
    assert History([], [*events, {"event": "start", "time": 5.0}]).last_fault is None
