"""The state of a run, from events, metrics and lock at a given time."""

import socket
from typing import Any

import pytest

from uniemox_dist.runtime.run_folder import Lock
from uniemox_dist.runtime.standing import Saved, facts

START = {"event": "start", "time": 1000.0, "step": 0, "ranks": 2}
LINES = [
    {"step": step, "time": 1000.0 + step, "loss": 2.0, "samples_per_s": 24.0} for step in range(10, 101, 10)
]
HELD, FREE, UNKNOWN = (
    Lock(True, "node1 pid 7", 990.0),
    Lock(False, f"{socket.gethostname()} pid 7", 990.0),
    Lock(),
)
CONFIG = {"run": {"max_steps": 400, "start_timeout_s": 300}}


def look(*events: dict[str, Any], lock: Lock, now: float, **more: Any) -> dict[str, Any]:
    """Facts of a run that began at 1000, did a step a second to 100, and wrote these events at 1105."""
    told = [START, *({"time": 1105.0, **event} for event in events)]
    return facts("r", CONFIG, more.get("lines", LINES), told, lock, more.get("saved", Saved(90, 1090.0)), now)


def test_a_run_that_writes_is_running_and_says_when_it_will_be_done() -> None:
    found = look(lock=HELD, now=1110.0)
    assert (found["state"], found["step"], found["max_steps"], found["holder"]) == (
        "running",
        100,
        400,
        "node1 pid 7",
    )
    assert (found["eta_s"], found["line_age_s"]) == (290.0, 10.0)  # 300 steps at one a second, 10 s ago
    assert (found["saved_step"], found["saved_age_s"], found["loss"], found["mfu"]) == (90, 20.0, 2.0, None)


def test_a_held_lock_and_no_line_for_long_is_stalled() -> None:
    # Usual intervals are 10 s: below a minute of silence nothing is said.
    assert look(lock=HELD, now=1159.0)["state"] == "running"
    found = look(lock=HELD, now=1161.0)
    assert (found["state"], found["remark"], found["eta_s"]) == ("stalled", "no line for 1 min 01 s", None)


def test_patience_follows_the_runs_own_intervals() -> None:
    slow = [{"step": step, "time": 1000.0 + 100 * step} for step in range(1, 5)]
    assert look(lock=HELD, now=1400.0 + 499, lines=slow)["state"] == "running"
    assert look(lock=HELD, now=1400.0 + 501, lines=slow)["state"] == "stalled"


def test_a_free_lock_and_no_word_of_an_end_is_killed() -> None:
    found = look(lock=FREE, now=1110.0)
    assert found["state"] == "killed"
    assert found["remark"] == "without a word; its last sign is 10 s old; goes on from step 90"
    assert look(lock=FREE, now=1110.0, saved=None)["remark"].endswith("has no checkpoint to go on from")


def test_a_lock_of_another_host_that_looks_free_counts_less_than_fresh_lines() -> None:
    elsewhere = Lock(False, "far-away pid 7", 990.0)
    assert look(lock=elsewhere, now=1110.0)["state"] == "running"
    assert look(lock=elsewhere, now=1200.0)["state"] == "killed"


def test_where_the_lock_cannot_be_told_lines_decide() -> None:
    assert look(lock=UNKNOWN, now=1110.0)["state"] == "running"
    found = look(lock=UNKNOWN, now=1200.0)
    assert (found["state"], found["remark"]) == (
        "stalled",
        "no line for 1 min 40 s or killed: the lock cannot be tested here",
    )


@pytest.mark.parametrize("lock", [FREE, UNKNOWN, Lock(True, "", 990.0)])
@pytest.mark.parametrize(
    ("event", "state", "remark"),
    [
        ({"event": "signal", "signal": "SIGTERM", "step": 100, "saved": True}, "stopped",
         "by SIGTERM; the same command goes on from step 90"),
        ({"event": "fault", "error": "NCCL  is\ngone", "ends": True, "step": 100}, "failed",
         "NCCL is gone; goes on from step 90"),
        ({"event": "end", "step": 400}, "complete", ""),
    ],
)  # fmt: skip
def test_the_last_word_counts_whatever_the_lock_says(
    lock: Lock, event: dict[str, Any], state: str, remark: str
) -> None:
    found = look(event, lock=lock, now=9999.0)
    assert (found["state"], found["remark"], found["eta_s"]) == (state, remark, None)


def test_faults_that_a_run_survives_leave_it_running() -> None:
    saved = {"event": "fault", "step": 100, "error": "save failed: no space"}
    picture = {"event": "fault", "step": 100, "damaged": "train.tar 7"}
    found = look(saved, picture, lock=HELD, now=1110.0)
    assert (found["state"], found["faults"], found["damaged_pictures"]) == ("running", 1, 1)
    assert found["last_event"] == {
        "age_s": 5.0,
        "text": "replaced a damaged picture at step 100: train.tar 7",
    }


def test_between_a_fault_and_the_next_attempt_the_launcher_restarts() -> None:
    ends = {"event": "fault", "error": "x", "ends": True}
    restart = {"event": "restart", "attempt": 1, "left": 2, "code": 1, "step": 90}
    assert look(ends, restart, lock=FREE, now=1110.0)["state"] == "restarting"
    assert look(ends, restart, lock=FREE, now=1110.0)["restarts"] == 1
    late = look(ends, restart, lock=FREE, now=1105.0 + 301)
    assert (late["state"], late["remark"]) == (
        "killed",
        "the launcher's restart came to nothing; goes on from step 90",
    )


def test_a_lock_younger_than_the_last_word_is_an_attempt_that_starts() -> None:
    stopped = {"event": "signal", "signal": "SIGTERM", "step": 100, "saved": True}
    found = look(stopped, lock=Lock(True, "node1 pid 9", 2000.0), now=2010.0)
    assert (found["state"], found["remark"]) == ("running", "starting")
    assert look(stopped, lock=Lock(True, "node1 pid 9", 2000.0), now=2301.0)["state"] == "stalled"


def test_a_complete_run_that_is_started_again_stays_complete() -> None:
    events = [START, {"event": "end", "time": 1400.0, "step": 400}, {**START, "time": 2000.0, "step": 400}]
    assert facts("r", CONFIG, [], events, FREE, Saved(400, 1399.0), 3000.0)["state"] == "complete"
    longer = {"run": {"max_steps": 800}}
    assert facts("r", longer, [], events, FREE, Saved(400, 1399.0), 3000.0)["state"] == "killed"


def test_no_time_is_left_to_tell_before_two_lines_of_the_attempt_that_starts() -> None:
    stopped = {"event": "signal", "signal": "SIGTERM", "step": 100, "saved": True}
    assert look(stopped, lock=Lock(True, "node1 pid 9", 2000.0), now=2010.0)["eta_s"] is None
    again = {**START, "time": 2020.0, "step": 100}
    for count, left in ((1, None), (2, 280.0 * 4)):
        more = [{"step": 100 + 10 * i, "time": 2030.0 + 40 * i} for i in range(1, count + 1)]
        lock = Lock(True, "node1 pid 9", 2000.0)
        found = look(stopped, again, lock=lock, now=more[-1]["time"], lines=[*LINES, *more])
        assert (found["state"], found["eta_s"]) == ("running", left)


def test_one_stall_does_not_change_the_time_that_is_left() -> None:
    late = [{**line, "time": line["time"] + (3600 if line["step"] > 50 else 0)} for line in LINES]
    assert look(lock=HELD, now=4700.0, lines=late)["eta_s"] == 300.0


def test_the_launchers_reason_and_pause_count_while_it_restarts() -> None:
    restart = {"event": "restart", "attempt": 1, "left": 2, "code": -9, "step": 90, "reason": "rank 1 was killed",
               "pause_s": 100.0}  # fmt: skip
    for lock in (FREE, UNKNOWN, HELD):
        found = look(restart, lock=lock, now=1105.0 + 399)
        assert (found["state"], found["remark"]) == (
            "restarting",
            "by the launcher after: rank 1 was killed; goes on from step 90",
        )
    assert look(restart, lock=FREE, now=1105.0 + 401)["state"] == "killed"


def test_a_stop_during_the_launchers_pause_is_a_stop() -> None:
    restart = {"event": "restart", "attempt": 1, "left": 2, "code": 1, "step": 90, "pause_s": 60}
    found = look(restart, {"event": "signal", "signal": "SIGTERM", "step": 90}, lock=FREE, now=1110.0)
    assert found["state"] == "stopped"


def test_a_mistake_after_a_restart_is_a_failure_that_must_be_mended() -> None:
    restart = {"event": "restart", "attempt": 1, "left": 2, "code": 1, "step": 90}
    fault = {"event": "fault", "error": "data.path=x: no such folder", "ends": True, "restart": False}
    found = look(restart, fault, lock=FREE, now=1110.0)
    assert (found["state"], found["remark"]) == (
        "failed",
        "data.path=x: no such folder; mend it first; then the same command goes on from step 90",
    )


def test_a_checkpoint_of_the_last_step_makes_a_run_complete() -> None:
    found = look(lock=FREE, now=9999.0, saved=Saved(400, 1500.0))
    assert (found["state"], found["remark"]) == (
        "complete",
        "by its last checkpoint; it wrote no word of its end",
    )
    assert look(lock=HELD, now=1110.0, saved=Saved(400, 1500.0))["state"] == "running"


def test_a_run_without_a_line_has_no_facts() -> None:
    found = facts("r", {}, [], [], Lock(), None, 0.0)
    assert (found["state"], found["step"], found["max_steps"], found["last_event"]) == (
        "running",
        0,
        None,
        None,
    )
