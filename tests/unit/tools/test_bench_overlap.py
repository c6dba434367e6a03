"""The benchmark of near-copies: what it counts, and its options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import bench_overlap  # noqa: E402
from overlap_edits import EDITS, encode  # noqa: E402


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/bench_overlap.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_copies_of_photographs_are_found_and_other_photographs_are_not() -> None:
    originals = [
        encode(Image.fromarray(getattr(data, name)()).convert("RGB")) for name in ("chelsea", "coffee")
    ]
    recall = bench_overlap.measure_recall(originals, copied=1)
    assert list(recall) == list(EDITS)
    assert {row["found"] for row in recall.values()} == {1}
    assert {row["of"] for row in recall.values()} == {1}


def test_the_index_is_measured_in_the_real_format(tmp_path: Path) -> None:
    done = run(
        "--index", "6000", "--landmarks", "3", "--assigned", "8192", "--json", str(tmp_path / "r.json")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["pictures"], results["rows"], results["landmarks"]) == (6000, 36_000, 189)
    assert (results["landmarks_compared"], results["rows_assigned"]) == (3, 8192)
    assert results["comparisons"] > 0


@pytest.mark.parametrize(("count", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)])
def test_intervals_are_wilsons(count: int, of: int, low: float, high: float) -> None:
    assert bench_overlap.wilson(count, of) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_pictures_or_an_index_must_be_given(tmp_path: Path) -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr == "bench_overlap.py: error: give PICTURES or --index N\n"
    assert "no such folder" in run(str(tmp_path / "none")).stderr
