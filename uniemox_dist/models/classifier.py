"""The emotion classifier: timm's ViT over the scene, or over scene and person, and one linear layer.

Shape legend: B samples, D encoder width, C outputs (classes, or categories followed by dimensions), L labels.
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
from uniemox_dist.config.finetune import EMOTIC_RANGE, Target
from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.models.compilation import compile_blocks
from uniemox_dist.models.drop_path import replace_drop_paths
from uniemox_dist.models.encoder import encoder_arguments
from uniemox_dist.models.patches import normalise, sincos_positions

TIMM_NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224"}
"""timm's names by width for models without model.name. All relevant settings are passed as arguments."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a classifier, and settings of their losses."""

    task: Literal["single", "multi"]
    labels: tuple[str, ...]
    dimensions: tuple[str, ...] = ()
    persons: bool = False
    pooling: Literal["mean", "token"] = "mean"
    smoothing: float = 0.0
    """Label smoothing with task=single: share of a target that is spread over all classes."""
    weights: tuple[float, ...] | None = None
    """Weights of the categories' losses with task=multi; None weighs all by 1."""
    dimension_weight: float = 1.0
    target: Target = "label"
    """What the outputs of the labels learn with task=single: one label, or shares of all labels. With `dimensions`
    there are no labels."""
    ranges: tuple[tuple[float, float], ...] = ()
    """Lowest and highest value of each dimension, which the network estimates in the range -1 to 1; empty: EMOTIC's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all outputs."""
        return (*self.labels, *self.dimensions)

    def to_unit(self, values_BV: Tensor) -> Tensor:
        """Converts values of the dimensions from their ranges to -1…1."""
        middle_V, half_V = self._scale(values_BV)
        return (values_BV - middle_V) / half_V

    def from_unit(self, values_BV: Tensor) -> Tensor:
        """Inverts `to_unit`."""
        middle_V, half_V = self._scale(values_BV)
        return values_BV * half_V + middle_V

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and half of the width of each range."""
        ranges = self.ranges or (EMOTIC_RANGE,) * len(self.dimensions)
        low_V, high_V = like.new_tensor(ranges).reshape(-1, 2).unbind(1)
        return (low_V + high_V) / 2, (high_V - low_V) / 2


def classifier_arguments(model: ModelConfig, pooling: str) -> dict[str, Any]:
    """Returns timm's arguments for a classifier's encoder: the student's with the classifier's pooling."""
    pooled = {"class_token": True, "global_pool": "avg" if pooling == "mean" else "token"}
    return {**encoder_arguments(model), **pooled}


def make_timm_model(model: ModelConfig, pooling: str, **options: Any) -> VisionTransformer:
    """Creates timm's model of these settings; `options` are passed to `timm.create_model`."""
    name = timm_name(model.name) if model.name else TIMM_NAMES.get(model.width, "vit_base_patch16_224")
    vit: Any = timm.create_model(name, pretrained=False, **classifier_arguments(model, pooling), **options)
    return vit  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Encoder, one linear layer, and the loss of their outputs."""

    decoder = None
    """A classifier has no decoder; code shared with students checks this."""

    def __init__(self, model: ModelConfig, outputs: Outputs) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.encoder = make_timm_model(model, outputs.pooling, num_classes=0, drop_path_rate=model.drop_path)
        replace_drop_paths(self.encoder)
        self.head = nn.Linear(model.width * (2 if outputs.persons else 1), len(outputs.names))
        # As in MAE's fine-tuning: tiny weights keep the encoder's first gradients small.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self._set_positions(learned=model.positions == "learned")

    def compile_parts(self, options: dict[str, Any]) -> None:
        """Compiles the encoder's blocks, with options of torch.compile."""
        compile_blocks(self.encoder, options)

    @torch.no_grad()
    def _set_positions(self, *, learned: bool) -> None:
        positions = sincos_positions(self.encoder.embed_dim, self.model.patch_grid)
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
        """Classifies uint8 views.

        Returns:
            Without targets: outputs B×C in fp32, and two zeros. With targets: the loss, and its two parts (labels,
            dimensions) as a detached vector.
        """
        dtype = self.head.weight.dtype
        views = scene_B3HW
        if self.outputs.persons:  # one pass over both views
            assert person_B3HW is not None
            views = torch.cat([scene_B3HW, person_B3HW])
        features = self.encoder(normalise(views, self.model.mean, self.model.std, dtype))
        if self.outputs.persons:
            features = torch.cat(features.chunk(2), dim=1)
        outputs_BC = self.head(features).float()
        if targets_BC is None:
            return outputs_BC, outputs_BC.new_zeros(2)
        parts = self.losses(outputs_BC, targets_BC)
        return parts[0] + self.outputs.dimension_weight * parts[1], torch.stack(parts).detach()

    def losses(self, outputs_BC: Tensor, targets_BC: Tensor) -> list[Tensor]:
        """Returns the loss of the labels and that of the dimensions (each 0 without any).

        Both are means over samples, so averages over micro-batches and ranks are exact even if some values are unknown.
        The loss of a distribution is its Kullback-Leibler divergence from the softmax of the outputs.
        """
        L = len(self.outputs.labels)
        logits_BL, targets_BL = outputs_BC[:, :L], targets_BC[:, :L]
        return [
            self._label_loss(logits_BL, targets_BL),
            self._dimension_loss(outputs_BC[:, L:], targets_BC[:, L:]),
        ]

    def _label_loss(self, logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        if not self.outputs.labels:
            return logits_BL.new_zeros(())
        if self.outputs.task == "single":
            soft_BL = targets_BL * (1 - self.outputs.smoothing) + self.outputs.smoothing / len(
                self.outputs.labels
            )
            if self.outputs.target == "distribution":
                return F.kl_div(logits_BL.log_softmax(1), soft_BL, reduction="batchmean")
            return F.cross_entropy(logits_BL, soft_BL)
        each_BL = F.binary_cross_entropy_with_logits(logits_BL, targets_BL, reduction="none")
        if self.outputs.weights is not None:
            each_BL = each_BL * torch.tensor(self.outputs.weights, device=each_BL.device)
        return each_BL.mean()

    def _dimension_loss(self, found_BV: Tensor, targets_BV: Tensor) -> Tensor:
        if not self.outputs.dimensions:
            return found_BV.new_zeros(())
        known_BV = targets_BV.isfinite()
        error_BV = found_BV - self.outputs.to_unit(targets_BV)
        # NaN times zero is NaN, so unknown values are replaced before any multiplication.
        squares_BV = torch.where(known_BV, error_BV, 0.0).square()
        return (squares_BV.sum(1) / known_BV.sum(1).clamp(min=1)).mean()


def category_weights(shares_L: list[float]) -> tuple[float, ...]:
    """Returns weights of categories from their shares p of the samples: 1 / ln(1.2 + p), scaled to a mean of 1.

    Rare categories weigh more. Source: Kosti et al., "Context Based Emotion Recognition using EMOTIC Dataset",
    TPAMI 2019.
    """
    raw = [1 / math.log(1.2 + share) for share in shares_L]
    mean = sum(raw) / len(raw)
    return tuple(weight / mean for weight in raw)
