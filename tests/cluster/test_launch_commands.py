"""`uniemox launch slurm` on a real Slurm with commands other than pretraining: fine-tuning, evaluation, teaching."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import teach_options
from labelled_sets import labels_set, packed
from slurm_jobs import ROOT, Cluster, Job, events, lines, reached, until
from small import make_release

pytestmark = pytest.mark.cluster
FINETUNE = """
extends: finetune
run: {name: f, dir: runs, epochs: null, max_steps: 150, save_every: 50, log_every: 1, preflight: false}
data: {path: data, workers: 0}
batch: {global_batch: 8, micro_batch: 2, streams: 8}
model: {name: null, image_size: 32, patch_size: 8, width: 32, depth: 2, heads: 2}
optim: {warmup_epochs: null, warmup_steps: 1, precision: fp32}
"""
SITE = "{gpus_per_node: 0, ranks_per_node: 1, time: 60, env: {DS_ACCELERATOR: cpu, OMP_NUM_THREADS: 1}}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    counts = {split: dict.fromkeys(("joy", "fear", "awe"), 8) for split in ("train", "val", "test")}
    return packed(labels_set(folder / "source", counts), folder / "data")


@pytest.fixture
def place(tmp_path: Path, labelled: Path) -> Path:
    (tmp_path / "f.yaml").write_text(FINETUNE)
    (tmp_path / "site.yaml").write_text(SITE)
    (tmp_path / "data").symlink_to(labelled)
    return tmp_path


def launch(cluster: Cluster, place: Path, *words: str, kind: str = "slurm") -> int:
    """Submits; returns the job's number."""
    command = [sys.executable, "-m", "uniemox_dist.cli", "launch", kind, "--cluster", "site.yaml", *words]
    env = {**cluster.env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("submitted job ")[1].split(";")[0])


def log(place: Path) -> str:
    return "\n".join(path.read_text() for path in place.rglob("slurm-*.out"))


def test_a_preempted_fine_tuning_run_saves_and_continues_in_the_same_job(
    cluster: Cluster, place: Path
) -> None:
    job = Job(cluster, launch(cluster, place, "f.yaml", "--nodes", "2"), place)
    run = place / "runs/f"
    until(reached(run, 20), lambda: log(place))
    cluster.occupy(4)
    assert job.ended() == ("COMPLETED", 0), log(place)
    assert job.restarts == 1
    [stopped], [resumed] = events(run, "signal"), events(run, "resume")
    assert stopped["saved"]
    assert resumed["step"] == stopped["step"] >= 20
    assert [event["step"] for event in events(run, "end")] == [150]
    assert [event["ranks"] for event in events(run, "job")] == [2, 2]
    assert sorted({line["step"] for line in lines(run / "metrics.jsonl")}) == list(range(1, 151))
    found = json.loads((run / "finetune.json").read_text())
    assert found["labels"] == ["awe", "fear", "joy"]
    assert not (run / "job.json").exists()


def test_a_preempted_fine_tuning_run_of_submitit_continues_too(cluster: Cluster, place: Path) -> None:
    job = Job(cluster, launch(cluster, place, "f.yaml", kind="submitit"), place)
    run = place / "runs/f"
    until(reached(run, 20), lambda: log(place))
    cluster.run("scancel", "--signal=USR2", str(job.number))
    assert job.ended() == ("COMPLETED", 0), "\n".join(p.read_text() for p in run.rglob("*_log.out"))
    assert job.restarts == 1
    assert [event["step"] for event in events(run, "end")] == [150]
    assert events(run, "resume")[0]["step"] == events(run, "signal")[0]["step"]


def test_an_evaluation_runs_as_one_process_from_its_frozen_code(
    cluster: Cluster, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    release = make_release(tmp_path_factory.mktemp("release"))
    words = ("--", "evaluate", "knn", str(release), "data", "--json", "out file.json")
    job = Job(cluster, launch(cluster, place, "--nodes", "1", *words), place)
    assert job.ended() == ("COMPLETED", 0), log(place)
    assert "knn" in (place / "out file.json").read_text()
    own = place / "jobs/evaluate-knn-0001"
    assert json.loads((own / "submission.json").read_text())["job_ids"] == [job.number]
    assert (own / f"slurm-{job.number}.out").exists()
    wrong = ("--", "evaluate", "knn", str(release), "data", "--baselines", "teacher")
    job = Job(cluster, launch(cluster, place, *wrong), place)
    assert job.ended() == ("FAILED", 2)
    assert (
        "was trained without a teacher"
        in (place / f"jobs/evaluate-knn-0002/slurm-{job.number}.out").read_text()
    )


def test_the_ranks_of_a_teaching_job_share_the_shards(
    cluster: Cluster, place: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    # Runs of other tests may have cached the captions beside the shards.
    shutil.copytree(tiny_data / "train", place / "train", ignore=shutil.ignore_patterns("cache"))
    words = ("--nodes", "2", "--", "teach", "train", *teach_options(tiny_teacher))
    job = Job(cluster, launch(cluster, place, *words), place)
    assert job.ended() == ("COMPLETED", 0), log(place)
    embedded = [line for line in log(place).splitlines() if "captions embedded" in line]
    assert len(embedded) == 2  # a line of each rank
    assert sum(int(line.split(": ")[1].split()[0]) for line in embedded) == 60
