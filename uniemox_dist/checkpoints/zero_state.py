"""This rank's fragments of every parameter in DeepSpeed's ZeRO partitions.

DeepSpeed keeps flat fp32 partitions. The position of a parameter in them is internal to DeepSpeed, so `check` tests
for the required attributes when an engine is made and raises an error instead of saving wrong data. In stage 0 every
rank has all numbers; a fragment is then this rank's share of an even cut, as in stage 3, so that all ranks write.

When a run resumes, every part file is read by one rank. With the same number of ranks and the same stage each rank
loads its own part, and only the low-precision weights are gathered, as after an optimizer's step. Otherwise the ranks
send each other the parts, one after the other, and each copies the ranges that it needs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.format import EMA, KINDS, Part, own_files, owner, part_files
from uniemox_dist.checkpoints.fragment_index import parse_key
from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed.collectives import share_bytes
from uniemox_dist.distributed.deepspeed_internals import (
    find_adam_states,
    gather_low_precision,
    list_flat_partitions,
    list_trained,
    locate_share,
    read_shapes,
)

NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Fragment:
    """A range of one flattened parameter that this rank owns; the tensors are views of DeepSpeed's."""

    name: str
    start: int
    tensors: dict[str, Tensor]


def list_fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments. Over all ranks they cover every parameter exactly once."""
    if not engine.zero_optimization():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for f in _whole(engine):
            length = f.tensors["fp32"].numel()
            share = -(-length // world_size)
            start, end = share * rank, min(share * (rank + 1), length)
            if end > start:
                yield Fragment(f.name, start, {kind: t[start:end] for kind, t in f.tensors.items()})
        return
    states = find_adam_states(engine)
    flats = list_flat_partitions(engine)
    for name, p in list_trained(engine):
        place = locate_share(engine, p)
        if place is None:
            continue
        start, length, group, offset = place
        yield Fragment(
            name, start, {k: t.narrow(0, offset, length) for k, t in _kinds(flats[group], states).items()}
        )


def read_adam_step(engine: Any) -> float:
    """The number of updates that Adam has made; all its states agree on it."""
    steps = {float(state["step"]) for state in find_adam_states(engine).values()}
    assert len(steps) <= 1, f"Adam's states disagree on their step: {steps}"
    return steps.pop() if steps else 0.0


def load_fragments(engine: Any, checkpoint: Checkpoint, averages: Iterable[Fragment] = ()) -> bool:
    """Loads this rank's fragments and the low-precision copies from a checkpoint of any layout, and `averages`, the
    fragments of the encoder's moving average. Frees the files that the checkpoint holds in memory. Collective.

    Returns:
        False if the checkpoint holds no moving average; `averages` are then not changed.

    Raises:
        UserError: if the checkpoint does not cover a fragment, or a file cannot be read.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sharded, parts = engine.zero_optimization(), part_files(checkpoint)
    own = set(own_files(checkpoint, rank, world_size))
    wanted = _Wanted([*(list_fragments(engine) if sharded else _whole(engine)), *averages])
    for name in parts:
        if name in own:
            wanted.fill(Part(checkpoint.folder / name, checkpoint.contents.get(name)))
    lacking, lacking_ema, has_ema = wanted.gather_counts(engine.device)
    if lacking or (has_ema and lacking_ema):
        for number, name in enumerate(parts):
            content = checkpoint.contents.get(name)
            if name in own and content is None:
                content = bytearray((checkpoint.folder / name).read_bytes())
            size, source = checkpoint.info["files"][name]["bytes"], owner(number, len(parts), world_size)
            content = share_bytes(content, size, source, engine.device)
            if name not in own:
                wanted.fill(Part(checkpoint.folder / name, content))
        lacking, lacking_ema, has_ema = wanted.gather_counts(engine.device)
    checkpoint.contents.clear()
    if lacking or (has_ema and lacking_ema):
        text = f"{checkpoint.folder}: its parts do not hold every number exactly once; use another checkpoint"
        raise UserError(text if rank == 0 else "")  # one rank reports it
    for state in find_adam_states(engine).values():
        state["step"].fill_(checkpoint.info["adam_step"])
    gather_low_precision(engine)
    return bool(has_ema)


class _Wanted:
    """The ranges that a rank loads, and how much of them is loaded."""

    def __init__(self, targets: Iterable[Fragment]) -> None:
        self._tensors = {(f.name, kind): (f.start, t) for f in targets for kind, t in f.tensors.items()}
        self._lacking = {key: tensor.numel() for key, (_, tensor) in self._tensors.items()}
        self._has_ema = False

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Copies the ranges that a part holds."""
        for key, length in part.lengths.items():
            name, first, kind = parse_key(key)
            self._has_ema |= kind == EMA
            start, tensor = self._tensors.get((name, kind), (0, NOTHING))
            a, b = max(start, first), min(start + tensor.numel(), first + length)
            if a < b:
                tensor[a - start : b - start].copy_(part.read(key, a - first, b - a))
                self._lacking[name, kind] -= b - a
        part.close()

    def gather_counts(self, device: torch.device) -> tuple[int, int, int]:
        """The most parameters that a rank has not loaded, the most averages, and 1 if a part holds averages.
        Collective."""
        lacking = [kind == EMA for (_, kind), count in self._lacking.items() if count]
        counts = torch.tensor([lacking.count(False), lacking.count(True), int(self._has_ema)], device=device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        most, most_ema, has_ema = counts.tolist()
        return most, most_ema, has_ema


def check(engine: Any) -> None:
    """Checks that this version of DeepSpeed has the internals that checkpoints need. Collective.

    Raises:
        RuntimeError: if this version keeps its partitions differently.
    """
    try:
        covered = sum(f.tensors["fp32"].numel() for f in list_fragments(engine))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(
            f"this version of DeepSpeed keeps its ZeRO partitions differently ({error!r}); checkpoints would be "
            "wrong; install a tested version (see setup.py)"
        ) from error
    total = torch.tensor([float(covered)], dtype=torch.float64, device=engine.device)
    torch.distributed.all_reduce(total)
    expected = sum(torch.Size(shape).numel() for shape in read_shapes(engine).values())
    if round(total.item()) != expected:
        raise RuntimeError(
            f"ZeRO partitions cover {round(total.item())} of {expected} numbers; install a tested DeepSpeed"
        )


def _whole(engine: Any) -> Iterator[Fragment]:
    """In stage 0, every parameter as one fragment."""
    states = find_adam_states(engine)
    for name, p in list_trained(engine):
        yield Fragment(name, 0, _kinds(p, states))


def _kinds(weights: Tensor, states: Any) -> dict[str, Tensor]:
    """Flat views of fp32 weights and their moments."""
    found = {"fp32": weights, **{kind: states[weights][kind] for kind in KINDS[1:]}}
    return {kind: tensor.detach().view(-1) for kind, tensor in found.items()}
