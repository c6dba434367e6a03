"""One table of several encoders: on a real data set, and its Markdown."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from uniemox_dist.core.errors import UserError

TOOL = Path(__file__).parents[3] / "tools/compare_releases.py"


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Calls the tool in this process; returns its exit code."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setattr(sys, "argv", [TOOL.name, *arguments])
    code: int = importlib.import_module("compare_releases").main()
    return code


def test_encoders_of_timm_are_compared(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert compare(monkeypatch, *given, *options) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "\n".join(lines) in capsys.readouterr().out
    assert lines[0] == "| data, method | test_vit | test_vit |"
    result = json.loads((tmp_path / "table.json").read_text())[f"emoji/knn/{given[0]}"]
    assert result["data"]["test"]["samples"] == 20
    value = f"{result['rows']['release']['accuracy']:.3f} ["
    assert lines[2].startswith(f"| emoji, knn | **{value}")
    assert lines[3] == "| emoji, retrieval | – | – |"
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="is not a safetensors file"):
        compare(monkeypatch, "timm:test_vit=none", "--data", f"x={tiny_data}")
