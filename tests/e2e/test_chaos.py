"""Real faults in real runs (tools/chaos.py), each against a run that was left alone: nothing lost, nothing doubled, and
the same losses and weights bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from chaos_faults.registry import ESSENTIAL, FAULTS  # noqa: E402

Rows = dict[str, dict[str, Any]]
REST = [name for name in FAULTS if name not in ESSENTIAL]


def cause(names: Sequence[str], out: Path, *options: str) -> Rows:
    """Causes faults, one after the other; the rows by name."""
    tool = [sys.executable, str(ROOT / "tools/chaos.py"), "--only", *names, "--json", str(out), *options]
    result = subprocess.run(
        tool, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert out.exists(), result.stderr
    rows = {row["fault"]: row for row in json.loads(out.read_text())}
    assert result.returncode == any(row["result"] == "FAILED" for row in rows.values())
    return rows


@pytest.fixture(scope="module")
def essential(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return cause(ESSENTIAL, tmp_path_factory.mktemp("chaos") / "rows.json")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return cause(REST, tmp_path_factory.mktemp("chaos") / "rows.json")


def survived(row: dict[str, Any]) -> None:
    if row["skipped"]:
        pytest.skip(row["skipped"])
    assert row["problems"] == []
    assert (row["samples_lost"], row["samples_doubled"]) == (0, 0)


# What only the row itself can say of a fault, beside that the run ended as if it had not been.
MORE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "1a": lambda row: row["recovered_from"] == 4 and row["steps_lost"] >= 2,
    "4": lambda row: row["recovered_from"] >= 4 and row["steps_lost"] >= 4,
    "5-usr2-step": lambda row: row["recovered_from"] >= 6 and row["steps_lost"] == 0,
    "6": lambda row: row["recovered_from"] == 4 and row["noticed_s"] > 1,
    "7a": lambda row: row["recovered_from"] is None,
}


@pytest.mark.parametrize("name", ESSENTIAL)
def test_a_run_survives(name: str, essential: Rows) -> None:
    survived(essential[name])
    assert MORE.get(name, lambda row: True)(essential[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_run_also_survives(name: str, rest: Rows) -> None:
    survived(rest[name])


@pytest.mark.slow
def test_a_run_survives_ten_kills_during_saves(tmp_path: Path) -> None:
    row = cause(["2"], tmp_path / "rows.json", "--kills", "10", "--seed", "1")["2"]
    survived(row)
    assert row["notes"][0].startswith("10 kills, ")
