"""Access to DeepSpeed's internals: ZeRO's fp32 partitions, Adam's states, the reduced gradients and their update. No
other module uses anything beyond DeepSpeed's public interface.

setup.py limits the version of DeepSpeed because of this file. With a version that keeps them elsewhere,
`checkpoints.zero_state.check`, `read_reduced_gradients` and `take_over_checks` raise an error.
"""

from collections.abc import Sequence
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
    """The parameters that are trained, with their names. Every step asks for them, so the engine remembers them."""
    if "trained_parameters" not in engine.__dict__:
        engine.trained_parameters = [
            (name, p) for name, p in engine.module.named_parameters() if p.requires_grad
        ]
    found: list[tuple[str, Any]] = engine.trained_parameters
    return found


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


def read_reduced_gradients(engine: Any) -> list[dict[str, Tensor]]:
    """Returns this rank's share of the step's gradients by parameter name, for each of ZeRO's groups, after the
    backward pass of the last micro-batch; in stage 0 all gradients as one group. The padding of partitions is left out.

    Raises:
        RuntimeError: if this version of DeepSpeed keeps them elsewhere.
    """
    optimizer = engine.optimizer
    names = {id(p): name for name, p in list_trained(engine)}
    if not engine.zero_optimization():
        own = [p for group in optimizer.param_groups for p in group["params"]]
        order = {id(p): place for place, p in enumerate(own)}  # a sum of fp32 depends on its order
        trained = sorted(list_trained(engine), key=lambda pair: order.get(id(pair[1]), 0))
        return [{name: p.grad for name, p in trained if p.grad is not None}]
    flats = list_flat_partitions(engine)
    found: list[dict[str, Tensor]] = [{} for _ in flats]
    try:
        groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.params_in_partition
        for group, gradients in optimizer.averaged_gradients.items():
            real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            found[group] = {names[id(p)]: gradient for p, gradient in zip(groups[group], real)}
        if not optimizer.averaged_gradients:  # an optimizer on the CPU has them in its flat partitions
            found = [
                {} if flat.grad is None else {f"group {group}": flat.grad} for group, flat in enumerate(flats)
            ]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise _moved(repr(error)) from error
    if not any(found) and any(flat.numel() for flat in flats):
        raise _moved("none are found")
    return found


def take_over_checks(engine: Any) -> None:
    """Makes ZeRO's optimizer leave the norm of gradients, their check and clipping to `update`.

    ZeRO would compute a norm for each parameter again, and wait for the device to compare it.

    Raises:
        RuntimeError: if this version of DeepSpeed does them elsewhere.
    """
    if not engine.zero_optimization():
        return
    optimizer = engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    norm = "_get_norm_groups" if stage3 else "scaled_global_norm"
    for name in (norm, "unscale_and_clip_grads", "_optimizer_step"):
        if not callable(getattr(optimizer, name, None)):
            raise _moved(f"no {name}")
    factors: list[Tensor] = []

    def scale(group: Any, _: Any) -> None:
        gradients = [optimizer.fp32_partitioned_groups_flat[group].grad] if stage3 else group
        for factor in factors:
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))

    # Python numbers, which are compared without waiting for the device.
    setattr(optimizer, norm, lambda: [0.0] if stage3 else 0.0)
    optimizer.unscale_and_clip_grads = scale
    optimizer.factors = factors
    if not stage3 and FlatReduction.fits(optimizer):
        FlatReduction(optimizer).install()


class FlatReduction:
    """The reduction of gradients in ZeRO-1 and ZeRO-2, with few operations.

    DeepSpeed copies each gradient into a bucket and from there to its partition, one after the other, and the update
    copies the partition once more into a flat one. This class copies all gradients of a bucket together, and straight
    to their places in the flat partition; without other ranks there is no bucket. The reduction itself, and the
    results, are DeepSpeed's.
    """

    def __init__(self, optimizer: Any) -> None:
        self.zero = optimizer
        [(self._dtype, self._bucket)] = optimizer.ipg_buckets.items()
        self._several = torch.distributed.get_world_size(optimizer.dp_process_group) > 1
        self._partitions: dict[int, Any] = {}
        """DeepSpeed's flat partition of this rank, by group. On a GPU it exists from the first gradient to the update.
        On a CPU it is kept, because the kernel would have to clear the memory of a new one in each step."""
        self._targets: dict[int, Tensor] = {}
        """A parameter's part of its partition, by its number; with its shape if that is the whole."""
        self._placed: set[int] = set()
        """Numbers of the parameters whose gradients of earlier micro-batches are in `_partitions`."""
        self._starts: dict[int, int] = {}
        """Where this rank's part of a gradient starts, by the parameter's number."""
        rank = torch.distributed.get_rank(optimizer.dp_process_group)
        for group, parameters in enumerate(optimizer.params_in_partition):
            starts = optimizer.grad_start_offset[group][rank]
            self._starts.update({n: int(starts[n]) for n in map(optimizer.get_param_id, parameters)})

    def install(self) -> None:
        """Replaces DeepSpeed's reduction."""
        zero = self.zero
        self._allocate_buckets, zero.setup_buckets = zero.setup_buckets, lambda: None
        zero.reduce_independent_p_g_buckets_and_remove_grads = self.add
        zero.independent_gradient_partition_epilogue = self.finish
        if not (zero.partition_gradients or zero.overlap_comm):
            # Hooks of parameters which would do nothing: all gradients are reduced after the backward pass.
            for hook in zero._grad_acc_hooks:
                hook.remove()
            zero._grad_acc_hooks.clear()

    @staticmethod
    def fits(optimizer: Any) -> bool:
        """False with settings of the section `deepspeed` for which DeepSpeed's own reduction is needed."""
        return (
            type(optimizer).__name__ == "DeepSpeedZeroOptimizer"
            and optimizer.contiguous_gradients
            and not (optimizer.cpu_offload or optimizer.zenflow or optimizer.has_moe_layers)
            and optimizer.dtype == optimizer.gradient_accumulation_dtype
            and len(optimizer.ipg_buckets) == 1
        )

    def add(self, p: Any, group: int) -> None:
        """Takes the gradient of a parameter, and reduces the bucket first if it is full."""
        bucket, size = self._bucket, p.numel()
        if bucket.elements and bucket.elements + size > self.zero.reduce_bucket_size:
            self._reduce()
        bucket.grads.append(p.grad.view(-1) if self._several else p.grad)
        bucket.params.append((group, p.param_idx_in_group, self.zero.get_param_id(p)))
        bucket.elements += size
        if p.is_cuda:
            bucket.copy_streams.add(torch.cuda.current_stream())
        p.grad = None

    def finish(self) -> None:
        """Reduces the last bucket of a micro-batch; after the last micro-batch of a step, hands the partitions over."""
        zero = self.zero
        self._reduce()
        if self._overlaps:
            torch.cuda.current_stream().wait_stream(zero.reduction_stream)  # the device waits, not the host
        if zero.is_gradient_accumulation_boundary():
            for group in range(len(zero.bit16_groups)):
                self._open_partition(group)
            zero.averaged_gradients.update(self._partitions)
            if unused := [part for number, part in self._targets.items() if number not in self._placed]:
                torch._foreach_zero_(unused)
            self._placed.clear()
            if any(partition.flat_partition.is_cuda for partition in self._partitions.values()):
                self._partitions.clear()
                self._targets.clear()
        zero._release_ipg_buffers()
        zero._clear_param_grad_only()
        zero._epilogue_ran_this_backward = True

    @property
    def _overlaps(self) -> bool:
        """Whether buckets are reduced on a stream of their own."""
        return bool(self._several and self.zero.overlap_comm and self.zero.reduction_stream is not None)

    def _open_partition(self, group: int) -> None:
        if group in self._partitions:
            return
        self._partitions[group] = found = self.zero._build_compact_grad_partition_buffer(group)
        own = [part for part in found if not getattr(part, "_zero_padding", False)]
        numbers = map(self.zero.get_param_id, self.zero.params_in_partition[group])
        self._targets.update(zip(numbers, own, strict=True))

    @torch.no_grad()
    def _reduce(self) -> None:
        bucket, gradients = self._bucket, self._bucket.grads
        if not gradients:
            return
        for group in sorted({group for group, *_ in bucket.params}):
            self._open_partition(group)
        if len(bucket.copy_streams) > 1:  # compiled backward passes can use several
            here = torch.cuda.current_stream()
            for stream in bucket.copy_streams - {here}:
                here.wait_stream(stream)
            for gradient in gradients:
                gradient.record_stream(here)
            bucket.copy_streams = {here}
        if self._several:
            if bucket.elements > self.zero.reduce_bucket_size:  # a single gradient, reduced where it is
                [flat] = gradients
                if self._overlaps:
                    flat.record_stream(self.zero.reduction_stream)
            else:
                self._allocate_buckets()  # once in a micro-batch
                flat = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
                copies = list(flat.split([gradient.numel() for gradient in gradients]))
                torch._foreach_copy_(copies, gradients)
                gradients = copies
            self.zero.average_tensor(flat, self._dtype)
        with torch.cuda.stream(self.zero.reduction_stream if self._overlaps else None):
            self._place(gradients)
        bucket.clear()
        if self._overlaps:
            bucket.index = (
                1 - bucket.index
            )  # DeepSpeed has two buffers, so that one fills while the other is reduced

    def _place(self, gradients: Sequence[Tensor]) -> None:
        """Copies reduced gradients to their places in this rank's partitions, or adds those of later micro-batches."""
        new: tuple[list[Tensor], list[Tensor]] = [], []
        more: tuple[list[Tensor], list[Tensor]] = [], []
        for (_, _, number), gradient in zip(self._bucket.params, gradients):
            target = self._targets.get(number)
            if target is None:
                continue  # other ranks own this parameter
            if target.shape != gradient.shape:
                target = target.view(-1)
                gradient = gradient.view(-1).narrow(0, self._starts[number], target.numel())
            targets, sources = more if number in self._placed else new
            targets.append(target)
            sources.append(gradient)
            self._placed.add(number)
        if new[0]:
            torch._foreach_copy_(*new)
        if more[0]:
            torch._foreach_add_(*more)


@torch.no_grad()
def update(engine: Any, gradients: Sequence[Tensor], *, skip: Tensor, factor: Tensor | None) -> None:
    """Updates the weights from the step's gradients, without waiting for the device.

    Args:
        gradients: those of `read_reduced_gradients`.
        skip: 1 if no weight, moment or step counter may change, otherwise 0; fp32, on the device.
        factor: by which gradients are multiplied first; fp32, on the device.
    """
    sharded = engine.zero_optimization()
    optimizer = engine.optimizer
    # The second one exists if ZeRO-3 keeps a part of the states on the CPU.
    for adam in (
        (optimizer.optimizer, getattr(optimizer, "backup_optimizer", None)) if sharded else (optimizer,)
    ):
        if adam is not None:
            adam.found_inf = skip  # torch's fused Adam reads it on the device
    if sharded:
        optimizer.factors[:] = [] if factor is None else [factor]
    elif factor is not None:
        torch._foreach_mul_(list(gradients), factor)
    engine.step()


def _moved(why: str) -> RuntimeError:
    return RuntimeError(
        f"this version of DeepSpeed keeps its gradients differently ({why}); install a tested one (setup.py)"
    )
