"""Counts the pictures in succession that no server sent, to distinguish a few dead servers from an outage."""

import threading

from uniemox_dist.core.errors import Fault

SILENT_PICTURES = 32
"""The pack ends if no server answered for so many pictures in succession, but did before."""


class Answers:
    """The answers of all servers of one kind, in this process."""

    def __init__(self, servers: str, cause: str) -> None:
        """`servers` names their kind and `cause` the probable reason of an outage in the error line."""
        self._servers, self._cause = servers, cause
        self._lock = threading.Lock()
        self._has_answered = False
        self._silent = 0

    def add(self, is_answer: bool) -> None:
        """Counts a picture.

        Raises:
            Fault: if no server has answered for the last pictures, although some did before.
        """
        with self._lock:
            self._has_answered |= is_answer
            self._silent = 0 if is_answer else self._silent + 1
            if self._has_answered and self._silent >= SILENT_PICTURES:
                raise Fault(
                    f"no {self._servers} answered for the last {self._silent} pictures, so {self._cause} may be "
                    "down; continue with --resume"
                )
