"""Shares files between data sets by links."""

import errno
import os
from pathlib import Path

_NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK}


def link_file(source: Path, target: Path) -> None:
    """Links `target` to `source`: a hard link, so that either folder may be deleted; a symbolic link if the file system
    does not allow a hard link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        target.symlink_to(source.resolve())
