"""An elastic stream inside loaders of other libraries. See docs/elastic_loaders.md."""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.iterations import MicroBatches, SourceSamples
from uniemox_dist.data.stateful_loader import StatefulLoader
from uniemox_dist.data.stream import Stream

REORDERING = ("shuffle", "detshuffle", "select", "rsample", "islice")
"""Stages of webdataset after which it is not known how many samples of the stream the batches hold."""

_iterations = count(1)


class MicroBatchSampler(Sampler[list[int]]):
    """The slots of this rank's micro-batches from the stream's position to the end of the pass: a batch sampler for
    `torch.utils.data.DataLoader(stream, batch_sampler=…)`."""

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        stream.count_micro_batches(micro_batch)
        self.stream, self.micro_batch = stream, micro_batch

    @property
    def batch_size(self) -> int:
        """Samples of a micro-batch, for programs that divide the batches of a sampler among ranks, as accelerate does.

        Raises:
            UserError: if the batches are those of one rank of several.
        """
        if (ranks := self.stream.world.size) > 1:
            raise UserError(
                f"batch_sampler: has the batches of one of {ranks} ranks, and a program is about to divide them among "
                "ranks again; keep this loader from it (see docs/elastic_loaders.md), or open ElasticShards with "
                "rank=0, world_size=1"
            )
        return self.micro_batch

    def __len__(self) -> int:
        """Micro-batches of a whole pass."""
        return self.stream.pass_samples // self.micro_batch

    def __iter__(self) -> MicroBatches:
        return MicroBatches(self.stream, self.micro_batch, next(_iterations))

    def set_epoch(self, epoch: int) -> None:
        """Goes forward to the beginning of pass `epoch`, if the position is in an earlier one. Trainers call this, and
        some load no state of a loader if the checkpoint was written at the end of an epoch."""
        self.stream.begin_pass(epoch)


class ElasticSource(IterableDataset[Any]):
    """The samples of this rank from the stream's position to the end of the pass, one by one: the first stage of a
    `webdataset.DataPipeline`, or the data set of a DataLoader.

    In loader processes each yields whole micro-batches in turn, so that a loader which makes batches of `micro_batch`
    samples in each process has them in the stream's order, with any number of processes.
    """

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        stream.count_micro_batches(micro_batch)
        self.stream, self.micro_batch = stream, micro_batch
        self._begun, self._marks = 0, 0
        self._before: MicroBatches | None = None
        """The iteration before, in a loader process that lives on."""

    def __iter__(self) -> SourceSamples:
        stream, worker = self.stream, get_worker_info()
        self._begun += 1
        if worker is None:
            return SourceSamples(MicroBatches(stream, self.micro_batch, next(_iterations)), 0, 1)
        # The loader processes of one iteration have one base seed; those that live on have begun equally many.
        iteration = hash((worker.seed - worker.id, self._begun))
        start, (marks, mark) = None, stream.position.marks
        if self._before is not None:
            start = self._before.end if marks == self._marks else mark
        self._marks, self._before = marks, MicroBatches(stream, self.micro_batch, iteration, start)
        return SourceSamples(self._before, worker.id, worker.num_workers)


class TrackedLoader(StatefulLoader):
    """A loader of another library over a stream, whose batches it counts: each iteration is the rest of the pass, and
    the state is that of the stream after the batches that were yielded."""

    sampler: MicroBatchSampler

    def __init__(self, stream: Stream[Any], loader: Iterable[Any], micro_batch: int) -> None:
        """`loader` yields micro-batches of `micro_batch` samples from a MicroBatchSampler or an ElasticSource of the
        stream.

        Raises:
            UserError: as `Stream.count_micro_batches`; or if a stage of webdataset leaves out samples or moves them
                between batches, so that the number of batches would not tell which samples were used.
        """
        super().__init__(stream, micro_batch, MicroBatchSampler(stream, micro_batch))
        self.loader = loader
        if (stage := _find_stage(loader)) is not None:
            raise UserError(
                f"loader: has webdataset's stage {stage!r}, after which batches are not those of the stream, so that "
                "its position cannot be known; leave it out (the stream is shuffled; a `transform` that raises "
                "DamagedSample has a sample replaced), or do without `track`"
            )

    def __iter__(self) -> Iterator[Any]:
        batches, used = iter(self.sampler), 0
        self.stream.position.number = batches.number  # the pass before may not have been reported
        self.stream.position.mark()
        for batch in self.loader:
            slots = next(batches, None)
            if slots is None:
                raise _wrong_length(f"more than {used}", used)
            self.stream.advance(len(slots))
            used += 1
            yield batch
        if missing := len(list(batches)):
            raise _wrong_length(str(used), used + missing)


def _wrong_length(found: str, expected: int) -> UserError:
    return UserError(
        f"loader: yielded {found} batches, and the rest of the pass has {expected} micro-batches, so that its position "
        "is not known; let each batch hold micro_batch samples, and let no stage leave out samples"
    )


def _find_stage(loader: Any) -> str | None:
    """The name of the first stage of `REORDERING` in a pipeline or loader of webdataset."""
    for stage in getattr(loader, "pipeline", [loader]):
        if stage is not loader and hasattr(stage, "pipeline"):
            found = _find_stage(stage)
        elif isinstance(stage, DataLoader):
            found = _find_stage(stage.dataset) if hasattr(stage.dataset, "pipeline") else None
        else:
            name = getattr(getattr(stage, "f", type(stage)), "__name__", "").removeprefix("_")
            found = name if name in REORDERING else None
        if found is not None:
            return found
    return None
