"""Measuring on all ranks and gathering the facts. Without a process group this process is the only rank."""

import faulthandler
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from uniemox_dist.core.errors import EXIT_FAULT, Fault, UserError
from uniemox_dist.distributed.world import World, is_joined
from uniemox_dist.doctor.findings import Finding, RankFacts, Trouble, select_with_facts

T = TypeVar("T")
HOST = socket.gethostname()


def try_measure(measure: Callable[[], T]) -> T | Trouble:
    """Returns the result of `measure`, or its error, because a rank that fails must not leave the others waiting.

    `measure` must not communicate with other ranks.
    """
    try:
        return measure()
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return Trouble(
            f"{name}{error.strerror or error}", "check that it exists, and can be read and written"
        )
    except (UserError, Fault) as error:
        value, _, remedy = str(error).partition("; ")
        return Trouble(value, remedy)
    except (RuntimeError, ValueError, ImportError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Trouble(f"{type(error).__name__}: {first}", "see the message, and fix its cause")


def gather(world: World, facts: T | Trouble) -> list[RankFacts[T]]:
    """The facts of all ranks, the same list on all ranks. Collective."""
    own: RankFacts[T] = RankFacts(world.rank, HOST, facts)
    if not is_joined():
        return [own]
    from uniemox_dist.distributed import collectives

    return collectives.gather_objects(own, world)


def select(everyone: Sequence[RankFacts[tuple[Any, ...]]], number: int) -> list[RankFacts[Any]]:
    """One of several facts that were gathered together."""
    return [RankFacts(one.rank, one.host, facts[number]) for one, facts in select_with_facts(everyone)]


def barrier() -> None:
    """Waits for all ranks; does nothing without a process group."""
    if is_joined():
        from uniemox_dist.distributed import collectives

        collectives.barrier()


@contextmanager
def limit_time(seconds: float, what: str, world: World) -> Iterator[None]:
    """Ends this process, after printing a finding and all stacks, if the block takes longer than `seconds`. There is
    no other way to end a collective operation that hangs."""

    def end() -> None:
        value = f"still running after {seconds:g} s"
        remedy = (
            "this rank hangs (its stack is on the error stream), or waits for a rank that hangs or is not reached; "
            "see the ranks that print nothing, and NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_DEBUG=INFO"
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
