"""The tools that a person runs by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools/train_demo_teacher.py")]


@pytest.mark.slow
def test_the_demo_teacher_can_be_trained_again(tmp_path: Path) -> None:
    arguments = [
        "--out",
        str(tmp_path / "clip"),
        "--steps",
        "3",
        "--batch",
        "16",
        "--json",
        str(tmp_path / "t.json"),
    ]
    subprocess.run([*TOOL, *arguments], check=True, timeout=600, cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "clip").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert (tmp_path / "clip" / "open_clip_model.safetensors").stat().st_size < 20e6
    assert [line["row"] for line in json.loads((tmp_path / "t.json").read_text())] == [
        "teacher",
        "colour histogram",
        "24x24 pixels",
    ]


@pytest.mark.slow
def test_the_shipped_teacher_has_the_figures_of_its_readme(tmp_path: Path) -> None:
    folder = ROOT / "uniemox_dist/teacher/demo_teacher"
    arguments = ["--out", str(folder), "--steps", "0", "--json", str(tmp_path / "t.json")]
    subprocess.run([*TOOL, *arguments], check=True, timeout=600, cwd=tmp_path)
    for line in json.loads((tmp_path / "t.json").read_text()):
        name = line["row"].replace("24x24", "24×24")
        stated = next(
            r for r in (folder / "README.md").read_text().splitlines() if r.startswith(f"| {name} |")
        )
        assert float(stated.split("|")[3]) == pytest.approx(line["r10"], abs=0.006)


@pytest.mark.slow
def test_bench_startup_counts_what_a_start_loads(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(ROOT / "tools/bench_startup.py"),
        "--rounds",
        "1",
        "--json",
        str(rows_file),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    alone, encoder, rank = json.loads(rows_file.read_text())["rows"]
    assert alone["modules"] < encoder["modules"] < rank["modules"]
