"""Memory for the views of micro-batches, shared with loader processes and used again and again.

Fresh shared memory would be zeroed by the kernel page by page for each micro-batch, a tenth of the loader's time;
and it would lie in /dev/shm, which is small in many containers.
"""

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

NONE = -1
"""No buffer was free."""


class ViewBuffers:
    """Room for the views of some micro-batches: made before processes are forked, which then share it."""

    def __init__(self, count: int, views: int, size: int) -> None:
        """`count` buffers of `views` views, `size` pixels a side."""
        self._shape = (views, size, size, 3)
        self._bytes = int(np.prod(self._shape))
        self._memory = mmap.mmap(-1, max(1, count * self._bytes))
        self._free = deque(range(count))

    def take(self) -> int:
        """A free buffer's number, or NONE."""
        return self._free.popleft() if self._free else NONE

    def room(self, number: int) -> Tensor:
        """A buffer as views×3×size×size uint8, channels last."""
        return self._tensor(self._array(number))

    def lend(self, number: int) -> Tensor:
        """`room`, of a buffer that becomes free again when nothing refers to its memory any more, whatever tensor was
        made from it meanwhile."""
        array = self._array(number)
        weakref.finalize(array, self._free.append, number)
        return self._tensor(array)

    def _array(self, number: int) -> np.ndarray:
        start = number * self._bytes
        return np.frombuffer(self._memory, np.uint8, self._bytes, start)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).view(self._shape).permute(0, 3, 1, 2)
