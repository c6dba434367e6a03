"""An exponential moving average of the encoder's weights, kept in fp32 and sharded like the optimizer's states."""

from collections.abc import Iterator
from typing import Any

import torch

from uniemox_dist.checkpoints.format import EMA
from uniemox_dist.checkpoints.zero_state import Fragment, list_fragments, read_adam_step

ENCODER = "encoder."


def warmed_up_decay(updates: float, decay: float) -> float:
    """The decay of the n-th update, min(decay, (1 + n) / (10 + n)), so that an early average soon forgets the first
    weights."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Average ← d·average + (1 − d)·weights after each update, over this rank's own fragments of the fp32 weights.

    All ranks together hold one copy of the encoder. The average starts from the engine's weights at its creation.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay, self._engine = decay, engine
        self._own = [f for f in list_fragments(engine) if f.name.startswith(ENCODER)]
        self._weights = [f.tensors["fp32"] for f in self._own]
        self._averages = [weights.clone() for weights in self._weights]
        self.updates = read_adam_step(engine)

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights of an applied update to the average, without waiting for the device."""
        self.updates += 1
        if self._averages:  # with many ranks, one may have no share
            weight = 1 - warmed_up_decay(self.updates, self.decay)
            torch._foreach_lerp_(self._averages, self._weights, weight)

    @torch.no_grad()
    def resume(self, *, loaded: bool) -> None:
        """Follows the engine, which has loaded a checkpoint. If the average's fragments were not `loaded`, because the
        checkpoint has none, it restarts from the weights."""
        if not loaded:
            for average, weights in zip(self._averages, self._weights):
                average.copy_(weights)
        self.updates = read_adam_step(self._engine)

    def fragments(self) -> Iterator[Fragment]:
        """The fragments that this rank saves and loads."""
        for own, average in zip(self._own, self._averages):
            yield Fragment(own.name, own.start, {EMA: average})
