"""How far a stream has been read, and the state that a checkpoint keeps of it."""

from collections.abc import Mapping
from multiprocessing import RawArray
from multiprocessing.context import get_spawning_popen
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted

STATE_VERSION = 1
_MARK, _MARKS, _ENDED, _ENDED_AT, _END = range(5)


class StreamPosition:
    """How many samples the ranks of a stream have used. Every rank uses equally many, since ranks train together.

    Samples count as used when they are reported, by setting `number`. Loaders of other libraries report nothing. So
    after an iteration that was read to its end, and of which nothing was reported, the next one begins at that end.
    """

    def __init__(self, streams: int, world_size: int, number: int = 0, shared: Any = None) -> None:
        self.streams, self.world_size = streams, world_size
        self._number = number
        self._resumed: int | None = None
        # Loader processes see what this process writes, and the other way round.
        self._shared = RawArray("q", [0, 0, 0, -1, 0]) if shared is None else shared

    @property
    def number(self) -> int:
        """Samples that each rank has used. Loader processes keep what it was when they were started."""
        return self._number

    @number.setter
    def number(self, value: int) -> None:
        self._number, self._resumed = value, None
        self._shared[_ENDED_AT] = -1

    def mark(self) -> None:
        """Tells loader processes that live for several epochs where the next one begins."""
        self._shared[_MARK] = self.number
        self._shared[_MARKS] += 1

    @property
    def marks(self) -> tuple[int, int]:
        """How often `mark` was called in the process that trains, and the number at the last time."""
        return self._shared[_MARKS], self._shared[_MARK]

    def begin(self, iteration: int) -> int:
        """Returns the number of the sample at which an iteration begins. `iteration` identifies it: a loader process
        may begin after others have finished the same one."""
        if self._resumed is not None:
            return self._resumed
        _, _, ended, ended_at, end = self._shared
        return end if ended_at == self.number and ended != iteration else self.number

    def finish(self, iteration: int, end: int) -> None:
        """Notes that an iteration was read to its end."""
        self._resumed = None
        self._shared[_ENDED], self._shared[_END] = iteration, end
        self._shared[_ENDED_AT] = self.number

    def resume(self, number: int) -> None:
        """Makes the next iteration begin at a number, even if the position is loaded before it does: torchdata loads
        the state of the data set after that of the sampler."""
        self.number = number
        self._resumed = number

    def settle(self) -> None:
        """Goes to where `resume` said, if nothing was reported since."""
        if self._resumed is not None:
            self.number = self._resumed

    def convert(self, samples: int, world_size: int) -> int:
        """Returns the number of this stream's ranks where `world_size` ranks had used `samples` samples together.

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
        return samples // self.world_size

    def load(self, samples: int, world_size: int) -> None:
        """Goes to the place where `world_size` ranks had used `samples` samples together. Raises as `convert`."""
        resumed = self._resumed
        self.number = self.convert(samples, world_size)
        self._resumed = resumed

    def __reduce__(self) -> tuple[Any, ...]:
        # Only a process that is being started can share the memory.
        shared = None if get_spawning_popen() is None else self._shared
        return StreamPosition, (self.streams, self.world_size, self.number, shared)


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
        if type(state[name]) is not int or not (name == "world_size") <= state[name] < 1 << 62:
            raise UserError(f"state.{name}={state[name]!r}: is not a number of {name}; the state was edited")
    if state["samples"] % state["world_size"]:
        raise UserError(
            f"state.samples={state['samples']}: is not the same number for each of {state['world_size']} ranks; the "
            "state was edited"
        )
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
