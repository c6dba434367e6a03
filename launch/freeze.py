"""Copies the code that a submission uses, so that later edits and updates do not change queued jobs.

A copy is named by the hash of its content, published as a whole, and reused by later submissions of the same code.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.submission import SUBMISSION, lock_submissions
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    canonical_json,
    fsync_dir,
    publish_dir,
    read_json,
    sha256_bytes,
    sha256_file,
)

PACKAGES = ("uniemox_dist", "shards", "launch")
LEFT_OUT = ("shards/demo",)
SHIPPED_TEACHER = "uniemox_dist/teacher/demo_teacher"
DETECTORS = "shards/detect/weights"
"""Large files that only some commands read."""
MAIN = (
    "__main__.py",
    b"""# `python FOLDER pretrain ...` runs these packages, whatever lies in the working directory.
from uniemox_dist.cli.main import main

main()
""",
)
HASH_DIGITS = 12


def freeze_code(into: Path, *, shipped_teacher: bool, detectors: bool = False) -> Path:
    """Copies the installed packages into a folder below `into`, unless the copy exists; returns its path.

    Args:
        shipped_teacher: include the teacher that comes with the package.
        detectors: include the person detectors' weights.

    Raises:
        UserError: if the existing copy was edited, or a copy cannot be made.
    """
    files, hashes = _list_installed_files(shipped_teacher, detectors)
    final = into / _make_name(hashes)
    if final.exists():
        _check(final)
        return final
    try:
        into.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=into, prefix=f".{final.name}.", suffix=".tmp"))
    except OSError as error:
        raise UserError(
            f"{into} cannot be made ({error.strerror}); give a run.dir that can be written"
        ) from None
    try:
        temporary.chmod(0o755)
        (temporary / MAIN[0]).write_bytes(MAIN[1])
        for name, path in files.items():
            _copy(path, temporary / name)
        copied = {name: sha256_file(temporary / name) for name in hashes}
        if copied != hashes:  # a file changed during the copy
            changed = next(name for name in files if copied[name] != hashes[name])
            raise UserError(f"{files[changed]} changed while it was copied; submit again")
        publish_dir(temporary, final)
    except OSError as error:
        if not final.exists():  # otherwise another submission has just published the same code
            raise UserError(
                f"{final} cannot be made ({error.strerror or error}); free space, or give another run.dir"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextmanager
def frozen_code(into: Path, submission: Path, **parts: bool) -> Iterator[Path]:
    """Freezes the code of one submission. If the block fails, removes the copy, provided that this submission made it
    and no other one uses it.

    Args:
        into: the folder of all copies.
        submission: the folder of this submission; those of others lie beside it.
        parts: arguments of `freeze_code`.
    """
    # The lock and the order "folder first, then code" let each submission see the other before it removes a copy.
    with lock_submissions(into.parent):
        before = set(into.iterdir()) if into.is_dir() else None
        code = freeze_code(into, **parts)
    try:
        yield code
    except BaseException:
        if before is None or code not in before:
            with lock_submissions(into.parent):
                if not any(
                    _may_use(other, code) for other in submission.parent.iterdir() if other != submission
                ):
                    shutil.rmtree(code, ignore_errors=True)
                    if before is None:
                        with suppress(OSError):  # another copy has been made meanwhile
                            into.rmdir()
        raise


def _may_use(submission: Path, code: Path) -> bool:
    """Whether a folder is another submission that uses a copy, or does not state its copy yet."""
    if not submission.is_dir() or submission == code.parent:
        return False
    try:
        return bool(read_json(submission / SUBMISSION)["code"] == code.name)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def code_name(*, shipped_teacher: bool, detectors: bool = False) -> str:
    """The name of a copy of the installed packages."""
    return _make_name(_list_installed_files(shipped_teacher, detectors)[1])


def content_hash(folder: Path) -> str:
    """The name for a copy's content, without the files that Python compiles there."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return _make_name({name: sha256_file(folder / name) for name in names if _is_counted(name)})


def _check(copy: Path) -> None:
    if (found := content_hash(copy)) != copy.name:
        raise UserError(
            f"{copy}: was edited since it was frozen (its content is now {found}); move it away and submit again"
        )


def _list_installed_files(shipped_teacher: bool, detectors: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to copy by their names in the copy, and their hashes."""
    parts = {SHIPPED_TEACHER: shipped_teacher, DETECTORS: detectors}
    files = dict(_list_files((*LEFT_OUT, *(part for part, needed in parts.items() if not needed))))
    return files, {
        MAIN[0]: sha256_bytes(MAIN[1]),
        **{name: sha256_file(path) for name, path in files.items()},
    }


def _list_files(left_out: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Pairs of name in the copy and path of the installed file, sorted by name."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in root.rglob("*"):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            if path.is_file() and _is_counted(name) and not name.startswith(tuple(f"{x}/" for x in left_out)):
                found.append((name, path))
    yield from sorted(found)


def _is_counted(name: str) -> bool:
    parts = name.split("/")
    return not name.endswith((".pyc", ".pyo")) and not any(p == "__pycache__" or p[0] == "." for p in parts)


def _make_name(hashes: dict[str, str]) -> str:
    return sha256_bytes(canonical_json(sorted(hashes.items())))[:HASH_DIGITS]


def _copy(source: Path, target: Path) -> None:
    """Copies a file and makes it read-only. Folders stay writable, so that Python can store compiled files there and
    the run's folder can be deleted."""
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
        fsync_dir(target.parent.parent)
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    target.chmod(0o444)
