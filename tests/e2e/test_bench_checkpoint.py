"""The benchmark of saving runs, on two ranks, and its numbers are of one kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("model.name=null", "model.image_size=32", "model.patch_size=8", "model.width=32", "model.depth=2")
SMALL += ("model.heads=2", "model.decoder_width=32", "model.decoder_depth=1", "model.decoder_heads=2")


@pytest.mark.slow
def test_both_ways_of_saving_are_measured_in_one_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools/bench_checkpoint.py"),
        "--ranks",
        "2",
        "--saves",
        "3",
        "--ema",
    ]
    command += ["--dir", str(tmp_path / "disk"), "--json", str(tmp_path / "found.json")]
    command += [word for pair in SMALL for word in ("--set", pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["ranks"], found["threads"]) == (2, 1)
    # fp32 weights and two moments of all parameters, and the average of the encoder.
    assert found["checkpoint_bytes"] > found["host_bytes"] > 0
    assert found["checkpoint_bytes"] - found["host_bytes"] < 100_000  # headers
    assert len(found["every_blocked_s"]) == len(found["every_synchronous_s"]) == 3
    assert found["asynchronous_blocked_s"] > 0
    assert found["blocked_share"] == found["asynchronous_blocked_s"] / found["synchronous_s"]
    assert found["share_of_disk"] == found["written_bytes_per_s"] / found["disk_bytes_per_s"]
    assert "blocked: " in done.stdout
    assert list((tmp_path / "disk").iterdir()) == []
