"""Access to DeepSpeed's internals: ZeRO's fp32 partitions, Adam's states and the reduced gradients. No other module
uses anything beyond DeepSpeed's public interface.

setup.py limits the version of DeepSpeed because of this file. With a version that keeps them elsewhere,
`checkpoints.zero_state.check` and `read_reduced_gradients` raise an error.
"""

from typing import Any

import torch
from torch import Tensor

from uniemox_dist.core.imports import collection_paused

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """Imports DeepSpeed without two parts that would add seconds to every start: the kernels of an optimizer that no
    run uses, which import torch's compiler; and a C++ operator for inference, which is compiled at the first start on
    a CPU."""
    with collection_paused():
        import deepspeed
        from deepspeed.runtime import compiler

        before, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer
        except ImportError:  # a version without it
            pass
        finally:
            compiler.compile = before
    # Reading this attribute would probe every operator, for which DeepSpeed may start compilers.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def list_trained(engine: Any) -> list[tuple[str, Any]]:
    """The parameters that are trained, with their names."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def read_shapes(engine: Any) -> dict[str, list[int]]:
    """Full shapes of all trained parameters, also if ZeRO-3 keeps only a part of them on this rank."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in list_trained(engine)}


def count_parameters(module: torch.nn.Module) -> int:
    """Number of parameters of a module, also if ZeRO-3 keeps only a part of them on this rank."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def is_partitioned(p: Any) -> bool:
    """True for a parameter of which ZeRO-3 keeps only a part on this rank."""
    return hasattr(p, "ds_id")


def list_flat_partitions(engine: Any) -> list[Tensor]:
    """The flat fp32 partitions of this rank."""
    optimizer = engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    )
    return flats


def find_adam_states(engine: Any) -> Any:
    """Adam's states by the tensors that it updates; created where the first step has not created them yet."""
    sharded = engine.zero_optimization()
    adam = engine.optimizer.optimizer if sharded else engine.optimizer
    for tensor in list_flat_partitions(engine) if sharded else [p for _, p in list_trained(engine)]:
        state = adam.state[tensor]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(tensor)
        # A fused Adam keeps its step counter on the device.
        state.setdefault("step", torch.zeros((), device=tensor.device if adam.defaults["fused"] else "cpu"))
    return adam.state


def locate_share(engine: Any, p: Any) -> tuple[int, int, int, int] | None:
    """This rank's share of a parameter: (start in the parameter, length, group, offset in the group's flat
    partition); None if it owns none of it."""
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


@torch.no_grad()
def gather_low_precision(engine: Any) -> None:
    """Fills the module's parameters, which are copies of the fp32 partitions, from the partitions of all ranks.
    Collective."""
    if not engine.zero_optimization():
        return  # the parameters themselves are the fp32 weights
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3, where each rank keeps a shard
        flats = list_flat_partitions(engine)
        for _, p in list_trained(engine):
            share = locate_share(engine, p)
            if share is not None:
                _, length, group, offset = share
                p.ds_tensor.view(-1)[:length].copy_(flats[group].narrow(0, offset, length))
        return
    rank = torch.distributed.get_rank()
    partitioned = zip(
        optimizer.bit16_groups_flat, optimizer.parallel_partitioned_bit16_groups, list_flat_partitions(engine)
    )
    for whole, partitions, weights in partitioned:
        partitions[rank].copy_(weights)
        if len(partitions) > 1:
            torch.distributed.all_gather_into_tensor(whole, partitions[rank])


def read_reduced_gradients(engine: Any) -> dict[str, Tensor]:
    """Returns this rank's share of the step's gradients by parameter name, after the backward pass of the last
    micro-batch; in stage 0 all gradients. The padding of partitions is left out.

    Raises:
        RuntimeError: if this version of DeepSpeed keeps them elsewhere.
    """
    if not engine.zero_optimization():
        return {name: p.grad for name, p in list_trained(engine) if p.grad is not None}
    optimizer = engine.optimizer
    found: dict[str, Tensor] = {}
    names = {id(p): name for name, p in list_trained(engine)}
    try:
        groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.params_in_partition
        for group, gradients in optimizer.averaged_gradients.items():
            real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            found.update({names[id(p)]: gradient for p, gradient in zip(groups[group], real)})
        if not optimizer.averaged_gradients:  # an optimizer on the CPU has them in its flat partitions
            flats = enumerate(list_flat_partitions(engine))
            found = {f"group {group}": flat.grad for group, flat in flats if flat.grad is not None}
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise _moved(repr(error)) from error
    if not found and any(flat.numel() for flat in list_flat_partitions(engine)):
        raise _moved("none are found")
    return found


def _moved(why: str) -> RuntimeError:
    return RuntimeError(
        f"this version of DeepSpeed keeps its gradients differently ({why}); install a tested one (setup.py)"
    )
