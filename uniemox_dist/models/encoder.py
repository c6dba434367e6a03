"""The student's encoder: a timm VisionTransformer that reads visible patches only.

Its state dict is timm's, so a released encoder loads into `timm.create_model` unchanged.
Shape legend: B views, N patches, V visible patches, R register tokens, P values of a patch, D width.
"""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from uniemox_dist.config.encoder_names import timm_name
from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.models.drop_path import replace_drop_paths
from uniemox_dist.models.patches import select_patches, sincos_positions


def encoder_arguments(model: ModelConfig) -> dict[str, Any]:
    """Returns timm's arguments for an encoder. It states all relevant ones, because timm has other defaults.

    With model.name, the rest of the architecture comes from that name; without it, the encoder is a plain ViT.
    """
    arguments: dict[str, Any] = {"img_size": model.image_size, "patch_size": model.patch_size}
    if model.name is not None:
        # α and β are class tokens, so an architecture without a class token gets one.
        return {**arguments, "class_token": True, "global_pool": "token"}
    shape = {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads}
    return {**arguments, **shape, "mlp_ratio": model.mlp_ratio}


class PatchProjection(nn.Conv2d):
    """Projects patches B×V×P to B×V×D with the weights of a patch convolution.

    It keeps the convolution's parameter names and shapes. It must be a module, because under ZeRO-3 a weight exists
    only while its module's forward runs.
    """

    def forward(self, patches_BVP: Tensor) -> Tensor:
        return F.linear(patches_BVP, self.weight.flatten(1), self.bias)


class MaskedEncoder(VisionTransformer):
    """timm's pre-norm ViT with class token and fixed 2-D sine-cosine positions, over visible patches."""

    def __init__(self, model: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(_make_vit(model).__dict__)
        replace_drop_paths(self)
        proj = self.patch_embed.proj
        self.patch_embed.proj = PatchProjection(
            3, self.embed_dim, kernel_size=proj.kernel_size, stride=proj.stride, bias=proj.bias is not None
        )
        assert self.pos_embed is not None
        positions = sincos_positions(self.embed_dim, model.patch_grid)
        if self.no_embed_class:  # the class token has no row in the table
            positions = positions[:, 1:]
        elif self.num_reg_tokens:  # register tokens have rows in the table, filled with zeros
            positions = F.pad(positions, (0, 0, self.num_reg_tokens, 0))
        self.pos_embed = nn.Parameter(positions, requires_grad=model.positions == "learned")

    def forward(self, patches_BNP: Tensor, visible_BV: Tensor) -> Tensor:  # type: ignore[override]
        """Encodes the visible ones of normalised patches to tokens B×(1+V)×D, class token first."""
        assert self.pos_embed is not None
        assert self.cls_token is not None
        B = patches_BNP.shape[0]
        prefix = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], 1)
        first = 0  # row of the first patch in the position table
        if not self.no_embed_class:
            first = self.num_prefix_tokens
            prefix = prefix + self.pos_embed[:, :first]
        tokens_BVD = self.patch_embed.norm(self.patch_embed.proj(select_patches(patches_BNP, visible_BV)))
        tokens_BVD = tokens_BVD + self.pos_embed[0, first:][visible_BV]
        x = self.norm_pre(torch.cat([prefix.expand(B, -1, -1), tokens_BVD], dim=1))
        x = self.norm(run_blocks(self.blocks, x, checkpointing=self.grad_checkpointing and self.training))
        return x if self.reg_token is None else torch.cat([x[:, :1], x[:, self.num_prefix_tokens :]], dim=1)


def run_blocks(blocks: Any, x: Tensor, *, checkpointing: bool) -> Tensor:
    """Applies all blocks; with `checkpointing` keeps only their inputs and recomputes the rest in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x


def _make_vit(model: ModelConfig) -> VisionTransformer:
    arguments = {**encoder_arguments(model), "num_classes": 0, "drop_path_rate": model.drop_path}
    if model.name is None:
        return VisionTransformer(**arguments, weight_init="skip")
    vit: Any = timm.create_model(timm_name(model.name), pretrained=False, **arguments)
    return vit  # type: ignore[no-any-return]


def initialise_weights(module: nn.Module) -> None:
    """Sets MAE's initial weights: Xavier for linear layers and the patch projection, normal with std 0.02 for tokens.

    Norms and scales keep the initial weights of their architecture.
    """
    if isinstance(module, PatchProjection):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name in ("cls_token", "reg_token", "mask_token"):
        if isinstance(token := getattr(module, name, None), nn.Parameter):
            nn.init.normal_(token, std=0.02)
