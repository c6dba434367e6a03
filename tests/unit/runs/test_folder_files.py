"""The lock of a run as others see it, and files that are being written or were cut."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from event_lines import write_event

from uniemox_dist.core.errors import UserError
from uniemox_dist.runs.folder import Lock, RunFolder, find_runs, open_run, read_lines


def test_testing_the_lock_names_its_holder_and_does_not_take_it(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path), RunFolder(tmp_path)
    assert folder.check_lock() == Lock()
    folder.lock()
    seen = other.check_lock()
    assert seen.held is True
    assert seen.holder.endswith(f"pid {os.getpid()}")
    assert seen.since == (tmp_path / "lock").stat().st_mtime
    with pytest.raises(UserError, match=f"pid {os.getpid()} is training here"):
        other.lock()
    folder.unlock()
    assert other.check_lock().held is False
    other.lock()
    other.unlock()


def test_the_kernel_frees_the_lock_of_a_process_that_was_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        folder = RunFolder(tmp_path)
        folder.lock()
        theirs.send("held")
        time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert ours.recv() == "held"
    seen = RunFolder(tmp_path).check_lock()
    assert (seen.held, seen.holder.rpartition(" ")[2]) == (True, str(process.pid))
    process.kill()
    process.join()
    assert RunFolder(tmp_path).check_lock().held is False


def test_a_run_starts_while_another_process_tests_its_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with open(tmp_path / "lock", encoding="utf-8") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.15, lambda: fcntl.flock(look, fcntl.LOCK_UN)).start()
        folder = RunFolder(tmp_path)
        folder.lock()
        folder.unlock()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_if_locks_cannot_be_tested_the_state_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "lock").write_text("node1 pid 7\n")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    seen = RunFolder(tmp_path).check_lock()
    assert (seen.held, seen.holder) == (None, "node1 pid 7")


def test_cut_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_lines(path) == []
    path.write_bytes('{"a": 1}\n[2]\nnull\n\n{"b": "x\u2028y"}\n{"c": "é'.encode()[:-1])
    assert read_lines(path) == [{"a": 1}, {"b": "x\u2028y"}]
    assert read_lines(path, last_bytes=25) == [{"b": "x\u2028y"}]
    assert read_lines(path, last_bytes=10_000) == read_lines(path)


def test_runs_are_found_below_a_folder_but_not_inside_each_other(tmp_path: Path) -> None:
    for name in (
        "b/config.yaml",
        "a/x/events.jsonl",
        "b/inner/config.yaml",
        ".hidden/config.yaml",
        "1/2/3/4/config.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / "a/x", tmp_path / "b"]
    assert open_run(tmp_path / "b").path == tmp_path / "b"
    with pytest.raises(UserError, match=f"so it is not a run folder; did you mean {tmp_path / 'a/x'}?"):
        open_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"so it is not a run folder; give run\.dir/run\.name"):
        open_run(tmp_path / "empty")
    with pytest.raises(UserError, match=r"none: no such folder; give run\.dir/run\.name"):
        open_run(tmp_path / "none")


def test_a_user_error_removes_only_the_files_of_this_start(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    (own / "logs").mkdir(parents=True)
    for name in ("logs/rank0.log", "lock", "notes.txt"):
        (own / name).write_text("mine")
    folder = RunFolder(own)
    folder.create()
    folder.discard_unused()
    assert (own / "logs" / "rank0.log").read_text() == (own / "lock").read_text() == "mine"
    fresh = RunFolder(tmp_path / "runs" / "a" / "fresh")
    fresh.create()
    fresh.lock()
    fresh.discard_unused()
    assert not (tmp_path / "runs").exists()
    fresh.unlock()


def test_a_lock_that_was_deleted_while_waiting_is_no_lock(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.create()
    first.lock()
    path = tmp_path / "run" / "lock"
    opened = path.open("a+")
    path.unlink()
    second.lock()  # a new file, which everybody sees
    with pytest.raises(UserError, match="is training here"):
        RunFolder(tmp_path / "run").lock()
    opened.close()


def test_a_torn_last_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_event(folder, "start", step=0)
    with folder.events.open("a") as file:
        file.write('{"event": "sa')
    write_event(folder, "end", step=4)
    assert [line["event"] for line in read_lines(folder.events)] == ["start", "end"]
    assert len(folder.events.read_text().splitlines()) == 3
