"""Writes one file of a checkpoint in one pass, hashing the bytes on their way to the disk.

safetensors' own writer would be a first pass over the data and hashing the file a second one, and it holds Python's
lock while it writes; a background thread must not stop the training loop. The format is a small one: the length of a
JSON header (8 bytes, little endian), the header (padded to a multiple of 8), and the tensors' bytes one after the
other.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
PIECE_BYTES = 16 << 20
"""Bytes written and hashed at once, both without the GIL; few enough to be in the CPU's cache when they are hashed."""


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes tensors on the CPU as a safetensors file, flushed to the disk; returns its bytes and its SHA-256.

    Raises:
        OSError: if it cannot be written (a full disk); the file is then left as far as it came.
    """
    about = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, about, tensors.__getitem__)


def write_tensors(
    path: Path, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> tuple[int, str]:
    """As `write_part`, for tensors that are stated by number format and shape and read one after the other: only one of
    them needs to be in memory.

    Raises:
        OSError: if it cannot be written (a full disk); the file is then left as far as it came.
    """
    digest, written = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in _pieces(about, read):
            digest.update(piece)
            rest = piece
            while rest:  # an unbuffered write may take less than it was given
                rest = rest[file.write(rest) :]
            written += len(piece)
        os.fsync(file.fileno())
        # These bytes are not read again soon, and would push the shards out of the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written, digest.hexdigest()


def _pieces(
    about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> Iterator[memoryview]:
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in about.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name, stated in about.items():
        tensor = read(name).detach()
        assert (tensor.dtype, tuple(tensor.shape)) == stated, name
        if tensor.numel():
            whole = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(whole), PIECE_BYTES):
                yield whole[start : start + PIECE_BYTES]
