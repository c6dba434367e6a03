"""Converts operating system errors (no space, no permission, a folder instead of a file) to one line that names the
file and the fix."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from uniemox_dist.core.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def writing(target: str, fix: str = "give another place") -> Iterator[None]:
    """Context manager for code that writes files. `target` is the option or argument with its value; `fix` is the
    advice for all errors except a full disk.

    Raises:
        UserError: for any OSError inside. Reads of other files inside must use `reading`.
    """
    try:
        yield
    except OSError as error:
        fix = "make room, then start again" if error.errno in _NO_ROOM else fix
        raise UserError(f"{target}: cannot be written ({said(error)}); {fix}") from None


@contextmanager
def reading(target: str, fix: str = "copy it again") -> Iterator[None]:
    """Context manager for code that reads local files.

    Raises:
        UserError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be read ({said(error)}); {fix}") from None


def said(error: OSError) -> str:
    """The operating system's text for an error, without the text that libraries add."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
