"""The decoder: predicts the pixels of a view's masked patches from its visible tokens.

Shape legend: B views, V visible and M masked patches, D encoder width, F decoder width, P patch values.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from uniemox_dist.models.encoder import run_blocks
from uniemox_dist.models.patches import sincos_positions


class Decoder(nn.Module):
    """MAE's decoder (He et al. 2022) with timm's blocks.

    Each token carries its position, so their order does not matter. Masked tokens come last, which makes the
    predictions a slice without reordering.
    """

    def __init__(
        self, *, width: int, depth: int, heads: int, mlp_ratio: float, side: int, patch_values: int
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prediction = nn.Linear(width, patch_values)

    def forward(self, tokens_BTF: Tensor, visible_BV: Tensor, masked_BM: Tensor) -> Tensor:
        """Predicts B×M×P from class and visible tokens (T = 1+V, already projected to width F)."""
        masked_BMF = self.mask_token + self.pos_embed[0, 1:][masked_BM]
        cls_B1F = tokens_BTF[:, :1] + self.pos_embed[:, :1]
        visible_BVF = tokens_BTF[:, 1:] + self.pos_embed[0, 1:][visible_BV]
        x = torch.cat([cls_B1F, visible_BVF, masked_BMF], dim=1)
        x = run_blocks(self.blocks, x, checkpointing=self.grad_checkpointing and self.training)
        return self.prediction(self.norm(x[:, -masked_BM.shape[1] :]))
