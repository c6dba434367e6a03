"""What the system refuses (no room, no permission, a folder in the way) as one line that names the file and the fix."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from uniemox_dist.core.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def writing(target: str, fix: str = "give another place") -> Iterator[None]:
    """Around whatever writes; `target` is the option or argument with its value, `fix` helps unless room is missing.

    Raises:
        UserError: for any OSError inside. What is only read there has to go through `reading`.
    """
    try:
        yield
    except OSError as error:
        fix = "make room, then start again" if error.errno in _NO_ROOM else fix
        raise UserError(f"{target}: cannot be written ({said(error)}); {fix}") from None


@contextmanager
def reading(target: str, fix: str = "copy it again") -> Iterator[None]:
    """Around whatever reads local files.

    Raises:
        UserError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be read ({said(error)}); {fix}") from None


def said(error: OSError) -> str:
    """What the system says, in its own few words: libraries wrap them in theirs."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
