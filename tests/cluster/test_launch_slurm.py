"""`uniemox launch` on a real Slurm: what was frozen runs; as one job, a chain, a sweep, and through submitit."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_commands import write_commands
from slurm_jobs import ROOT, Cluster, Job, events, lines, until

import launch
from uniemox_dist.runs.folder import append_line

pytestmark = pytest.mark.cluster
RECIPE = """
extends: demo
run: {name: r, dir: runs, epochs: null, max_steps: 6, save_every: 3, log_every: 1, preflight: false}
data: {eval_path: null, workers: 0}
batch: {global_batch: 12, micro_batch: 3, streams: 12}
model: {image_size: 32, depth: 2, width: 64, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
loss: {relation: 0, similarity: 0}
optim: {warmup_epochs: null, warmup_steps: 1, precision: fp32}
"""
SITE = "{gpus_per_node: 0, ranks_per_node: 1, time: 60, env: {DS_ACCELERATOR: cpu, OMP_NUM_THREADS: 1}}"
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def place(tmp_path: Path, tiny_data: Path) -> Path:
    """A working directory with a space in its name, with a recipe and a site."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "site.yaml").write_text(SITE)
    (folder / "data").symlink_to(tiny_data / "train")
    return folder


@pytest.fixture
def start(cluster: Cluster, place: Path) -> Launch:
    """Runs `uniemox launch KIND r.yaml …` in `place`; what is installed may lie elsewhere."""

    def call(*arguments: str, code: int = 0, installed: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "uniemox_dist.cli", "launch", "slurm", "r.yaml", "data.path=data"]
        command += ["--cluster", "site.yaml", *arguments]
        env = {**cluster.env, "PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    return call


def job(cluster: Cluster, number: int, folder: Path) -> Job:
    return Job(cluster, number, folder)


def test_a_job_runs_the_code_that_was_installed_when_it_was_submitted(
    cluster: Cluster, start: Launch, place: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("uniemox_dist", "shards", "launch"):
        left_out = shutil.ignore_patterns("__pycache__", "demo", "detectors", "demo_teacher")
        shutil.copytree(ROOT / package, checkout / package, ignore=left_out)
    (place / "site.yaml").write_text(SITE[:-1] + ", sbatch: [--hold]}")
    run = place / "runs/r"
    run.mkdir(parents=True)
    append_line(run / "nodes.jsonl", {"time": time.time(), "node": "n1", "job_id": 1, "finding": "no GPU"})
    done = start("--chain", "2", installed=checkout)
    assert "leaves out n1" in done.stderr
    first, second = (int(word) for word in done.stdout.splitlines()[-1].split()[-2:])
    # A checkout that is being edited.
    (checkout / "uniemox_dist/train/loop.py").write_text("raise RuntimeError('edited')\n")
    refused = start(code=2)
    assert f"jobs {first} (pending), {second} (pending) have this run" in refused.stderr
    cluster.run("scontrol", "release", f"{first},{second}")
    assert job(cluster, first, place).ended() == ("COMPLETED", 0), (
        run / f"logs/slurm-{first}.out"
    ).read_text()
    assert [event["step"] for event in events(run, "end")] == [6]
    began = events(run, "job")[0]
    assert (began["job_id"], "n1" in began["nodes"], began["ranks"]) == (first, False, 1)
    # The next of the chain has nothing left to do.
    assert job(cluster, second, place).ended() == ("COMPLETED", 0)
    assert "is complete: 6 of 6 steps" in (run / f"logs/slurm-{second}.out").read_text()
    changed = start("run.max_steps=8", code=2)
    assert "run.max_steps: 6 -> 8" in changed.stderr


def test_a_sweep_runs_every_point_with_its_own_settings_and_requeues_each_alone(
    cluster: Cluster, start: Launch, place: Path
) -> None:
    done = start("--array", "run.seed=1,2", "run.max_steps=150", "run.save_every=50")
    [number] = [
        int(line.split()[2].rstrip(";")) for line in done.stdout.splitlines() if "submitted job" in line
    ]
    runs = [place / f"runs/r-seed_{seed}" for seed in (1, 2)]

    def ended() -> bool:
        return all(events(run, "end") for run in runs)

    def logs() -> str:
        return "\n".join(p.read_text() for p in (place / "runs/sweeps/r-0001").glob("slurm-*.out"))

    until(lambda: all(len(lines(run / "metrics.jsonl")) > 3 for run in runs), logs)
    # The last task's own number is the array's.
    cluster.run("scancel", "--signal=USR2", f"{number}_1")
    until(lambda: ended() or not cluster.run("squeue", "-h"), logs)
    assert ended(), logs()
    restarts = [[event["restarts"] for event in events(run, "job")] for run in runs]
    assert restarts == [[0], [0, 1]]
    losses = [{line["step"]: line["loss"] for line in lines(run / "metrics.jsonl")} for run in runs]
    assert len(losses[0]) == len(losses[1]) == 150
    assert losses[0] != losses[1]
    assert all((place / f"runs/sweeps/r-0001/slurm-{number}_{n}.out").exists() for n in (0, 1))


CONTAINERS = {
    # Everything before the command, as `apptainer exec` reads it, is removed; the command is run.
    "apptainer": 'while [[ $1 != *.sif ]]; do echo "$1" >>"$OPTIONS"; shift; done; shift; exec "$@"',
    # The options that pyxis adds to srun.
    "srun": 'a=(); for x in "$@"; do case $x in --container*) echo "$x" >>"$OPTIONS";; *) a+=("$x");; esac; done\n'
    'exec /usr/bin/srun "${a[@]}"',
}


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_job_whose_commands_run_in_containers(
    cluster: Cluster, start: Launch, place: Path, tmp_path: Path, kind: str
) -> None:
    """Without a container: programs that stand in for it take its options and run the command."""
    wanted = {n: text for n, text in CONTAINERS.items() if (n == "apptainer") == (kind == "apptainer")}
    tools = write_commands(tmp_path / "tools", wanted)
    own = Path(sys.executable).with_name("uniemox")
    site = {
        **yaml.safe_load(SITE),
        "nodes": 2,
        "container": {"kind": kind, "image": "/shared/x.sif"},
        "setup": f'export PATH="{tools}:$PATH" OPTIONS="{tmp_path}/options"\n',
        "uniemox": str(own),
    }
    (place / "site.yaml").write_text(yaml.safe_dump(site))
    done = start()
    number = int(done.stdout.split("submitted job ")[1].split(";")[0])
    run = place / "runs/r"
    assert job(cluster, number, place).ended() == ("COMPLETED", 0), (
        run / f"logs/slurm-{number}.out"
    ).read_text()
    assert [event["step"] for event in events(run, "end")] == [6]
    assert events(run, "job")[0]["ranks"] == 2
    options = (tmp_path / "options").read_text()
    assert str(place) in options


@pytest.fixture
def here(cluster: Cluster, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process in `place`, as on a login node of the cluster."""
    for key in ("SLURM_CONF", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(key, cluster.env[key])
    monkeypatch.chdir(place)
    return place


def submitted(**options: Any) -> Any:
    more = [f"{key}={value}" for key, value in options.items()]
    settings = ["data.path=data", "run.max_steps=400", "run.save_every=100", *more]
    return launch.submit("r.yaml", "site.yaml", *settings)


def test_a_preempted_submitit_job_continues_from_its_save(cluster: Cluster, here: Path) -> None:
    found = submitted()
    run = here / "runs/r"
    until(lambda: len(lines(run / "metrics.jsonl")) > 20, lambda: found.stdout() or "no log")
    found._interrupt()  # submitit's own rehearsal of a pre-emption
    assert found.result() == 0, found.stdout()
    [stopped] = events(run, "signal")
    [resumed] = events(run, "resume")
    assert stopped["saved"]
    assert resumed["step"] == stopped["step"] > 20
    assert [event["step"] for event in events(run, "end")] == [400]
    assert Job(cluster, int(found.job_id), here).restarts == 1
    assert "this job is preempted" in found.stdout()


def test_a_cancelled_submitit_job_saves_and_is_not_queued_again(cluster: Cluster, here: Path) -> None:
    found = submitted()
    run = here / "runs/r"
    until(lambda: len(lines(run / "metrics.jsonl")) > 5, lambda: found.stdout() or "no log")
    found.cancel()
    state, _ = Job(cluster, int(found.job_id), here).ended()
    assert state == "CANCELLED"
    [stopped] = events(run, "signal")
    assert stopped["saved"]
    assert Job(cluster, int(found.job_id), here).restarts == 0
    assert os.listdir(run / "checkpoints") == [f"step_{stopped['step']:08d}"]
