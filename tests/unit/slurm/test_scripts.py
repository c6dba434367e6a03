"""The batch scripts without a cluster: their syntax, and what they understand of a resolved configuration."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "slurm" / "pretrain.sbatch"

# srun and scontrol of a cluster that is not there; each writes down how it was called.
FAKES = {
    "srun": 'echo "srun $*" >>"$CALLS"; mkdir -p "$SAVED" && touch "$SAVED/complete.json"; exit "$CODE"',
    "scontrol": 'case $1 in show) echo node7; echo node8;; *) echo "scontrol $*" >>"$CALLS";; esac',
    "uniemox": f'exec "{sys.executable}" -m uniemox_dist.cli "$@"',
}


def run(tmp_path: Path, code: int, saved: str, *arguments: str) -> tuple[int, list[str], str]:
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "CALLS": str(tmp_path / "calls"),
        "SAVED": str(tmp_path / saved),
        "CODE": str(code),
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    command = ["bash", str(SCRIPT), "demo", f"run.dir={tmp_path}", "run.name=x", *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return result.returncode, calls, result.stderr


@pytest.mark.parametrize(
    ("code", "saved", "requeued"),
    [
        (75, "x/checkpoints/step_00000010", True),
        (
            75,
            "elsewhere/checkpoints/step_00000010",
            False,
        ),  # no new checkpoint of this run: no endless requeue
        (1, "x/checkpoints/step_00000010", False),
        (0, "x/checkpoints/step_00000010", False),
    ],
)
def test_a_job_is_queued_again_only_after_75_and_a_new_complete_checkpoint(
    tmp_path: Path, code: int, saved: str, requeued: bool
) -> None:
    ended, calls, error = run(tmp_path, code, saved)
    assert ended == code, error
    assert calls[0].startswith("srun --kill-on-bad-exit=1 uniemox pretrain demo")
    assert ("scontrol requeue 41" in calls) == requeued


def test_a_wrong_recipe_ends_before_srun(tmp_path: Path) -> None:
    ended, calls, error = run(tmp_path, 0, "x", "optim.bllr=1")
    assert ended == 2
    assert calls == []
    assert "did you mean optim.blr?" in error
