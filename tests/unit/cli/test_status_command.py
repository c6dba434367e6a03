"""`uniemox status` on run folders of every state."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from event_lines import write_event
from told_run import last_time, told_run

from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER
from uniemox_dist.core.formatting import zone
from uniemox_dist.runs.folder import RunFolder

GIVE = "give run.dir/run.name, such as demo/runs/demo, or run.dir"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The status of a made-up run 20 s after its last line, with a checkpoint that is 10 minutes old."""
    folder = told_run(tmp_path / "runs/told")
    now = last_time(folder) + 20
    for step, age_s in ((7500, 1500), (8000, 600)):
        complete = folder.checkpoints / f"step_{step:08d}/complete.json"
        complete.parent.mkdir()
        about = {
            "format": "uniemox-checkpoint",
            "format_version": 1,
            "step": step,
            "slots": 1,
            "adam_step": 1.0,
        }
        rest = {"world_size": 8, "zero_stage": 1, "config": {}, "parameters": {}, "files": {}}
        complete.write_text(json.dumps({**about, **rest}))
        os.utime(complete, (now - age_s, now - age_s))
    monkeypatch.setattr(time, "time", lambda: now)
    return folder


def rows(output: str) -> list[list[str]]:
    """The cells of the table's lines; the text of the last event is one."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]


def test_one_run_is_a_row_and_its_last_events(told: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    told.lock()
    os.utime(told.path / "lock", (0, 0))
    assert uniemox(["status", str(told.path)]) == EXIT_DONE
    told.unlock()
    out = capsys.readouterr().out
    head, row, *more = rows(out)
    assert dict(zip(head, row, strict=True)) == {
        "run": str(told.path),
        "state": "running",
        "step": "8,200",
        "of": "12,000",
        "epoch": "7.00",
        "loss": "1.336",
        "samples/s": "512.0",
        "data wait": "1.0 %",
        "MFU": "29.0 %",
        "saved": "8,000, 10 min 00 s ago",
        "restarts": "1",
        "skipped": "2",
        "faults": "2",
        "left": "2 h 06 min",  # 3,800 steps at 2 s a step, less 20 s
    }
    assert ["4 attempts, 1 loss spike, 1 damaged picture replaced, last metrics 20 s ago"] in more
    assert f"the last of 37 events, times in {zone(last_time(told))}:" in out
    assert len([line for line in more if line and line[0][:6] == "11-24 "]) == 12
    assert "resumed from step_00007000, a checkpoint of 8 ranks, ZeRO-1" in out


def test_json_has_the_facts_as_numbers(told: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (told.path / "lock").write_text("node01 pid 7\n")
    assert uniemox(["status", "--json", str(told.path.parent)]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["format_version"], len(found["runs"])) == ("uniemox-status", 1, 1)
    run = found["runs"][0]
    # The lock of another host appears free, but the lines are recent.
    assert (run["state"], run["step"], run["max_steps"], run["mfu"]) == ("running", 8200, 12000, 0.29)
    assert (run["saved_step"], run["saved_age_s"], run["eta_s"]) == (8000, 600.0, 7580.0)
    assert (run["attempts"], run["restarts"], run["skipped"], run["faults"]) == (4, 1, 2, 2)


def test_a_parent_folder_and_a_pattern_find_the_runs_inside_each_once(
    told: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    young = RunFolder(told.path.parent / "young")
    young.create()
    write_event(young, "start", step=0, ranks=2, host="n")
    write_event(young, "fault", error="no data", ends=True)
    for arguments in (
        [str(told.path.parent)],
        [f"{told.path.parent}/*"],
        [str(told.path), str(told.path.parent)],
    ):
        assert uniemox(["status", *arguments]) == EXIT_DONE
        head, first, second = rows(capsys.readouterr().out)
        assert (head[0], head[-1]) == ("run", "last event")
        assert (first[0], first[1]) == (str(told.path), "running")
        assert first[-1].startswith("6 min 57 s ago: saved step 8,000: 1.3 GB in 3.10 s")
        assert first[-1].endswith(" …")
        assert (second[0], second[1], second[2]) == (str(young.path), "failed", "0")
        assert second[-1] == "0 s ago: fault: no data; it ended this attempt"


def test_half_written_lines_and_settings_are_borne(
    told: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, text in (
        (told.metrics, '{"step": 8220, "lo'),
        (told.events, '{"time": 17'),
        (told.config, "\nrun: {"),
    ):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    (told.checkpoints / "step_00009000").mkdir()
    (told.checkpoints / "step_00009000/complete.json").write_text('{"format": "unie')
    assert uniemox(["status", "--json", str(told.path)]) == EXIT_DONE
    run = json.loads(capsys.readouterr().out)["runs"][0]
    assert (run["step"], run["saved_step"], run["max_steps"], run["last_event"]["text"]) == (
        8200,
        8000,
        None,
        "saved step 8,000: 1.3 GB in 3.10 s, training waited 0.42 s; removed step_00007000",
    )


def test_only_the_end_of_long_metrics_is_read(told: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with open(told.metrics, "r+", encoding="utf-8") as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines(["x" * 10_000_000 + "\n", *lines])
    assert uniemox(["status", "--json", str(told.path)]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["runs"][0]["loss"] == json.loads(lines[-1])["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], f"RUN={{tmp}}/none: no such folder; {GIVE}"),
        (["{tmp}"], f"RUN={{tmp}}: holds no config.yaml and no events.jsonl, nor do folders in it; {GIVE}"),
        (["{tmp}", "--watch", "--json"], "--watch and --json: give one of them"),
        ([], "Missing argument 'RUN...'. See `uniemox status --help`."),
    ],
)
def test_a_folder_that_is_not_a_run_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert uniemox(["status", *(word.format(tmp=tmp_path) for word in arguments)]) == EXIT_USER
    assert capsys.readouterr().err == f"uniemox: error: {message.format(tmp=tmp_path)}\n"


@pytest.mark.parametrize("watch", [["--watch"], ["--watch", "0.2"], ["--watch=0.2"]])
def test_watching_shows_each_change_until_ctrl_c_and_ends_with_0(tmp_path: Path, watch: list[str]) -> None:
    folder = told_run(tmp_path / "told")
    process = subprocess.Popen(
        [sys.executable, "-m", "uniemox_dist.cli", "status", *watch, str(folder.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(3)]
    assert first[0].startswith("run ")
    assert "stalled" in first[1]
    if watch != ["--watch"]:
        write_event(folder, "end", step=12000)
        assert any("complete" in process.stdout.readline() for _ in range(500))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (EXIT_DONE, "")


def test_a_pattern_without_a_match_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uniemox(["status", f"{tmp_path}/zz*"]) == EXIT_USER
    assert capsys.readouterr().err == (
        f"uniemox: error: RUN={tmp_path}/zz*: the pattern matches nothing; {GIVE}\n"
    )
