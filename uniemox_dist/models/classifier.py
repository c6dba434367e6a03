"""A classifier of emotions: timm's ViT over the scene, or over scene and person, and one linear layer.

Shape legend: B samples, D encoder width, C outputs (classes, or categories and then dimensions).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from uniemox_dist.config.encoder_names import timm_name
from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.models.drop_path import replace_drop_paths
from uniemox_dist.models.encoder import encoder_arguments
from uniemox_dist.models.patches import normalise, sincos_positions

LOWEST, HIGHEST = 1.0, 10.0
"""Bounds of EMOTIC's valence, arousal and dominance; the network estimates them on -1 to 1."""
TIMM_NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224"}
"""Names for timm by width, where the settings give none: what matters is stated as arguments."""


@dataclass(frozen=True)
class Outputs:
    """What a classifier answers, and how its answers are judged."""

    task: Literal["single", "multi"]
    labels: tuple[str, ...]
    dimensions: tuple[str, ...] = ()
    persons: bool = False
    pooling: Literal["mean", "token"] = "mean"
    smoothing: float = 0.0
    """Share of a target that all classes get alike, in training with task=single."""
    weights: tuple[float, ...] | None = None
    """Of the categories' losses, with task=multi; None: 1 for each."""
    dimension_weight: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Of all outputs."""
        return (*self.labels, *self.dimensions)


def classifier_arguments(model: ModelConfig, pooling: str) -> dict[str, Any]:
    """timm's arguments of a classifier's encoder: the student's, with the pooling of the classifier."""
    pooled = {"class_token": True, "global_pool": "avg" if pooling == "mean" else "token"}
    return {**encoder_arguments(model), **pooled}


def make_timm_model(model: ModelConfig, pooling: str, **more: Any) -> VisionTransformer:
    """timm's own model of these settings, `more` being further arguments of timm's."""
    name = timm_name(model.name) if model.name else TIMM_NAMES.get(model.width, "vit_base_patch16_224")
    vit: Any = timm.create_model(name, pretrained=False, **classifier_arguments(model, pooling), **more)
    return vit  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Encoder, one linear layer, and the loss of their answers."""

    decoder = None
    """As a student without one, for what prepares its passes."""

    def __init__(self, model: ModelConfig, outputs: Outputs) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.encoder = make_timm_model(model, outputs.pooling, num_classes=0, drop_path_rate=model.drop_path)
        replace_drop_paths(self.encoder)
        self.head = nn.Linear(model.width * (2 if outputs.persons else 1), len(outputs.names))
        # MAE's fine-tuning: nearly nothing at first, so that the encoder's first gradients are small.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self._fixed_positions(learned=model.positions == "learned")

    @torch.no_grad()
    def _fixed_positions(self, *, learned: bool) -> None:
        positions = sincos_positions(self.encoder.embed_dim, self.model.image_size // self.model.patch_size)
        table = self.encoder.pos_embed
        if self.encoder.no_embed_class:
            positions = positions[:, 1:]
        elif self.encoder.num_reg_tokens:
            positions = F.pad(positions, (0, 0, self.encoder.num_reg_tokens, 0))
        assert table is not None
        table.copy_(positions)
        table.requires_grad_(learned)

    def forward(
        self, scene_B3HW: Tensor, person_B3HW: Tensor | None, targets_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """uint8 views to answers B×C in fp32 and, without targets, nothing; with them to the loss and its two parts
        (labels, dimensions), detached."""
        dtype = self.head.weight.dtype
        views = scene_B3HW
        if self.outputs.persons:  # one pass over both views
            assert person_B3HW is not None
            views = torch.cat([scene_B3HW, person_B3HW])
        features = self.encoder(normalise(views, self.model.mean, self.model.std, dtype))
        if self.outputs.persons:
            features = torch.cat(features.chunk(2), dim=1)
        answers_BC = self.head(features).float()
        if targets_BC is None:
            return answers_BC, answers_BC.new_zeros(2)
        parts = self.losses(answers_BC, targets_BC)
        return parts[0] + self.outputs.dimension_weight * parts[1], torch.stack(parts).detach()

    def losses(self, answers_BC: Tensor, targets_BC: Tensor) -> list[Tensor]:
        """Loss of the labels, and of the dimensions (0 without any). Each is a mean over samples of a value of its own,
        so that averages over micro-batches and ranks are exact, wherever values are not known."""
        L = len(self.outputs.labels)
        logits_BL, targets_BL = answers_BC[:, :L], targets_BC[:, :L]
        none = answers_BC.new_zeros(())
        if self.outputs.task == "single":
            soft = targets_BL * (1 - self.outputs.smoothing) + self.outputs.smoothing / L
            return [F.cross_entropy(logits_BL, soft), none]
        each_BL = F.binary_cross_entropy_with_logits(logits_BL, targets_BL, reduction="none")
        if self.outputs.weights is not None:
            each_BL = each_BL * torch.tensor(self.outputs.weights, device=each_BL.device)
        labels = each_BL.mean()
        if not self.outputs.dimensions:
            return [labels, none]
        known = targets_BC[:, L:].isfinite()
        error = answers_BC[:, L:] - to_unit(targets_BC[:, L:])
        # A NaN times zero is NaN: what is not known is left out before anything is multiplied.
        squares = torch.where(known, error, 0.0).square()
        return [labels, (squares.sum(1) / known.sum(1).clamp(min=1)).mean()]


def to_unit(values: Tensor) -> Tensor:
    """Valence, arousal, dominance on EMOTIC's scale to -1 … 1."""
    return (values - (LOWEST + HIGHEST) / 2) / ((HIGHEST - LOWEST) / 2)


def from_unit(values: Tensor) -> Tensor:
    """The other way."""
    return values * ((HIGHEST - LOWEST) / 2) + (LOWEST + HIGHEST) / 2


def category_weights(shares_L: list[float]) -> tuple[float, ...]:
    """Weights of categories by their shares p of the samples, 1 / ln(1.2 + p) (Kosti et al., Context Based Emotion
    Recognition using EMOTIC Dataset, TPAMI 2019), brought to a mean of 1: rare ones count for more."""
    raw = [1 / math.log(1.2 + share) for share in shares_L]
    mean = sum(raw) / len(raw)
    return tuple(weight / mean for weight in raw)
