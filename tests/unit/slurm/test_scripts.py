"""The batch script of a run without a cluster: what it asks of Slurm's commands, and in which order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_commands import write_commands

from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION

SCRIPT = Path(__file__).parents[3] / "slurm" / "pretrain.sbatch"
BATCH = ("batch.global_batch=96", "batch.streams=12", "batch.micro_batch=8")
INFO = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "step": 10, "files": {}})

# Commands of a cluster that is not there; each writes down how it was called. Every srun ends with the next of $CODES.
FAKES = {
    "srun": 'echo "srun $*" >>"$CALLS"\n'
    'set -- $CODES; n=$(grep -c ^srun "$CALLS"); code=${!n}\n'
    'if [[ $code == 75 ]]; then mkdir -p "$SAVED" && echo "$INFO" >"$SAVED/complete.json"; fi\n'
    'if [[ $code == 137 ]]; then echo \'{"event": "fault", "error": "boom", "ends": true}\' '
    '>>"$RUN/events.jsonl"; fi\n'
    'if [[ $code == bad ]]; then echo \'{"time": 9e9, "node": "n8", "job_id": 41, "finding": "fail"}\' '
    '>>"$RUN/nodes.jsonl"; code=1; fi\n'
    "exit $code",
    "scontrol": 'case $1 in show) echo "JobId=41 JobState=$STATE Reason=None Restarts=0 TimeLimit=1-00:00:00 '
    'EndTime=2001-09-09T01:46:40 ExcNodeList=n3 Features=a100&ib TresPerNode=gres/gpu:3 x=y";;'
    ' *) echo "scontrol $*" >>"$CALLS";; esac',
    "squeue": 'echo "41 RUNNING 1-00:00:00"; echo "$OTHERS"',
    "sbatch": 'echo "sbatch $*" >>"$CALLS"',
    "sleep": "exit 0",
    "uniemox": f'exec "{sys.executable}" -m uniemox_dist.cli "$@"',
}


def run(
    tmp_path: Path,
    codes: str,
    *arguments: str,
    state: str = "RUNNING",
    others: str = "",
    saved: str = "x",
    script: Path = SCRIPT,
    recipe: str = "demo",
    **env: str,
) -> tuple[int, list[str], str]:
    tools = write_commands(tmp_path / "bin", FAKES)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NAME": "mine",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_NTASKS_PER_NODE": "3",
        "SLURM_CPUS_PER_TASK": "4",
        "CALLS": str(tmp_path / "calls"),
        "SAVED": str(tmp_path / saved / "checkpoints" / "step_00000010"),
        "RUN": str(tmp_path / "x"),
        "INFO": INFO,
        "CODES": codes,
        "STATE": state,
        "OTHERS": others,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        **env,
    }
    command = ["bash", str(script), recipe, *BATCH, f"run.dir={tmp_path}", "run.name=x", *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return result.returncode, calls, result.stderr


@pytest.mark.parametrize(
    ("code", "saved", "state", "ends", "requeued"),
    [
        ("75", "x", "RUNNING", 75, True),
        ("75", "elsewhere", "RUNNING", 1, False),  # no new checkpoint of this run: no endless requeue
        ("75", "x", "COMPLETING", 75, False),  # cancelled
        ("2", "x", "RUNNING", 2, False),
        ("0", "x", "RUNNING", 0, False),
    ],
)
def test_a_job_is_queued_again_only_after_75_and_a_new_complete_checkpoint(
    tmp_path: Path, code: str, saved: str, state: str, ends: int, requeued: bool
) -> None:
    ended, calls, error = run(tmp_path, code, saved=saved, state=state)
    assert ended == ends, error
    assert calls[0].startswith(
        "srun --nodes=2 --ntasks=6 --ntasks-per-node=3 --cpus-per-task=4 --kill-on-bad-exit=1 uniemox pretrain demo"
    )
    tasks = "scontrol update JobId=41 NumTasks=3"  # so that it may start with one of its two nodes
    asked = [call for call in calls[1:] if call != tasks]
    assert asked == (["scontrol requeue 41"] if requeued else [])
    assert (tasks in calls) == requeued
    assert (tmp_path / "x" / "job.json").exists() == requeued


def test_a_fine_tuning_run_is_queued_again_as_well(tmp_path: Path) -> None:
    script = SCRIPT.with_name("finetune.sbatch")
    ended, calls, error = run(tmp_path, "75", script=script, recipe="finetune_fi")
    assert ended == 75, error
    assert "--kill-on-bad-exit=1 uniemox finetune finetune_fi" in calls[0]
    assert "scontrol requeue 41" in calls


def test_a_job_cancelled_while_it_ends_is_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = FAKES["scontrol"].replace(
        "show) ",
        'show) [[ ! -e $RUN/events.jsonl ]] || ! grep -q requeue "$RUN/events.jsonl" || STATE=COMPLETING; ',
    )
    monkeypatch.setitem(FAKES, "scontrol", scontrol)
    ended, calls, error = run(tmp_path, "75")
    assert ended == 75, error
    assert "scontrol requeue 41" not in calls


def test_after_a_fault_the_ranks_are_started_again_in_the_same_allocation(tmp_path: Path) -> None:
    ended, calls, error = run(tmp_path, "137 0", "run.max_restarts=1")
    assert ended == 0, error
    first, second = (call for call in calls if call.startswith("srun"))
    assert first == second
    assert "boom; restarting from the beginning in 1 s (1 of 1)" in error


def test_a_node_that_failed_the_preflight_is_left_out_of_a_new_job_of_the_same_size(tmp_path: Path) -> None:
    gpus = {"SLURM_GPUS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "3", "SLURM_JOB_ACCOUNT": "me"}
    ended, calls, error = run(tmp_path, "bad", "optim.blr=1e-3", **gpus)
    assert ended == 1
    assert calls[-1] == (
        "sbatch --nodes=2 --exclude=n8,n3 --job-name=mine --time=1-00:00:00 --constraint=a100&ib "
        "--signal=USR2@180 --partition=gpu --account=me "
        "--ntasks-per-node=3 --cpus-per-task=4 --gpus-per-node=3 --export=ALL,UNIEMOX_AFTER_JOB=41 "
        f"{SCRIPT} demo {' '.join(BATCH)} run.dir={tmp_path} run.name=x optim.blr=1e-3"
    )
    assert len(calls) == 2
    assert "the preflight failed on n8: fail; submitted again without n8" in error
    assert not (tmp_path / "x" / "job.json").exists()


def test_gpus_that_were_asked_for_by_gres_are_asked_for_again(tmp_path: Path) -> None:
    _, calls, error = run(tmp_path, "bad", SLURM_GPUS_ON_NODE="3")
    assert " --gres=gpu:3 " in calls[-1], error


def test_a_wrong_recipe_ends_before_srun(tmp_path: Path) -> None:
    ended, calls, error = run(tmp_path, "0", "optim.bllr=1")
    assert (ended, calls) == (2, [])
    assert "did you mean optim.blr?" in error


def test_a_run_that_another_job_has_ends_before_srun_and_stays_the_other_ones(tmp_path: Path) -> None:
    lock = tmp_path / "x" / "job.json"
    lock.parent.mkdir()
    facts = {"job_id": 40, "restarts": 0, "nodes": ["n1"], "host": "n1", "user": "ann", "time": 1.0}
    lock.write_text(json.dumps(facts))
    ended, calls, error = run(tmp_path, "0", others="40 PENDING 1:00:00")
    assert (ended, calls) == (2, [])
    assert (
        f"run.dir/run.name={tmp_path}/x: job 40 of ann holds the run (pending); wait for it, end it with"
        in error
    )
    assert json.loads(lock.read_text()) == facts


def test_ranks_get_caches_on_the_node_and_their_own_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAKES, "srun", 'env >"$CALLS"; exit 0')
    ended, lines, error = run(tmp_path, "0", TMPDIR="/scratch", SLURM_EXPORT_ENV="NONE", TZ="UTC")
    assert ended == 0, error
    told = dict(line.partition("=")[::2] for line in lines)
    assert told["TORCHINDUCTOR_CACHE_DIR"] == f"/scratch/uniemox-{os.getuid()}/inductor"
    assert told["TRITON_CACHE_DIR"] == f"/scratch/uniemox-{os.getuid()}/triton"
    assert told["OMP_NUM_THREADS"] == "4"
    assert told["UNIEMOX_LEAD_S"] == "180"
    assert told["UNIEMOX_ENDS"] == "1000000000"
    assert told["SLURM_EXPORT_ENV"] == "ALL"  # also after sbatch --export=NONE
    assert float(told["UNIEMOX_BATCH_BEGAN"]) > 1e9
