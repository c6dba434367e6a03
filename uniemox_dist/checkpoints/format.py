"""The content of checkpoint files. A fragment `NAME@START@KIND` holds the numbers of the flattened parameter NAME from
START on. KIND is fp32 (the weights), exp_avg or exp_avg_sq (Adam's moments), or ema (the moving average of the encoder,
if the run keeps one). Reading copies the parts that overlap, so that any number of ranks and any ZeRO stage reads any
other's. Parameters that are not trained (fixed positions) are stored whole, by name, in `fixed.safetensors`.
"""

from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from uniemox_dist.checkpoints.folders import FIXED, Checkpoint
from uniemox_dist.core.errors import UserError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
EMA = "ema"


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
