"""The GPU check with tiny models on CPUs: all parts run, and an interrupted check keeps what it has."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["tests", "steps", "pretrain", "saves", "embed", "decode", "more-steps"]


def start(out: Path, *options: str) -> "subprocess.Popen[str]":
    command = [str(ROOT / "tools/gpu_check.sh"), str(out), "--tiny", *options]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def parts_of(out: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "gpu_check.json").read_text())
    return {part["name"]: part for part in found["parts"]}


@pytest.mark.slow
def test_all_parts_run_with_tiny_models_on_cpus(tmp_path: Path) -> None:
    with start(tmp_path / "out") as process:
        errors = process.communicate()[1]
    parts = parts_of(tmp_path / "out")
    assert [(name, part["state"]) for name, part in parts.items()] == [(name, "done") for name in PARTS], (
        errors
    )
    assert process.returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu_check.json",
        "gpu_check.log",
        "gpu_check.md",
    ]
    result = {name: part["result"] for name, part in parts.items()}
    assert (result["tests"]["passed"], result["tests"]["bad"]) == (1, [])
    steps = result["steps"]["rows"]
    assert [(row["wanted"], row["micro_batch"], row["compile"]) for row in steps] == [
        (2, 2, "off"),
        (2, 2, "on"),
        ("largest", 4, "off"),
    ]
    for row in steps:
        for teacher in ("live", "cached"):
            assert row[teacher]["samples_per_s"] > 0
            assert row[teacher]["planned_bytes"] > 0
            assert 0 < row[teacher]["share_of_matrix_rate"] < 1
        assert row["live"]["useful_flops"] > row["cached"]["useful_flops"]
    assert (result["pretrain"]["exit_code"], result["pretrain"]["steps"]) == (0, 2)
    assert 0 <= result["pretrain"]["data_wait_share"] <= 1
    assert [save["step"] for save in result["pretrain"]["saves"]] == [4]
    assert result["saves"]["blocked_share"] > 0
    assert len(result["embed"]["rates"]) == 2
    assert set(result["decode"]["samples_per_s"]) == set("abcd")
    assert result["decode"]["pixels"]["mean"] < 1
    assert result["more-steps"] == {}
    page = (tmp_path / "out/gpu_check.md").read_text()
    assert "Its figures mean nothing" in page
    assert all(f"`{name}`" in page for name in PARTS)


@pytest.mark.slow
def test_an_interrupted_check_ends_its_part_and_keeps_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(out, "--only", "steps", "decode") as process:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            time.sleep(0.2)
            found = parts_of(out)["steps"] if (out / "gpu_check.json").exists() else {}
            if found.get("result", {}).get("rows"):
                break
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == 1
    assert "interrupted; the results until now are kept" in errors
    parts = parts_of(out)
    assert [parts[name]["state"] for name in ("tests", "steps", "decode")] == [
        "not run",
        "interrupted",
        "not run",
    ]
    assert parts["steps"]["result"]["rows"][0]["live"]["samples_per_s"] > 0
    assert "| `steps` | interrupted |" in (out / "gpu_check.md").read_text()
    [worker] = [word for word in parts["steps"]["command"] if word.endswith("steps.json")]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(worker.encode() in command for command in commands)
