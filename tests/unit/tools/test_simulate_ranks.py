"""The tool that counts what the ranks of a large job read and send: on a tiny model, with few ranks."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
TINY = (
    "model.name=null",
    "model.image_size=32",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
)


@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_together_read_each_file_of_a_fabricated_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    rank: Any = importlib.import_module("simulated_rank")
    made = rank.fabricate(str(tmp_path), 3, stage, list(TINY))
    assert made["files"] == 4
    found = rank.choose(str(tmp_path), 3)
    assert (found["most_parts"], found["parts"]) == (1, 3)
    assert made["bytes"] <= found["read_bytes"] < made["bytes"] + 2 * made["complete_bytes"] + 10_000


@pytest.mark.slow
def test_the_tables_of_a_tiny_job(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "simulate_ranks.py"), "--ranks", "4", "--node", "2", "--json"]
    sizes = ["--shards", "500", "--samples", "20000", "--texts", "64"]
    settings = [word for pair in TINY for word in ("--set", pair)]
    done = subprocess.run(
        [*command, str(tmp_path / "rows.json"), *sizes, *settings],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.count("| ranks |") == 4
    [job] = json.loads((tmp_path / "rows.json").read_text())["jobs"]
    assert [played["rank"] for played in job["played"]] == [0, 2, 3]
    for played in job["played"]:
        assert played["choosing"]["parts"] == 1
        assert played["loading"]["parts"] == 0  # kept from hashing
        assert played["texts"]["received"] == {"all_gather_into_tensor": 2 * 512 * 48}
    first, middle, last = (played["commit"] for played in job["played"])
    assert first["received"]["gather"] >= 3 * middle["sent"]["gather"] > 0  # padded to rank 0's, the longest
    assert "gather" not in middle["received"]
    assert "gather" not in last["received"]
    assert [data["manifests"] for data in job["data"]] == [1, 0, 0]
    assert len({data["identity"] for data in job["data"]}) == 1
