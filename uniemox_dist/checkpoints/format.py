"""The content of checkpoint files. A fragment `NAME@START@KIND` holds the numbers of the flattened parameter NAME from
START on. KIND is fp32 (the weights), exp_avg or exp_avg_sq (Adam's moments), or ema (the moving average of the encoder,
if the run keeps one). Reading copies the parts that overlap, so that any number of ranks and any ZeRO stage reads any
other's. Parameters that are not trained (fixed positions) are stored whole, by name, in `fixed.safetensors`.

Files are written in one pass that hashes the bytes on their way to the disk. safetensors' own writer would need a
second pass for the hash, and holds the GIL while it writes, which would stop the training loop. The format is small:
the length of a JSON header (8 bytes, little endian), the header (padded to a multiple of 8), and the tensors' bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from uniemox_dist.checkpoints.folders import FIXED, Checkpoint
from uniemox_dist.core.errors import UserError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
EMA = "ema"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
PIECE_BYTES = 16 << 20
"""Bytes written and hashed at once, both without the GIL; they still are in the CPU's cache when they are hashed."""


def fragment_key(name: str, start: int, kind: str) -> str:
    """The tensor name of a fragment."""
    return f"{name}@{start}@{kind}"


def fixed_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are not trained, fp32 on the CPU, for checkpoints."""
    fixed = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in fixed}


def fixed_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters of a checkpoint that were not trained; empty in a checkpoint of early versions, which computed
    them."""
    return load_file(checkpoint.folder / FIXED) if FIXED in checkpoint.info["files"] else {}


@torch.no_grad()
def load_fixed(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the parameters that a checkpoint's run did not train into a module: they may come from `model.init_from`.

    Raises:
        UserError: if one has another shape.
    """
    there = fixed_tensors(checkpoint)
    for name, p in module.named_parameters():
        if not p.requires_grad and name in there:
            if there[name].shape != p.shape:
                raise UserError(
                    f"{checkpoint.folder}: is of another model: {name} is {list(there[name].shape)} there and "
                    f"{list(p.shape)} here; set model.* as in its run"
                )
            p.copy_(there[name])


class FragmentReader:
    """Reads ranges of parameters from a checkpoint's files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes: dict[str, list[int]] = checkpoint.info["parameters"]
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for name in checkpoint.info["files"]:
            if name.endswith(".safetensors") and name != FIXED:
                try:
                    file = safe_open(checkpoint.folder / name, "pt")
                except SafetensorError as error:
                    raise UserError(
                        f"{checkpoint.folder / name}: not readable ({error}); use another checkpoint"
                    ) from None
                for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    parameter, start, kind = key.rsplit("@", 2)
                    self._pieces.setdefault((parameter, kind), []).append((int(start), file.get_slice(key)))

    @property
    def has_ema(self) -> bool:
        """True if it holds a moving average of the encoder's weights."""
        return any(kind == EMA for _, kind in self._pieces)

    def read(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """`length` fp32 numbers of the flattened parameter from `start` on.

        Raises:
            UserError: if the checkpoint does not cover that range.
        """
        out = torch.empty(length)
        covered = 0
        for first, piece in self._pieces.get((name, kind), []):
            a, b = max(start, first), min(start + length, first + piece.get_shape()[0])
            if a < b:
                out[a - start : b - start] = piece[a - first : b - first]
                covered += b - a
        if covered != length:
            raise UserError(
                f"{self.checkpoint.folder}: holds {covered} of {length} numbers of {name} ({kind})"
            )
        return out

    def parameter(self, name: str, kind: str = "fp32") -> Tensor:
        """A whole parameter in its shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, int(torch.Size(shape).numel())).view(shape)


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes tensors on the CPU as a safetensors file, flushed to the disk; returns its bytes and its SHA-256.

    Raises:
        OSError: if it cannot be written (a full disk); the file then stays incomplete.
    """
    about = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, about, tensors.__getitem__)


def write_tensors(
    path: Path, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> tuple[int, str]:
    """Like `write_part`, for tensors that are described by number format and shape and read one after the other, so
    that only one of them is in memory.

    Raises:
        OSError: if it cannot be written (a full disk); the file then stays incomplete.
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
