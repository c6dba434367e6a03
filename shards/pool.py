"""One function over many shards, in this process or several."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from uniemox_dist.core.errors import Fault

T = TypeVar("T")


def in_order(function: Callable[..., T], *arguments: Iterable[Any], workers: int) -> Iterator[T]:
    """`map`, over some processes; 0: in this one.

    Raises:
        Fault: if a process is killed.
    """
    if not workers:
        yield from map(function, *arguments)
        return
    # Fresh processes: a forked pyarrow may hold locks of threads that do not exist any more.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, *arguments)
        except BrokenProcessPool:
            raise Fault(
                "a worker died (killed, or out of memory); start again, with fewer --workers"
            ) from None
