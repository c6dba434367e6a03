"""The state of a run, from events, metrics and lock at a given time."""

import socket
from typing import Any

import pytest

from uniemox_dist.runs.folder import Lock
from uniemox_dist.runs.history import History
from uniemox_dist.runs.jobs import Job
from uniemox_dist.runs.status import Saved, summarize

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
    """Facts of a run that began at 1000, did one step per second up to 1100, and wrote these events at 1105."""
    told = [START, *({"time": 1105.0, **event} for event in events)]
    return summarize(
        "r",
        CONFIG,
        History(more.get("lines", LINES), told),
        lock,
        more.get("saved", Saved(90, 1090.0)),
        now,
        more.get("job"),
    )


def test_a_run_that_writes_is_running_and_has_an_estimated_end() -> None:
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
    # Usual intervals are 10 s: a silence below a minute is not reported.
    assert look(lock=HELD, now=1159.0)["state"] == "running"
    found = look(lock=HELD, now=1161.0)
    assert (found["state"], found["remark"], found["eta_s"]) == ("stalled", "no line for 1 min 01 s", None)


def test_patience_follows_the_runs_own_intervals() -> None:
    slow = [{"step": step, "time": 1000.0 + 100 * step} for step in range(1, 5)]
    assert look(lock=HELD, now=1400.0 + 499, lines=slow)["state"] == "running"
    assert look(lock=HELD, now=1400.0 + 501, lines=slow)["state"] == "stalled"


def test_a_first_step_that_compiles_may_take_longer() -> None:
    config = {"run": {**CONFIG["run"], "compile_timeout_s": 600}, "compute": {"compile": True}}
    for given, word in ((CONFIG, "stalled"), (config, "running")):
        found = summarize("r", given, History([], [START]), HELD, None, now=START["time"] + 500)
        assert found["state"] == word


def test_a_free_lock_and_no_word_of_an_end_is_killed() -> None:
    found = look(lock=FREE, now=1110.0)
    assert found["state"] == "killed"
    assert found["remark"] == "no exit message; its last line is 10 s old; continues from step 90"
    assert look(lock=FREE, now=1110.0, saved=None)["remark"].endswith("has no checkpoint to continue from")


def test_recent_lines_take_precedence_over_a_free_lock_of_another_host() -> None:
    elsewhere = Lock(False, "far-away pid 7", 990.0)
    assert look(lock=elsewhere, now=1110.0)["state"] == "running"
    assert look(lock=elsewhere, now=1200.0)["state"] == "killed"


def test_without_locks_the_lines_decide() -> None:
    assert look(lock=UNKNOWN, now=1110.0)["state"] == "running"
    found = look(lock=UNKNOWN, now=1200.0)
    assert (found["state"], found["remark"]) == (
        "stalled",
        "no line for 1 min 40 s; perhaps killed: the lock cannot be tested here",
    )


@pytest.mark.parametrize("lock", [FREE, UNKNOWN, Lock(True, "", 990.0)])
@pytest.mark.parametrize(
    ("event", "state", "remark"),
    [
        ({"event": "signal", "signal": "SIGTERM", "step": 100, "saved": True}, "stopped",
         "by SIGTERM; the same command continues from step 90"),
        ({"event": "fault", "error": "NCCL  is\ngone", "ends": True, "step": 100}, "failed",
         "NCCL is gone; continues from step 90"),
        ({"event": "end", "step": 400}, "complete", ""),
    ],
)  # fmt: skip
def test_the_last_event_decides_even_if_the_lock_is_held(
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
        "the launcher's restart did not begin to train; continues from step 90",
    )


def test_a_lock_younger_than_the_last_word_is_an_attempt_that_starts() -> None:
    stopped = {"event": "signal", "signal": "SIGTERM", "step": 100, "saved": True}
    found = look(stopped, lock=Lock(True, "node1 pid 9", 2000.0), now=2010.0)
    assert (found["state"], found["remark"]) == ("running", "starting")
    assert look(stopped, lock=Lock(True, "node1 pid 9", 2000.0), now=2301.0)["state"] == "stalled"


def test_a_complete_run_that_is_started_again_stays_complete() -> None:
    events = [START, {"event": "end", "time": 1400.0, "step": 400}, {**START, "time": 2000.0, "step": 400}]
    assert (
        summarize("r", CONFIG, History([], events), FREE, Saved(400, 1399.0), 3000.0)["state"] == "complete"
    )
    longer = {"run": {"max_steps": 800}}
    assert summarize("r", longer, History([], events), FREE, Saved(400, 1399.0), 3000.0)["state"] == "killed"


def test_no_time_left_is_estimated_before_two_lines_of_an_attempt() -> None:
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
            "by the launcher after: rank 1 was killed; continues from step 90",
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
        "data.path=x: no such folder; fix it first; then the same command continues from step 90",
    )


def test_a_checkpoint_of_the_last_step_makes_a_run_complete() -> None:
    found = look(lock=FREE, now=9999.0, saved=Saved(400, 1500.0))
    assert (found["state"], found["remark"]) == (
        "complete",
        "by its last checkpoint; it wrote no end event",
    )
    assert look(lock=HELD, now=1110.0, saved=Saved(400, 1500.0))["state"] == "running"


def test_a_run_without_a_line_has_no_facts() -> None:
    found = summarize("r", {}, History([], []), Lock(), None, 0.0)
    assert (found["state"], found["step"], found["max_steps"], found["last_event"]) == (
        "running",
        0,
        None,
        None,
    )


STOPPED = {"event": "signal", "signal": "SIGUSR2", "step": 100, "saved": True, "time": 1105.0}
BROKEN = {"event": "fault", "error": "NCCL is gone", "ends": True, "time": 1105.0}


@pytest.mark.parametrize(
    ("events", "job", "state", "remark"),
    [
        # In the queue.
        ([STOPPED], Job(17, state="PENDING", reason="Resources", start=1410.0), "queued",
         "job 17 waits for free nodes; expected to start in 5 min 00 s; continues from step 90"),
        ([STOPPED], Job(17, state="PENDING", reason="(QOSMaxJobs)"), "queued",
         "job 17 waits in the queue (QOSMaxJobs); continues from step 90"),
        ([STOPPED], Job(17, state="REQUEUED", reason="BeginTime", start=1000.0), "queued",
         "job 17 waits for its begin time, which a requeue delays by some minutes; continues from step 90"),
        ([], Job(17, state="CONFIGURING"), "queued", "job 17: its nodes are being started; continues from step 90"),
        # On nodes, before and after attempts.
        ([STOPPED], Job(17, state="RUNNING", nodes="n[1-2]", start=1106.0), "running", "job 17 starts on n[1-2]"),
        ([STOPPED], Job(17, state="RUNNING", start=1000.0), "stopped",
         "by SIGUSR2; the same command continues from step 90; job 17 still runs"),
        ([BROKEN], Job(17, state="RUNNING", start=1000.0), "restarting",
         "in job 17 after: NCCL is gone; continues from step 90"),
        ([], Job(17, state="SUSPENDED"), "stalled", "job 17 is suspended"),
        ([BROKEN], Job(17, state="COMPLETING", nodes="n1", start=1000.0), "failed",
         "NCCL is gone; continues from step 90; job 17 is ending on n1"),
        ([STOPPED, {"event": "requeue", "job_id": 17, "step": 90}], Job(17, state="RUNNING", nodes="n1", start=1000.0),
         "queued", "job 17 was requeued, continues from step 90; it is ending on n1"),
        ([BROKEN, {"event": "restart", "reason": "x"}], Job(17, state="RUNNING", start=1000.0), "restarting",
         "by the launcher after: NCCL is gone; continues from step 90"),
        # Over, or unknown.
        ([], Job(17, state=""), "killed", "no exit message; job 17 has ended; continues from step 90"),
        ([], Job(17, state="NODE_FAIL"), "killed",
         "no exit message; job 17 has ended (NODE_FAIL); continues from step 90"),
        ([BROKEN], Job(17, state="FAILED"), "failed",
         "NCCL is gone; continues from step 90; job 17 has ended (FAILED)"),
        ([], Job(17, state="CANCELLED"), "stopped", "job 17 was cancelled; the same command continues from step 90"),
        ([STOPPED], Job(17), "stopped", "by SIGUSR2; the same command continues from step 90"),
        ([STOPPED, {"event": "requeue", "job_id": 17}], Job(17), "queued",
         "job 17 went back into the queue; continues from step 90"),
        ([STOPPED, {"event": "requeue", "job_id": 17}, {"event": "job", "job_id": 17, "restarts": 1}], Job(17),
         "running", "job 17 starts"),
        ([{"event": "end", "step": 400}], Job(17, state="PENDING"), "complete", ""),
    ],
)  # fmt: skip
def test_the_jobs_state_completes_the_folders(
    events: list[dict[str, Any]], job: Job, state: str, remark: str
) -> None:
    found = look(*events, lock=FREE, now=1110.0, job=job)
    assert (found["state"], found["remark"]) == (state, remark)


def test_no_time_left_is_estimated_while_a_requeued_job_starts() -> None:
    job = Job(17, state="RUNNING", start=1106.0)
    found = look(STOPPED, {"event": "job", "job_id": 17, "restarts": 1}, lock=FREE, now=1110.0, job=job)
    assert (found["state"], found["remark"], found["eta_s"]) == ("running", "job 17 starts", None)


def test_a_job_that_runs_for_long_without_a_line_is_stalled() -> None:
    old = Job(17, state="RUNNING", nodes="n1", start=900.0)
    found = look(lock=FREE, now=2000.0, job=old)
    assert (found["state"], found["remark"]) == (
        "stalled",
        "no line for 15 min 00 s, but job 17 still runs on n1",
    )
    late = look(STOPPED, lock=FREE, now=2000.0, job=Job(17, state="RUNNING", start=1500.0))
    assert (late["state"], late["remark"]) == (
        "stalled",
        "job 17 has run for 8 min 20 s without writing a line",
    )


def test_a_process_that_holds_the_lock_counts_more_than_any_job() -> None:
    for job in (Job(17, state="PENDING"), Job(17, state=""), Job(17, state="NODE_FAIL"), Job(17)):
        assert look(lock=HELD, now=1110.0, job=job)["state"] == "running"


def test_a_run_with_a_free_lock_of_another_host_is_killed_once_its_job_has_ended() -> None:
    elsewhere = Lock(False, "n2 pid 7", 990.0)
    gone = Job(17, hosts=("n1", "n2"), began=980.0, state="")
    assert look(lock=elsewhere, now=1110.0, job=gone)["state"] == "killed"
    # A user started it by hand after that job, on a host that does not belong to the job.
    by_hand = Lock(False, "n3 pid 7", 990.0)
    assert look(lock=by_hand, now=1110.0, job=gone)["state"] == "running"
    assert look(lock=by_hand, now=1110.0, job=Job(17, ("n1",), 995.0, state=""))["state"] == "killed"


def test_a_submitted_run_is_queued_and_one_whose_job_ended_without_an_event_is_killed() -> None:
    for job, state, remark in (
        (Job(17), "queued", "job 17 was submitted, and has written nothing yet"),
        (Job(17, state="PENDING", reason="Priority"), "queued",
         "job 17 waits behind jobs of higher priority; has no checkpoint to continue from"),
        (Job(17, state="RUNNING", start=5.0), "running", "nothing written yet"),
        (Job(17, state="CANCELLED"), "killed", "job 17 has ended (CANCELLED), and has written nothing"),
    ):  # fmt: skip
        found = summarize("r", {}, History([], []), Lock(), None, 10.0, job)
        assert (found["state"], found["remark"]) == (state, remark)


def test_requeues_are_counted_beside_the_launchers_restarts() -> None:
    job = {"event": "job", "job_id": 17}
    again = [{**job, "restarts": 0}, {"event": "restart"}, {"event": "requeue"}, {**job, "restarts": 1},
             {**job, "restarts": 2}]  # fmt: skip
    found = look(*again, lock=HELD, now=1110.0)
    assert (found["restarts"], found["requeues"]) == (1, 2)  # the second one by Slurm itself
    assert look(*again, {"event": "requeue"}, lock=FREE, now=1110.0)["requeues"] == 3
