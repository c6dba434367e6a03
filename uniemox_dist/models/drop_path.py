"""Stochastic depth (Huang et al. 2016) whose draws are given from outside, so that they can follow from a sample and
not from the rank that happens to have it. Shape legend: B samples (or views), N tokens, D width, K places."""

from collections.abc import Sequence

import timm.layers
from timm.layers.drop import drop_path
from torch import Tensor, nn


class DropPath(nn.Module):
    """A residual branch that is left out for a share of the samples, and scaled up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors_B: Tensor | None = None
        """What samples' branches are multiplied by; without any, torch's generator decides."""

    def forward(self, x: Tensor) -> Tensor:
        """The branch's B×N×D, or zeros for a sample that does without it."""
        if not self.training:
            return x
        if self.factors_B is None:
            return drop_path(x, self.rate, True)
        # The rate is not looked at here, so that blocks of all rates compile to one graph.
        return x * self.factors_B[: len(x)].to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """What print shows."""
        return f"rate={self.rate:.3f}"


def replace_drop_paths(module: nn.Module) -> None:
    """Puts ours in the place of each of timm's."""
    for parent in module.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, timm.layers.DropPath):
                setattr(parent, name, DropPath(float(child.drop_prob)))


def find_drop_paths(module: nn.Module) -> list[DropPath]:
    """Those of a module, in its order."""
    return [child for child in module.modules() if isinstance(child, DropPath)]


def set_draws(paths: Sequence[DropPath], draws_BK: Tensor) -> None:
    """Hands the draws of the next pass, uniform in [0, 1), to all places of a module; at least as many rows as it will
    have samples. A branch is left out where its draw is below its rate."""
    for path, draws_B in zip(paths, draws_BK.unbind(1), strict=True):
        path.factors_B = (draws_B >= path.rate).float() / (1 - path.rate)
