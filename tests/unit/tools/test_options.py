"""Options of the tools: a wrong value is one line and exit code 2, before any work."""

import argparse
import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("options")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("positive_int", "3", 3),
        ("non_negative_int", "0", 0),
        ("positive_ints", "8,64", [8, 64]),
        ("positive_number", "1e9", 1e9),
        ("ratio", "0.75", 0.75),
        ("teacher_shape", "RN50", "RN50"),
        ("setting_pair", "model.width=48", "model.width=48"),
        ("setting_pair", "deepspeed.zero_optimization.reduce_bucket_size=1", None),
    ],
)
def test_a_valid_value_is_converted(types: Any, name: str, text: str, value: object) -> None:
    assert getattr(types, name)(text) == (text if value is None else value)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("positive_int", "0", "'0': expected a positive integer"),
        ("positive_int", "abc", "'abc': expected a positive integer"),
        ("non_negative_int", "-1", "'-1': expected 0 or a positive integer"),
        ("positive_ints", "8,", "'': expected a positive integer"),
        ("positive_number", "nan", "'nan': expected a positive number"),
        ("positive_number", "inf", "'inf': expected a positive number"),
        ("ratio", "2", "'2': expected a number between 0 and 1"),
        ("ratio", "0", "'0': expected a number between 0 and 1"),
        ("teacher_shape", "RN50x", "did you mean RN50x4"),
        ("teacher_shape", "local-dir:/nonexistent", "contains no open_clip_config.json"),
        ("setting_pair", "bogus=1", "bogus is no key of the configuration; known: run, data"),
        ("setting_pair", "model.widht=1", "did you mean model.width?"),
        ("setting_pair", "model=1", "model is a section"),
        ("setting_pair", "model.width", "expected key=value"),
        ("photo_folder", "/nonexistent", "no such folder"),
    ],
)
def test_a_wrong_value_is_refused_with_the_fix(types: Any, name: str, text: str, reason: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        getattr(types, name)(text)
    assert reason in str(refused.value)


def test_a_folder_of_photos_contains_a_jpeg(types: Any, tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"contains no \*.jpg"):
        types.photo_folder(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.jpg").touch()
    assert types.photo_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ranks", "8,abc"], "argument --ranks: 'abc': expected a positive integer"),
        (["--set", "model.mask_ratio=2"], "model.mask_ratio"),
        (["--json", "{folder}/a/b.json"], "no such folder; give a file in an existing folder"),
        (["--json", "{folder}"], "is a folder; give a file"),
    ],
)
def test_a_tool_ends_with_one_line_before_the_work(tmp_path: Path, arguments: list[str], reason: str) -> None:
    command = [sys.executable, str(TOOLS / "simulate_ranks.py")]
    command += [word.format(folder=tmp_path) for word in arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("simulate_ranks.py: error: ")
    assert reason in line
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_tool_removes_its_temporary_folder(tmp_path: Path) -> None:
    script = (
        "import sys, tempfile, time\n"
        "from benchmark import run_main\n"
        "def main():\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[1]):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "run_main(main)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=TOOLS, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
