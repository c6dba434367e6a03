"""Restarts a run's ranks on one machine after faults, while the run makes progress."""

import signal
import time
from collections.abc import Callable, Sequence

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.core.errors import EXIT_FAULT, EXIT_REQUEUE
from uniemox_dist.distributed.local_launcher import LOOK_S, Ended, Signals, print_line, run_attempt
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.events.jobs import Restart
from uniemox_dist.runs.events.reading import find_fault, select_kind
from uniemox_dist.runs.events.training import FaultEvent, Signal
from uniemox_dist.runs.folder import RunFolder, read_lines

LONGEST_PAUSE_S = 60.0
"""Pauses before restarts double from one second up to this."""


def run_with_restarts(
    command: Callable[[], Sequence[str]],
    ranks: int,
    folder: RunFolder,
    signals: Signals,
    *,
    max_restarts: int,
    gpus: bool,
) -> int:
    """Runs the ranks of a run and restarts them after a fault (exit code 1), at most `max_restarts` times in a row
    without a newer complete checkpoint. Returns the exit code of the run.

    There is no restart after a fault that would happen again (an event with `"restart": false`), or after a stop
    signal. A stop between two attempts, or while ranks are starting, returns 75 if there is a checkpoint, from which
    the same command continues.

    Args:
        command: returns the command line of a rank; called before every attempt.
    """
    reached = find_newest_step(folder)
    attempts = without_progress = 0
    while not signals.received:
        attempts += 1
        known = _count_event_bytes(folder)
        ended = run_attempt(command(), ranks, signals, gpus=gpus)
        if ended.code != EXIT_FAULT:
            return ended.code
        if signals.received and not ended.unprepared:
            return EXIT_FAULT
        if signals.received:
            break
        events = _read_events_after(folder, known)
        last = _find_cause(events, ended)
        if any(
            "error" in fault and fault.get("restart") is False for fault in select_kind(events, FaultEvent)
        ):
            print_line(f"no restart, because the same fault would happen again: {last}")
            return EXIT_FAULT
        step = find_newest_step(folder)
        if step is not None and (reached is None or step > reached):
            reached, without_progress = step, 0
        if without_progress == max_restarts:
            tried = (
                f"after {_format_restarts(max_restarts)} without a new checkpoint"
                if max_restarts
                else "at once"
            )
            print_line(f"giving up {tried} (run.max_restarts={max_restarts}); the last fault: {last}")
            if folder.path.is_dir():  # a rank that was killed could not write it
                folder.write(FaultEvent(error=f"given up {tried}: {last}", ends=True, restart=False))
            return EXIT_FAULT
        without_progress += 1
        pause_s = min(LONGEST_PAUSE_S, 2.0 ** (without_progress - 1))
        place = "from the beginning" if step is None else f"from step {step}"
        print_line(f"{last}; restarting {place} in {pause_s:.0f} s ({without_progress} of {max_restarts})")
        if folder.path.is_dir():
            folder.write(
                Restart(
                    attempt=attempts + 1,
                    left=max_restarts - without_progress,
                    code=ended.code,
                    step=step,
                    reason=last,
                    pause_s=pause_s,
                )
            )
        if _wait_for_stop(pause_s, signals):
            break
    return exit_after_stop(folder, signals)


def exit_after_stop(folder: RunFolder, signals: Signals) -> int:
    """The exit code of a run that was stopped while no rank handled signals: 75 if there is a checkpoint, 1 otherwise.

    Writes an event, so that the fault of an earlier attempt is not taken for the cause of the end.
    """
    step = find_newest_step(folder)
    # Another process trains this run and continues.
    if folder.path.is_dir() and not folder.check_lock().held:
        folder.write(
            Signal(step=step, signal=signal.Signals(signals.received[0]).name, saved=step is not None)
        )
    if step is None:
        print_line("stopped before the first checkpoint")
        return EXIT_FAULT
    print_line(f"stopped; run the same command again to continue from step {step}")
    return EXIT_REQUEUE


def find_newest_step(folder: RunFolder) -> int | None:
    """The step of a run's newest complete checkpoint; None without one."""
    try:
        found = list_complete_checkpoints(folder.checkpoints)
    except OSError:  # a checkpoint is being deleted, or the file system fails
        return None
    return found[-1].step if found else None


def _count_event_bytes(folder: RunFolder) -> int:
    """Bytes of events.jsonl before the attempt that starts now."""
    try:
        return folder.events.stat().st_size
    except OSError:
        return 0


def _read_events_after(folder: RunFolder, known: int) -> list[Line]:
    """The events of the present attempt, which follow the first `known` bytes."""
    try:
        return read_lines(folder.events, max(0, folder.events.stat().st_size - known))
    except OSError:
        return []


def _find_cause(events: Sequence[Line], ended: Ended) -> str:
    """The cause of the end of an attempt, in one line."""
    reason = ended.reason or ""
    death = reason if " died of " in reason else ""
    if found := find_fault(events, death):
        return found
    stopped = "some ranks stopped on a signal, and others had already ended"
    return f"{reason} (see its message above)" if reason else stopped


def _wait_for_stop(seconds: float, signals: Signals) -> bool:
    """Waits; returns True as soon as a stop signal is received."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not signals.received:
        time.sleep(LOOK_S)
    return bool(signals.received)


def _format_restarts(restarts: int) -> str:
    return f"{restarts} restart{'' if restarts == 1 else 's'}"
