"""A rank of a job whose other ranks are not there, and what it reads, opens and exchanges.

The process group is torch's fake one, whose collectives return at once. Ranks of a job run one after the other: rank 0
records what it sends to all others (the tape), and they replay it.
"""

import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World

EXCHANGES = ("gather", "all_gather", "all_gather_into_tensor", "all_reduce", "broadcast")


@dataclass
class Counts:
    """What this rank did while it was counted."""

    opened: Counter[str] = field(default_factory=Counter)
    """Files by name."""
    read_bytes: int = 0
    """As the kernel counts them, of all files."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by exchange; what a rank passes on in a tree or ring is not counted."""
    received: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    @property
    def parts(self) -> int:
        """Number of part files that were opened, repetitions included."""
        return sum(count for name, count in self.opened.items() if name.startswith("part_"))

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "parts": self.parts,
            "read_bytes": self.read_bytes,
            "sent": dict(self.sent),
            "received": dict(self.received),
            "cpu_s": self.cpu_s,
        }


class Opens:
    """Counts the files that this process opens, by name."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()

    def count_open(self, path: str | os.PathLike[str]) -> None:
        """Counts a file that this process opens."""
        self.files[Path(path).name] += 1


class Rank:
    """A rank of a job whose other ranks are not there."""

    def __init__(self, rank: int, size: int, tape: Path) -> None:
        self.world = World(rank, size, local_rank=rank % 8)
        self._tape = open(tape, "wb" if rank == 0 else "rb")  # noqa: SIM115
        self._counts: Counts | None = None

    def __enter__(self) -> "Rank":
        return self

    def __exit__(self, *_: object) -> None:
        self._tape.close()

    def count_open(self, path: str | os.PathLike[str]) -> None:
        """Counts a file that this process opens."""
        if self._counts is not None:
            self._counts.opened[Path(path).name] += 1

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Counts what happens, and lets rank 0's words reach the others."""
        found = Counts()
        originals = {(where, name): getattr(where, name) for where in (dist, c10d) for name in EXCHANGES}
        for (where, name), original in originals.items():
            setattr(where, name, self._counting(name, original, found))
        on_main, collectives.on_main = collectives.on_main, self._on_main  # type: ignore[assignment]
        self._counts, before, began = found, read_bytes(), time.process_time()
        PLAYED[:] = [self]
        try:
            yield found
        finally:
            self._counts = None
            found.read_bytes, found.cpu_s = read_bytes() - before, time.process_time() - began
            collectives.on_main = on_main
            for (where, name), original in originals.items():
                setattr(where, name, original)

    def _on_main(self, _: World, work: Callable[[], Any]) -> Any:
        value = self._share(pickle.dumps(work()) if self.world.is_main else None)
        if self._counts is not None:
            (self._counts.sent if self.world.is_main else self._counts.received)["on_main"] += len(value)
        return pickle.loads(value)

    def _share(self, content: bytes | None) -> bytes:
        """Rank 0's bytes, by way of the tape."""
        if content is not None:
            self._tape.write(len(content).to_bytes(8, "little") + content)
            self._tape.flush()
            return content
        counts, self._counts = self._counts, None
        before = read_bytes()
        found = self._tape.read(int.from_bytes(self._tape.read(8), "little"))
        self.replayed += read_bytes() - before
        self._counts = counts
        return found

    def _counting(self, name: str, original: Callable[..., Any], found: Counts) -> Callable[..., Any]:
        others = self.world.size - 1

        def exchange(*arguments: Any, **named: Any) -> Any:
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            if name == "broadcast":
                source = named.get("src", arguments[1] if len(arguments) > 1 else 0)
                own = source == self.world.rank
                (found.sent if own else found.received)[name] += tensors[0].nbytes
                if source == 0:
                    _fill(tensors[0], self._share(_content(tensors[0]) if own else None))
                return None
            count = tensors[-1].nbytes
            if name == "gather":
                main = self.world.is_main
                (found.received if main else found.sent)[name] += count * others if main else count
            else:
                found.sent[name] += count
                found.received[name] += count if name == "all_reduce" else count * others
            return original(*arguments, **named)

        return exchange

    replayed = 0
    """Bytes of the tape that were read, which are no files of the job."""


PLAYED: list[Rank | Opens] = []
"""Where opened files are counted."""


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and PLAYED and isinstance(arguments[0], str | os.PathLike):
        PLAYED[0].count_open(arguments[0])


sys.addaudithook(_see)


def _content(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensor: Tensor, content: bytes) -> None:
    if tensor.numel():
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=tensor.dtype).view(tensor.shape))


def read_bytes() -> int:
    """Bytes that this process has read, as the kernel counts them."""
    text = Path("/proc/self/io").read_text()
    return int(text.split()[1])
