"""The losses of UniEmoX, over the rows of one micro-batch, in fp32.

Source: C. Chen, X. Sun, Z. Liu, "UniEmoX: Cross-modal Semantic-Guided Large-Scale Pretraining for Universal Scene
Emotion Perception", IEEE TIP 34, 2025, doi 10.1109/TIP.2025.3587577. Each loss is a mean over equal rows, so averages
over micro-batches and ranks are exact. `LOSSES` computes a term of `config/losses.py` by its name.
Shape legend: B samples, G samples of the step's global batch, E embedding width, N patches, M masked ones, P values
of a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.config.losses import LossConfig
from uniemox_dist.models.patches import select_patches


@dataclass(frozen=True)
class LossInputs:
    """Outputs of the student and their targets; None for those that no active loss needs."""

    fused_BE: Tensor | None = None
    """γ, the student's embedding of scene and person."""
    teacher_BE: Tensor | None = None
    """Ω, the teacher's embedding of the scene."""
    texts_GE: Tensor | None = None
    """Λ, the teacher's embeddings of the captions of the step; unit rows."""
    logit_scale: float = 100.0
    """The teacher's logit scale."""
    predicted_BMP: Tensor | None = None
    """The decoder's pixels of the masked patches."""
    patches_BNP: Tensor | None = None
    """All patches of the reconstructed views, standardised by the model's statistics."""
    masked_BM: Tensor | None = None
    """Numbers of the masked patches."""


def relation_loss(
    fused_BE: Tensor,
    teacher_BE: Tensor,
    texts_GE: Tensor,
    *,
    form: str = "cosine",
    logit_scale: float = 100.0,
) -> Tensor:
    """L1, relation distillation from paired and unpaired pairs.

    A = γ̂ Λᵀ and C = Ω̂ Λᵀ hold the similarities of each picture with every caption of the step (one paired, the
    others not); the loss is the mean over rows of 1 − cos(A_i, C_i). With form="kl" it is the mean of
    KL(softmax(s·C_i) ‖ softmax(s·A_i)), s the teacher's logit scale.
    """
    texts_GE = texts_GE.float()
    student_BG = F.normalize(fused_BE.float(), dim=1) @ texts_GE.T
    teacher_BG = F.normalize(teacher_BE.float(), dim=1) @ texts_GE.T
    if form == "kl":
        student_log = F.log_softmax(logit_scale * student_BG, dim=1)
        teacher_log = F.log_softmax(logit_scale * teacher_BG, dim=1)
        return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return (1 - F.cosine_similarity(student_BG, teacher_BG, dim=1)).mean()


def similarity_loss(fused_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """L2, similarity distillation: mean over i of 1 − cos(γ_i, Ω_i)."""
    return (1 - F.cosine_similarity(fused_BE.float(), teacher_BE.float(), dim=1)).mean()


def reconstruction_targets(patches_BMP: Tensor, *, norm_pix: bool) -> Tensor:
    """Returns the targets of L3: the pixels, or with norm_pix each patch standardised (MAE, He et al. 2022)."""
    patches_BMP = patches_BMP.float()
    if not norm_pix:
        return patches_BMP
    variance, mean = torch.var_mean(patches_BMP, dim=-1, keepdim=True)
    return (patches_BMP - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(predicted_BMP: Tensor, target_BMP: Tensor) -> Tensor:
    """L3, reconstruction: mean squared error over the masked patches, the only ones that are predicted."""
    return F.mse_loss(predicted_BMP.float(), target_BMP.float())


def compute_terms(config: LossConfig, inputs: LossInputs) -> list[Tensor]:
    """Computes the active terms in the order of `LOSS_TERMS`, without their weights."""
    return [LOSSES[term.name](config, inputs) for term in config.active]


def _relation(config: LossConfig, inputs: LossInputs) -> Tensor:
    assert inputs.fused_BE is not None
    assert inputs.teacher_BE is not None
    assert inputs.texts_GE is not None
    return relation_loss(
        inputs.fused_BE,
        inputs.teacher_BE,
        inputs.texts_GE,
        form=config.relation_form,
        logit_scale=inputs.logit_scale,
    )


def _similarity(config: LossConfig, inputs: LossInputs) -> Tensor:
    assert inputs.fused_BE is not None
    assert inputs.teacher_BE is not None
    return similarity_loss(inputs.fused_BE, inputs.teacher_BE)


def _reconstruction(config: LossConfig, inputs: LossInputs) -> Tensor:
    assert inputs.predicted_BMP is not None
    assert inputs.patches_BNP is not None
    assert inputs.masked_BM is not None
    pixels_BMP = select_patches(inputs.patches_BNP, inputs.masked_BM)
    return reconstruction_loss(
        inputs.predicted_BMP, reconstruction_targets(pixels_BMP, norm_pix=config.norm_pix)
    )


LOSSES: dict[str, Callable[[LossConfig, LossInputs], Tensor]] = {
    "relation": _relation,
    "similarity": _similarity,
    "reconstruction": _reconstruction,
}
"""The function of every term in `config.losses.LOSS_TERMS`, by its name."""
