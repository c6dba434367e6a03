"""Builds data sets out of others: shares files by links, and publishes complete folders only."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import publish_dir

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


@contextmanager
def publish_on_success(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out` on success, and is deleted otherwise.

    Raises:
        UserError: if `out` exists and is not an empty folder, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT={out}: exists; give another folder, or delete it")
    out = out.absolute()  # so that `.` has a name
    partial = out.with_name(f".{out.name}.tmp")  # not the name of an interrupted pack
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); give another folder") from None
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        publish_dir(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
