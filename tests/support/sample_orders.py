"""The parameters of an order of samples, for tests of the plan."""

from dataclasses import dataclass

from uniemox_dist.data.plan import Plan


@dataclass(frozen=True)
class SampleOrder:
    """The parameters of an order of samples."""

    sources: list[list[int]]
    weights: list[float]
    streams: int
    turns: int
    """Global batch / streams."""
    seed: int
    window: int

    @property
    def global_batch(self) -> int:
        return self.streams * self.turns

    def plan(self) -> Plan:
        return Plan(
            self.sources,
            self.weights,
            streams=self.streams,
            global_batch=self.global_batch,
            seed=self.seed,
            window=self.window,
        )
