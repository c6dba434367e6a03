"""Losses that leap: worth an event, since they tell of bad data, a rate that is too high, or a failing device."""

import math
import statistics
from collections import deque

WINDOW = 100
"""Steps whose median a loss is compared with."""
LEAST = 20
"""Steps that a median is worth something after."""


class Spikes:
    """Compares each loss with the running median of those before it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def seen(self, loss: float) -> float | None:
        """The median, if this loss exceeds it by the factor; a loss that is not finite is left to the skipping."""
        if not math.isfinite(loss):
            return None
        median = statistics.median(self._losses) if len(self._losses) >= LEAST else math.inf
        self._losses.append(loss)
        return median if loss > self.factor * median > 0 else None
