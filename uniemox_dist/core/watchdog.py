"""A process that hangs ends itself, and leaves the stacks of all its threads behind.

Ranks that wait for one that hangs, crashed silently or sits on a dead file system would otherwise hold their GPUs until
somebody looks.
"""

import faulthandler
import os
import threading
from collections.abc import Callable
from pathlib import Path

from uniemox_dist.core.errors import EXIT_FAULT

TICK_S = 0.5
GRACE_S = 2.0
"""Between stacks and end: ranks that wait for the same one get the time to write theirs before connections break."""


class Watchdog:
    """Ends the process with exit code 1 if what was announced last takes longer than it may.

    Time is counted in ticks, so that a job that was suspended as a whole and goes on is not ended for it. A rank that
    hangs while it holds Python's lock cannot end itself: the others do, and whoever started them then kills it.
    """

    def __init__(self, stacks: Path, say: Callable[[str], None]) -> None:
        """`stacks` is written only when it comes to that; `say` is told in one line what took too long."""
        self._stacks, self._say = stacks, say
        self._doing, self._limit_s, self._waited_s = "", float("inf"), 0.0
        self._changed, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        """Begins to watch."""
        self._thread.start()
        return self

    def expect(self, doing: str, limit_s: float) -> None:
        """From now on `doing` is under way, and may take `limit_s` seconds until the next call."""
        with self._changed:
            self._doing, self._limit_s, self._waited_s = doing, limit_s, 0.0

    def close(self) -> None:
        """Watches no longer."""
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
            where = f"what every thread did then stands in {self._stacks}"
            try:
                write_stacks(self._stacks, reason)
            except OSError as error:
                where = f"{self._stacks} could not be written ({error.strerror})"
            self._say(f"{reason}; {where}")
        finally:
            self._closed.wait(GRACE_S)
            os._exit(EXIT_FAULT)  # the main thread hangs: it can neither be asked nor waited for


def write_stacks(path: Path, reason: str) -> None:
    """Appends the Python stacks of all threads of this process to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{reason}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
