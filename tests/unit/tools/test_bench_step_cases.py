"""The benchmark of steps case by case: a case that fails costs no other case, and no case starts without time."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench_step_cases
from bench_step_cases import RESTART, Bench, Case, measure_all, run_workers

CASES = [Case("a", 0.75, 64, False), Case("b", 0.9, None, True), Case("c", 0.75, 64, False)]
WORKER = """
import json, sys
from pathlib import Path
file = Path(sys.argv[1])
found = json.loads(file.read_text())
for name in "abc"[len(found["rows"]):]:
    if name == sys.argv[2] and not found.get("crashed"):
        found["crashed"] = True
        if sys.argv[3] == "3":
            found["rows"].append({"model": name, "failed": "CUDA error"})
        file.write_text(json.dumps(found))
        sys.exit(int(sys.argv[3]))
    found["rows"].append({"model": name})
    file.write_text(json.dumps(found))
"""
"""Measures nothing, and ends once with an exit code at one case."""


def options(file: Path, **more: Any) -> argparse.Namespace:
    defaults = {"json": file, "seconds": None, "matrix_size": 64, "multiple": 4, "at_most": 10}
    return argparse.Namespace(**{**defaults, "set": [], "precision": "fp32", "teacher_shape": "t", **more})


@pytest.mark.parametrize(
    ("code", "reason"), [(9, "its process ended with exit code 9"), (RESTART, "CUDA error")]
)
def test_a_process_that_ends_is_replaced_for_the_cases_that_are_left(
    code: int, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "cases.json"
    file.write_text('{"rows": []}')
    assert run_workers([sys.executable, "-c", WORKER, str(file), "b", str(code)], options(file), CASES) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["model"] for row in rows] == ["a", "b", "c"]
    assert [row.get("failed") for row in rows] == [None, reason, None]


def test_no_case_starts_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"rows": [], "began": time.time() - 100, "matrix_tflops": 1.0}))

    def try_case(self: Bench, case: Case) -> dict[str, Any]:
        raise AssertionError(f"{case} was started")

    monkeypatch.setattr(bench_step_cases.Bench, "try_case", try_case)
    assert measure_all(options(file, seconds=99.0), CASES) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["wanted"], row["compile"], row["not_run"]) for row in rows] == [
        (64, "off", "no time was left"),
        ("largest", "on", "no time was left"),
        (64, "off", "no time was left"),
    ]


def test_a_case_out_of_memory_is_recorded_and_of_the_largest_three_quarters_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def measure(self: Bench, case: Case, config: Any) -> dict[str, Any]:
        tried.append(config.batch.micro_batch)
        if config.batch.micro_batch > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return {"live": {}}

    monkeypatch.setattr(bench_step_cases.Bench, "_measure", measure)
    monkeypatch.setattr(bench_step_cases, "find_obstacle", lambda kind: None)
    bench = Bench(options(tmp_path, teacher_shape="shipped:demo"), 1.0)
    largest = Case("vit_base_patch16_224", 0.9, None, True)
    assert bench.try_case(largest) == {"micro_batch": 6, "live": {}, "too_large_though_planned": 8}
    assert tried == [8, 6]  # the largest multiple of 4 up to 10; a CPU's memory has no limit in the plan
    fixed = Case("vit_base_patch16_224", 0.9, 64, False)
    assert bench.try_case(fixed) == {"micro_batch": 64, "failed": "out of memory: CUDA out of memory."}


def test_compilation_that_cannot_work_is_recorded_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = Bench(options(tmp_path), 1.0).try_case(CASES[1])
    assert found == {"failed": "cannot compile: there is no C++ compiler (g++)"}


@pytest.mark.parametrize(
    "words", [["a", "0.75", "64", "yes"], ["a", "much", "64", "on"], ["a", "0.75", "6.5", "on"]]
)
def test_a_case_with_a_wrong_word_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError):
        Case.parse(words)
