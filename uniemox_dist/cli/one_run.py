"""Helpers for the commands whose argument is one run's folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from uniemox_dist.checkpoints.folders import Checkpoint
    from uniemox_dist.checkpoints.verify import Unread


class RunPath(click.Path):
    """A run's folder as an argument. An empty text, as from an unset variable, is an error, not the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from uniemox_dist.core.files import require_local

        refuse_empty(value)
        return super().convert(require_local(value, "RUN"), param, ctx)


def refuse_empty(run: object) -> None:
    """
    Raises:
        UserError: if RUN is an empty text.
    """
    from uniemox_dist.core.errors import UserError

    if run == "":
        raise UserError("RUN is empty; give run.dir/run.name, such as demo/runs/demo")


def find_checkpoints(run: Path) -> Path:
    """A run's checkpoints/.

    Raises:
        UserError: if RUN is not a run's folder.
    """
    from uniemox_dist.checkpoints.folders import COMPLETE
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import open_run

    above = run.resolve().parent
    if (run / COMPLETE).is_file():
        raise UserError(f"RUN={run}: is one checkpoint; give its run's folder, {above.parent}")
    if run.name == "checkpoints" and run.is_dir():
        raise UserError(f"RUN={run}: give the run's folder, {above}")
    place = run / "checkpoints"
    return place if place.is_dir() else open_run(run).checkpoints


@contextmanager
def hold_lock(run: Path, *, only_look: bool) -> Iterator[None]:
    """Holds the run's lock, so that it cannot start meanwhile.

    Raises:
        UserError: if the run trains.
    """
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import RunFolder

    folder = RunFolder(run)
    lock = folder.check_lock()
    if lock.held:
        raise UserError(
            f"RUN={run}: {lock.holder or 'another process'} is training here and prunes by itself at each save; "
            "wait or stop it, or change its run.keep_last and run.keep_every"
        )
    if only_look:
        yield
        return
    folder.lock()
    try:
        yield
    finally:
        folder.unlock()


def list_requested(run: Path, step: int | None) -> "list[Checkpoint | Unread]":
    """The folders that `verify` checks: those of a run's checkpoints, or one folder, which may be set aside.

    Raises:
        UserError: if there are none.
    """
    from uniemox_dist.checkpoints import folders
    from uniemox_dist.checkpoints.verify import Unread, examine
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import is_run

    path = Path(os.path.abspath(run))  # not resolved: the name of a link is the checkpoint's
    named = folders.NAME.match(path.name.removeprefix(".")) is not None
    if (run / folders.COMPLETE).is_file() or (named and run.is_dir() and not is_run(run)):
        one = examine(path)
        if step is not None and not isinstance(one, Unread) and one.step != step:
            raise UserError(
                f"--step={step}: RUN={run} is the checkpoint of step {one.step}; leave --step out"
            )
        return [one]
    place = find_checkpoints(run)
    chosen: list[Checkpoint | Unread] = [*folders.list_complete_checkpoints(place)]
    steps = ", ".join(str(c.step) for c in chosen if not isinstance(c, Unread)) or "none"
    chosen += map(examine, folders.list_incomplete(place))
    if not chosen:
        raise UserError(f"RUN={run}: has no complete checkpoint; let the run save one first")
    if step is not None:
        chosen = [
            c
            for c in chosen
            if (c.folder.name if isinstance(c, Unread) else folders.step_folder(c.step))
            == folders.step_folder(step)
        ]
        if not chosen:
            raise UserError(f"--step={step}: {run} has no complete checkpoint of that step; it has {steps}")
    return chosen


def remove(path: Path, *, seen: bool) -> None:
    """Deletes a folder, or a link without its target.

    Args:
        seen: whether readers may have it open. It is then renamed first, so that they never read a part of it.
    """
    from uniemox_dist.core.files import remove_dir

    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        (remove_dir if seen else shutil.rmtree)(path)


def count_bytes(path: Path) -> int:
    """Bytes that deleting a path frees: 0 for a link."""
    from uniemox_dist.checkpoints.folders import count_bytes_below

    if path.is_symlink():
        return 0
    return count_bytes_below(path) if path.is_dir() else path.stat().st_size
