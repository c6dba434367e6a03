"""Measures how long a rank computes without waiting for others, which distinguishes a slow rank from those that wait
for it.

The steps of all ranks take the same time, because each waits for the slowest in the exchange of gradients. The parts
before the exchange depend on one rank only: its wait for data, the teacher, and the student's forward pass. In ZeRO-3
the forward pass exchanges weights, so a slow rank shows only partly.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

WINDOW = 10
"""Ranks are compared at the first log interval after at least this many steps."""
NOTICED = 0.1
"""Share of the steps' time by which a slow rank must exceed the median."""


class ComputeTimer:
    """Adds up the time between `start` and `stop`; on a GPU by CUDA events, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._seconds = self._began = 0.0

    def start(self) -> None:
        """Starts an interval of computing."""
        if self._cuda:
            self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._pairs[-1][0].record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Ends the interval."""
        if self._cuda:
            self._pairs[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def read_and_reset(self) -> float:
        """Seconds since the last call; the device must have reached all events, as it has after a step."""
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._pairs) / 1e3
        self._seconds = 0.0
        self._pairs.clear()
        return seconds


@dataclass(frozen=True)
class Straggler:
    """A slow rank, for which all others wait."""

    rank: int
    host: str
    seconds: float
    """Seconds of its computing per step."""
    median_s: float
    """Seconds of the median rank."""

    def facts(self) -> dict[str, Any]:
        """The fields of its event."""
        times = {"seconds": round(self.seconds, 4), "median_s": round(self.median_s, 4)}
        return {"rank": self.rank, "host": self.host, **times}

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: it computes {self.seconds:.3f} s per step, the median rank "
            f"{self.median_s:.3f} s"
        )


class Stragglers:
    """Reports a rank when it becomes slow. It compares windows of several steps, so one slow step does not count."""

    def __init__(self, hosts: Sequence[str], factor: float) -> None:
        self.hosts, self.factor = hosts, factor
        self._slow: set[int] = set()
        self._warm = False
        self._start_window()

    def _start_window(self) -> None:
        self._own_s, self._steps, self._seconds = [0.0] * len(self.hosts), 0, 0.0

    def add(self, own_s: Sequence[float], steps: int, seconds: float) -> list[Straggler]:
        """Adds an interval: the computing time of each rank, and the duration of the steps. Returns the ranks that
        became slow.

        With an even number of ranks the lower median is used, so that of two ranks the slower is compared with the
        other. A difference that is small relative to the duration of the steps is ignored.
        """
        if not self._warm:  # the first interval includes the first step, with compilation and allocations
            self._warm = True
            return []
        self._own_s = [a + b for a, b in zip(self._own_s, own_s, strict=True)]
        self._steps, self._seconds = self._steps + steps, self._seconds + seconds
        if self._steps < WINDOW:
            return []
        median = statistics.median_low(self._own_s)
        slow = {
            rank
            for rank, own in enumerate(self._own_s)
            if own > self.factor * median and own - median > NOTICED * self._seconds
        }
        named = [
            Straggler(rank, self.hosts[rank], self._own_s[rank] / self._steps, median / self._steps)
            for rank in sorted(slow - self._slow)
        ]
        self._slow = slow
        self._start_window()
        return named
