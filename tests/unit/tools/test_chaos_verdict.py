"""The judge of tools/chaos.py sees what a run lost, saw twice or computed otherwise."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from chaos import chosen, table
from chaos_faults.lab import SAVE_EVERY, STEPS, Run
from chaos_faults.registry import ESSENTIAL, FAULTS, described
from chaos_faults.verdict import NUMBERS, Outcome, compare, recovery

from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION, step_folder
from uniemox_dist.core.files import sha256_file


@pytest.fixture
def reference(tmp_path: Path) -> Run:
    """A made-up run of two ranks with two samples a step each."""
    path = tmp_path / "reference"
    (path / "trace").mkdir(parents=True)
    for rank in range(2):
        slots = [[4 * step + 2 * rank, 4 * step + 2 * rank + 1] for step in range(STEPS)]
        lines = [
            {"step": i + 1, "slots": s, "keys": [f"k{n}" for n in s], "sums": [[n, 1] for n in s]}
            for i, s in enumerate(slots)
        ]
        write(path / "trace" / f"rank{rank}.jsonl", lines)
    write(path / "metrics.jsonl", [{"step": s + 1, **dict.fromkeys(NUMBERS, 1.5)} for s in range(STEPS)])
    folder = path / "checkpoints" / step_folder(STEPS)
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(b"weights")
    facts = {"bytes": 7, "sha256": sha256_file(folder / "part")}
    info = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": STEPS, "files": {"part": facts}}
    info |= {"slots": 4 * STEPS, "adam_step": STEPS, "world_size": 2, "zero_stage": 1, "precision": "fp32"}
    info |= {"data_identity": "ab", "teacher": None, "embedding_width": None, "parameters": {}}
    info |= {"config": {"run": {}, "data": {}, "batch": {}, "model": {}}}
    (folder / "complete.json").write_text(json.dumps(info))
    return Run(path, [])


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(reference: Run, tmp_path: Path) -> Run:
    shutil.copytree(reference.path, tmp_path / "run")
    return Run(tmp_path / "run", [])


def verdict(run: Run, reference: Run, **options: Any) -> Outcome:
    outcome = Outcome("1a")
    compare(outcome, run, reference, **options)
    return outcome


def test_a_run_that_did_steps_again_just_as_before_is_ok(run: Run, reference: Run) -> None:
    for path in run.path.glob("trace/*"):
        lines = read(path)
        write(path, lines[:6] + lines[4:])
    write(run.folder.metrics, read(run.folder.metrics)[:6] + read(run.folder.metrics)[4:])
    write(
        run.folder.events,
        [{"time": 10.5, "event": "restart"}, {"time": 11, "event": "resume", "step": SAVE_EVERY}],
    )
    outcome = verdict(run, reference)
    recovery(outcome, run, 10.0)
    assert outcome.result == "ok"
    assert (outcome.noticed_s, outcome.recovered_from, outcome.steps_lost) == (0.5, SAVE_EVERY, 2)


def test_lost_and_doubled_samples_are_counted(run: Run, reference: Run) -> None:
    path = run.path / "trace" / "rank1.jsonl"
    lines = read(path)
    lines[3] = {**lines[3], "slots": lines[2]["slots"]}  # the samples of the previous step again
    write(path, lines[:-1])
    outcome = verdict(run, reference)
    assert (outcome.samples_lost, outcome.samples_doubled) == (4, 2)
    assert outcome.result == "FAILED"


def test_another_view_of_a_sample_is_a_difference_also_in_a_repeated_step(run: Run, reference: Run) -> None:
    path = run.path / "trace" / "rank0.jsonl"
    lines = read(path)
    other = {**lines[5], "sums": [[0, 0], lines[5]["sums"][1]]}
    write(path, [*lines[:5], other, *lines[5:]])
    assert verdict(run, reference).problems == ["1 samples differ from the undisturbed run"]
    assert verdict(run, reference, replaced=frozenset({lines[5]["keys"][0]})).problems == []


def test_another_loss_and_other_weights_are_differences(run: Run, reference: Run) -> None:
    lines = read(run.folder.metrics)
    lines[7]["grad_norm"] = 1.5000000001
    write(run.folder.metrics, lines)
    complete = run.folder.checkpoints / step_folder(STEPS) / "complete.json"
    info = json.loads(complete.read_text())
    part = complete.with_name("part")
    part.write_bytes(b"WEIGHTS")
    info["files"]["part"]["sha256"] = sha256_file(part)
    complete.write_text(json.dumps(info))
    assert verdict(run, reference).problems == [
        "losses differ at steps [8]",
        f"weights of step {STEPS} differ",
    ]
    assert verdict(run, reference, losses=False).problems == []


def test_names_choose_faults_in_the_order_of_the_table() -> None:
    assert chosen(["10", "1a"]) == ["1a", "10"]
    assert len(chosen(["5"])) == 12
    assert chosen(["1"]) == []
    assert set(ESSENTIAL) <= set(FAULTS)
    assert all(described(name) for name in FAULTS)


def test_the_table_states_failed_and_skipped_faults() -> None:
    ok, failed = Outcome("1a", 0.12, 4, 2, notes=["a note"]), Outcome("6", problems=["it hung"])
    skipped = Outcome("3a", skipped="no rights")
    rows = [[c.strip() for c in line.split("|")[2:-1]] for line in table([ok, failed, skipped]).splitlines()]
    assert rows[2] == ["0.1 s", "step 4", "2", "0", "0", "ok; a note"]
    assert rows[3] == ["", "never stopped", "0", "0", "0", "FAILED; it hung"]
    assert rows[4] == ["", "", "", "", "", "skipped: no rights"]
