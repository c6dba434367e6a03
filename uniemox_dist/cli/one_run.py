"""What commands about one run's folder share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def checkpoints_of(run: Path) -> Path:
    """A run's checkpoints/.

    Raises:
        UserError: if RUN is no run's folder.
    """
    from uniemox_dist.checkpoints.folders import COMPLETE
    from uniemox_dist.runtime.errors import UserError
    from uniemox_dist.runtime.runs import open_run

    above = run.resolve().parent
    if (run / COMPLETE).is_file():
        raise UserError(f"RUN={run}: is one checkpoint; give its run's folder, {above.parent}")
    if run.name == "checkpoints" and run.is_dir():
        raise UserError(f"RUN={run}: give the run's folder, {above}")
    place = run / "checkpoints"
    return place if place.is_dir() else open_run(run).checkpoints


@contextmanager
def alone(run: Path, *, only_look: bool) -> Iterator[None]:
    """Keeps the run from starting meanwhile.

    Raises:
        UserError: if it trains.
    """
    from uniemox_dist.runtime.errors import UserError
    from uniemox_dist.runtime.run_folder import RunFolder

    folder = RunFolder(run)
    lock = folder.look_at_lock()
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
