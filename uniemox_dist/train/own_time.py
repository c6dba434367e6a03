"""How long a rank computes by itself, without waiting for another: what tells a slow rank from those that wait for it.

All ranks' steps take the same time, since each waits for the slowest in the exchange of gradients. What comes before it
is a rank's own: its wait for data, the teacher, and the student's forward pass (in ZeRO-3 that one exchanges weights,
so that there a slow rank shows only in part).
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch


class OwnTime:
    """Adds up the time between `start` and `stop`, on a GPU by events that the device meets on its way."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []
        self._seconds = self._began = 0.0

    def start(self) -> None:
        """Own work begins."""
        if self._cuda:
            self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._pairs[-1][0].record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Own work ends."""
        if self._cuda:
            self._pairs[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since the last call; the device must have met all events, as it has after a step."""
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._pairs) / 1e3
        self._seconds = 0.0
        self._pairs.clear()
        return seconds


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    seconds: float
    median_s: float


def stragglers(own_s: list[float], interval_s: float, factor: float) -> list[Straggler]:
    """Ranks whose own time exceeds `factor` times the median, and the median by a tenth of the interval: of what is
    small beside the step nobody waits long. Of an even number of ranks the lower median counts, so that of two the
    slower is compared with the other."""
    median = statistics.median_low(own_s)
    return [
        Straggler(rank, seconds, median)
        for rank, seconds in enumerate(own_s)
        if seconds > factor * median and seconds - median > 0.1 * interval_s
    ]
