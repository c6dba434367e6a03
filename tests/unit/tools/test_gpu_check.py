"""The GPU check: its command line, its time limits, and its page. The parts themselves run in tests/e2e."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
from benchmark import run_main  # noqa: E402
from gpu_page import make_page  # noqa: E402
from gpu_parts import PARTS, VIT_B, VIT_L, Form, Part, environment, list_cases  # noqa: E402

MACHINE = {
    "gpu": "A GPU",
    "gpu_bytes": 150e9,
    "gpus": 1,
    "cuda": "13.0",
    "cores": 16,
    "python": "3.12.3",
    "versions": {"torch": "2.11.0", "webdataset": None},
}


def command_of(code: str, limit_s: float = 60.0, name: str = "part") -> Part:
    """A part that runs Python code, which gets the part's file as its argument."""

    def command(form: Form, limit_s: float, results: Any) -> list[str]:
        return [sys.executable, "-c", code, str(form.json(name))]

    def read(form: Form, name: str, output: str) -> dict[str, Any]:
        file = form.json(name)
        return json.loads(file.read_text()) if file.exists() else {}

    return Part(name, f"The part {name}", limit_s, command, read)


def checked(parts: list[Part], tmp_path: Path, minutes: float = 8.0) -> tuple[int, dict[str, Any]]:
    """Runs a check of some parts; returns its exit code and its parts' results by name."""
    (tmp_path / "scratch").mkdir()
    form = Form(tmp_path / "scratch", False, 2)
    names = [part.name for part in parts if part.name != "unwanted"]
    out = gpu_check.make_out(tmp_path / "out")
    every = [*parts, *(command_of("", name=part.name) for part in PARTS)]  # the page has a section for each
    code = gpu_check.Check(form, MACHINE, out, minutes, names, every).run()
    found = json.loads((out / "gpu_check.json").read_text())
    assert (out / "gpu_check.md").read_text().startswith("# GPU check\n")
    return code, {row["name"]: row for row in found["parts"]}


@pytest.fixture(autouse=True)
def _sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts made here have a section without content."""
    sections = dict.fromkeys(("part", "bad", "slow", "good", "unwanted"), lambda parts, steps: [])
    monkeypatch.setattr("gpu_page.SECTIONS", {**gpu_check.make_page.__globals__["SECTIONS"], **sections})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["OUT", "--only", "stepz"],
            "--only stepz: no such part; the parts are tests, steps, pretrain, saves",
        ),
        (["FILE"], "is a file; give a folder"),
        (["OUT", "--minutes", "0"], "--minutes 0: give more than 0"),
        (["OUT", "--minutes", "soon"], "invalid float value: 'soon'"),
        ([], "the following arguments are required: OUT"),
        (["OUT"], "no GPU here (torch.cuda.is_available() is false); --tiny runs the parts"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "FILE").write_text("")
    paths = {"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "FILE")}
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *(paths.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        run_main(gpu_check.main)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_check.py: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_results_of_an_earlier_check_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "gpu_check.json").write_text("{}")
    with pytest.raises(ValueError, match="has the results of an earlier check; give another folder"):
        gpu_check.make_out(tmp_path)


def test_cases_are_all_combinations_once_and_start_with_those_of_the_aims() -> None:
    cases = list_cases(tiny=False)
    assert len(cases) == len(set(cases)) == 2 * 2 * 3 * 2
    assert cases[:2] == [(VIT_L, "0.75", "256", "off"), (VIT_B, "0.75", "64", "off")]
    compiled = [compiles for *_, compiles in cases[11:]]
    assert compiled == sorted(compiled)  # off before on


def test_the_limits_of_all_parts_leave_time_in_the_whole_check() -> None:
    assert sum(part.limit_s for part in PARTS if part.name != "more-steps") <= 60 * gpu_check.MINUTES - 20


def test_a_part_that_fails_or_is_too_slow_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    parts = [
        command_of("print('first'); import sys; sys.exit('the disk is on fire')", name="bad"),
        command_of(
            "import sys, time; open(sys.argv[1], 'w').write('{\"rows\": 2}'); time.sleep(60)", 2.0, "slow"
        ),
        command_of("import sys; open(sys.argv[1], 'w').write('{\"rate\": 7}')", name="good"),
        command_of("", name="unwanted"),
    ]
    code, rows = checked(parts, tmp_path)
    assert code == 1
    assert (rows["bad"]["state"], rows["bad"]["reason"]) == ("failed", "exit code 1: the disk is on fire")
    assert rows["bad"]["tail"] == ["first", "the disk is on fire"]
    assert (rows["slow"]["state"], rows["slow"]["reason"]) == ("timed out", "took longer than 2 s")
    assert rows["slow"]["result"] == {"rows": 2}
    assert (rows["good"]["state"], rows["good"]["result"]) == ("done", {"rate": 7})
    assert (rows["unwanted"]["state"], rows["unwanted"]["reason"]) == ("not run", "left out by --only")
    page = (tmp_path / "out/gpu_check.md").read_text()
    assert "| `slow` | timed out | 2 | took longer than 2 s |" in page
    assert "the disk is on fire" in (tmp_path / "out/gpu_check.log").read_text()


def test_a_part_for_which_no_time_is_left_is_not_started(tmp_path: Path) -> None:
    slow = command_of("import time; time.sleep(60)", 480.0, "slow")
    code, rows = checked([slow, command_of("", 480.0, "good")], tmp_path, minutes=1.5 / 60)
    assert code == 1
    assert rows["slow"]["state"] == "timed out"
    assert rows["slow"]["seconds"] < 30
    assert (rows["good"]["state"], rows["good"]["reason"]) == ("not run", "no time was left")


def test_a_killed_check_leaves_what_it_had_found(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tools")!r}, {str(ROOT / "tests/unit/tools")!r}]
from test_gpu_check import *
import gpu_page
gpu_page.SECTIONS["slow"] = lambda parts, steps: []
code = "import os, sys, time; open(sys.argv[1], 'w').write('{{\\"pid\\": %d}}' % os.getpid()); time.sleep(60)"
checked([command_of(code, name="slow")], Path({str(tmp_path)!r}))
""")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    results = tmp_path / "out/gpu_check.json"
    with subprocess.Popen([sys.executable, str(script)], env=environment) as process:
        try:
            found: dict[str, Any] = {}
            end = time.monotonic() + 60
            while "result" not in found and time.monotonic() < end:
                time.sleep(0.1)
                found = json.loads(results.read_text())["parts"][0] if results.exists() else {}
        finally:
            process.kill()
    os.kill(found["result"]["pid"], signal.SIGKILL)
    found = json.loads(results.read_text())["parts"][0]
    assert found["state"] == "running"
    assert "| `slow` | running |" in (tmp_path / "out/gpu_check.md").read_text()


def test_results_of_tests_are_counted_in_a_session_that_did_not_end() -> None:
    [tests] = [part for part in PARTS if part.name == "tests"]
    output = (
        "[gw0] [ 10%] PASSED tests/gpu/test_on_gpu.py::test_a[cuda] \n"
        "[gw1] [ 20%] FAILED tests/gpu/test_on_gpu.py::test_b[cuda-1] \n"
        "tests/gpu/test_on_gpu.py::test_c[cuda] \n"
    )
    found = tests.read(Form(Path(), False, 2), "tests", output)
    assert found == {
        "passed": 1,
        "failed": 1,
        "error": 0,
        "skipped": 0,
        "bad": ["tests/gpu/test_on_gpu.py::test_b[cuda-1]"],
    }


def test_the_tests_are_those_of_make_test_gpu() -> None:
    [tests] = [part for part in PARTS if part.name == "tests"]
    command = tests.command(Form(Path(), False, 16), 60, {})
    command = ["python" if word == sys.executable else word for word in command if word != "-vv"]
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if "-rs -m" in line]
    line = (
        line.strip()
        .replace("$(or $(GPU_JOBS),4)", "4")
        .replace("$(if $(SHORT), and not slow)", " and not slow")
    )
    assert shlex.split(line.replace("$(BIN)/", "")) == ["OMP_NUM_THREADS=1", *command]
    assert environment(Form(Path(), False, 16), tests)["OMP_NUM_THREADS"] == "1"


def step(share: float, peak: float | None = 10e9, planned: float = 10.3e9) -> dict[str, Any]:
    return {
        "samples_per_s": 1000.0,
        "share_of_matrix_rate": share,
        "peak_bytes": peak,
        "planned_bytes": planned,
        "first_step_s": 21.0,
    }


def row(model: str, wanted: int | str, compiles: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "mask": 0.75, "wanted": wanted, "compile": compiles, **more}


def recorded() -> dict[str, Any]:
    """Results as a check of a GPU writes them, with numbers made up."""
    steps = [
        row(VIT_L, 256, "off", micro_batch=256, live=step(0.45), cached=step(0.41)),
        row(VIT_L, 256, "on", micro_batch=256, live=step(0.55), cached=step(0.52, planned=10.8e9)),
        row(VIT_B, 64, "off", micro_batch=64, live=step(0.2), cached=step(0.36)),
        row(VIT_B, "largest", "off", micro_batch=1152, failed="out of memory: CUDA out of memory."),
        row(VIT_B, 256, "on", not_run="no time was left"),
    ]
    more = [row(VIT_B, 256, "on", micro_batch=256, live=step(0.5), cached=step(0.5))]
    results: dict[str, Any] = {
        "tests": {"passed": 11, "failed": 1, "error": 0, "skipped": 0, "bad": ["tests/gpu/x.py::test_y"]},
        "steps": {"matrix_tflops": 790.0, "rows": steps},
        "pretrain": {
            "samples_per_s": 1500.0,
            "tflops_per_s": 180.0,
            "mfu": 0.18,
            "steps": 30,
            "workers": 15,
            "data_wait_share": 0.0031,
            "data_wait_share_max": 0.01,
            "start_s": {"imports": 9.0, "total": 31.0},
            "saves": [{"step": 40, "bytes": 1.4e9, "seconds": 1.5, "blocked_s": 0.2}],
        },
        "embed": {"rates": {"bare": [900.0, 1000.0, 1100.0]}},
        "more-steps": {"matrix_tflops": 780.0, "rows": more},
    }
    parts = [
        {"name": p.name, "title": p.title, "state": "done", "seconds": 30.0, "result": results[p.name]}
        if p.name in results
        else {"name": p.name, "title": p.title, "state": "not run", "reason": "no time was left"}
        for p in PARTS
    ]
    return {"tiny": False, "minutes": 8.0, "seconds": 470.0, "machine": MACHINE, "parts": parts}


def test_the_page_compares_with_the_aims_and_says_what_was_not_reached_or_not_run() -> None:
    page = make_page(recorded()).splitlines()
    aims = dict(line.strip("| ").split(" | ", 1) for line in page if line.startswith("| ") and " % " in line)
    assert "| all tests pass | 11 passed, 1 failed | not reached |" in page
    assert aims["ViT-L from micro-batch 256 on: 50 % of the matrix rate"] == (
        "52 % (mask 0.75, micro-batch 256, cached) to 55 % (mask 0.75, micro-batch 256, live) | "
        "reached in 2 of 8; others not run"
    )
    assert aims["ViT-B at micro-batch 64: 35 % of the matrix rate"].endswith("| not reached in 1 of 4")
    assert aims["data wait 0 %"] == "0.3 % | reached"
    assert (
        aims["`uniemox plan` within 5 % of the memory, compile off"]
        == "+3.0 % to +3.0 % in 4 steps | reached"
    )
    assert aims["`uniemox plan` within 5 % of the memory, compile on"] == (
        "+3.0 % to +8.0 % in 4 steps | not reached"
    )


def test_the_page_has_a_section_for_each_part_and_a_row_for_each_step() -> None:
    page = make_page(recorded())
    for part in PARTS[:-1]:
        assert f"## {part.title} (`{part.name}`)" in page
    assert (
        "A GPU, 150 GB; 16 cores; CUDA 13.0, Python 3.12.3, torch 2.11.0. 7 min 50 s of at most 8 min 00 s."
        in page
    )
    assert "| `saves` | not run | – | no time was left |" in page
    assert "not run: no time was left." in page
    rows = [line for line in page.splitlines() if line.startswith("| vit_")]
    assert rows[0] == "| vit_large | 0.75 | 256 | off | live | 1000 | 45 % | 10.00 GB | +3.0 % |  |"
    assert rows[2].endswith("| 10.00 GB | +3.0 % | first step 21.0 s |")
    assert rows[6] == (
        "| vit_base | 0.75 | 1152 (largest) | off | – | – | – | – | – | out of memory: CUDA out of memory. |"
    )
    assert len(rows) == 9  # the second part measured the case that the first did not reach
    assert f"{VIT_L} 0.9 256 on" in page.partition("Not reached: ")[2]
    assert "- tests/gpu/x.py::test_y" in page
    assert "Save after step 40: 1.40 GB in 1.50 s; training waited 0.20 s." in page


def test_the_page_of_a_tiny_check_judges_nothing() -> None:
    page = make_page({**recorded(), "tiny": True})
    assert "Its figures mean nothing" in page
    assert "| data wait 0 % | 0.3 % | not judged |" in page
