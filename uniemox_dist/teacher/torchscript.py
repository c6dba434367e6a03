"""The tensors of a TorchScript archive, such as OpenAI's CLIP files, read without running or compiling its code.

open_clip's own loader refuses these archives, since torch.load(weights_only=True) does; torch.jit.load, which opens
them, may run code that lies in them. So the archive's pickle is read by the same restricted unpickler as any other
file of weights, and its TorchScript classes become empty shells that hold tensors.
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
"""What only TorchScript pickles name: its classes, and its typed lists."""


class _Shell:
    """Stands for any TorchScript object: its attributes are kept, nothing of it can be called."""

    def __new__(cls, *_: Any) -> "_Shell":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive (rather than one of torch.save, or something else)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Tensors by the names that they have in the module: those of its state_dict, and buffers that are not in it.

    Raises:
        pickle.UnpicklingError: if the archive's pickle names anything but tensors and TorchScript's own classes.
        Exception: of zipfile's and torch's many types, if it is damaged.
    """
    # Without code/ and constants.pkl it is an archive as torch.save writes it.
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
    return dict(_tensors(root, ""))


def _tensors(shell: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(shell).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Shell):
            yield from _tensors(value, f"{prefix}{name}.")
