"""One iteration over the micro-batches of a rank, or over its samples, inside loaders of other libraries."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.stream import Stream


class MicroBatches(Iterator[list[int]]):
    """One iteration of a MicroBatchSampler. It has a state, which torchdata's StatefulDataLoader stores."""

    def __init__(
        self, stream: Stream[Any], micro_batch: int, iteration: int, start: int | None = None
    ) -> None:
        """`iteration` is as in `StreamPosition.begin`, which gives `start` by default."""
        stream.check_world()
        self.stream, self.micro_batch, self._iteration = stream, micro_batch, iteration
        start = stream.position.begin(iteration) if start is None else start
        self.go_to(start, stream.pass_end(start))
        self._resumed = False

    def __next__(self) -> list[int]:
        if self._resumed:
            self.stream.position.settle()
            self._resumed = False
        if self.number >= self.end:
            self.stream.position.finish(self._iteration, self.end)
            raise StopIteration
        slots = next(self._slots)
        self.number += len(slots)
        return slots

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream after the micro-batches that this iteration has yielded."""
        return {**self.stream.state_after(self.number), "pass_ended": self.number >= self.end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the micro-batches of a state, which may come from another number of ranks.

        Raises:
            UserError: as `Stream.load_state_dict`.
        """
        self.stream.load_state_dict(state)
        number = self.stream.position.number
        self.stream.position.resume(number)
        self.go_to(number, number if state.get("pass_ended") else self.stream.pass_end(number))
        self._resumed = True

    def go_to(self, number: int, end: int) -> None:
        """Makes the next micro-batch begin with the rank's sample `number`, and the last end before `end`."""
        world = self.stream.world
        self.number, self.end = number, end
        self._slots = self.stream.plan.walk(number, world.rank, world.size, self.micro_batch)


class SourceSamples(Iterator[Any]):
    """One iteration of an ElasticSource, in one of several processes. It has a state, which torchdata's
    StatefulDataLoader stores for each process."""

    def __init__(self, batches: MicroBatches, process: int, processes: int) -> None:
        """Raises UserError if the step under way ends with a part of a micro-batch."""
        self.batches, self._process, self._processes = batches, process, processes
        self._slots: Iterator[int] = iter(())
        self._begin(batches.number)

    def __next__(self) -> Any:
        slot = next(self._slots, None)
        if slot is None:
            self._slots = iter(next(self._own))
            slot = next(self._slots)
        sample = self.batches.stream[slot]
        self._taken += 1
        return sample

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration began, and how many samples this process has yielded since."""
        begun = self.batches.stream.state_after(self._first)
        return {**begun, "taken": self._taken, "loader_processes": self._processes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the samples of a state, and reads none of them.

        Raises:
            UserError: if the state is of another stream, or of other numbers of ranks or loader processes, so that each
                process has read other samples.
        """
        stream = self.batches.stream
        stream.check_state(state)
        for name, value in (("world_size", stream.world.size), ("loader_processes", self._processes)):
            if state.get(name) != value:
                raise UserError(
                    f"state.{name}={state.get(name)}: is {value} now, and the state of an iterable data set belongs to "
                    "its processes; use a sampler, or store the state of ElasticShards instead (track)"
                )
        self._begin(stream.position.convert(state["samples"], state["world_size"]))
        self._taken = left = state["taken"]
        for slots in self._own:
            if left < len(slots):
                self._slots = iter(slots[left:])
                return
            left -= len(slots)

    def _begin(self, number: int) -> None:
        """Raises UserError as `__init__`."""
        stream, micro_batch = self.batches.stream, self.batches.micro_batch
        if (rest := -number % (stream.global_batch // stream.world.size)) % micro_batch:
            raise UserError(
                f"micro_batch={micro_batch}: does not divide the {rest} samples that this rank has left in the step "
                "under way; resume with the micro_batch of before, use `sampler`, or save at the end of a step"
            )
        self._first, self._taken = number, 0  # where the iteration began, and the samples yielded since
        self.batches.go_to(number, stream.pass_end(number))
        self._own = islice(self.batches, self._process, None, self._processes)
