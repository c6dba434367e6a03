"""The norm of a step's gradients, whether all are finite, and clipping: few operations for all parameters together, on
the device, without waiting for it.

The formulas are those of DeepSpeed's optimizers, so that on one rank clipped gradients have the same bits as theirs. In
ZeRO-1 and ZeRO-2 the norms of groups are fp32.
Shape legend: G groups of parameters (in ZeRO-3 its smaller groups; in stage 0 one).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sums_of_squares(
    groups: Sequence[Mapping[str, Tensor]],
    stage: int,
    world_size: int,
    device: torch.device,
    *,
    clips: bool,
) -> Tensor:
    """Sums the squares of this rank's share of the gradients in each group; fp64, G.

    The sum over all ranks counts each gradient once, also in stage 0, where every rank has all gradients. A norm that
    is only reported is computed in fp32, which a CPU does three times as fast (relative error below 1e-4).
    """
    gradients = [gradient for group in groups for gradient in group.values()]
    if stage == 0:
        return torch.nn.utils.get_total_norm(gradients).to(device).double().square().view(1) / world_size
    if not gradients:  # with many ranks, one may own none
        return torch.zeros(len(groups), dtype=torch.float64, device=device)
    squares = (
        torch.stack(torch._foreach_norm(gradients, 2, torch.float64 if clips else torch.float32))
        .double()
        .square()
    )
    return torch.stack([part.sum() for part in squares.split([len(group) for group in groups])]).to(device)


def total_norm(squares_G: Tensor, stage: int) -> Tensor:
    """The norm of all gradients, from the sums of squares over all ranks."""
    dtype = torch.float32 if stage in (1, 2) else torch.float64
    return torch.linalg.vector_norm(squares_G.to(dtype).sqrt())


def find_bad(loss: Tensor, squares_G: Tensor) -> Tensor:
    """Returns 1 if the loss or a gradient is not finite, otherwise 0; fp32.

    Squares that exceed fp32 count too, because they would make Adam's second moments infinite for good.
    """
    return 1 - torch.cat([loss.view(1), squares_G]).float().isfinite().all().float()


def clip_factor(norm: Tensor, bad: Tensor, clip_grad: float) -> Tensor:
    """The factor, at most 1, that scales gradients down to a norm of `clip_grad`; fp32. It is 1 for gradients that are
    not applied, so that the evidence shows them as they are."""
    factor = 1.0 / ((norm + 1e-6) / clip_grad).clamp(min=1.0)
    return torch.where(bad > 0, 1.0, factor).float()
