"""A frozen open_clip picture tower, computed faster with the same weights and, to rounding, the same results.

QuickGELU writes three tensors of the MLP's hidden width, of which a tower that is never trained needs one. Attention
by the fused kernel gains next to nothing where nn.MultiheadAttention takes its own fast path, as it does on a CPU for
frozen weights. What was measured stands in docs/benchmarks/step.md.
Shape legend: B pictures, T tokens, D width, H heads.
"""

from typing import Any

import torch
from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 1.702
"""QuickGELU is x·σ(1.702·x)."""


class FusedAttention(nn.MultiheadAttention):
    """Self-attention by torch's fused kernel."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = options.get("attn_mask") is None and not options.get("need_weights", True)
        if query is not key or key is not value or not plain:
            return super().forward(query, key, value, **options)
        B, T, D = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        joined_BTD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        return self.out_proj(joined_BTD), None


class QuickGELU(OpenClipQuickGELU):
    """x·σ(1.702·x) = SiLU(1.702·x) / 1.702, in the memory of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return F.silu(x.mul_(SLOPE), inplace=True).mul_(1 / SLOPE)


def quicken(visual: nn.Module) -> nn.Module:
    """Lets the tower's blocks compute in these ways, where it has such blocks; weights and their names stay."""
    for block in visual.modules():
        if not isinstance(block, ResidualAttentionBlock):
            continue
        attention = block.attn
        if (
            type(attention) is nn.MultiheadAttention
            and attention.batch_first
            and attention.in_proj_weight is not None
        ):
            attention.__class__ = FusedAttention
        for module in block.mlp:
            if (
                type(module) is OpenClipQuickGELU
            ):  # its input is the linear layer's output, which nothing else reads
                module.__class__ = QuickGELU
    return visual
