"""Transport of micro-batches from loader processes to the training process: views in shared memory, the rest by value.

The memory of the views is allocated once and reused. Fresh shared memory would be zeroed by the kernel page by page for
each micro-batch, which takes a tenth of the loader's time, and it would be in /dev/shm, which is small in many
containers.
"""

import mmap
import weakref
from collections import deque
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from uniemox_dist.data.loader import ROW_FIELDS, VIEW_FIELDS, MicroBatch

NO_BUFFER = -1
"""Buffer number of a task for which no buffer was free."""


class ViewBuffers:
    """A pool of buffers for views. Created before the loader processes are forked, which then share its memory."""

    def __init__(self, count: int, views: int, size: int) -> None:
        """Allocates `count` buffers of `views` views, `size` pixels a side."""
        self._shape = (views, size, size, 3)
        self._bytes = int(np.prod(self._shape))
        self._memory = mmap.mmap(-1, max(1, count * self._bytes))
        self._free = deque(range(count))

    def acquire(self) -> int:
        """Returns the number of a free buffer, or NO_BUFFER."""
        return self._free.popleft() if self._free else NO_BUFFER

    def tensor(self, number: int) -> Tensor:
        """Returns a buffer as views×3×size×size uint8, channels last."""
        return self._to_tensor(self._array(number))

    def lend(self, number: int) -> Tensor:
        """Returns a buffer like `tensor`. The buffer becomes free once no tensor refers to its memory any more."""
        array = self._array(number)
        weakref.finalize(array, self._free.append, number)
        return self._to_tensor(array)

    def _array(self, number: int) -> np.ndarray:
        start = number * self._bytes
        return np.frombuffer(self._memory, np.uint8, self._bytes, start)

    def _to_tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).view(self._shape).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class SharedMicroBatch:
    """A micro-batch on its way from a loader process: its views are in a shared buffer, its other tensors are small."""

    pool: int
    """Key of the buffer pool in POOLS of the training process."""
    number: int
    """Number of the buffer; NO_BUFFER if `views` holds the views."""
    views: Tensor | None
    batch: MicroBatch
    """The micro-batch without its tensors."""
    rows: dict[str, np.ndarray]
    """Its other tensors by name."""

    @classmethod
    def pack(cls, batch: MicroBatch, pool: int, number: int, views: Tensor) -> "SharedMicroBatch":
        """Packs a micro-batch in a loader process."""
        bare: MicroBatch = replace(batch, **dict.fromkeys((*VIEW_FIELDS, *ROW_FIELDS)))  # type: ignore[arg-type]
        rows = {name: tensor.numpy() for name in ROW_FIELDS if (tensor := getattr(batch, name)) is not None}
        return cls(pool, number, views if number == NO_BUFFER else None, bare, rows)

    def unpack(self) -> MicroBatch:
        """Returns the micro-batch in the training process. Its buffer is free again once its views are deleted."""
        views = self.views
        if views is None:
            views = POOLS[self.pool].lend(self.number)
        B = len(self.rows["slots_B"])
        rows = {name: torch.from_numpy(array) for name, array in self.rows.items()}
        person_B3HW = views[B:] if len(views) > B else None
        return replace(self.batch, scene_B3HW=views[:B], person_B3HW=person_B3HW, **rows)  # type: ignore[arg-type]

    def pin_memory(self) -> MicroBatch:
        """Unpacks and pins the micro-batch; the DataLoader's thread calls this in the training process."""
        return self.unpack().pin_memory()


POOLS: "WeakValueDictionary[int, ViewBuffers]" = WeakValueDictionary()
"""The buffer pools of this process by their `id`."""
