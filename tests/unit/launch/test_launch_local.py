"""`uniemox launch local`: a run on this machine, from its own frozen code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_USER
from uniemox_dist.runs.folder import RunFolder, read_lines

RECIPE = """
extends: demo
run: {name: r, dir: runs, epochs: null, max_steps: 2, preflight: false}
data: {path: data, eval_path: null, workers: 0}
batch: {global_batch: 12, micro_batch: 3, streams: 12}
model: {image_size: 32, depth: 2, width: 64, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}
loss: {relation: 0, similarity: 0}
optim: {warmup_epochs: null, warmup_steps: 1, precision: fp32}
"""


@pytest.fixture
def place(tmp_path: Path, emoji_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "site.yaml").write_text("{nodes: 4, gpus_per_node: 0, ranks_per_node: 2}")
    (tmp_path / "data").symlink_to(emoji_shards / "train")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_local_run_uses_the_frozen_code_and_not_the_working_directory(place: Path) -> None:
    (place / "shards").mkdir()
    (place / "shards/__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    # The command itself is the installed one.
    code = "from uniemox_dist.cli.main import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.path.remove(''); {code}", "launch", "local", "r.yaml"]
    done = subprocess.run(
        [*command, "--cluster", "site.yaml"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = RunFolder(place / "runs/r")
    assert [event["step"] for event in read_lines(folder.events) if event["event"] == "end"] == [2]
    facts = json.loads((folder.path / "jobs/0001/submission.json").read_text())
    assert (facts["job_ids"], facts["nodes"], facts["ranks_per_node"]) == ([], "1", 2)
    # The process prints its program, which is the folder of the frozen code.
    assert json.loads(folder.environment.read_text())["command"][0] == facts["code"]


def test_a_local_run_is_checked_like_a_submitted_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "local", "r.yaml", "--cluster", "site.yaml"]
    assert run([*words, "data.path=nowhere"]) == EXIT_USER
    assert "data.path=nowhere: no such folder" in capsys.readouterr().err
    assert run([*words, "--dry-run", "optim.blr=1e-2"]) == 0
    said = capsys.readouterr()
    assert "blr: 0.01" in said.out
    assert "2 ranks on this machine" in said.err
    assert not (place / "runs").exists()


def test_a_run_that_trains_already_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunFolder(place / "runs/r")
    other.create()
    other.lock()
    try:
        assert run(["launch", "local", "r.yaml", "--cluster", "site.yaml"]) == EXIT_USER
        assert "is training here" in capsys.readouterr().err
        assert not (other.path / "jobs").exists()
    finally:
        other.unlock()
