"""How far a stream has been read, and the state that a checkpoint keeps of it."""

import mmap
from collections.abc import Mapping
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted

STATE_VERSION = 1


class StreamPosition:
    """How many samples the ranks of a stream have used. Every rank uses equally many, since ranks train together.

    The number is in memory that forked processes share, so that loader processes that live for several epochs see where
    the next one begins.
    """

    def __init__(self, streams: int, world_size: int) -> None:
        self.streams, self.world_size = streams, world_size
        self._memory = mmap.mmap(-1, 8)
        self._number = memoryview(self._memory).cast("q")

    @property
    def number(self) -> int:
        """Samples that each rank has used."""
        return self._number[0]

    @number.setter
    def number(self, value: int) -> None:
        self._number[0] = value

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
        return _rebuild, (self.streams, self.world_size, self.number)


def _rebuild(streams: int, world_size: int, number: int) -> StreamPosition:
    position = StreamPosition(streams, world_size)
    position.number = number
    return position


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
