"""Scene views that were drawn and embedded before the run, and which of them a slot shows."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from uniemox_dist.data.crops import ViewPlan
from uniemox_dist.data.rng import Purpose, mix64


@dataclass(frozen=True)
class StoredView:
    """One scene view of a picture, and what the teacher said of it."""

    plan: ViewPlan
    """Without a person."""
    picture_E: Tensor
    """fp16 unit row Ω."""


class StoredViews(Protocol):
    """The stored views of a data set, by place."""

    count: int
    """K, of each picture."""

    def view(self, shard: int, row: int, number: int) -> StoredView:
        """View `number` (0…K-1) of the picture at a place.

        Raises:
            ValueError: if the picture could not be read when its views were made.
        """
        ...


def which_view(count: int, seed: int, image_sha256: str, epoch: int) -> int:
    """The stored view that a picture shows in an epoch: one after the other, from a start of its own."""
    return (epoch + mix64(seed, int(image_sha256[:16], 16), Purpose.CACHED_VIEW)) % count
