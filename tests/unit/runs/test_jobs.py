"""Which jobs a run's folder names, and which of them counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from uniemox_dist.runs.jobs import Job, choose_job, read_jobs
from uniemox_dist.scheduler.commands import JobState


def name_jobs(run: Path, own: Any = None, *submissions: Any) -> None:
    """Writes job.json and submissions; texts are written as they are."""
    run.mkdir(exist_ok=True)
    for number, found in enumerate((own, *submissions)):
        path = run / (f"jobs/{number:04d}/submission.json" if number else "job.json")
        if found is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found if isinstance(found, str) else json.dumps(found))


def test_jobs_come_from_job_json_and_submissions_newest_first_each_once(tmp_path: Path) -> None:
    own = {"job_id": 17, "nodes": ["n1", "n2"], "time": 5.0}
    name_jobs(tmp_path / "r", own, {"job_ids": [16, 17]}, {"job_ids": [20]})
    assert read_jobs(tmp_path / "r") == [Job(20), Job(17, ("n1", "n2"), 5.0), Job(16)]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"job_id": "17"}', '{"job_id": -1, "job_ids": 3}',
                                  '{"job_id": true, "job_ids": [true, null, "x", 1.5]}', "\xff"])  # fmt: skip
def test_damaged_files_name_no_job(tmp_path: Path, text: str) -> None:
    name_jobs(tmp_path / "r", text, text)
    (tmp_path / "r/jobs/notes").mkdir()
    (tmp_path / "r/jobs/0002").write_text("")
    assert read_jobs(tmp_path / "r") == []
    assert read_jobs(tmp_path / "none") == []


def test_the_job_that_runs_counts_then_the_first_that_waits_then_the_newest() -> None:
    jobs = [Job(20), Job(18), Job(17, ("n1",)), Job(16)]
    run, wait = JobState("RUNNING", "", "n1", 5.0, 60.0), JobState("PENDING", "Dependency")
    assert choose_job(jobs, {20: wait, 18: wait, 17: run}) == Job(
        17, ("n1",), state="RUNNING", nodes="n1", start=5.0, time_left_s=60.0
    )
    assert choose_job(jobs, {20: wait, 18: wait}) == Job(18, state="PENDING", reason="Dependency")
    assert choose_job(jobs, {17: JobState("COMPLETED")}) == Job(20, state="")
    assert choose_job(jobs[2:], {17: JobState("TIMEOUT")}) == Job(17, ("n1",), state="TIMEOUT")
    assert choose_job([], {}) is None


def test_without_an_answer_it_is_the_one_that_began() -> None:
    assert choose_job([Job(20), Job(17, ("n1",))], None) == Job(17, ("n1",))
    assert choose_job([Job(20), Job(18)], None) == Job(20)
