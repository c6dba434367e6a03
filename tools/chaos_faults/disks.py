"""Faults of disks: full or read-only during a save, a flipped bit, metrics and TensorBoard that cannot be written."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chaos_faults.kills import STEP
from chaos_faults.lab import SAVE_EVERY, STEPS, Lab, Run
from chaos_faults.verdict import Outcome, compare, finished, recovery, same_weights

ROOM_MB = 400
"""Size of the small disk; some checkpoints of the large model fit."""


class NotPermitted(Exception):
    """Raised if this user may not mount file systems here."""


@contextmanager
def small_disk(lab: Lab, name: str, megabytes: float) -> Iterator[Path]:
    """Mounts a separate file system in memory."""
    folder = lab.root / f"disk-{name}"
    folder.mkdir(exist_ok=True)
    if not lab.mount:
        raise NotPermitted("mounting was not allowed")
    size = f"size={round(megabytes * 1024)}k"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise NotPermitted(f"no file system can be mounted: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Fills the remaining space; returns the file that occupies it."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


def remount(folder: Path, how: str) -> bool:
    """Makes a file system read-only (`ro`) or writable (`rw`); fails while a file is open for writing."""
    command = ["mount", "-o", f"remount,{how}", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _on_disk(run: Run, disk: Path) -> None:
    """Links the checkpoints folder of a run that has not begun to a small disk."""
    run.path.mkdir(parents=True)
    (disk / "checkpoints").mkdir()
    run.folder.checkpoints.symlink_to(disk / "checkpoints")


def _goes_on(outcome: Outcome, lab: Lab, run: Run, when: float, *, unremovable: bool = False) -> None:
    """Checks that a failed save is reported, training continues without interruption, and later saves succeed."""
    code = run.finish()
    finished(outcome, run, code)
    recovery(outcome, run, when)
    told = [event for event in run.events("fault", since=when) if "step" in event]
    outcome.expect(told, "no event says that the save failed")
    outcome.expect(len(run.events("start")) == 1, "training was interrupted")
    failed = sorted({event["step"] for event in told})
    left = [path.name for path in run.folder.checkpoints.glob(".step_*")]
    # Nothing can be deleted while the disk is read-only; the next start does it.
    outcome.expect(not left or unremovable, f"left behind: {left}")
    saved = [event["step"] for event in run.events("save")]
    outcome.notes.append(f"failed saves: {failed}, saved: {saved}")
    compare(outcome, run, lab.reference("large"))


def full(lab: Lab) -> Outcome:
    """The disk of the checkpoints is full during a save."""
    outcome, run = Outcome("3a"), lab.run("3a", model="large")
    with small_disk(lab, "3a", ROOM_MB) as disk:
        _on_disk(run, disk)
        run.start().wait_for_save(SAVE_EVERY)
        when = time.time()
        filler = fill(disk)
        run.wait_until(lambda: run.events("fault"), "a fault of the save")
        filler.unlink()
        _goes_on(outcome, lab, run, when)
    return outcome


def read_only(lab: Lab) -> Outcome:
    """The file system of the checkpoints becomes read-only during a save."""
    outcome, run = Outcome("3b"), lab.run("3b", model="large")
    with small_disk(lab, "3b", ROOM_MB) as disk:
        _on_disk(run, disk)
        run.start().wait_for_save(SAVE_EVERY)
        run.wait_until(lambda: remount(disk, "ro"), "a moment in which no file was open for writing")
        when = time.time()
        try:
            run.wait_until(lambda: run.events("fault"), "a fault of the save")
        finally:
            remount(disk, "rw")
        _goes_on(outcome, lab, run, when, unremovable=True)
    return outcome


def bit_flip(lab: Lab) -> Outcome:
    """A bit of the newest checkpoint flips while the run is stopped."""
    outcome, run = Outcome("4"), lab.run("4").start()
    run.wait_until(lambda: len(run.checkpoints()) >= 2, "a second checkpoint")
    run.kill()
    newest, before = run.checkpoints()[-1], run.checkpoints()[-2]
    part = newest.folder / "part_00001.safetensors"
    data = bytearray(part.read_bytes())
    data[lab.dice("4").randrange(len(data) // 2, len(data))] ^= 1
    part.write_bytes(data)
    when = time.time()
    finished(outcome, run, run.start().finish())
    recovery(outcome, run, when)
    told = [str(event.get("error")) for event in run.events("fault", since=when)]
    outcome.expect(any(newest.folder.name in text for text in told), f"no fault names it: {told}")
    outcome.expect(
        outcome.recovered_from == before.step, f"resumed from {outcome.recovered_from}, not {before.step}"
    )
    aside = list(run.folder.checkpoints.glob(f"{newest.folder.name}.*"))
    outcome.expect(aside, "the damaged checkpoint was not set aside")
    outcome.notes.append(f"step {newest.step} damaged")
    compare(outcome, run, lab.reference())
    return outcome


def metrics_full(lab: Lab) -> Outcome:
    """The disk of metrics.jsonl and events.jsonl is full."""
    outcome, run = Outcome("9a"), lab.run("9a")
    with small_disk(lab, "9a", 0.25) as disk:
        run.path.mkdir(parents=True)
        for path in (run.folder.metrics, run.folder.events):
            path.symlink_to(disk / path.name)
        run.start().wait_for_step(STEP)
        when = time.time()
        fill(disk)
        code = run.finish()
        written = len(run.folder.metrics.read_text().splitlines())
    _trained_on(outcome, lab, run, code)
    told = next((t for t, line in run.heard if "No space left on device" in line and t >= when), None)
    outcome.expect(told is not None, "nothing says so")
    outcome.noticed_s = None if told is None else round(told - when, 2)
    outcome.notes.append(f"about {written} of {STEPS} lines of metrics kept")
    return outcome


def no_tensorboard(lab: Lab) -> Outcome:
    """A file has the name of the TensorBoard folder."""
    outcome, run = Outcome("9b"), lab.run("9b")
    run.path.mkdir(parents=True)
    run.folder.tensorboard.write_text("not a folder\n")
    when = time.time()
    code = run.start().finish()
    _trained_on(outcome, lab, run, code)
    told = next((t for t, line in run.heard if "continues without TensorBoard" in line), None)
    outcome.expect(told is not None, "nothing says so")
    outcome.noticed_s = None if told is None else round(told - when, 2)
    return outcome


def _trained_on(outcome: Outcome, lab: Lab, run: Run, code: int) -> None:
    finished(outcome, run, code)
    if not outcome.problems:
        compare(outcome, run, lab.reference(), losses=False)
        same_weights(outcome, run, lab.reference())
