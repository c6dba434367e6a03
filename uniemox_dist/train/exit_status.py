"""How runs end before their last step: what is told of it, and the exit code."""

import logging
import socket

from uniemox_dist.core.errors import EXIT_FAULT, EXIT_REQUEUE
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events import FaultEvent, Signal
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")


def hung(folder: RunFolder, rank: int, reason: str) -> None:
    """What the watchdog says before it ends a rank."""
    error = f"rank {rank}: {reason}"
    folder.write(FaultEvent(rank=rank, host=socket.gethostname(), error=error, ends=True))
    log.error("ends: %s", reason)


def stopped(folder: RunFolder, world: World, signal: str | None, step: int, saved: bool) -> int:
    """After a signal to any rank: exit code 75 if the step is saved, and otherwise that of a fault."""
    if world.is_main:
        folder.write(Signal(step=step, signal=signal, saved=saved))
        log.info(
            "stopped by %s after step %d; start the same command again to go on",
            signal or "a rank",
            step,
        )
    return EXIT_REQUEUE if saved else EXIT_FAULT


def fault(folder: RunFolder, world: World, reason: str) -> int:
    """Ends the run with a fault that the launcher need not try again: the same would happen."""
    if world.is_main:
        folder.write(FaultEvent(error=reason, ends=True, restart=False))
        log.error("ended: %s", reason)
    return EXIT_FAULT
