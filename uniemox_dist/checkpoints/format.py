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
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, Checkpoint
from uniemox_dist.checkpoints.fragment_index import (
    FRAGMENTS,
    FragmentIndex,
    Run,
    fragment_key,
    parse_key,
    part_name,
)
from uniemox_dist.core.errors import UserError

log = logging.getLogger("uniemox")
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
EMA = "ema"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
STORED = {name: dtype for dtype, name in DTYPES.items()}
OPEN_PARTS = 256
"""Files that a reader keeps open; a process may usually open 1,024."""
PIECE_BYTES = 16 << 20
"""Bytes written and hashed at once, both without the GIL; they still are in the CPU's cache when they are hashed."""


def copy_fixed_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are not trained, fp32 on the CPU, for checkpoints."""
    fixed = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in fixed}


def read_fixed_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters of a checkpoint that were not trained; empty in a checkpoint of early versions, which computed
    them."""
    if (content := checkpoint.contents.get(FIXED)) is not None:
        return load(bytes(content))
    return load_file(checkpoint.folder / FIXED) if FIXED in checkpoint.info["files"] else {}


@torch.no_grad()
def load_fixed(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the parameters that a checkpoint's run did not train into a module: they may come from `model.init_from`.

    Raises:
        UserError: if one has another shape.
    """
    there = read_fixed_tensors(checkpoint)
    for name, p in module.named_parameters():
        if not p.requires_grad and name in there:
            if there[name].shape != p.shape:
                raise UserError(
                    f"{checkpoint.folder}: is of another model: {name} is {list(there[name].shape)} there and "
                    f"{list(p.shape)} here; set model.* as in its run"
                )
            p.copy_(there[name])


class Part:
    """A part file, of which ranges are read: from `content` if its bytes are in memory, otherwise by positioned reads,
    which neither map the file nor read ahead."""

    def __init__(self, path: Path, content: bytearray | None = None) -> None:
        """Reads the header.

        Raises:
            UserError: if it is not a safetensors file.
            OSError: if it cannot be read.
        """
        self._path, self._content = path, content
        self._file = None if content is not None else os.open(path, os.O_RDONLY)
        try:
            size = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(bytes(self._bytes(8, size)))
            self._tensors: dict[str, tuple[torch.dtype, int, int]] = {}
            for key, facts in header.items():
                if key != "__metadata__":
                    dtype, (first, end) = STORED[facts["dtype"]], facts["data_offsets"]
                    self._tensors[key] = dtype, 8 + size + first, (end - first) // dtype.itemsize
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            self.close()
            raise UserError(f"{path}: not readable ({error}); use another checkpoint") from None

    @property
    def lengths(self) -> dict[str, int]:
        """The length of every tensor, by its key."""
        return {key: length for key, (_, _, length) in self._tensors.items()}

    def read(self, key: str, start: int, length: int) -> Tensor:
        """`length` numbers of a tensor from `start` on; a view of `content`, if that is in memory.

        Raises:
            UserError: if the file does not hold them.
            OSError: if it cannot be read.
        """
        dtype, position, found = self._tensors.get(key, (torch.float32, 0, 0))
        if start + length > found:
            raise UserError(
                f"{self._path}: holds {found} numbers of {key} instead of {start + length}; use another checkpoint"
            )
        try:
            content = self._bytes(position + start * dtype.itemsize, length * dtype.itemsize)
        except ValueError as error:
            raise UserError(f"{self._path}: not readable ({error}); use another checkpoint") from None
        return torch.frombuffer(content, dtype=dtype) if length else torch.empty(0)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _bytes(self, position: int, count: int) -> memoryview:
        """Raises ValueError if the file is shorter."""
        if self._file is None:
            found = memoryview(self._content or b"")[position : position + count]
            done = len(found)
        else:
            left = os.fstat(self._file).st_size - position
            if count > left:  # a damaged header may ask for more than memory holds
                raise ValueError(f"it ends {count - left} bytes early")
            found, done = memoryview(bytearray(count)), 0
            while done < count and (n := os.preadv(self._file, [found[done:]], position + done)):
                done += n
        if done != count:
            raise ValueError(f"it ends {count - done} bytes early")
        return found


class FragmentReader:
    """Reads ranges of parameters from a checkpoint's files. Opens only the files that overlap them, which the index in
    complete.json names; in a checkpoint without one, reads the headers of all files first."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes: dict[str, list[int]] = checkpoint.info["parameters"]
        self._parts: dict[int, Part] = {}
        """Open files by number, the one that was used last at the end."""
        try:
            index = FragmentIndex.parse(checkpoint.info)
        except ValueError as error:
            log.warning(
                "%s: the entry %s %s; the headers of all parts are read instead",
                checkpoint.folder / COMPLETE,
                FRAGMENTS,
                error,
            )
            index = None
        self._index = index or self._scan()

    @property
    def has_ema(self) -> bool:
        """True if it holds a moving average of the encoder's weights."""
        return EMA in self._index.kinds

    def read(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """`length` fp32 numbers of the flattened parameter from `start` on.

        Raises:
            UserError: if the checkpoint does not cover that range.
        """
        found = self._index.find(name, kind, start, length)
        covered = sum(min(start + length, first + size) - max(start, first) for _, first, size in found)
        if covered != length:  # before memory is allocated, because the length comes from complete.json
            raise UserError(
                f"{self.checkpoint.folder}: holds {covered} of {length} numbers of {name} ({kind})"
            )
        out = torch.empty(length)
        for number, first, size in found:
            a, b = max(start, first), min(start + length, first + size)
            out[a - start : b - start] = self._part(number).read(
                fragment_key(name, first, kind), a - first, b - a
            )
        return out

    def parameter(self, name: str, kind: str = "fp32") -> Tensor:
        """A whole parameter in its shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _part(self, number: int) -> Part:
        part = self._parts.pop(number, None)
        if part is None:
            part = Part(self.checkpoint.folder / part_name(number))
            if len(self._parts) == OPEN_PARTS:
                self._parts.pop(next(iter(self._parts))).close()
        self._parts[number] = part
        return part

    def _scan(self) -> FragmentIndex:
        runs: dict[tuple[str, str], list[Run]] = {}
        for number, file in enumerate(part_files(self.checkpoint)):
            if file != part_name(number):
                raise UserError(
                    f"{self.checkpoint.folder}: lacks {part_name(number)}; use another checkpoint"
                )
            for key, length in self._part(number).lengths.items():
                name, start, kind = parse_key(key)
                if length:
                    runs.setdefault((name, kind), []).append(Run(number, start, length))
        return FragmentIndex(runs)


def part_files(checkpoint: Checkpoint) -> list[str]:
    """The files of fragments, in the order of the ranks that wrote them."""
    names = (name for name in checkpoint.info["files"] if name.endswith(".safetensors") and name != FIXED)
    return sorted(names, key=lambda name: (len(name), name))


def owner(number: int, parts: int, world_size: int) -> int:
    """The rank that reads a part when `world_size` ranks resume: each its own, if as many ranks wrote them."""
    return number * world_size // parts


def own_files(checkpoint: Checkpoint, rank: int, world_size: int) -> list[str]:
    """The files that a rank reads and hashes on resume: its parts and, on rank 0, those that are not parts."""
    parts = part_files(checkpoint)
    others = sorted(checkpoint.info["files"].keys() - set(parts)) if rank == 0 else []
    return others + [name for i, name in enumerate(parts) if owner(i, len(parts), world_size) == rank]


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
