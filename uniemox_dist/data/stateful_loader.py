"""What the loaders of an elastic stream have in common."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Sampler

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.stream import Stream


class StatefulLoader:
    """What trainers expect of a loader: a constant length, `sampler.set_epoch`, and a state."""

    def __init__(self, stream: Stream[Any], micro_batch: int, sampler: Sampler[list[int]]) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        self.stream, self.micro_batch, self.sampler = stream, micro_batch, sampler
        self.accumulate = stream.count_micro_batches(micro_batch)
        """Micro-batches of a rank in a step."""

    def __len__(self) -> int:
        """Micro-batches of a whole pass; an iteration that begins within a pass has fewer."""
        return self.stream.pass_samples // self.micro_batch

    def state_dict(self) -> dict[str, Any]:
        """The stream's state, and the number of micro-batches in a step."""
        return {**self.stream.state_dict(), "accumulate": self.accumulate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the stream's state.

        Raises:
            UserError: as `ElasticShards.load_state_dict`; or within a pass, if a step had another number of
                micro-batches, because trainers go on counting batches from the number that they have stored.
        """
        stream, accumulate = self.stream, self.accumulate
        saved = state.get("accumulate", accumulate) if isinstance(state, Mapping) else None
        number = stream.position.number
        stream.load_state_dict(state)
        batches = "1 micro-batch" if accumulate == 1 else f"{accumulate} micro-batches"
        if saved != accumulate and stream.position.number % stream.pass_samples:
            stream.position.number = number
            raise UserError(
                f"micro_batch={self.micro_batch}: a step has {batches} here and had "
                f"{saved} where the state was saved, so a trainer that counts batches would count on from a wrong "
                "number; keep the micro-batches of a step, call rescale_batches in Lightning, or load the state into "
                "ElasticShards if nothing counts batches"
            )
