"""The folder in which a pack grows, and how it becomes OUT: whole, or with its manifests last.

It is `OUT.partial` beside OUT and is renamed to it. Where OUT is there already (an empty folder, a mount point
such as a Docker volume, a link to a folder) nothing can be renamed to its place: then it is `OUT/.partial`, and
what it holds moves into OUT.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.format.manifest import MANIFEST
from shards.pack.journal import has_steps
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import fsync_dir, publish_dir, write_bytes

WORK = ".work"
PART = "part.json"
INSIDE = ".partial"
_MOVING = "moving"
"""In the working folder of a pack that is whole, and of which some pieces may be in OUT already."""
_NO_CONTENT = {INSIDE, "lost+found"}  # the latter is in every fresh ext4 file system
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def is_taken(out: Path) -> bool:
    """Whether OUT holds anything that is not an interrupted pack of ours.

    Raises:
        UserError: for a name that no folder can have, and a link that leads nowhere.
    """
    try:
        if out.is_symlink() and not out.exists():
            raise UserError(f"OUT={out}: a link that leads nowhere; delete it, or make the folder it names")
        _of(out).exists()  # its name is longer than OUT's
        return out.exists() and (
            not out.is_dir() or any(path.name not in _NO_CONTENT for path in out.iterdir())
        )
    except OSError as error:
        raise UserError(f"OUT={out}: {error.strerror}; give another folder") from None


@contextmanager
def growing(out: Path, resume: bool) -> Iterator[Path]:
    """The folder that becomes `out`: this process's alone, kept after an error if it holds whole shards.

    Raises:
        UserError: if another pack is under way or was interrupted, or there is no room to write.
    """
    partial = _of(out)
    work = partial / WORK
    if has_steps(work) and not resume:
        raise UserError(
            f"OUT={out}: an interrupted pack lies in {_shown(partial)}; go on with --resume, or delete it"
        )
    with _alone(out, partial):
        if not has_steps(work):
            _clear(partial)
        try:
            yield partial
        except BaseException as error:
            whole = has_steps(work)
            if not whole:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                kept = f"the whole shards stay in {_shown(partial)}: " if whole else "nothing was kept: "
                again = "the same command with --resume goes on" if whole else "start again"
                raise UserError(f"OUT={out}: {error.strerror}; {kept}make room, then {again}") from None
            raise


def publish(partial: Path, out: Path) -> None:
    """Makes a pack that is whole `out`. A kill leaves either nothing of it there, or what `go_on_moving` mends."""
    if out.is_dir():
        write_bytes(partial / WORK / _MOVING, b"")
        _move(partial, out)
    else:
        publish_dir(partial, out)
    shutil.rmtree(out / WORK, ignore_errors=True)


def go_on_moving(out: Path) -> None:
    """Finishes a `publish` that was killed, where there is one."""
    partial = _of(out)
    if (partial / WORK / _MOVING).is_file():
        with _alone(out, partial):
            _move(partial, out)


def _of(out: Path) -> Path:
    out = out.absolute()  # so that `.` has a name, too
    beside = out.with_name(f"{out.name}.partial")
    return out / INSIDE if out.is_dir() and not beside.is_dir() else beside


def _shown(partial: Path) -> str:
    return f"{partial.parent.name}/{INSIDE}" if partial.name == INSIDE else partial.name


@contextmanager
def _alone(out: Path, partial: Path) -> Iterator[None]:
    """Holds the lock of a partial folder, which it makes where there is none."""
    try:
        (partial / WORK).mkdir(parents=True, exist_ok=True)
        lock = open(partial / WORK / "lock", "w")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); give another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"OUT={out}: another process is packing into {_shown(partial)}; wait for it"
            ) from None
        yield


def _clear(partial: Path) -> None:
    """Deletes what a pack without a whole shard left, except the lock that is held."""
    for path in [*partial.iterdir(), *(partial / WORK).iterdir()]:
        if path not in (partial / WORK, partial / WORK / "lock"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _move(partial: Path, out: Path) -> None:
    """Moves the pieces of a whole pack into an empty folder. What has a manifest has all that it names, and what has
    a part.json has all its manifests."""
    pieces = [path for path in partial.iterdir() if path.name != WORK]
    last = [path for path in pieces if path.name == MANIFEST or (path / MANIFEST).is_file()]
    note = [path for path in pieces if path.name == PART]
    first = [path for path in pieces if path not in last and path not in note]
    for group in (first, last, note):
        for path in sorted(group):
            os.rename(path, out / path.name)
        fsync_dir(out)
    shutil.rmtree(partial)
