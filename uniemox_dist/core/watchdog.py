"""A watchdog that ends a hanging process and writes the stacks of all its threads.

Otherwise ranks would hold their GPUs for as long as they wait for a rank that hangs, has crashed or waits for a dead
file system.
"""

import faulthandler
import os
import threading
from collections.abc import Callable
from pathlib import Path

from uniemox_dist.core.errors import EXIT_FAULT

TICK_S = 0.5
GRACE_S = 2.0
"""Seconds between writing the stacks and the end, in which other waiting ranks write theirs."""


class Watchdog:
    """Ends the process with exit code 1 if the present phase takes longer than its limit.

    It counts ticks, so that a job that Slurm suspended and resumed is not ended. A rank that hangs while it holds
    Python's GIL cannot end itself: the others end, and the launcher then kills it.
    """

    def __init__(self, stacks: Path, say: Callable[[str], None]) -> None:
        """`stacks` is written only if a limit is exceeded; `say` is called with one line about the phase."""
        self._stacks, self._say = stacks, say
        self._doing, self._limit_s, self._waited_s = "", float("inf"), 0.0
        self._changed, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        """Starts the thread."""
        self._thread.start()
        return self

    def expect(self, doing: str, limit_s: float) -> None:
        """Starts a phase, named `doing`, that may last `limit_s` seconds until the next call."""
        with self._changed:
            self._doing, self._limit_s, self._waited_s = doing, limit_s, 0.0

    def close(self) -> None:
        """Stops the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(TICK_S):
            with self._changed:
                self._waited_s += TICK_S
                late, doing, limit_s = self._waited_s > self._limit_s, self._doing, self._limit_s
            if late:
                self._end(f"{doing} took longer than {limit_s:g} s")

    def _end(self, reason: str) -> None:
        try:
            where = f"the stacks of all threads are in {self._stacks}"
            try:
                write_stacks(self._stacks, reason)
            except OSError as error:
                where = f"{self._stacks} could not be written ({error.strerror})"
            self._say(f"{reason}; {where}")
        finally:
            self._closed.wait(GRACE_S)
            os._exit(EXIT_FAULT)  # the main thread hangs, so that a normal exit is impossible


def write_stacks(path: Path, reason: str) -> None:
    """Appends the Python stacks of all threads of this process to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{reason}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
