"""How far a stream has been read, and the state that a checkpoint keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uniemox_dist.core.errors import UserError

STATE_VERSION = 1


@dataclass
class StreamPosition:
    """How many samples the ranks of a stream have used. Every rank uses equally many, since ranks train together."""

    streams: int
    global_batch: int
    world_size: int
    number: int = 0
    """Samples that each rank has used."""

    @property
    def step(self) -> int:
        """Complete steps."""
        return self.number * self.world_size // self.global_batch

    def load(self, samples: int, world_size: int) -> None:
        """Goes to the place where `world_size` ranks had used `samples` samples together.

        Raises:
            UserError: if these are not whole turns of the streams, so that other numbers of ranks would have used
                other samples.
        """
        if samples % self.streams and world_size != self.world_size:
            each = samples // world_size
            raise UserError(
                f"state.samples={samples}: was saved by {world_size} ranks within a turn of the streams, after {each} "
                f"samples of each rank; load it on {world_size} ranks, or save where each rank has used a multiple of "
                f"streams / ranks = {self.streams // world_size} samples (the end of a step always is)"
            )
        self.number = samples // self.world_size


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Checks that a state is one of ours, and belongs to the same sequence of samples.

    Raises:
        UserError: naming each value that differs.
    """
    if not isinstance(state, Mapping):
        raise UserError(
            f"state={type(state).__name__}: is not what state_dict() returned, but another object"
        )
    known = {"version", "samples", "world_size", *expected}
    if lacking := sorted(known - state.keys()):
        raise UserError(f"state: lacks {lacking[0]!r}; give what state_dict() of ElasticShards returned")
    if state["version"] != STATE_VERSION:
        raise UserError(
            f"state.version={state['version']!r}: this version reads {STATE_VERSION}; update uniemox-dist"
        )
    for name in ("samples", "world_size"):
        if type(state[name]) is not int or state[name] < (name == "world_size"):
            raise UserError(f"state.{name}={state[name]!r}: is not a number of {name}; the state was edited")
    differing = [
        f"{name} was {_short(state[name])} and is {_short(value)}"
        for name, value in expected.items()
        if state[name] != value
    ]
    if differing:
        raise UserError(
            f"state: is of another stream: {'; '.join(differing)}; open the stream as it was, or begin anew without "
            "the state"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
