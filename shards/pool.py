"""Runs one function over many shards, in this process or in several, with a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from uniemox_dist.core.errors import Fault

T = TypeVar("T")


class Progress(Protocol):
    """A progress display, such as a bar of tqdm."""

    total: float | None

    def update(self, n: float = 1) -> Any:
        """Counts `n` more finished items."""


def map_in_order(
    function: Callable[..., T],
    jobs: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    progress: Progress | None = None,
) -> Iterator[T]:
    """Calls `function(*job)` for each job in `workers` processes (0: this one); yields the results in order.

    Raises:
        Fault: if a process is killed.
    """
    jobs = list(jobs)
    if progress is not None:
        progress.total = len(jobs)
    for result in _map(function, jobs, workers):
        yield result
        if progress is not None:
            progress.update(1)


def _map(function: Callable[..., T], jobs: list[tuple[Any, ...]], workers: int) -> Iterator[T]:
    if not workers:
        yield from (function(*job) for job in jobs)
        return
    # Spawned, because a forked pyarrow may hold locks of threads that no longer exist.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, *zip(*jobs))
        except BrokenProcessPool:
            raise Fault(
                "a worker died (killed, or out of memory); start again with fewer --workers"
            ) from None
