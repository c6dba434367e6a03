"""This rank's fragments of every parameter inside DeepSpeed's ZeRO partitions.

DeepSpeed keeps flat fp32 partitions; where a parameter's numbers lie in them is internal to it, so `check` looks
for what is needed when an engine is made and fails clearly instead of saving nonsense.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.checkpoints.files import KINDS, FragmentReader


@dataclass(frozen=True)
class Fragment:
    """A stretch of one flattened parameter that this rank owns; the tensors are views into DeepSpeed's."""

    name: str
    start: int
    tensors: dict[str, Tensor]


def trained(engine: Any) -> list[tuple[str, Any]]:
    """The parameters that are trained, with their names."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def shapes(engine: Any) -> dict[str, list[int]]:
    """Full shapes of all trained parameters, also where ZeRO-3 keeps a part only."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained(engine)}


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's fragments; over all ranks they cover every parameter exactly once."""
    optimizer = engine.optimizer
    flats = _flat_partitions(engine)
    for name, p in trained(engine):
        place = _place(engine, p)
        if place is None:
            continue
        start, length, group, offset = place
        state = optimizer.optimizer.state[flats[group]]
        whole = {"fp32": flats[group], **{kind: state[kind] for kind in KINDS[1:]}}
        yield Fragment(
            name, start, {k: t.detach().view(-1).narrow(0, offset, length) for k, t in whole.items()}
        )


def adam_step(engine: Any) -> float:
    """How many updates Adam has made; the same in all its states."""
    _flat_partitions(engine)
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    assert len(steps) <= 1, f"Adam's states disagree on their step: {steps}"
    return steps.pop() if steps else 0.0


def load_fragments(engine: Any, reader: FragmentReader, step: float) -> None:
    """Fills this rank's partitions, and the low-precision copies, from a checkpoint of any layout."""
    for fragment in fragments(engine):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(reader.read(fragment.name, kind, fragment.start, tensor.numel()))
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.tensor(step)
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for name, p in trained(engine):
            if hasattr(p, "ds_id"):  # ZeRO-3: this rank's shard, padded at the end
                shard = p.ds_tensor.numel()
                start = min(rank * shard, p.ds_numel)
                length = min(shard, p.ds_numel - start)
                if length:
                    p.ds_tensor.view(-1)[:length].copy_(reader.read(name, "fp32", start, length))
            else:
                p.copy_(reader.parameter(name))


def check(engine: Any) -> None:
    """Looks for the DeepSpeed internals that checkpoints rest on.

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


def _flat_partitions(engine: Any) -> list[Tensor]:
    """The flat fp32 partitions of this rank; Adam's state is made where the first step has not made it yet."""
    optimizer = engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    )
    for flat in flats:
        state = optimizer.optimizer.state[flat]
        for kind in KINDS[1:]:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
        state.setdefault("step", torch.tensor(0.0))
    return flats


def _place(engine: Any, p: Any) -> tuple[int, int, int, int] | None:
    """(start in the parameter, length, group, offset in the group's flat partition) of what this rank owns."""
    if hasattr(p, "ds_id"):
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        shard = (p.ds_numel + world_size - 1) // world_size
        start = min(rank * shard, p.ds_numel)
        length = min(shard, p.ds_numel - start)
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(p)]
        return (start, length, group, offset) if length else None
    mapping = getattr(p, "_hp_mapping", None)
    if mapping is None:
        return None
    in_parameter = mapping.lp_fragment_address
    return (
        in_parameter.start,
        in_parameter.numel,
        mapping.param_group_index,
        mapping.hp_fragment_address.start,
    )
