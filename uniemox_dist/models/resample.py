"""Positions and patch projections of other weights, brought to a student's picture and patch size.

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
"""DeiT's, which no student has."""
PROJECTION, DECODER_POSITIONS = "encoder.patch_embed.proj.weight", "decoder.pos_embed"


class Resampler:
    """Changes tensors by the student's names in place, and notes what was resampled, from what to what."""

    def __init__(self, there: dict[str, Tensor], where: str) -> None:
        self.there, self.where = there, where
        self.done: dict[str, str] = {}
        self.learned_positions = False
        """Whether the encoder's positions were other than the fixed sine-cosine."""

    def projection(self, patch_size: int) -> None:
        """The patch projection to another patch size (Beyer et al., FlexiViT, CVPR 2023), as timm does it."""
        weight = self.there.get(PROJECTION)
        new = [patch_size, patch_size]
        if weight is not None and weight.ndim == 4 and list(weight.shape[-2:]) != new:
            self.done[PROJECTION] = f"{size(weight.shape[-2:])} -> {size(new)}"
            self.there[PROJECTION] = resample_patch_embed(weight, new)

    def positions(self, encoder: VisionTransformer, side: int) -> None:
        """The encoder's positions to side² patches.

        Rows before those of the patches (class token, registers) go where the student has them. Where one of both has
        no such rows, they are added to its tokens, or zero: the same function.

        Raises:
            UserError: if the rows are no square of patches.
        """
        table = self.there.get(POSITIONS)
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
            places = [name == token for name in ours]
            if sum(places) == len(theirs_KD):
                rows_KD[places] = theirs_KD
            elif not ours and token in self.there:
                self.there[token] = self.there[token] + theirs_KD
        self.there[POSITIONS] = torch.cat([rows_KD[None], new], dim=1)

    def decoder_positions(self, side: int) -> None:
        """The decoder's, whose first row is the class token's."""
        table = self.there.get(DECODER_POSITIONS)
        if table is not None and table.ndim == 3 and _is_square(table.shape[1] - 1):
            new = self._grid(table[0, 1:], side, DECODER_POSITIONS)
            self.there[DECODER_POSITIONS] = torch.cat([table[:, :1], new], dim=1)

    def _tokens_before(self, rows: int, *, prefer_none: bool) -> list[str]:
        """Which tokens the first rows of a table belong to: those that leave a square of patches."""
        tokens = [name for name in (CLASS, DISTILLATION) if name in self.there]
        registers = [REGISTERS] * (self.there[REGISTERS].shape[1] if REGISTERS in self.there else 0)
        choices = sorted(([*tokens, *registers], tokens, []), key=len, reverse=not prefer_none)
        for choice in choices:
            if _is_square(rows - len(choice)):
                return choice
        raise UserError(
            f"{self.where}: {POSITIONS} has {rows} rows, no square of patches; pictures are square here"
        )

    def _grid(self, patches_ND: Tensor, side: int, name: str) -> Tensor:
        """1×side²×D."""
        old = math.isqrt(patches_ND.shape[0])
        if old != side:
            self.done[name] = f"{old}x{old} -> {side}x{side}"
        return resample_abs_pos_embed(patches_ND[None], [side, side], [old, old], num_prefix_tokens=0)


def size(shape: Iterable[int]) -> str:
    """A shape, for people."""
    return "x".join(map(str, shape))


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _is_sincos(patches_ND: Tensor) -> bool:
    N, width = patches_ND.shape
    if width % 4:
        return False
    return torch.allclose(patches_ND, sincos_positions(width, math.isqrt(N))[0, 1:], atol=1e-3)
