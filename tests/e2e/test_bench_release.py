"""The memory of a release, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_release_takes_less_than_twice_the_memory_of_its_model(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench_release.py"), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    assert all(row["above"] < 2.2 * row["model"] for row in rows)
    assert done.stdout.startswith("| written as | model in fp32 |")
