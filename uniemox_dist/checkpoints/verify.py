"""Reads every byte of checkpoints again, and finds folders that cannot be read. Torch-free."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uniemox_dist.checkpoints.complete_entries import find_wrong_entry
from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    FORMAT,
    FORMAT_VERSION,
    NAME,
    SET_ASIDE,
    UNREADABLE,
    Checkpoint,
    digest,
    find_file_problem,
    read_checkpoint,
)
from uniemox_dist.checkpoints.retention import list_superfluous
from uniemox_dist.core.errors import Fault
from uniemox_dist.core.files import read_json


@dataclass(frozen=True)
class Unread:
    """A folder that is not read as a checkpoint."""

    folder: Path
    kind: Literal["incomplete", "damaged", "newer", "unreadable"]
    """incomplete: a save that never ended; newer: a later version may read it; unreadable: its disk does not answer,
    and its content may be intact."""
    problem: str


@dataclass(frozen=True)
class Verdict:
    """The result for one checkpoint."""

    checkpoint: Checkpoint
    problems: tuple[str, ...]
    """One problem for complete.json if it was altered, and one for each file whose size or SHA-256 differs."""
    gone: bool = False
    """True if it was deleted meanwhile, by the retention of a run in progress."""


def examine(folder: Path) -> Checkpoint | Unread:
    """Reads a folder by its complete.json. The folder may have any name, because it may have been renamed or
    copied."""
    found = read_checkpoint(folder)
    if found is not None:
        return found
    path = folder / COMPLETE
    if folder.name.startswith("."):
        return Unread(folder, "incomplete", "its save, or its deletion, has not ended")
    if not path.exists():
        return Unread(folder, "incomplete", f"it has no {COMPLETE}, which a save writes last")
    try:
        info = read_json(path)
    except OSError as error:
        return Unread(folder, "unreadable", f"{path} {UNREADABLE}: {error.strerror}")
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        return Unread(folder, "damaged", f"{path} is not a {FORMAT}")
    version = info.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        return Unread(folder, "newer", f"{path} is of a newer version; update uniemox-dist")
    problem = _own_problem(folder, info)
    return Checkpoint(folder, info) if problem is None else Unread(folder, "damaged", f"{path} {problem}")


def _own_problem(folder: Path, info: dict[str, Any]) -> str | None:
    try:
        if info.get("sha256", digest(info)) != digest(info):
            return "was altered: its SHA-256 differs"
    except ValueError:  # NaN has no canonical form
        return "was altered: it holds what no save writes"
    if (wrong := find_wrong_entry(info)) is not None:
        return wrong
    step, named = info["step"], NAME.fullmatch(folder.name) or SET_ASIDE.fullmatch(folder.name)
    return f"is that of step {step}" if named and int(named[1]) != step else None


def list_superseded(
    place: Path, complete: Sequence[Checkpoint], keep_last: int, keep_every: int | None, aside: Sequence[Path]
) -> tuple[list[Path], list[tuple[Checkpoint, str]]]:
    """Returns the checkpoints to delete, and the damaged ones found, each with the reason. Only intact checkpoints
    count among the last ones to keep. Reads every byte of the last ones if there is anything to delete: an old
    checkpoint, or a folder in `aside`. `complete` has the oldest first.

    Raises:
        Fault: if the newest checkpoint is damaged or missing and so cannot replace those that would be deleted.
    """
    steps = [checkpoint.step for checkpoint in complete]
    plain = list_superfluous(steps, keep_last, keep_every)
    if not plain and not aside:
        return [], []
    if not complete:
        raise Fault(f"{place}: no complete checkpoint could replace {aside[0].name}; nothing was deleted")
    sound, broken = _newest_sound(complete, keep_last if plain else 1)
    if complete[-1] not in sound:
        raise Fault(
            f"the newest checkpoint is damaged ({broken[0][1]}); nothing was deleted: start the run again, which "
            f"skips it, or delete {complete[-1].folder} by hand"
        )
    doomed = list_superfluous(steps, keep_last + len(broken), keep_every) if plain else []
    return [checkpoint.folder for checkpoint in complete if checkpoint.step in doomed], broken


def _newest_sound(
    complete: Sequence[Checkpoint], count: int
) -> tuple[list[Checkpoint], list[tuple[Checkpoint, str]]]:
    sound: list[Checkpoint] = []
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(complete):
        if len(sound) == count:
            break
        problem = checkpoint.problem(hashes=True)
        if problem is None:
            sound.append(checkpoint)
        else:
            damaged.append((checkpoint, problem))
    return sound, damaged


def verify(
    checkpoints: Sequence[Checkpoint], *, workers: int, read: Callable[[int], object] = lambda _: None
) -> Iterator[Verdict]:
    """Hashes all files of checkpoints in threads; calls `read` with the bytes of each file when it is done."""
    with ThreadPoolExecutor(workers) as pool:

        def one(checkpoint: Checkpoint, name: str) -> str | None:
            facts = checkpoint.info["files"][name]
            problem = find_file_problem(checkpoint.folder / name, facts, hashes=True)
            read(facts["bytes"])
            return problem

        jobs = [(c, [pool.submit(one, c, name) for name in c.info["files"]]) for c in checkpoints]
        try:
            for checkpoint, futures in jobs:
                found = [checkpoint.own_problem(), *(future.result() for future in futures)]
                problems = tuple(problem for problem in found if problem is not None)
                gone = bool(problems) and not checkpoint.folder.is_dir()
                yield Verdict(checkpoint, () if gone else problems, gone)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupted command does not read the rest
