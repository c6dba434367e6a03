"""Where an encoder looks: the attention of its class token in the last block.

Shape legend: B pictures, T tokens, N patches, H heads, D width.
"""

from typing import Any

import torch
from torch import Tensor

from uniemox_dist.models.student import Student


@torch.no_grad()
def class_attention(student: Student, pictures_B3HW: Tensor) -> Tensor | None:
    """Shares of the class token's attention over the patches, the mean of all heads, B×side×side; None for encoders
    whose attention has no joint projection to queries and keys."""
    attention: Any = student.encoder.blocks[-1].attn  # type: ignore[union-attr,index]
    if not hasattr(attention, "qkv") or not hasattr(attention, "num_heads"):
        return None
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        student.encode(pictures_B3HW)
    finally:
        hook.remove()
    tokens_BTD = seen[0]
    B, T, D = tokens_BTD.shape
    qkv = attention.qkv(tokens_BTD)
    if qkv.shape[-1] != 3 * D:
        return None
    q, k, _ = qkv.view(B, T, 3, attention.num_heads, D // attention.num_heads).permute(2, 0, 3, 1, 4)
    q, k = (getattr(attention, norm)(x) for norm, x in (("q_norm", q), ("k_norm", k)))
    share_BHT = ((q[:, :, :1] @ k.transpose(-1, -2)) * attention.scale).softmax(-1)[:, :, 0]
    side = student.model.image_size // student.model.patch_size
    patches_BN = share_BHT.float().mean(1)[:, T - side * side :]
    return (patches_BN / patches_BN.sum(1, keepdim=True)).view(B, side, side)
