"""One table of several encoders: on a real data set, and its Markdown."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools/compare_releases.py"


def test_encoders_of_timms_stand_beside_each_other(tiny_data: Path, tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    given = [f"timm:test_vit={tmp_path / 'weights.safetensors'}"] * 2
    options = [
        "--data",
        f"emoji={tiny_data}",
        "--methods",
        "knn,retrieval",
        "--out",
        str(tmp_path / "table"),
    ]
    done = subprocess.run(
        [sys.executable, str(TOOL), *given, *options], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "\n".join(lines) in done.stdout
    assert lines[0] == "| data, method | test_vit | test_vit |"
    result = json.loads((tmp_path / "table.json").read_text())[f"emoji/knn/{given[0]}"]
    assert result["data"]["test"]["samples"] == 20
    value = f"{result['rows']['release']['accuracy']:.3f} ["
    assert lines[2].startswith(f"| emoji, knn | **{value}")
    assert lines[3] == "| emoji, retrieval | – | – |"
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    wrong = [sys.executable, str(TOOL), "timm:test_vit=none", "--data", f"x={tiny_data}"]
    refused = subprocess.run(wrong, capture_output=True, text=True, check=False, cwd=ROOT)
    assert refused.returncode == 2
    assert "is no safetensors file" in refused.stderr
