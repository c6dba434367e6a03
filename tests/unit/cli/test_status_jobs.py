"""`uniemox status` with Slurm, without it, and with one that does not answer; many runs; narrow terminals."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from event_lines import write_event
from told_run import told_run

from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER
from uniemox_dist.scheduler import commands

SQUEUE = """#!/bin/sh
echo "$@" >> {log}
{body}
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run of job 17, one that was stopped and is queued as job 18, and one that was submitted only, as 19."""
    place = tmp_path / "runs"
    told_run(place / "a/first").path.joinpath("job.json").write_text(
        json.dumps({"job_id": 17, "nodes": ["n1", "n2"], "time": 1.0})
    )
    second = told_run(place / "b/second_with_a_long_name")
    write_event(second, "signal", step=8200, signal="SIGUSR2", saved=True)
    write_event(second, "requeue", job_id=18, reason="saved before its time limit")
    for run, job in ((second.path, 18), (place / "b/c/third", 19)):
        (run / "jobs/0001").mkdir(parents=True)
        (run / "jobs/0001/submission.json").write_text(json.dumps({"job_ids": [job]}))
    (place / "b/c/third/config.yaml").write_text("run: {max_steps: 100}\n")
    return place


def fake_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Puts a squeue before all others on PATH; returns the file of its calls."""
    tool, log = tmp_path / "bin/squeue", tmp_path / "calls"
    tool.parent.mkdir()
    tool.write_text(SQUEUE.format(log=log, body=body))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    return log


def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    begins = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3630))
    return fake_squeue(
        tmp_path,
        monkeypatch,
        "echo '17|17|RUNNING|None|n[1-2]|2026-01-01T00:00:00|1-02:00:00'\n"
        f"echo '18|18|PENDING|BeginTime||{begins}|1:00:00'\n"
        "echo '19|19|PENDING|Priority||N/A|1:00:00'",
    )


def test_slurm_is_asked_once_for_all_runs_and_its_states_are_shown(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = answer(monkeypatch, tmp_path)
    assert uniemox(["status", "--all", str(runs)]) == EXIT_DONE
    head, *rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert head[:4] == ["run", "state", "job", "nodes (reason)"]
    assert [row[:4] for row in rows] == [
        ["a/first", "stalled", "17 RUNNING", "n[1-2]"],
        ["b/c/third", "queued", "19 PENDING", "(Priority)"],
        ["b/second_with_a_long_name", "queued", "18 PENDING", "(BeginTime)"],
    ]
    assert "ago: job 18 was requeued: saved before its" in rows[2][-1]
    assert len(calls.read_text().splitlines()) == 1
    assert calls.read_text().rstrip().endswith("-j 17,18,19")


def test_one_run_shows_the_expected_start_of_its_job_or_the_time_left(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, tmp_path)
    assert uniemox(["status", str(runs / "b/second_with_a_long_name")]) == EXIT_DONE
    out = capsys.readouterr().out
    assert re.search(
        r"^queued: job 18 waits for its begin time, .*; expected to start in 1 h 00 min; has no ch", out, re.M
    )
    assert re.search(r"^job 18: PENDING, expected to start \d\d-\d\d \d\d:\d\d$", out, re.M)
    assert "1 restart and 1 requeue" in out
    assert uniemox(["status", str(runs / "a")]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "job 17: RUNNING on n[1-2], since 01-01 00:00, 1 d 2 h to its time limit" in out


def test_json_has_the_job(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, tmp_path)
    assert uniemox(["status", "--json", "--all", str(runs)]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["slurm"] is None
    assert [run["run"] for run in found["runs"]] == [
        f"{runs}/{name}" for name in ("a/first", "b/c/third", "b/second_with_a_long_name")
    ]
    job = found["runs"][0]["job"]
    assert (job.pop("start") > 0, job) == (
        True,
        {"id": 17, "state": "RUNNING", "reason": None, "nodes": "n[1-2]", "time_left_s": 93600.0},
    )
    assert (found["runs"][2]["requeues"], found["runs"][2]["job"]["reason"]) == (1, "BeginTime")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sleep 30", "squeue: no answer within 0.3 s; try again later"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "squeue: slurm_load_jobs "
         "error: Unable to contact slurm controller"),
        ("exit 3", "squeue: exit code 3, no message"),
    ],
)  # fmt: skip
def test_a_slurm_that_does_not_answer_costs_one_remark(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    why: str,
) -> None:
    fake_squeue(tmp_path, monkeypatch, body)
    monkeypatch.setattr(commands, "SCREEN_TIMEOUT_S", 0.3)
    assert uniemox(["status", "--all", str(runs)]) == EXIT_DONE
    *_, first, third, second, blank, remark = capsys.readouterr().out.splitlines()
    assert (blank, remark) == ("", f"States are from the run folders alone, without Slurm: {why}")
    assert [line.split()[1:3] for line in (first, third, second)] == [
        ["stalled", "17"],
        ["queued", "19"],
        ["queued", "18"],
    ]


def test_while_slurm_is_silent_it_is_not_asked_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_squeue(tmp_path, monkeypatch, "exit 3")
    slurm = commands.JobQueries()
    assert [slurm.query([17]), slurm.query([17])] == [None, None]
    assert len(calls.read_text().splitlines()) == 1
    monkeypatch.setattr(commands, "RETRY_S", 0.0)
    later = commands.JobQueries()
    assert [later.query([17]), later.query([17])] == [None, None]
    assert len(calls.read_text().splitlines()) == 3


def test_runs_without_jobs_need_no_slurm_and_runs_with_jobs_report_its_absence(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told_run(tmp_path / "alone")
    assert uniemox(["status", str(tmp_path / "alone")]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "Slurm" not in out
    assert " job " not in out.splitlines()[0]
    assert uniemox(["status", str(runs / "a")]) == EXIT_DONE
    remark = "States are from the run folders alone, without Slurm: there is no squeue on this machine"
    assert capsys.readouterr().out.splitlines()[-1] == remark


def in_terminal(characters: int, *arguments: str) -> list[str]:
    """The lines that the command writes into a terminal of this width."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, characters, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "uniemox_dist.cli", "status", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")},
    )
    os.close(terminal)
    said = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # how Linux signals that no process holds the terminal any more
            break
        if not piece:
            break
        said += piece
    os.close(main)
    assert process.wait(timeout=120) == EXIT_DONE
    return said.decode().splitlines()


@pytest.mark.parametrize(
    ("characters", "shown"),
    [
        (200, ["run", "state", "job", "nodes (reason)", "step", "of", "epoch", "loss", "samples/s", "data wait", "MFU",
               "restarts", "skipped", "faults", "last event"]),
        (100, ["run", "state", "job", "nodes (reason)", "step", "of", "loss", "samples/s", "restarts"]),
        (80, ["run", "state", "job", "step", "of", "loss", "samples/s", "restarts"]),
        (40, ["run", "state", "step", "loss"]),
        (20, ["run", "s…"]),
    ],
)  # fmt: skip
def test_a_narrow_terminal_gets_fewer_columns_and_no_line_that_wraps(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int, shown: list[str]
) -> None:
    answer(monkeypatch, tmp_path)
    lines = [click.unstyle(line) for line in in_terminal(characters, "--all", str(runs))]
    assert re.split(r"  +", lines[0]) == shown
    assert len(lines) == 4
    assert max(map(len, lines)) <= characters
    assert lines[3].startswith("b/second_with_a_long_name" if characters == 200 else "…")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "{tmp}", "{tmp}/x"], "--all={tmp} and RUN={tmp}/x: give one of them"),
        (
            ["--all", "{tmp}"],
            "--all={tmp}: no folder below it holds a config.yaml or an events.jsonl; {give}",
        ),
        (["--all", "{tmp}/none"], "--all={tmp}/none: no such folder; {give}"),
        (["--all", "{tmp}/file"], "--all={tmp}/file: is not a folder; {give}"),
        (["--all", ""], "--all is empty; {give}"),
        (["--all"], "Option '--all' requires an argument."),
    ],
)
def test_a_folder_without_runs_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    give = "give the folder that holds your runs, such as run.dir"
    assert uniemox(["status", *(word.format(tmp=tmp_path) for word in arguments)]) == EXIT_USER
    assert capsys.readouterr().err == f"uniemox: error: {message.format(tmp=tmp_path, give=give)}\n"


def test_all_with_a_runs_own_folder_shows_that_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told_run(tmp_path / "alone")
    assert uniemox(["status", "--all", str(tmp_path / "alone")]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{tmp_path}/alone  stalled ")
