"""Bytes that all ranks need: sent by rank 0, and kept once on each node."""

import logging
import mmap
import os
import secrets
from pathlib import Path

import torch

from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World

log = logging.getLogger("uniemox")
FOLDER = Path("/dev/shm")
"""The memory of a node, as a file system."""
Buffer = bytearray | mmap.mmap


def share_on_nodes(content: mmap.mmap | None, world: World, device: torch.device) -> Buffer:
    """Returns rank 0's `content` on all ranks. Collective.

    The ranks of a node map one file in the node's memory, which has no name any more when this returns. A rank that
    does not find its node's file, because containers separate them or the memory is full, keeps a copy of its own.
    """
    if world.size == 1:
        assert content is not None
        return content
    name, size = collectives.on_main(world, lambda: (f"uniemox-{secrets.token_hex(16)}", len(content or b"")))
    own = collectives.share_bytes(content, size, 0, device)
    path = FOLDER / name
    try:
        if world.local_rank == 0:
            _write(path, own)
        collectives.barrier()
        mapped = _map(path, own)
        collectives.barrier()
    finally:
        if world.local_rank == 0:
            path.unlink(missing_ok=True)
    return own if mapped is None else mapped


def _write(path: Path, content: Buffer) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb", buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
    except OSError as error:
        path.unlink(missing_ok=True)
        log.debug("%s: %s; each rank keeps its own copy", path, error.strerror)


def _map(path: Path, content: Buffer) -> mmap.mmap | None:
    """Maps the file; None if it is not there, or has other bytes."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # mmap refuses an empty file
        return None
    return mapped if memoryview(mapped) == memoryview(content) else None
