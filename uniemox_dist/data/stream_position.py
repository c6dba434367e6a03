"""How far a stream has been read, and the state that a checkpoint keeps of it."""

import mmap
from collections.abc import Mapping
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted

STATE_VERSION = 1


class StreamPosition:
    """How many samples the ranks of a stream have used. Every rank uses equally many, since ranks train together."""

    def __init__(self, streams: int, world_size: int, number: int = 0) -> None:
        self.streams, self.world_size = streams, world_size
        self.number = number
        """Samples that each rank has used."""
        self._begin = memoryview(mmap.mmap(-1, 8)).cast("q")
        self._begin[0] = -1

    @property
    def begin(self) -> int | None:
        """The number at the last `mark`, in all processes that this one has forked; None before."""
        return None if self._begin[0] < 0 else self._begin[0]

    def mark(self) -> None:
        """Tells loader processes that live for several epochs where the next one begins."""
        self._begin[0] = self.number

    def load(self, samples: int, world_size: int) -> None:
        """Goes to the place where `world_size` ranks had used `samples` samples together.

        Raises:
            UserError: if these are not whole turns of the streams, so that other numbers of ranks would have used
                other samples.
        """
        if samples % self.streams and world_size != self.world_size:
            raise UserError(
                f"state.samples={samples}: was saved by {counted(world_size, 'rank')} within a turn of the "
                f"{self.streams} streams, so only {counted(world_size, 'rank')} can go on there; save where `samples` "
                "is a multiple of the streams, as it is at the end of each step"
            )
        self.number = samples // self.world_size

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamPosition, (self.streams, self.world_size, self.number)


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
