"""Stochastic depth (Huang et al. 2016) with random numbers set from outside, so that they depend on the sample's slot.

Shape legend: B samples (or views), N tokens, D width, L drop-path layers of a module.
"""

from collections.abc import Sequence

import timm.layers
from timm.layers.drop import drop_path
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch for a share `rate` of the samples, and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors_B: Tensor | None = None
        """Factors of the samples' branches; None uses torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the branch B×N×D, with zeros for samples that drop it."""
        if not self.training:
            return x
        if self.factors_B is None:
            return drop_path(x, self.rate, True)
        # The rate is not used here, so that blocks of all rates compile to one graph.
        return x * self.factors_B[: len(x)].to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Text for `print(module)`."""
        return f"rate={self.rate:.3f}"


def replace_drop_paths(module: nn.Module) -> None:
    """Replaces timm's DropPath layers by ours, in place."""
    for parent in module.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, timm.layers.DropPath):
                setattr(parent, name, DropPath(float(child.drop_prob)))


def find_drop_paths(module: nn.Module) -> list[DropPath]:
    """Lists a module's DropPath layers in the order of its modules."""
    return [child for child in module.modules() if isinstance(child, DropPath)]


def list_rates(module: nn.Module) -> tuple[float, ...]:
    """Lists the rates of a module's DropPath layers."""
    return tuple(path.rate for path in find_drop_paths(module))


def set_factors(paths: Sequence[DropPath], factors_BL: Tensor) -> None:
    """Sets the factors of the next forward pass for a module's DropPath layers; at least one row per sample."""
    for path, factors_B in zip(paths, factors_BL.unbind(1), strict=True):
        path.factors_B = factors_B
