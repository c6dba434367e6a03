"""How micro-batches come from a loader process to the training process: views in shared buffers, the rest by value."""

from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from uniemox_dist.data.buffers import NONE, ViewBuffers
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.views import empty_views
from uniemox_dist.runtime.errors import Fault, UserError


@dataclass(frozen=True)
class Failure:
    """An error that says all there is to say; as an exception it would arrive wrapped in a process's traceback."""

    user: bool
    text: str


@dataclass(frozen=True)
class Sent:
    """A micro-batch on its way from a loader process: its views lie in a shared buffer, all else is small."""

    pool: int
    """Which StepBatches of the training process lent the buffer."""
    number: int
    """Of the buffer; or NONE, and then the views come along."""
    views: Tensor | None
    batch: MicroBatch
    """Without tensors."""
    slots: np.ndarray
    texts: np.ndarray | None

    @classmethod
    def of(cls, batch: MicroBatch, pool: int, number: int, room: Tensor) -> "Sent":
        """What a loader process sends."""
        bare = replace(batch, slots_B=_NOTHING, scene_B3HW=_NOTHING, person_B3HW=None, texts_BE=None)
        texts = None if batch.texts_BE is None else batch.texts_BE.numpy()
        return cls(pool, number, room if number == NONE else None, bare, batch.slots_B.numpy(), texts)

    def received(self) -> MicroBatch:
        """The micro-batch, in the training process. Its buffer is free again when its views are gone."""
        views = self.views
        if views is None:
            views = LENDERS[self.pool].lend(self.number)
        B = len(self.slots)
        return replace(
            self.batch,
            slots_B=torch.from_numpy(self.slots),
            scene_B3HW=views[:B],
            person_B3HW=views[B:] if len(views) > B else None,
            texts_BE=None if self.texts is None else torch.from_numpy(self.texts),
        )

    def pin_memory(self) -> MicroBatch:
        """Called by the DataLoader's thread in the training process."""
        return self.received().pin_memory()


_NOTHING = torch.empty(0)
LENDERS: "WeakValueDictionary[int, ViewBuffers]" = WeakValueDictionary()
"""The buffers of this process by their `id`."""


class LoadedDataset(Dataset[Sent | Failure]):
    """The data set in a loader process: views into shared buffers, errors with a message of their own as items."""

    def __init__(self, dataset: PlannedDataset, buffers: ViewBuffers | None) -> None:
        self.dataset, self.buffers, self.pool = dataset, buffers, id(buffers)

    def __getitem__(self, task: tuple[list[int], int]) -> Sent | Failure:
        slots, number = task
        try:
            if self.buffers is None or number == NONE:
                room = empty_views(self.dataset.views * len(slots), self.dataset.settings.image_size)
            else:
                room = self.buffers.room(number)
            return Sent.of(self.dataset.make(slots, room), self.pool, number, room)
        except (UserError, Fault) as error:
            return Failure(isinstance(error, UserError), str(error))
