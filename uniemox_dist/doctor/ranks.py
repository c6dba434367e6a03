"""How ranks tell each other what they measured. Without a process group this process is the whole world."""

import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from uniemox_dist.core.errors import EXIT_FAULT, Fault, UserError
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding, Told, Trouble, sound

T = TypeVar("T")
HOST = socket.gethostname()


def joined() -> bool:
    """Whether there is a process group; does not import torch."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def measured(measure: Callable[[], T]) -> T | Trouble:
    """What `measure` returns, or why it could not: a rank that fails must not leave the others waiting.

    `measure` may not talk to other ranks.
    """
    try:
        return measure()
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return Trouble(
            f"{name}{error.strerror or error}", "see that it is there, and may be read and written"
        )
    except (UserError, Fault) as error:
        value, _, remedy = str(error).partition("; ")
        return Trouble(value, remedy)
    except (RuntimeError, ValueError, ImportError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Trouble(f"{type(error).__name__}: {first}", "see the message; mend what it names")


def told(world: World, facts: T | Trouble) -> list[Told[T]]:
    """The facts of all ranks, on all ranks alike. Collective; they travel pickled, between ranks of one job only."""
    own: Told[T] = Told(world.rank, HOST, facts)
    if not joined() or world.size == 1:
        return [own]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own)
    return everyone


def part(everyone: Sequence[Told[tuple[Any, ...]]], number: int) -> list[Told[Any]]:
    """Of ranks that told several facts at once, one of these."""
    return [Told(one.rank, one.host, facts[number]) for one, facts in sound(everyone)]


def meet() -> None:
    """Waits for all ranks."""
    if joined():
        import torch
        import torch.distributed as dist

        # NCCL guesses the GPU from the global rank otherwise, warns, and may guess wrong
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


@contextmanager
def within(seconds: float, what: str, world: World) -> Iterator[None]:
    """Ends this process with a line and its stack if what is inside has not ended by then.

    A collective operation that hangs can be ended in no other way.
    """

    def end() -> None:
        value = f"not ended after {seconds:g} s"
        remedy = (
            "this rank hangs in it (its stack is on the error stream), or waits for one that hangs or is not reached; "
            "see the ranks that say nothing, and NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_DEBUG=INFO"
        )
        print(Finding("fail", what, value, remedy, world.rank, HOST).line(), flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_FAULT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
