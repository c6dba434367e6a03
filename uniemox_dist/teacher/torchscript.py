"""Reads the tensors of a TorchScript archive, such as OpenAI's CLIP files, without running or compiling its code.

open_clip's loader rejects these archives, because torch.load(weights_only=True) does. torch.jit.load opens them but
may run code that they contain. This module reads the archive's pickle with the same restricted unpickler as any other
file of weights; TorchScript classes become empty shells that hold tensors.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SCRIPT = ("__torch__.", "torch.jit._pickle.")
"""Prefixes of names that occur in TorchScript pickles only: its classes and its typed lists."""


class _Shell:
    """Stands in for any TorchScript object: keeps its attributes and has no methods."""

    def __new__(cls, *_: Any) -> "_Shell":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


def is_torchscript(path: Path) -> bool:
    """True if a file is a TorchScript archive, not one of torch.save or another format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a module by name: its state_dict and its non-persistent buffers.

    Raises:
        pickle.UnpicklingError: if the archive's pickle names anything but tensors and TorchScript's own classes.
        Exception: of several types from zipfile and torch, if the archive is damaged.
    """
    # Without code/ and constants.pkl the archive has the layout that torch.save writes.
    plain = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(plain, "w") as out:
        for name in archive.namelist():
            record = name.partition("/")[2]
            if record in ("data.pkl", "version", "byteorder") or record.startswith("data/"):
                out.writestr(name, archive.read(name))
    plain.seek(0)
    named = torch.serialization.get_unsafe_globals_in_checkpoint(plain)
    foreign = sorted(name for name in named if not name.startswith(_SCRIPT))
    if foreign:
        raise pickle.UnpicklingError(f"GLOBAL {foreign[0]} is neither a tensor nor a class of TorchScript")
    plain.seek(0)
    shells: list[Any] = [(_Shell, name) for name in named]
    with torch.serialization.safe_globals(shells):
        root = torch.load(plain, map_location="cpu", weights_only=True)
    return dict(_iterate_tensors(root, ""))


def _iterate_tensors(shell: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(shell).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Shell):
            yield from _iterate_tensors(value, f"{prefix}{name}.")
