"""The folder that a pack writes into, and how it becomes OUT.

It is `OUT.partial` beside OUT, and is renamed to OUT when the pack is complete. If OUT exists already (an empty folder,
a mount point such as a Docker volume, a link to a folder), a folder cannot be renamed to it. The working folder is
then `OUT/.partial`, and its content moves into OUT, manifests last.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format.manifest import MANIFEST, SIZES
from shards.format.rejected import REJECTED
from shards.pack.journal import has_steps
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import fsync_dir, publish_dir, read_json, write_bytes

WORK = ".work"
PART = "part.json"
INSIDE = ".partial"
_MOVING = "moving"
"""Marks a complete pack, some pieces of which may be in OUT already; a file in the working folder."""
_APPEND = b"append"
"""Content of that file if the pieces go into a finished data set."""
_NO_CONTENT = {INSIDE, "lost+found"}  # the latter is in every fresh ext4 file system
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def is_taken(out: Path) -> bool:
    """Whether OUT contains anything other than an interrupted pack of this command.

    Raises:
        UserError: for an illegal folder name and a broken link.
    """
    try:
        if out.is_symlink() and not out.exists():
            raise UserError(f"OUT={out}: a broken link; delete it, or create the folder it points to")
        _partial_folder(out).exists()  # its name is longer than OUT's
        return out.exists() and (
            not out.is_dir() or any(path.name not in _NO_CONTENT for path in out.iterdir())
        )
    except OSError as error:
        raise UserError(f"OUT={out}: {error.strerror}; give another folder") from None


@contextmanager
def open_partial(out: Path, resume: bool) -> Iterator[Path]:
    """Yields the folder that becomes `out`, locked for this process. After an error it is kept if it has complete
    shards.

    Raises:
        UserError: if another pack is running or was interrupted, or the disk is full.
    """
    partial = _partial_folder(out)
    work = partial / WORK
    if has_steps(work) and not resume:
        raise UserError(
            f"OUT={out}: an interrupted pack is in {_display(partial)}; continue it with --resume, or delete it"
        )
    with _lock(out, partial):
        if not has_steps(work):
            _clear(partial)
        try:
            yield partial
        except BaseException as error:
            is_kept = has_steps(work)
            if not is_kept:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                kept = f"complete shards are in {_display(partial)}" if is_kept else "nothing was kept"
                again = "continue with the same command and --resume" if is_kept else "start again"
                raise UserError(
                    f"OUT={out}: {error.strerror}; {kept}; free some space, then {again}"
                ) from None
            raise


def publish(partial: Path, out: Path) -> None:
    """Moves a complete pack to `out`. After a kill `out` is either missing, or `finish_publishing` completes it."""
    if out.is_dir():
        write_bytes(partial / WORK / _MOVING, b"")
        _move(partial, out)
    else:
        publish_dir(partial, out)
    shutil.rmtree(out / WORK, ignore_errors=True)


def publish_into(partial: Path, out: Path) -> None:
    """Moves new shards into a finished data set, and then replaces its manifests. After a kill `out` is whole, with or
    without the new shards of a split, and `finish_publishing` completes it."""
    write_bytes(partial / WORK / _MOVING, _APPEND)
    _move_files(partial, out)


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan of an interrupted pack or append; None if there is none."""
    try:
        return dict(read_json(_partial_folder(out) / WORK / "plan.json"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return {}


def finish_publishing(out: Path) -> None:
    """Finishes a `publish` or `publish_into` that was killed, if there is one."""
    partial = _partial_folder(out)
    marker = partial / WORK / _MOVING
    if marker.is_file():
        with _lock(out, partial):
            (_move_files if marker.read_bytes() == _APPEND else _move)(partial, out)


def _partial_folder(out: Path) -> Path:
    out = out.absolute()  # so that `.` has a name
    beside = out.with_name(f"{out.name}.partial")
    return out / INSIDE if out.is_dir() and not beside.is_dir() else beside


def _display(partial: Path) -> str:
    return f"{partial.parent.name}/{INSIDE}" if partial.name == INSIDE else partial.name


@contextmanager
def _lock(out: Path, partial: Path) -> Iterator[None]:
    """Holds the lock of a partial folder, which is created if missing."""
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
                f"OUT={out}: another process is packing into {_display(partial)}; wait until it ends"
            ) from None
        yield


def _clear(partial: Path) -> None:
    """Deletes the remains of a pack without a complete shard, except the lock file."""
    for path in [*partial.iterdir(), *(partial / WORK).iterdir()]:
        if path not in (partial / WORK, partial / WORK / "lock"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _move(partial: Path, out: Path) -> None:
    """Moves the pieces of a complete pack into an empty folder: a manifest after all files that it names, and part.json
    after all manifests."""
    pieces = [path for path in partial.iterdir() if path.name != WORK]
    last = [path for path in pieces if path.name == MANIFEST or (path / MANIFEST).is_file()]
    note = [path for path in pieces if path.name == PART]
    first = [path for path in pieces if path not in last and path not in note]
    for group in (first, last, note):
        for path in sorted(group):
            os.rename(path, out / path.name)
        fsync_dir(out)
    shutil.rmtree(partial)


def publishing_order(name: Path) -> tuple[int, str]:
    """The sort key of a file of a data set: lists and manifests come after the shards that they name."""
    return (2 if name.name == MANIFEST else 1 if name.name in (SIZES, REJECTED) else 0), str(name)


def _move_files(partial: Path, out: Path) -> None:
    """Moves all files of a pack into a finished data set, manifests last."""
    found = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
    names = sorted((name for name in found if WORK not in name.parts), key=publishing_order)
    for is_manifest in (False, True):
        group = [name for name in names if (name.name == MANIFEST) == is_manifest]
        for folder in sorted({(out / name).parent for name in group}):
            folder.mkdir(parents=True, exist_ok=True)
        for name in group:
            os.replace(partial / name, out / name)
        for folder in sorted({(out / name).parent for name in group}):
            fsync_dir(folder)
    shutil.rmtree(partial)
