"""Regular expressions of presets, with a limit on the time of a match.

A pattern such as `(a+)+b` needs time that grows exponentially with the length of a text. Python's matcher checks for
signals while it works, so a timer can end it.
"""

import re
import signal
import threading
from collections.abc import Callable
from types import FrameType

from uniemox_dist.core.errors import UserError

MOST_CHARS = 1 << 16
"""Longest text that a pattern is tried on; a longer one does not match."""
LIMIT_S = 2.0
"""Longest time of one match, seconds of this process's CPU. Usual patterns need microseconds."""


class _TookTooLong(Exception):
    """A match reached its limit."""


class Pattern:
    """A regular expression of a preset. Outside of the main thread, which alone can have a timer, it has no limit."""

    def __init__(self, field: str, text: str) -> None:
        """
        Args:
            field: the field of the preset, for errors.
        """
        self._field, self._compiled = field, re.compile(text)
        self.groups = tuple(self._compiled.groupindex)
        """The names of its groups."""

    def search(self, text: str) -> re.Match[str] | None:
        """Searches the pattern in a text.

        Raises:
            UserError: if that takes too long.
        """
        return self._run(self._compiled.search, text)

    def fullmatch(self, text: str) -> re.Match[str] | None:
        """Matches the pattern with a whole text.

        Raises:
            UserError: if that takes too long.
        """
        return self._run(self._compiled.fullmatch, text)

    def _run(self, match: Callable[[str], re.Match[str] | None], text: str) -> re.Match[str] | None:
        if len(text) > MOST_CHARS:
            return None
        if threading.current_thread() is not threading.main_thread():
            return match(text)
        try:
            _start_timer()
            try:
                return match(text)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _TookTooLong:
            raise UserError(
                f"--preset: {self._field}={self._compiled.pattern!r}: takes more than {LIMIT_S:g} s for the text "
                f"{text[:60]!r}; simplify it, such as (a+)+ to a+"
            ) from None


def _start_timer() -> None:
    global _has_handler
    if not _has_handler:  # installed once, because that takes longer than most matches
        signal.signal(signal.SIGVTALRM, _stop)
        _has_handler = True
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _TookTooLong


_has_handler = False
