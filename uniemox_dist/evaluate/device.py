"""The device that a command computes on."""

import torch

from uniemox_dist.core.errors import UserError


def device_of(name: str) -> str:
    """`auto` is the first GPU where there is one.

    Raises:
        UserError: for a device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0][:120]
        raise UserError(f"--device={name}: cannot be used ({reason}); give cpu, or auto") from None
    return name
