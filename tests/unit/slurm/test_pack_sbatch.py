"""slurm/pack.sbatch without a cluster: its syntax, the part that each task packs, and the joining that follows."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_commands import write_commands

from shards.format.manifest import read_manifest

SCRIPT = Path(__file__).parents[3] / "slurm" / "pack.sbatch"

# sbatch and scontrol of a cluster that is not there; sbatch writes down how it was called.
FAKES = {
    "sbatch": 'echo "$*" >>"$CALLS"; echo 42',
    "scontrol": f'echo "   Command={SCRIPT} and arguments"',
    "uniemox": f'exec "{sys.executable}" -m uniemox_dist.cli "$@"',
}


def run(tmp_path: Path, *arguments: str, **slurm: object) -> subprocess.CompletedProcess[str]:
    tools = write_commands(tmp_path / "bin", FAKES)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "SLURM_JOB_NAME": "pack",
        **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)


def task(number: int, count: int, first: int) -> dict[str, object]:
    return {
        "ARRAY_TASK_ID": number,
        "ARRAY_TASK_MIN": first,
        "ARRAY_TASK_COUNT": count,
        "ARRAY_JOB_ID": 41,
        "JOB_ID": 50 + number,
        "CPUS_PER_TASK": 0,
    }


@pytest.mark.parametrize("first", [0, 1])
def test_tasks_pack_their_parts_and_the_dependent_job_joins_them(
    first: int, emoji_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a folder" / "out"
    for number in (first, first + 1):
        options = ["--persons", "none", "--shard-samples", "20"]
        done = run(tmp_path, str(emoji_table), str(out), *options, **task(number, 2, first))
        assert done.returncode == 0, done.stderr
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert "--dependency=afterok:41" in call
    assert call.endswith(f"{SCRIPT} --merge {out}")
    joined = run(tmp_path, "--merge", str(out))
    assert joined.returncode == 0, joined.stderr
    assert read_manifest(out / "train").samples == 72
    assert read_manifest(out / "test").samples == 24
    assert pq.read_table(out / "rejected.parquet").num_rows == 0
    assert not Path(f"{out}.parts").exists()
    again = run(tmp_path, str(emoji_table), str(out), **task(first, 2, first))
    assert (again.returncode, again.stdout) == (0, f"{out} is complete: nothing to do\n")


def test_a_job_without_an_array_or_arguments_prints_its_usage(tmp_path: Path) -> None:
    alone = run(tmp_path, "source", "out")
    assert (alone.returncode, "sbatch --array=1-N" in alone.stderr) == (2, True)
    lacking = run(tmp_path, "source", **task(1, 2, 1))
    assert (lacking.returncode, "usage: sbatch" in lacking.stderr) == (2, True)
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    "out", ["s3://bucket/out", "s3://key:secret@bucket/out?token=secret", "gs://bucket/out"]
)
def test_an_out_that_is_a_url_is_refused_before_anything_is_written(out: str, tmp_path: Path) -> None:
    done = run(tmp_path, "source", out, **task(1, 2, 1))
    protocol = out.partition("://")[0]
    [line] = done.stderr.splitlines()
    assert line.startswith(
        f"pack.sbatch: OUT={protocol}://… is a URL; give a folder that all nodes share, or"
    )
    assert done.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def test_a_task_that_failed_ends_with_its_own_code(tmp_path: Path) -> None:
    failed = run(tmp_path, str(tmp_path / "no.parquet"), str(tmp_path / "out"), **task(2, 2, 1))
    assert (failed.returncode, "no such table" in failed.stderr) == (2, True)
