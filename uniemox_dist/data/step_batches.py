"""The micro-batches of one rank, step by step, whose views travel from loader processes in shared memory."""

from collections.abc import Iterator

from uniemox_dist.config.schema import Config
from uniemox_dist.data.batch_loader import BatchLoader
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.sources import count_shared_micro_batches
from uniemox_dist.data.views import allocate_views
from uniemox_dist.data.worker_transport import NO_BUFFER, POOLS, SharedMicroBatch, ViewBuffers


class StepBatches(BatchLoader[MicroBatch | SharedMicroBatch]):
    """The micro-batches of one rank, step by step. Its loader processes end when it is closed."""

    def __init__(self, dataset: PlannedDataset, config: Config, *, first_step: int, pin: bool) -> None:
        """
        Args:
            first_step: 0-based number of the first step.
            pin: copy micro-batches to pinned memory, for asynchronous copies to a GPU.
        """
        stream, batch, data = dataset.stream, config.batch, config.data
        world = stream.world
        self.dataset = dataset
        self.grad_accum = batch.global_batch // (batch.micro_batch * world.size)
        stream.set_kept_rows()
        self._buffers: ViewBuffers | None = None
        if data.workers:
            views = dataset.views_per_sample * batch.micro_batch
            count = count_shared_micro_batches(config, world.size)
            self._buffers = ViewBuffers(count, views, dataset.settings.image_size)
            POOLS[id(self._buffers)] = self._buffers
        first = first_step * (batch.global_batch // world.size)
        super().__init__(
            stream,
            self._load,
            self._with_buffers(stream.plan.walk(first, world.rank, world.size, batch.micro_batch)),
            workers=data.workers,
            prefetch=data.prefetch,
            timeout_s=data.timeout_s,
            pin=pin,
            timeout_name="data.timeout_s",
        )

    def next_step(self) -> list[MicroBatch]:
        """Returns all micro-batches of the next step.

        Raises:
            Fault: if a loader process died or hangs (naming it and its sample), or the data cannot be read.
        """
        found = [self.next_batch() for _ in range(self.grad_accum)]
        return [batch.unpack() if isinstance(batch, SharedMicroBatch) else batch for batch in found]

    def _with_buffers(self, requests: Iterator[list[int]]) -> Iterator[tuple[list[int], int]]:
        """Adds the number of a buffer for the views to each request."""
        for slots in requests:
            yield slots, NO_BUFFER if self._buffers is None else self._buffers.acquire()

    def _load(self, request: tuple[list[int], int]) -> SharedMicroBatch:
        """Loads a micro-batch in a loader process."""
        slots, number = request
        if self._buffers is None or number == NO_BUFFER:
            views = allocate_views(
                self.dataset.views_per_sample * len(slots), self.dataset.settings.image_size
            )
        else:
            views = self._buffers.tensor(number)
        return SharedMicroBatch.pack(self.dataset.load(slots, views), id(self._buffers), number, views)
