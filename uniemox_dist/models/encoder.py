"""The student's encoder: a timm VisionTransformer that is shown visible patches only.

Its state dict is timm's own, so that a released encoder loads into `timm.create_model` as it is.
Shape legend: B views, N patches, V visible patches, P values of a patch, D width.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from uniemox_dist.models.patches import sincos_positions, take


class PatchProjection(nn.Conv2d):
    """A patch convolution that takes patches which are already cut out: B×V×P to B×V×D.

    It keeps the convolution's parameter names and shapes. Being a module of its own matters under ZeRO-3,
    where a weight is there only while its module's forward runs.
    """

    def forward(self, patches_BVP: Tensor) -> Tensor:
        return F.linear(patches_BVP, self.weight.flatten(1), self.bias)


class MaskedEncoder(VisionTransformer):
    """timm's pre-norm ViT with class token and fixed 2-D sine-cosine positions, over visible patches."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments` are timm's VisionTransformer arguments; see `Student.encoder_arguments`."""
        super().__init__(**arguments, num_classes=0, weight_init="skip")
        width, patch = arguments["embed_dim"], arguments["patch_size"]
        self.patch_embed.proj = PatchProjection(3, width, kernel_size=patch, stride=patch)
        side = arguments["img_size"] // patch
        self.pos_embed = nn.Parameter(sincos_positions(width, side), requires_grad=False)

    def forward(self, patches_BNP: Tensor, visible_BV: Tensor) -> Tensor:  # type: ignore[override]
        """Normalised patches and the numbers of the visible ones to tokens B×(1+V)×D, class token first."""
        assert self.pos_embed is not None
        assert self.cls_token is not None
        tokens_BVD = self.patch_embed.proj(take(patches_BNP, visible_BV))
        tokens_BVD = tokens_BVD + self.pos_embed[0, 1:][visible_BV]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(tokens_BVD.shape[0], -1, -1)
        x = torch.cat([cls_B1D, tokens_BVD], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def initialise(module: nn.Module) -> None:
    """MAE's initial weights: Xavier for linear layers (patch projection included), 0.02 normal for tokens."""
    if isinstance(module, PatchProjection):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    for name in ("cls_token", "mask_token"):
        if isinstance(token := getattr(module, name, None), nn.Parameter):
            nn.init.normal_(token, std=0.02)
