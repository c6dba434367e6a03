"""The launcher's restart policy with real processes and real checkpoint folders."""

import sys
from pathlib import Path

import pytest
from attempts import begun, launch, restarts

from launch.restarts import run_with_restarts
from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION
from uniemox_dist.core.files import write_json
from uniemox_dist.distributed.local_launcher import Signals
from uniemox_dist.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.restarts.LONGEST_PAUSE_S", 0.05)


def test_a_killed_rank_is_started_again_and_the_run_ends_well(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(run, "checkpoint(4)\nif rank and not attempts: die()") == 0
    assert (begun(run, 0), begun(run, 1)) == (2, 2)
    assert restarts(run) == [{"attempt": 2, "left": 1, "code": 1, "step": 4}]
    assert "died of SIGKILL (possibly out of memory); restarting from step 4" in capfd.readouterr().err


def test_after_so_many_restarts_without_progress_it_gives_up_and_names_the_last_fault(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "event(event='fault', error=f'the {attempts}. of many', ends=True)\nsys.exit(1)"
    assert launch(run, code, ranks=1, max_restarts=2) == 1
    assert begun(run) == 3
    assert [e["left"] for e in restarts(run)] == [1, 0]
    assert [e["step"] for e in restarts(run)] == [None, None]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        "uniemox: giving up after 2 restarts without a new checkpoint (run.max_restarts=2); "
        "the last fault: the 2. of many"
    )


def test_without_an_event_the_last_line_points_to_the_ranks_message(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(run, "print('no such teacher', file=sys.stderr)\nsys.exit(1)", ranks=1, max_restarts=0) == 1
    assert capfd.readouterr().err.splitlines() == [
        "no such teacher",
        "uniemox: giving up at once (run.max_restarts=0); "
        "the last fault: rank 0 ended with exit code 1 (see its message above)",
    ]


def test_an_attempt_in_which_only_some_ranks_stopped_is_a_fault(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(run, "sys.exit(75 if rank else 0)", max_restarts=0) == 1
    why = "some ranks stopped on a signal, and others had already ended"
    assert capfd.readouterr().err.endswith(f"the last fault: {why}\n")


def test_each_new_checkpoint_resets_the_count_of_restarts(run: RunFolder) -> None:
    code = "if attempts < 4 and rank == 0: checkpoint(attempts // 2 + 1)\nsys.exit(0 if attempts == 7 else 1)"
    assert launch(run, code, max_restarts=2) == 1
    # Steps 1, 1, 2, 2 were saved by attempts 1 to 4: the last progress is that of attempt 3.
    assert begun(run) == 5
    assert [(e["step"], e["left"]) for e in restarts(run)] == [(1, 1), (1, 0), (2, 1), (2, 0)]


def test_checkpoints_of_before_are_no_progress(run: RunFolder) -> None:
    write_json(
        run.checkpoints / "step_00000009" / "complete.json",
        {"format": FORMAT, "format_version": FORMAT_VERSION, "step": 9, "files": {}},
    )
    assert launch(run, "sys.exit(1)", ranks=1, max_restarts=1) == 1
    assert begun(run) == 2


@pytest.mark.parametrize("code", [0, 2, 75])
def test_exit_codes_other_than_a_fault_are_not_restarted(run: RunFolder, code: int) -> None:
    assert launch(run, f"checkpoint(1)\nsys.exit({code})") == code
    assert begun(run) == 1
    assert restarts(run) == []


def test_a_mistake_that_one_rank_found_is_not_tried_again(run: RunFolder) -> None:
    assert launch(run, "sys.exit(2 if rank else 1)") == 2
    assert begun(run) == 1


def test_a_fault_that_would_only_happen_again_is_not_tried_again(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "if not attempts: die()\n"
        "event(event='fault', error='a slow disk')\n"
        "event(event='fault', error='no finite loss', ends=True, restart=False)\nsys.exit(1)"
    )
    assert launch(run, code, ranks=1) == 1
    assert begun(run) == 2
    says = capfd.readouterr().err.splitlines()[-1]
    assert says == "uniemox: no restart, because the same fault would happen again: no finite loss"
    # That of an earlier attempt, or of an earlier start, does not count.
    assert launch(run, "if attempts < 4: sys.exit(1)", ranks=1) == 0
    assert begun(run) == 5


def test_without_a_folder_no_event_is_written(run: RunFolder, tmp_path: Path) -> None:
    nowhere = RunFolder(tmp_path / "nowhere")
    with Signals() as signals:
        code = run_with_restarts(
            lambda: [sys.executable, "-c", "import sys; sys.exit(1)"],
            1,
            nowhere,
            signals,
            max_restarts=1,
            gpus=False,
        )
    assert code == 1
    assert not nowhere.path.exists()


def test_every_attempt_uses_another_port(run: RunFolder) -> None:
    code = "open(run / 'ports', 'a').write(os.environ['MASTER_PORT'] + ' ')\nsys.exit(attempts < 2)"
    assert launch(run, code, ranks=1) == 0
    assert len(set((run.path / "ports").read_text().split())) == 3


def test_a_stopped_rank_and_its_processes_are_killed_before_the_next_attempt(run: RunFolder) -> None:
    code = (
        "import subprocess\nif attempts: sys.exit(0)\n"
        "if rank: sys.exit(1)\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "(run / 'pids').write_text(f'{os.getpid()} {child.pid}')\nos.kill(os.getpid(), signal.SIGSTOP)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uniemox_dist.distributed.local_launcher.GRACE_S", 1.0)
        assert launch(run, code) == 0
    for pid in (run.path / "pids").read_text().split():
        assert not alive(int(pid))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked about yet since its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
