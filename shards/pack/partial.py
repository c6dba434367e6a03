"""The folder that a pack writes into, and how it becomes OUT.

It is `OUT.partial` beside OUT, and is renamed to OUT when the pack is complete. If OUT exists already (an empty folder,
a mount point such as a Docker volume, a link to a folder), a folder cannot be renamed to it. The working folder is
then `OUT/.partial`, and its content moves into OUT, manifests last.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from shards.format.entries import ShardEntry
from shards.format.index import index_path
from shards.format.manifest import MANIFEST, SIZES
from shards.format.rejected import REJECTED
from shards.pack.journal import has_steps
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import fsync_dir, publish_dir, read_json, try_lock, write_bytes

WORK = ".work"
_LOCK = "lock"
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
def open_partial(
    out: Path,
    resume: bool,
    *,
    appends: bool = False,
    again: str = "continue with the same command and --resume",
) -> Iterator[Path]:
    """Yields the folder that becomes `out`, or that is appended to it, locked for this process. After an error it is
    kept if it has complete shards; `again` is the advice for this case.

    Raises:
        UserError: if another pack is running, was interrupted or has just become `out`, or the disk is full.
    """
    partial = _partial_folder(out)
    work = partial / WORK
    with _lock(out, partial):
        if has_steps(work) and not resume:
            raise UserError(
                f"OUT={out}: an interrupted pack is in {_display(partial)}; continue it with --resume, or delete it"
            )
        if not has_steps(work):
            clear_partial(partial)
        try:
            if not appends:
                _check_free(out)
            yield partial
        except BaseException as error:
            is_kept = has_steps(work)
            if not is_kept:
                delete_partial(partial)
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                kept = f"complete shards are in {_display(partial)}" if is_kept else "nothing was kept"
                then = again if is_kept else "start again"
                raise UserError(
                    f"OUT={out}: {error.strerror}; {kept}; free some space, then {then}"
                ) from None
            raise


def _check_free(out: Path) -> None:
    """
    Raises:
        UserError: if another command has written `out` since this one started.
    """
    if is_taken(out):
        raise UserError(
            f"OUT={out}: another process has completed a data set there meanwhile; give another folder, or keep it"
        )


def publish(partial: Path, out: Path) -> None:
    """Moves a complete pack to `out`. After a kill `out` is either missing, or `finish_publishing` completes it.

    Raises:
        UserError: if another command has written `out`.
    """
    _check_free(out)
    if out.is_dir():
        write_bytes(partial / WORK / _MOVING, b"")
        _move(partial, out)
    else:
        publish_dir(partial, out)
        _delete_work(out / WORK)


def publish_into(partial: Path, out: Path) -> None:
    """Moves new shards into a finished data set, and then replaces its manifests. After a kill `out` is whole, with or
    without the new shards of a split, and `finish_publishing` completes it."""
    write_bytes(partial / WORK / _MOVING, _APPEND)
    _move_files(partial, out)


def has_complete_shards(out: Path) -> bool:
    """Whether an interrupted command left any."""
    return has_steps(_partial_folder(out) / WORK)


def read_plan(out: Path) -> dict[str, Any] | None:
    """The plan of an interrupted command; None if there is none."""
    try:
        return dict(read_json(_partial_folder(out) / WORK / "plan.json"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return {}


def finish_publishing(out: Path) -> None:
    """Finishes a `publish` or `publish_into` that was killed, if there is one."""
    if (out / WORK / _LOCK).is_file():
        _delete_work(out / WORK)
    with _interrupted_move(out) as partial:
        if partial is not None:
            is_append = (partial / WORK / _MOVING).read_bytes() == _APPEND
            (_move_files if is_append else _move)(partial, out)


def undo_publishing(out: Path) -> None:
    """Undoes a `publish` that was killed, if there is one: moves the pieces back, manifests first."""
    with _interrupted_move(out) as partial:
        if partial is not None:
            pieces = [path for path in out.iterdir() if path.name not in _NO_CONTENT]
            for path in sorted(pieces, key=lambda path: (not _has_manifest(path), path)):
                os.rename(path, partial / path.name)
            fsync_dir(out)
            (partial / WORK / _MOVING).unlink()


@contextmanager
def _interrupted_move(out: Path) -> Iterator[Path | None]:
    """Yields the partial folder, locked, if moving its pieces to `out` was interrupted; otherwise None."""
    partial = _partial_folder(out)
    if not (partial / WORK / _MOVING).is_file() and not _is_bare(partial):
        yield None
        return
    with _lock(out, partial):
        if (partial / WORK / _MOVING).is_file():
            yield partial
        else:  # it was done, here or by another process
            if _is_bare(partial):
                delete_partial(partial)
            yield None


def _is_bare(partial: Path) -> bool:
    """Whether a partial folder exists and has nothing but the lock file."""
    work = partial / WORK
    return partial.is_dir() and all(path in (work, work / _LOCK) for path in partial.rglob("*"))


def _partial_folder(out: Path) -> Path:
    out = out.absolute()  # so that `.` has a name
    beside = out.with_name(f"{out.name}.partial")
    return out / INSIDE if out.is_dir() and not beside.is_dir() else beside


def _display(partial: Path) -> str:
    return f"{partial.parent.name}/{INSIDE}" if partial.name == INSIDE else partial.name


@contextmanager
def _lock(out: Path, partial: Path) -> Iterator[None]:
    """Holds the lock of a partial folder, which is created if missing."""
    lock: TextIO | None = None
    try:
        while lock is None:
            lock = try_lock(partial / WORK / _LOCK)
    except BlockingIOError:
        raise UserError(
            f"OUT={out}: another process is writing into {_display(partial)}; wait until it ends"
        ) from None
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); give another folder") from None
    with lock:
        yield


def clear_partial(partial: Path) -> None:
    """Deletes the content of a partial folder, except the lock file; the mark of a complete pack last, so that a kill
    in between can be repaired."""
    kept = (partial / WORK, partial / WORK / _LOCK)
    paths = [path for path in (*partial.iterdir(), *(partial / WORK).iterdir()) if path not in kept]
    for path in sorted(paths, key=lambda path: path.name == _MOVING):
        _delete(path)


def delete_leftovers(partial: Path, entries: Mapping[str, Iterable[ShardEntry]]) -> None:
    """Deletes everything that a killed process left in a partial folder except complete shards, which `entries` lists
    by split: temporary files, other tars, and empty folders. The folders of the splits stay."""
    complete, splits = set[Path](), {partial / split for split in entries}
    for split, shards in entries.items():
        for entry in shards:
            complete |= {partial / split / entry.name, index_path(partial / split, entry.name)}
    for found, folders, names in os.walk(partial, topdown=False):
        if WORK in Path(found).relative_to(partial).parts:
            continue
        for path in (Path(found, name) for name in [*names, *folders]):
            if path.is_symlink() or not path.is_dir():
                if path not in complete:
                    path.unlink()
            elif path.name != WORK and path not in splits and not any(path.iterdir()):
                path.rmdir()


def delete_partial(partial: Path) -> None:
    """Deletes a partial folder, the lock file last: from then on another process may begin to write there."""
    with suppress(OSError):
        clear_partial(partial)
        _delete_work(partial / WORK)
        partial.rmdir()


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _delete_work(work: Path) -> None:
    """Deletes a working folder, the lock file last."""
    with suppress(OSError):
        for path in work.iterdir():
            if path.name != _LOCK:
                _delete(path)
        (work / _LOCK).unlink()
        work.rmdir()


def _move(partial: Path, out: Path) -> None:
    """Moves the pieces of a complete pack into an empty folder: a manifest after all files that it names, and part.json
    after all manifests."""
    pieces = [path for path in partial.iterdir() if path.name != WORK]
    last = [path for path in pieces if _has_manifest(path)]
    note = [path for path in pieces if path.name == PART]
    first = [path for path in pieces if path not in last and path not in note]
    for group in (first, last, note):
        for path in sorted(group):
            os.rename(path, out / path.name)
        fsync_dir(out)
    delete_partial(partial)


def _has_manifest(path: Path) -> bool:
    return path.name == MANIFEST or (path / MANIFEST).is_file()


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
    delete_partial(partial)
