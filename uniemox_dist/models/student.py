"""The student: one encoder pass over both masked views, fusion, one decoder pass over the scene.

Shape legend: B samples, N patches, V visible, M masked, P patch values, D and F encoder and decoder width, E
embedding width, G samples of the step's global batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.config.schema import LossConfig, ModelConfig
from uniemox_dist.models import losses
from uniemox_dist.models.compilation import compile_blocks
from uniemox_dist.models.decoder import Decoder
from uniemox_dist.models.encoder import MaskedEncoder, initialise_weights
from uniemox_dist.models.fusion import Fusion, make_fusion
from uniemox_dist.models.patches import load_statistics, select_patches, standardise_patches


@dataclass(frozen=True)
class Views:
    """The student's input for a micro-batch."""

    scene_B3HW: Tensor
    """uint8 scene views."""
    person_B3HW: Tensor | None
    """uint8 person views; None without a person branch."""
    scene_order_BN: Tensor
    """Order of the scene's patches: the first V are visible, the others masked."""
    person_order_BN: Tensor | None


@dataclass(frozen=True)
class Targets:
    """The teacher's embeddings for a micro-batch; both None if no active loss needs the teacher."""

    pictures_BE: Tensor | None = None
    """Ω, embeddings of the scenes."""
    texts_GE: Tensor | None = None
    """Λ, embeddings of all captions of the step, unit rows."""
    logit_scale: float = 100.0
    """The teacher's logit scale."""
    loss_weights: Mapping[str, float] | None = None
    """Weight of every loss by name in this step; None uses the configuration's. Python numbers, because a tensor would
    have to be copied to the device first."""


class Student(nn.Module):
    """All trained modules. Modules that no active loss needs are not built."""

    def __init__(self, model: ModelConfig, loss: LossConfig, embedding_width: int | None) -> None:
        """`embedding_width` is the teacher's E; None if no active loss needs a teacher."""
        super().__init__()
        self.model, self.loss = model, loss
        # Functions of tensors alone, which can be replaced by compiled ones.
        self.standardise_patches: Callable[..., Tensor] = standardise_patches
        self.compute_terms: Callable[..., list[Tensor]] = losses.compute_terms
        self.encoder = MaskedEncoder(model)
        self.to_decoder = nn.Linear(model.width, model.decoder_width)
        self.fusion: Fusion | None = None
        self.decoder: Decoder | None = None
        if loss.needs_teacher:
            assert embedding_width is not None
            self.fusion = make_fusion(model.fusion, model.decoder_width, embedding_width, model.fusion_heads)
        if loss.needs_decoder:
            self.decoder = Decoder(
                width=model.decoder_width,
                depth=model.decoder_depth,
                heads=model.decoder_heads,
                mlp_ratio=model.mlp_ratio,
                side=model.patch_grid,
                patch_values=model.patch_values,
            )
        self.apply(initialise_weights)

    def compile_parts(self, options: dict[str, Any]) -> None:
        """Compiles the blocks, the preparation of pixels and the losses, with options of torch.compile."""
        compile_blocks(self.encoder, options)
        if self.decoder is not None:
            compile_blocks(self.decoder, options)
        self.standardise_patches = torch.compile(standardise_patches, **options)
        self.compute_terms = torch.compile(losses.compute_terms, **options)

    @property
    def has_person_branch(self) -> bool:
        """True if the student reads the person view."""
        return self.fuses_person or (self.decoder is not None and self.loss.person_reconstruction)

    @property
    def fuses_person(self) -> bool:
        """True if γ depends on the person's class token."""
        return self.fusion is not None and self.model.fusion != "none"

    def forward(self, views: Views, targets: Targets) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the losses, and a detached vector of the unweighted losses.

        The vector has the order of `LOSS_NAMES`; a loss that is off is 0.
        """
        patches_BNP, order_BN = self.patches(views.scene_B3HW), views.scene_order_BN
        if self.has_person_branch:  # one pass over both views, so B is twice the samples
            assert views.person_B3HW is not None
            assert views.person_order_BN is not None
            patches_BNP = torch.cat([patches_BNP, self.patches(views.person_B3HW)])
            order_BN = torch.cat([order_BN, views.person_order_BN])
        visible_BV, masked_BM = self.split(order_BN)
        tokens_BTD = self.encoder(patches_BNP, visible_BV)
        if self.decoder is None:
            tokens_BTD = tokens_BTD[:, :1]
        tokens_BTF = self.to_decoder(tokens_BTD)
        scenes = views.scene_B3HW.shape[0]
        views_n = order_BN.shape[0] if self.loss.person_reconstruction else scenes  # that are reconstructed
        masked_BM = masked_BM[:views_n]
        fused_BE = predicted_BMP = None
        if self.fusion is not None:
            cls_BF = tokens_BTF[:, 0]
            fused_BE = self.fusion(cls_BF[:scenes], cls_BF[scenes:] if self.fuses_person else None)
        if self.decoder is not None:
            predicted_BMP = self.decoder(tokens_BTF[:views_n], visible_BV[:views_n], masked_BM)
        inputs = losses.LossInputs(
            fused_BE,
            targets.pictures_BE,
            targets.texts_GE,
            targets.logit_scale,
            predicted_BMP,
            patches_BNP[:views_n],
            masked_BM,
        )
        return self._weighted_sum(inputs, targets.loss_weights or self.loss.weights)

    def _weighted_sum(self, inputs: losses.LossInputs, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        names = [term.name for term in self.loss.active]
        parts = dict(zip(names, self.compute_terms(self.loss, inputs), strict=True))
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        zero = total.new_zeros(())
        return total, torch.stack([parts.get(name, zero).detach() for name in LOSS_NAMES])

    def patches(self, pixels_B3HW: Tensor) -> Tensor:
        """Converts uint8 pixels to standardised patches B×N×P in the encoder's number format."""
        statistics = load_statistics(self.model.mean, self.model.std, pixels_B3HW.device)
        dtype = self.to_decoder.weight.dtype
        return self.standardise_patches(pixels_B3HW, *statistics, dtype, self.model.patch_size)

    def split(self, order_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Splits an order of patches into visible B×V and masked B×M patch numbers."""
        return order_BN[:, : self.model.visible], order_BN[:, self.model.visible :]

    @torch.no_grad()
    def embed(self, scene_B3HW: Tensor, person_B3HW: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeds whole views: returns the encoder's normalised class token B×D and γ B×E (None without fusion)."""
        cls_BD = self.encode(scene_B3HW)
        fused_BE = None
        if self.fusion is not None:
            scene_BF, person_BF = self.to_decoder(cls_BD), None
            if self.fuses_person:
                assert person_B3HW is not None
                # Without a person the whole picture is both views and is encoded once.
                same = person_B3HW is scene_B3HW
                person_BF = scene_BF if same else self.to_decoder(self.encode(person_B3HW))
            fused_BE = self.fusion(scene_BF, person_BF)
        return cls_BD, fused_BE

    @torch.no_grad()
    def encode(self, pictures_B3HW: Tensor) -> Tensor:
        """Returns the encoder's normalised class token of whole views, B×D."""
        patches = self.patches(pictures_B3HW)
        all_patches = torch.arange(self.model.patches, device=patches.device).expand(patches.shape[0], -1)
        return self.encoder(patches, all_patches)[:, 0]

    @torch.no_grad()
    def reconstruct(self, scene_B3HW: Tensor, order_BN: Tensor) -> Tensor:
        """Predicts the pixels of the masked patches, B×M×P in units of 0…1 (not clipped).

        With norm_pix the prediction gets the true mean and variance of each patch, as in MAE's visualisations.
        """
        assert self.decoder is not None, "this student has no decoder: it was trained without reconstruction"
        patches_BNP = self.patches(scene_B3HW)
        visible_BV, masked_BM = self.split(order_BN)
        tokens = self.to_decoder(self.encoder(patches_BNP, visible_BV))
        predicted = self.decoder(tokens, visible_BV, masked_BM).float()
        if self.loss.norm_pix:
            variance, mean = torch.var_mean(
                select_patches(patches_BNP, masked_BM).float(), dim=-1, keepdim=True
            )
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        return self.to_unit(predicted)

    def to_unit(self, patches_BKP: Tensor) -> Tensor:
        """Converts standardised patches to pixel values in 0…1."""
        values = self.model.patch_size**2
        mean_P = torch.tensor(self.model.mean).repeat_interleave(values).to(patches_BKP.device)
        std_P = torch.tensor(self.model.std).repeat_interleave(values).to(patches_BKP.device)
        return patches_BKP.float() * std_P + mean_P
