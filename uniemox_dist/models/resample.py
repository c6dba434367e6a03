"""Resampling of positions and patch projections of other weights to a student's picture and patch size.

Shape legend: R rows of a table of positions, N patches, K rows before the patches, D width.
"""

import math
from collections.abc import Iterable

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from uniemox_dist.core.errors import UserError
from uniemox_dist.models.patches import sincos_positions

POSITIONS, CLASS, REGISTERS = "encoder.pos_embed", "encoder.cls_token", "encoder.reg_token"
DISTILLATION = "encoder.dist_token"
"""DeiT's distillation token, which no student has."""
PROJECTION, DECODER_POSITIONS = "encoder.patch_embed.proj.weight", "decoder.pos_embed"


class Resampler:
    """Resamples tensors, named like the student's, in place and records the changes in `done`."""

    def __init__(self, source: dict[str, Tensor], where: str) -> None:
        self.source, self.where = source, where
        self.done: dict[str, str] = {}
        self.learned_positions = False
        """True if the encoder's positions differ from the fixed sine-cosine ones."""

    def projection(self, patch_size: int) -> None:
        """Resamples the patch projection with timm (pseudo-inverse resize; Beyer et al., FlexiViT, CVPR 2023)."""
        weight = self.source.get(PROJECTION)
        new = [patch_size, patch_size]
        if weight is not None and weight.ndim == 4 and list(weight.shape[-2:]) != new:
            self.done[PROJECTION] = f"{format_shape(weight.shape[-2:])} -> {format_shape(new)}"
            self.source[PROJECTION] = resample_patch_embed(weight, new)

    def positions(self, encoder: VisionTransformer, side: int) -> None:
        """Resamples the encoder's positions to side² patches.

        Rows before those of the patches (class token, registers) move to the student's rows for them. If the student
        has none, they are added to its tokens; if the source has none, they are zero. Both compute the same function.

        Raises:
            UserError: if the number of patch rows is not a square.
        """
        table = self.source.get(POSITIONS)
        if table is None or table.ndim != 3:
            return
        before = self._tokens_before(table.shape[1], prefer_none=encoder.no_embed_class)
        first_KD, patches_ND = table[0, : len(before)], table[0, len(before) :]
        self.learned_positions = not _is_sincos(patches_ND)
        new = self._grid(patches_ND, side, POSITIONS)
        ours = [] if encoder.no_embed_class else [CLASS, *[REGISTERS] * encoder.num_reg_tokens]
        rows_KD = first_KD.new_zeros(len(ours), first_KD.shape[1])
        for token in (CLASS, REGISTERS):
            theirs_KD = first_KD[[name == token for name in before]]
            mask = [name == token for name in ours]
            if sum(mask) == len(theirs_KD):
                rows_KD[mask] = theirs_KD
            elif not ours and token in self.source:
                self.source[token] = self.source[token] + theirs_KD
        self.source[POSITIONS] = torch.cat([rows_KD[None], new], dim=1)

    def decoder_positions(self, side: int) -> None:
        """Resamples the decoder's positions, whose first row belongs to the class token."""
        table = self.source.get(DECODER_POSITIONS)
        if table is not None and table.ndim == 3 and _is_square(table.shape[1] - 1):
            new = self._grid(table[0, 1:], side, DECODER_POSITIONS)
            self.source[DECODER_POSITIONS] = torch.cat([table[:, :1], new], dim=1)

    def _tokens_before(self, rows: int, *, prefer_none: bool) -> list[str]:
        """Returns which tokens the first rows of a table belong to, such that a square number of patch rows remains."""
        tokens = [name for name in (CLASS, DISTILLATION) if name in self.source]
        registers = [REGISTERS] * (self.source[REGISTERS].shape[1] if REGISTERS in self.source else 0)
        choices = sorted(([*tokens, *registers], tokens, []), key=len, reverse=not prefer_none)
        for choice in choices:
            if _is_square(rows - len(choice)):
                return choice
        raise UserError(
            f"{self.where}: {POSITIONS} has {rows} rows, which form no square of patches; only square pictures are "
            "supported"
        )

    def _grid(self, patches_ND: Tensor, side: int, name: str) -> Tensor:
        """Resamples a table to 1×side²×D."""
        old = math.isqrt(patches_ND.shape[0])
        if old != side:
            self.done[name] = f"{old}x{old} -> {side}x{side}"
        return resample_abs_pos_embed(patches_ND[None], [side, side], [old, old], num_prefix_tokens=0)


def format_shape(shape: Iterable[int]) -> str:
    """Formats a shape, such as 16x16."""
    return "x".join(map(str, shape))


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _is_sincos(patches_ND: Tensor) -> bool:
    N, width = patches_ND.shape
    if width % 4:
        return False
    return torch.allclose(patches_ND, sincos_positions(width, math.isqrt(N))[0, 1:], atol=1e-3)
