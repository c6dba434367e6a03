"""Reading the output of Slurm's commands, and the errors where a command is missing or fails."""

from pathlib import Path

import pytest
from fake_commands import write_commands

from uniemox_dist.core.errors import UserError
from uniemox_dist.runs.jobs import Job
from uniemox_dist.scheduler import commands


def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    write_commands(tmp_path, {name: text})
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


LINES = """7|7|RUNNING|None|n[1-2]|2026-11-26T05:00:00|1-02:03:04
9|8|PENDING|Resources||N/A|UNLIMITED
8|8|RUNNING|None|n3|2026-11-26T05:00:00|59:10
10|10|CANCELLED|None||N/A|0:00
"""


def test_states_of_jobs_and_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "squeue", f"printf '%s' '{LINES}'")
    found = commands.query_job_states([7, 8, 10, 11])
    assert set(found) == {7, 8, 10}
    assert (found[7].nodes, found[7].time_left_s, found[7].reason) == ("n[1-2]", 93784, "")
    assert (found[8].state, found[8].time_left_s) == (
        "RUNNING",
        3550,
    )  # of the array's tasks the one that is on
    assert [found[n].live for n in (7, 8, 10)] == [True, True, False]
    assert found[10].start is None
    assert commands.query_job_states([]) == {}


def test_a_job_that_slurm_forgot_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(
        tmp_path, monkeypatch, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    assert commands.query_job_states([3]) == {}


def test_without_slurm_a_remark_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(commands.NoSlurm, match="squeue: there is no such command on this machine"):
        commands.query_job_states([1])
    assert not commands.has("sbatch")


def test_a_refusal_is_a_user_error_and_an_absent_controller_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = (
        "{ echo 'sbatch: error: invalid partition: x'; echo 'sbatch: error: Batch job failed'; } >&2; exit 1"
    )
    script = tmp_path / "x.sbatch"
    script.write_text("#!/bin/bash\n")
    tool(tmp_path, monkeypatch, "sbatch", refusal)
    with pytest.raises(UserError) as refused:
        commands.sbatch([], script)
    assert str(refused.value) == "sbatch: invalid partition: x; Batch job failed"
    tool(
        tmp_path,
        monkeypatch,
        "sbatch",
        "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1",
    )
    with pytest.raises(commands.SlurmFault, match="Unable to contact"):
        commands.sbatch([], script)
    tool(tmp_path, monkeypatch, "sbatch", "echo '17;cluster'")
    assert commands.sbatch([], script) == 17


def test_an_allocation_around_the_command_does_not_reach_the_new_job() -> None:
    given = {"SLURM_NTASKS": "8", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "a", "HOME": "/h"}
    assert commands.environment(given) == {
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "a",
        "HOME": "/h",
    }


def test_a_users_own_variables_do_not_overrule_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "x.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --time=60\n")
    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "mine")
    tool(tmp_path, monkeypatch, "sbatch", f"env >{tmp_path}/seen; echo 5")
    assert commands.sbatch([], script) == 5
    seen = (tmp_path / "seen").read_text()
    assert "SBATCH_ACCOUNT=mine" in seen
    assert "SBATCH_PARTITION" not in seen
    assert "SBATCH_TIMELIMIT" not in seen


@pytest.mark.parametrize(
    ("state", "live"),
    [("PREEMPTED", False), ("RESV_DEL_HOLD", True), ("LAUNCH_FAILED", False), ("A_LATER_SLURM", True)],
)
def test_all_readers_of_a_state_agree(state: str, live: bool) -> None:
    """Submission, the lock of a run and `uniemox status` all use one table of states."""
    assert commands.JobState(state).live is live
    assert (7 in commands.LiveJobs.parse(f"7 {state} 1-00:00:00").states) is live
    job = Job(7, state=state)
    assert (job.waits or job.runs, job.ended) == (live, not live)


def test_live_jobs_have_states_and_limits() -> None:
    found = commands.LiveJobs.parse(
        "7 RUNNING 1-12:30:00 x\n8 PENDING UNLIMITED\nslurm_load error\n9 FAILED 30:00\n"
    )
    assert found == commands.LiveJobs({7: "RUNNING", 8: "PENDING"}, {7: 131400.0, 9: 1800.0})
    assert found.knows(8)
    assert not found.knows(9)
