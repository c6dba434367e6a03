"""This rank's fragments of every parameter in DeepSpeed's ZeRO partitions.

DeepSpeed keeps flat fp32 partitions. The position of a parameter in them is internal to DeepSpeed, so `check` tests
for the required attributes when an engine is made and raises an error instead of saving wrong data. In stage 0 every
rank has all numbers; a fragment is then this rank's share of an even cut, so that all ranks write.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.checkpoints.format import KINDS, FragmentReader
from uniemox_dist.distributed.deepspeed_internals import (
    adam_states,
    flat_partitions,
    locate_share,
    shapes,
    trained,
    write_low_precision,
)


@dataclass(frozen=True)
class Fragment:
    """A range of one flattened parameter that this rank owns; the tensors are views of DeepSpeed's."""

    name: str
    start: int
    tensors: dict[str, Tensor]


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments. Over all ranks they cover every parameter exactly once."""
    if not engine.zero_optimization():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for f in _whole(engine):
            length = f.tensors["fp32"].numel()
            start, end = length * rank // world_size, length * (rank + 1) // world_size
            if end > start:
                yield Fragment(f.name, start, {kind: t[start:end] for kind, t in f.tensors.items()})
        return
    states = adam_states(engine)
    flats = flat_partitions(engine)
    for name, p in trained(engine):
        place = locate_share(engine, p)
        if place is None:
            continue
        start, length, group, offset = place
        yield Fragment(
            name, start, {k: t.narrow(0, offset, length) for k, t in _kinds(flats[group], states).items()}
        )


def adam_step(engine: Any) -> float:
    """The number of updates that Adam has made; all its states agree on it."""
    steps = {float(state["step"]) for state in adam_states(engine).values()}
    assert len(steps) <= 1, f"Adam's states disagree on their step: {steps}"
    return steps.pop() if steps else 0.0


def load_fragments(engine: Any, reader: FragmentReader, step: float) -> None:
    """Loads this rank's fragments, and the low-precision copies, from a checkpoint of any layout."""
    sharded = engine.zero_optimization()
    for fragment in fragments(engine) if sharded else _whole(engine):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(reader.read(fragment.name, kind, fragment.start, tensor.numel()))
    for state in adam_states(engine).values():
        state["step"].fill_(step)
    if not sharded:  # the parameters themselves are the fp32 weights
        return
    write_low_precision(
        engine, lambda name, start, length: reader.read(name, "fp32", start, length), reader.parameter
    )


def check(engine: Any) -> None:
    """Checks that this version of DeepSpeed has the internals that checkpoints need. Collective.

    Raises:
        RuntimeError: if this version keeps its partitions differently.
    """
    try:
        covered = sum(f.tensors["fp32"].numel() for f in fragments(engine))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(
            f"this version of DeepSpeed keeps its ZeRO partitions differently ({error!r}); checkpoints would be "
            "wrong; install a tested version (see setup.py)"
        ) from error
    total = torch.tensor([float(covered)], dtype=torch.float64, device=engine.device)
    torch.distributed.all_reduce(total)
    expected = sum(torch.Size(shape).numel() for shape in shapes(engine).values())
    if round(total.item()) != expected:
        raise RuntimeError(
            f"ZeRO partitions cover {round(total.item())} of {expected} numbers; install a tested DeepSpeed"
        )


def _whole(engine: Any) -> Iterator[Fragment]:
    """In stage 0, every parameter as one fragment."""
    states = adam_states(engine)
    for name, p in trained(engine):
        yield Fragment(name, 0, _kinds(p, states))


def _kinds(weights: Tensor, states: Any) -> dict[str, Tensor]:
    """Flat views of fp32 weights and their moments."""
    found = {"fp32": weights, **{kind: states[weights][kind] for kind in KINDS[1:]}}
    return {kind: tensor.detach().view(-1) for kind, tensor in found.items()}
