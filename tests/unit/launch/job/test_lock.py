"""RUN/job.json: one job locks a run, and the lock of a job that no longer runs is taken over."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launch.job.lock import JobLock, acquire, read, release
from uniemox_dist.core.errors import UserError
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.scheduler.commands import LiveJobs


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def own(job_id: int, restarts: int = 0) -> JobLock:
    return JobLock.for_this_process(job_id, restarts, ("n1", "n2"), began_step=5)


def test_a_free_run_is_locked_and_released(run: RunFolder) -> None:
    assert acquire(run, own(17), LiveJobs.parse("17 RUNNING 1:00:00\n")) is None
    facts = json.loads(run.job.read_text())
    assert facts["host"] == os.uname().nodename
    assert {key: facts[key] for key in ("job_id", "restarts", "nodes", "began_step")} == {
        "job_id": 17,
        "restarts": 0,
        "nodes": ["n1", "n2"],
        "began_step": 5,
    }
    release(run, 18)
    assert read(run.job) == JobLock(**{**facts, "nodes": ("n1", "n2")})
    release(run, 17)
    assert list(run.path.glob("*job.json*")) + list(run.path.glob(".*job.json*")) == []


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING", "SUSPENDED"])
def test_a_second_job_is_refused_with_the_first_ones_number(run: RunFolder, state: str) -> None:
    acquire(run, own(17), LiveJobs())
    with pytest.raises(UserError, match=rf"job 17 of \S+ holds the run \({state.lower()}\); .*scancel 17"):
        acquire(run, own(18), LiveJobs.parse(f"18 RUNNING 10:00\n17 {state} 10:00\n"))
    assert read(run.job).job_id == 17  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "live", ["18 RUNNING 10:00", "18 RUNNING\n17 CANCELLED", "19 PENDING\n18 RUNNING UNLIMITED"]
)
def test_the_lock_of_a_job_that_no_longer_runs_is_taken_over(run: RunFolder, live: str) -> None:
    acquire(run, own(17), LiveJobs())
    assert (
        acquire(run, own(18), LiveJobs.parse(live)) == "took the run over from job 17, which no longer runs"
    )
    assert read(run.job).job_id == 18  # type: ignore[union-attr]


def test_a_requeued_job_keeps_its_run(run: RunFolder) -> None:
    acquire(run, own(17), LiveJobs())
    assert acquire(run, own(17, restarts=1), LiveJobs.parse("17 RUNNING")) is None
    assert read(run.job).restarts == 1  # type: ignore[union-attr]


def test_without_an_answer_of_squeue_the_kernels_lock_decides(run: RunFolder) -> None:
    acquire(run, own(17), LiveJobs())
    run.lock()
    with pytest.raises(UserError, match="squeue does not answer"):
        acquire(run, own(18), LiveJobs.parse("slurm_load_jobs error: Unable to contact slurm controller"))
    run.unlock()
    assert "took the run over from job 17: no process trains" in str(acquire(run, own(18), LiveJobs()))


@pytest.mark.parametrize("other", [{"cluster": "b"}, {"user": "ann"}])
def test_if_squeue_may_not_show_a_job_the_kernels_lock_decides(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    acquire(run, replace(own(17), **other), LiveJobs())  # type: ignore[arg-type]
    run.lock()
    with pytest.raises(UserError, match=r"job 17 of .* is training this run"):
        acquire(run, own(18), LiveJobs.parse("18 RUNNING 1:00"))
    if "cluster" in other:  # its jobs have the same numbers
        with pytest.raises(UserError, match="on b is training this run"):
            acquire(run, own(17), LiveJobs.parse("17 RUNNING 1:00"))
    run.unlock()
    assert "took the run over from job" in str(acquire(run, own(18), LiveJobs.parse("18 RUNNING 1:00")))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job_id": "x"}', "null"])
def test_an_invalid_lock_file_is_replaced(run: RunFolder, text: str) -> None:
    run.job.write_text(text)
    assert acquire(run, own(18), LiveJobs.parse("18 RUNNING")) is None
    assert read(run.job).job_id == 18  # type: ignore[union-attr]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_jobs_at_once_exactly_one_locks_the_run(run: RunFolder, stale: bool) -> None:
    if stale:
        acquire(run, own(1), LiveJobs())
    ids = range(20, 28)
    live = LiveJobs.parse("".join(f"{job} RUNNING\n" for job in ids))

    def attempt(job: int) -> bool:
        try:
            acquire(run, own(job), live)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(len(ids)) as pool:
        took = dict(zip(ids, pool.map(attempt, ids)))
    winners = [job for job, won in took.items() if won]
    assert winners == [read(run.job).job_id]  # type: ignore[union-attr]
