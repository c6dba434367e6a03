"""Collective operations among ranks. Without a process group this process is the only rank."""

import os
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from importlib import import_module
from mmap import mmap
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed.world import World

T = TypeVar("T")
B = TypeVar("B", bytearray, mmap)
PIECE_BYTES = 64 << 20
"""Bytes of a file that ranks exchange at once."""

HOLDERS = ("torch.distributed.nn",)
"""Modules whose functions have the default group as a default argument. If such a module is first imported while a
group exists (open_clip imports this one), it holds the group forever, and `close` cannot end the group's threads. A
thread that needs the interpreter while it exits then aborts the process: "terminate called without an active
exception"."""


def init(world: World, timeout_s: int) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo elsewhere) and returns this rank's device.

    Args:
        timeout_s: seconds after which a collective operation fails.

    Raises:
        UserError: if the node has GPUs and this rank has none of its own.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        if world.local_rank >= (visible := torch.cuda.device_count()):
            raise UserError(
                f"rank {world.rank} is local rank {world.local_rank} and sees only {visible} of the GPUs; start no "
                f"more ranks on a node than it has GPUs, and let every rank see them all (--gpus-per-node, not "
                f"--gpus-per-task)"
            )
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if dist.is_initialized():
        return device
    for name in HOLDERS:
        import_module(name)
    # DeepSpeed requires a group even for one rank. A store in this process's memory needs no port.
    method = f"tcp://{world.master_addr}:{world.master_port}" if world.size > 1 else None
    store = None if method else dist.HashStore()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=method,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s),
    )
    # DeepSpeed reads these even when a group exists already.
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    return device


def close() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its result on all ranks; a UserError is raised on all ranks.

    The result is sent pickled, between ranks of one job only.
    """
    outcome: list[Any] = [None]
    if world.is_main:
        try:
            outcome = [("done", work())]
        except UserError as error:
            outcome = [("user", str(error))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "user":
        raise UserError(value if world.is_main else "")  # one rank reports it
    return value  # type: ignore[no-any-return]


def on_all(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on every rank and returns this rank's own result. A UserError of any rank is raised on all ranks,
    naming the hosts if there are several, because a file may be missing on one node only."""
    error: str | None = None
    try:
        result = work()
    except UserError as problem:
        error = str(problem)
    everyone = gather_objects((socket.gethostname(), error), world)
    if any(problem is not None for _, problem in everyone):
        raise UserError(_with_hosts(everyone) if world.is_main else "")  # one rank reports it
    return result


def _with_hosts(everyone: list[tuple[str, str | None]]) -> str:
    """The first problem, and the hosts that have a problem."""
    hosts = list(dict.fromkeys(host for host, _ in everyone))
    bad = list(dict.fromkeys(host for host, problem in everyone if problem is not None))
    problem = next(problem for _, problem in everyone if problem is not None)
    if len(hosts) == 1:
        return problem
    well = f", and not on {_some(host for host in hosts if host not in bad)}" if len(bad) < len(hosts) else ""
    return f"on {_some(bad)}{well}: {problem}"


def _some(names: Iterable[str]) -> str:
    """The first three names, and the number of the others."""
    known = list(names)
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")


@torch.no_grad()
def give_to_all(tensors: Iterable[Tensor], world: World, device: torch.device) -> None:
    """Overwrites tensors on the CPU with those of rank 0, one after the other. Collective."""
    if world.size == 1:
        return
    for tensor in tensors:
        there = tensor.detach().to(device)
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def gather_objects(value: T, world: World) -> list[T]:
    """The value of every rank, in rank order; pickled, between ranks of one job only. Collective."""
    values: list[Any] = [value] * world.size
    if dist.is_initialized() and world.size > 1:
        dist.all_gather_object(values, value)
    return values


def gather_on_main(value: T, world: World) -> list[T]:
    """The value of every rank, in rank order, on rank 0; an empty list elsewhere. Pickled, between ranks of one job
    only. Collective."""
    if not dist.is_initialized() or world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size if world.is_main else []
    dist.gather_object(value, values if world.is_main else None)
    return values


@torch.no_grad()
def share_bytes(content: B | None, size: int, source: int, device: torch.device) -> B | bytearray:
    """Returns the `size` bytes that rank `source` has in `content`; on other ranks in a new bytearray. Collective.

    They pass through the device in pieces, because NCCL sends from GPUs only.
    """
    found = bytearray(size) if dist.get_rank() != source or content is None else content
    if dist.get_world_size() > 1 and size:
        whole = torch.frombuffer(found, dtype=torch.uint8)
        for piece in whole.split(PIECE_BYTES):
            there = piece.to(device)
            dist.broadcast(there, src=source)
            piece.copy_(there)
    return found


def hosts(world: World) -> list[str]:
    """The host of every rank. Collective."""
    return gather_objects(socket.gethostname(), world)


def gather_numbers(values: list[float], world: World) -> list[list[float]]:
    """A few numbers of every rank, in rank order. Collective."""
    if not dist.is_initialized() or world.size == 1:
        return [values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = own.new_empty((world.size, len(values)))
    dist.all_gather(list(rows.unbind()), own)
    found: list[list[float]] = rows.tolist()
    return found


def sum_over_ranks(values: Tensor) -> None:
    """Sums a small vector over all ranks, in place, without waiting for the result on the host. Collective."""
    if dist.is_initialized():
        dist.all_reduce(values)


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        # NCCL guesses the GPU from the global rank otherwise, warns, and may guess wrong
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def gather_rows(rows_KE: Tensor, world_size: int) -> Tensor:
    """All ranks' rows in rank order: K×E to (W·K)×E, without autograd. Collective."""
    if world_size == 1:
        return rows_KE
    gathered = rows_KE.new_empty((world_size * rows_KE.shape[0], rows_KE.shape[1]))
    dist.all_gather_into_tensor(gathered, rows_KE.contiguous())
    return gathered
