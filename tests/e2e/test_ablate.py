"""tools/ablate.py in miniature: real runs, releases and evaluations, and what it does the second time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import TINY_MODEL

TOOL = [sys.executable, str(Path(__file__).parents[2] / "tools/ablate.py")]
TINY = (
    "batch.global_batch=24",
    "batch.micro_batch=24",
    *TINY_MODEL,
    "model.depth=1",
)


@pytest.mark.slow
def test_an_ablation_is_run_and_its_results_are_kept_apart(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    rows = ["all losses", "without L3 (reconstruction)"]
    command = [
        *TOOL,
        "--out",
        str(tmp_path / "a"),
        "--shards",
        str(tiny_data),
        "--epochs",
        "2",
        "--seeds",
        "4",
    ]
    command += ["--rows", *rows, "--minutes", "0", "--set", *TINY, f"teacher.name=local-dir:{tiny_teacher}"]
    subprocess.run(command, check=True, timeout=300)
    result = json.loads((tmp_path / "a" / "table.json").read_text())
    columns = {m["name"]: {row["row"]: row for row in m["rows"]} for m in result["metrics"]}
    assert list(columns) == ["retrieval_r10", "teacher_cosine", "masked_mse", "linear_probe"]
    trivial = {"untrained", "teacher", "colour histogram", "24x24 pixels", "chance"}
    assert set(columns["retrieval_r10"]) == {*rows, *trivial}
    assert set(columns["masked_mse"]) == {
        "all losses", "untrained", "linear interpolation", "mean of visible patches"
    }  # fmt: skip
    assert result["seeds"] == [4]
    score = tmp_path / "a" / "scores" / "all_losses_4.json"
    before = score.stat().st_mtime_ns
    again = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert score.stat().st_mtime_ns == before
    assert "complete in" not in again.stdout
    other = subprocess.run(
        [*command, "--epochs", "3"], check=False, timeout=60, capture_output=True, text=True
    )
    assert other.returncode == 1
    assert "was begun with other settings" in other.stderr
