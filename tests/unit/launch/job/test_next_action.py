"""Inside a Slurm job: what begins an attempt, and what follows its end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from event_lines import write_event

from launch.job.attempts import count_attempts
from launch.job.next_action import OwnJobState, choose_next_action
from launch.job.start import start_attempt
from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION, step_folder
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import write_json
from uniemox_dist.runs.folder import RunFolder, nodes_to_exclude, read_lines, report_bad_nodes
from uniemox_dist.scheduler.allocation import Allocation
from uniemox_dist.scheduler.commands import LiveJobs

ENV = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x4)",
    "UNIEMOX_LEAD_S": "180",
}
RUNNING = "RUNNING 0"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.job.next_action.NO_RANK_S", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def started(run: RunFolder, *more: str, live: str = "17 RUNNING 1:00:00", **env: str) -> Any:
    settings = [
        f"run.dir={run.path.parent}",
        f"run.name={run.path.name}",
        "data.path=x",
        "batch.micro_batch=8",
    ]
    settings += ["batch.global_batch=96", "batch.streams=12", *more]
    return start_attempt("demo", settings, LiveJobs.parse(live), Allocation.from_env({**ENV, **env}))


def saved(run: RunFolder, step: int) -> None:
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "files": {}}
    write_json(run.checkpoints / step_folder(step) / "complete.json", info)
    write_event(run, "save", step=step)


def settled(run: RunFolder, code: int, state: str = RUNNING) -> tuple[str, str]:
    verdict = choose_next_action(run, code, OwnJobState.parse(state, 0), 17)
    return verdict.line, verdict.remark


def kinds(run: RunFolder) -> list[str]:
    return [event["event"] for event in read_lines(run.events)]


@pytest.mark.parametrize(
    ("nodes", "each", "line", "idle"),
    [
        ("n[1-4]", 2, "3\t6\t2", "6 ranks is the largest legal number in 4 nodes x 2 tasks; idle: node n4"),
        ("n[1-2]", 2, "2\t4\t2", None),
        ("n1", 8, "1\t6\t6", "idle: 2 of 8 tasks on each other node"),
        ("n[1-3]", 1, "3\t3\t1", None),
    ],
)
def test_an_attempt_uses_the_largest_legal_ranks_and_reports_idle_tasks(
    run: RunFolder, nodes: str, each: int, line: str, idle: str | None
) -> None:
    begun = started(run, SLURM_JOB_NODELIST=nodes, SLURM_NTASKS_PER_NODE=str(each))
    assert begun.line() == f"{run.path}\t{line}"
    assert [idle in remark for remark in begun.remarks if idle] == ([True] if idle else [])
    [event] = read_lines(run.events)
    assert (event["event"], event["job_id"], event["ranks"]) == ("job", 17, int(line.split("\t")[1]))
    assert event["idle"] == len(begun_nodes(nodes)) * each - event["ranks"]


def begun_nodes(nodes: str) -> list[str]:
    from uniemox_dist.scheduler.hostlist import expand_hostlist

    return expand_hostlist(nodes)


def test_of_uneven_nodes_each_has_the_tasks_that_all_have(run: RunFolder) -> None:
    env = {**ENV, "SLURM_TASKS_PER_NODE": "3(x2),2"}
    del env["SLURM_NTASKS_PER_NODE"]
    assert Allocation.from_env(env).ranks_per_node == 2


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SLURM_JOB_ID": ""}, "inside a Slurm job"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "--ntasks-per-node=2: a node has 1 GPUs"),
    ],
)
def test_an_allocation_that_cannot_hold_the_ranks_is_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Allocation.from_env({**ENV, **env})


def test_gpus_without_a_task_are_reported_as_idle(run: RunFolder) -> None:
    [remark] = started(run, SLURM_GPUS_ON_NODE="8", SLURM_JOB_NODELIST="n1").remarks
    assert "a node has 8 GPUs and --ntasks-per-node=2" in remark


@pytest.mark.parametrize("limit", ["3:00", "2:59"])
def test_a_time_limit_within_the_signals_lead_is_refused_and_nothing_is_made(
    run: RunFolder, limit: str
) -> None:
    with pytest.raises(UserError, match=r"--time: the limit of .* --signal|--time"):
        started(run, live=f"17 RUNNING {limit}")
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("code", "save", "state", "line", "keeps"),
    [
        (0, True, RUNNING, "end 0", False),
        (2, False, RUNNING, "end 2", False),
        (75, True, RUNNING, "requeue", True),
        (75, True, "", "requeue", True),  # the controller does not answer
        (
            75,
            False,
            RUNNING,
            "end 1",
            False,
        ),  # srun also returns this if one rank ended with 75 and another failed
        (75, True, "COMPLETING 0", "end 75", False),  # cancelled
        (75, True, "CANCELLED 0", "end 75", False),
        (75, True, "COMPLETING 1", "end 75", True),  # Slurm has queued it again
        (75, True, "PENDING 1", "end 75", True),
        (75, True, "SPECIAL_EXIT 0", "end 75", True),  # requeued and held
        (75, True, "RESV_DEL_HOLD 0", "end 75", True),
        (75, True, "PREEMPTED 0", "end 75", False),
        (1, False, "COMPLETING 0", "end 1", False),
        (137, False, "COMPLETING 1", "end 1", True),
        (137, False, RUNNING, "again", True),
        (1, True, RUNNING, "again", True),
    ],
)
def test_each_exit_code_leads_to_its_next_action(
    run: RunFolder, code: int, save: bool, state: str, line: str, keeps: bool
) -> None:
    run.create()
    saved(run, 4)  # of an attempt before
    started(run)
    if save:
        saved(run, 6)
    assert settled(run, code, state)[0] == line
    assert run.job.exists() == keeps
    assert ("requeue" in kinds(run)) == (code == 75 and save and keeps)


def test_faults_are_tried_again_until_nothing_comes_of_it(run: RunFolder) -> None:
    started(run, "run.max_restarts=2")
    assert settled(run, 137)[0] == "again"
    saved(run, 3)  # progress gives all restarts back
    write_event(run, "fault", rank=1, error="boom", ends=True)
    assert settled(run, 1) == ("again", "boom; restarting from step 3 in 1 s (1 of 2)")
    assert settled(run, 137) == (
        "again",
        "srun ended with exit code 137 (see the ranks' messages in the main log); restarting from step 3 in 2 s "
        "(2 of 2)",
    )
    line, remark = settled(run, 1)
    assert line == "end 1"
    assert remark.startswith("giving up after 2 restarts without a new checkpoint (run.max_restarts=2)")
    assert read_lines(run.events)[-1]["restart"] is False
    assert not run.job.exists()


def test_a_fault_that_would_happen_again_ends_the_job_at_once(run: RunFolder) -> None:
    started(run)
    write_event(run, "fault", error="20 steps in a row", ends=True, restart=False)
    assert settled(run, 1) == (
        "end 1",
        "no restart, because the same fault would happen again: 20 steps in a row",
    )


def test_a_user_error_is_recognised_also_if_srun_killed_the_other_ranks(run: RunFolder) -> None:
    started(run)
    write_event(run, "fault", rank=0, error="data.path=x: no such folder", ends=True, restart=False, code=2)
    assert settled(run, 137)[0] == "end 2"


def test_a_save_counts_also_after_resuming_an_older_checkpoint(
    run: RunFolder,
) -> None:
    run.create()
    saved(run, 4)
    saved(run, 6)
    started(run)
    (run.checkpoints / step_folder(6)).rename(run.checkpoints / f"{step_folder(6)}.damaged")
    saved(run, 5)
    assert settled(run, 75)[0] == "requeue"


@pytest.mark.parametrize(("state", "line"), [(RUNNING, "requeue"), ("CANCELLED 0", "end 75")])
def test_a_rank_that_fails_on_its_way_out_of_a_complete_stop_changes_nothing(
    run: RunFolder, state: str, line: str
) -> None:
    started(run)
    saved(run, 5)
    write_event(run, "signal", step=5, signal="SIGUSR2", saved=True)
    write_event(run, "fault", rank=3, error="RuntimeError: boom", ends=True)
    assert settled(run, 137, state)[0] == line


def test_a_rank_that_fails_on_its_way_out_of_a_complete_run_changes_nothing(run: RunFolder) -> None:
    started(run)
    saved(run, 5)
    write_event(run, "end", step=5)
    assert settled(run, 134) == ("end 0", "the run is complete; a rank exited with 134 afterwards")


def test_a_failed_stop_is_not_started_again(run: RunFolder) -> None:
    started(run)
    write_event(run, "signal", step=3, signal="SIGUSR2", saved=False)
    assert settled(run, 1)[0] == "end 1"


def test_after_a_restart_an_older_save_is_no_save_of_this_attempt(run: RunFolder) -> None:
    started(run)
    saved(run, 4)
    assert settled(run, 1)[0] == "again"
    assert settled(run, 75)[0] == "end 1"


def test_a_job_whose_nodes_always_fail_is_not_requeued_forever(run: RunFolder) -> None:
    started(run)
    for restarts in ("1", "2"):  # by Slurm, without a word
        started(run, SLURM_RESTART_COUNT=restarts)
    with pytest.raises(Fault, match="given up after 2 restarts without a new checkpoint"):
        started(run, SLURM_RESTART_COUNT="3")
    assert not run.job.exists()
    assert started(run, SLURM_JOB_ID="18", live="18 RUNNING").ranks == 6  # a user submits it again


def test_requeues_after_complete_saves_are_not_limited(run: RunFolder) -> None:
    for restarts in range(5):
        started(run, SLURM_RESTART_COUNT=str(restarts))
        saved(run, restarts + 1)
        assert settled(run, 75)[0] == "requeue"
    assert count_attempts(read_lines(run.events)).in_vain == 0


def test_nodes_that_failed_the_preflight_are_left_out_of_a_new_job(run: RunFolder) -> None:
    started(run)
    write_event(run, "fault", rank=0, error="the preflight failed", ends=True)
    report_bad_nodes(run, {"n2": "fail  /dev/shm  too small"}, 17)
    report_bad_nodes(run, {"n3": "of another job"}, 16)
    assert settled(run, 1) == (
        "resubmit n2",
        "the preflight failed on n2: fail  /dev/shm  too small; submitted again without n2",
    )
    assert not run.job.exists()
    assert kinds(run)[-1] == "resubmit"
    assert nodes_to_exclude(run, time.time()) == ["n2", "n3"]
    assert nodes_to_exclude(run, time.time() + 24 * 3600 + 60) == []
    for number in (18, 19):  # in its place, on nodes that are no better
        job = {"SLURM_JOB_ID": str(number), "UNIEMOX_AFTER_JOB": str(number - 1)}
        started(run, live=f"{number} RUNNING", **job)
        report_bad_nodes(run, {"n1": "bad"}, number)
        line = choose_next_action(run, 1, OwnJobState.parse(RUNNING, 0), number).line
    assert line == "end 1"


def test_if_jobs_may_not_requeue_themselves_a_failed_preflight_ends_the_job(run: RunFolder) -> None:
    started(run)
    report_bad_nodes(run, {"n2": "fail  /dev/shm  too small"}, 17)
    action = choose_next_action(run, 1, OwnJobState.parse(RUNNING, 0), 17, may_requeue=False)
    assert action.line == "end 1"
    assert "the preflight failed on n2: fail  /dev/shm  too small" in action.remark
    assert "submit again" in action.remark
    assert kinds(run)[-1] == "fault"
    assert not run.job.exists()
    assert nodes_to_exclude(run, time.time()) == ["n2"]


def test_a_job_that_has_the_run_no_more_only_ends(run: RunFolder) -> None:
    started(run)
    facts = json.loads(run.job.read_text())
    run.job.write_text(json.dumps({**facts, "job_id": 18}))
    assert settled(run, 75)[0] == "end 1"
    assert json.loads(run.job.read_text())["job_id"] == 18
