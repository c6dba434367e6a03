import subprocess
import sys
from pathlib import Path

import pytest

START = (
    "import sys, time, threading; from pathlib import Path\n"
    "from uniemox_dist.core.watchdog import Watchdog\n"
    "dog = Watchdog(Path(sys.argv[1]), print).start()\n"
    "def sleeps_for_ever():\n    time.sleep(60)\n"
)


def run(code: str, stacks: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-u", "-c", START + code, str(stacks)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.long
def test_a_phase_that_takes_too_long_ends_the_process_with_1_and_writes_all_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    code = "threading.Thread(target=sleeps_for_ever, daemon=True).start()\ndog.expect('step 7', 1)\nsleeps_for_ever()"
    done = run(code, stacks)
    assert done.returncode == 1
    assert done.stdout.startswith("step 7 took longer than 1 s; the stacks of all threads are in ")
    text = stacks.read_text()
    assert text.startswith("step 7 took longer than 1 s\n")
    assert text.count("sleeps_for_ever") == 2


@pytest.mark.long
def test_a_phase_that_is_renewed_in_time_continues(tmp_path: Path) -> None:
    code = (
        "for step in range(4):\n    dog.expect(f'step {step}', 2)\n    time.sleep(0.6)\n"
        "dog.close()\ntime.sleep(2.2)\nprint('done')"
    )
    done = run(code, tmp_path / "stacks.txt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not (tmp_path / "stacks.txt").exists()


@pytest.mark.long
def test_stacks_that_cannot_be_written_do_not_keep_it_alive(tmp_path: Path) -> None:
    done = run("dog.expect('a save', 1)\nsleeps_for_ever()", tmp_path / "no folder" / "stacks.txt")
    assert done.returncode == 1
    assert done.stdout.startswith("a save took longer than 1 s; ")
    assert done.stdout.endswith("stacks.txt could not be written (No such file or directory)\n")
