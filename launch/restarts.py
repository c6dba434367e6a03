"""What the local launcher does after a fault: it starts the ranks again, as long as that brings the run on."""

import json
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from uniemox_dist.checkpoints.folders import complete_checkpoints
from uniemox_dist.core.errors import EXIT_FAULT, EXIT_REQUEUE
from uniemox_dist.distributed.local_launcher import LOOK_S, Ended, Signals, attempt, say
from uniemox_dist.runs.events import FaultEvent, Restart, Signal
from uniemox_dist.runs.folder import RunFolder

LONGEST_PAUSE_S = 60.0
"""Pauses before restarts grow from one second to this."""


def run_with_restarts(
    command: Callable[[], Sequence[str]],
    ranks: int,
    folder: RunFolder,
    signals: Signals,
    *,
    max_restarts: int,
    gpus: bool,
) -> int:
    """Runs the ranks of a run, and again after a fault (exit code 1): at most `max_restarts` times in a row without a
    newer complete checkpoint. Returns the exit code of the whole.

    A fault that would only happen again, as the run itself knows (an event with `"restart": false`), is not tried
    again; nor is anything once a signal asked to stop. A stop between two attempts, or while ranks are starting, ends
    with 75 if there is a checkpoint: the same command then goes on from it.

    Args:
        command: what each rank runs; asked before every attempt.
    """
    reached = newest_step(folder)
    attempts = without_progress = 0
    while not signals.received:
        attempts += 1
        known = _size(folder)
        ended = attempt(command(), ranks, signals, gpus=gpus)
        if ended.code != EXIT_FAULT:
            return ended.code
        if signals.received and not ended.unprepared:
            return EXIT_FAULT
        if signals.received:
            break
        faults = _faults(folder, known)
        last = _last(faults, ended)
        if any(fault.get("restart") is False for fault in faults):
            say(f"not started again, as the same would happen: {last}")
            return EXIT_FAULT
        step = newest_step(folder)
        if step is not None and (reached is None or step > reached):
            reached, without_progress = step, 0
        if without_progress == max_restarts:
            tried = f"after {_times(max_restarts)} without a new checkpoint" if max_restarts else "at once"
            say(f"gives up {tried} (run.max_restarts={max_restarts}); the last fault: {last}")
            if folder.path.is_dir():  # a rank that was killed could not tell
                folder.write(FaultEvent(error=f"given up {tried}: {last}", ends=True, restart=False))
            return EXIT_FAULT
        without_progress += 1
        pause_s = min(LONGEST_PAUSE_S, 2.0 ** (without_progress - 1))
        place = "from the beginning" if step is None else f"from step {step}"
        say(f"{last}; starts again {place} in {pause_s:.0f} s ({without_progress} of {max_restarts})")
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
        if _interrupted(pause_s, signals):
            break
    return stopped(folder, signals)


def stopped(folder: RunFolder, signals: Signals) -> int:
    """What a run ends with that a signal stopped while no rank minded it: 75 if there is a checkpoint, 1 otherwise.

    An event says so, or else the fault of the last attempt would be what the run ended with.
    """
    step = newest_step(folder)
    # If another process trains there, then it goes on.
    if folder.path.is_dir() and not folder.look_at_lock().held:
        folder.write(
            Signal(step=step, signal=signal.Signals(signals.received[0]).name, saved=step is not None)
        )
    if step is None:
        say("stopped before the first checkpoint")
        return EXIT_FAULT
    say(f"stopped; start the same command again to go on from step {step}")
    return EXIT_REQUEUE


def newest_step(folder: RunFolder) -> int | None:
    """The step of a run's newest complete checkpoint."""
    try:
        found = complete_checkpoints(folder.checkpoints)
    except OSError:  # one that is being deleted, or a file system that fails as well
        return None
    return found[-1].step if found else None


def _size(folder: RunFolder) -> int:
    """Bytes of events.jsonl: what comes after them is of the attempt that starts now."""
    try:
        return folder.events.stat().st_size
    except OSError:
        return 0


def _faults(folder: RunFolder, known: int) -> list[dict[str, Any]]:
    """The faults of the present attempt; damaged samples, which were replaced, are none."""
    try:
        with open(folder.events, "rb") as file:
            file.seek(known)
            texts = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for text in texts:
        try:
            events.append(json.loads(text))
        except ValueError:  # cut by the fault
            continue
    return [event for event in events if event.get("event") == "fault" and "error" in event]


def _last(faults: Sequence[dict[str, Any]], ended: Ended) -> str:
    """The fault that ended an attempt, in few words. A rank that was killed made the others fail, whatever they say."""
    if ended.reason and " died of " in ended.reason:
        return ended.reason
    ends = [fault for fault in faults if fault.get("ends")] or faults[-1:]
    if ends:
        return " ".join(str(ends[0]["error"]).split())
    return (
        f"{ended.reason} (its own message is above)"
        if ended.reason
        else "some ranks stopped and others ended"
    )


def _interrupted(seconds: float, signals: Signals) -> bool:
    """Waits; true as soon as a signal asks to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not signals.received:
        time.sleep(LOOK_S)
    return bool(signals.received)


def _times(restarts: int) -> str:
    return f"{restarts} restart{'' if restarts == 1 else 's'}"
