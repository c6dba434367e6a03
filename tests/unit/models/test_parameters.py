"""The parameters computed from the settings equal those of the real modules in name, shape, order and training."""

import json
import warnings
from typing import Any

import pytest
import torch

from uniemox_dist.config.encoder_names import SIZES, find_peculiarities, list_shapes
from uniemox_dist.config.schema import LossConfig, ModelConfig, OptimConfig
from uniemox_dist.models import encoder as encoders
from uniemox_dist.models.classifier import Classifier, Outputs
from uniemox_dist.models.encoder import MaskedEncoder, encoder_arguments
from uniemox_dist.models.parameters import (
    Parameter,
    classifier_parameters,
    encoder_parameters,
    optimizer_group,
    student_parameters,
)
from uniemox_dist.models.student import Student
from uniemox_dist.train.engine import parameter_groups

E = 24
SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "fusion_heads": 4,
}


def of_modules(module: torch.nn.Module) -> list[Parameter]:
    return [Parameter(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()]


def encoder(model: ModelConfig) -> MaskedEncoder:
    """On the meta device: nothing is stored."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that timm calls deprecated
        return MaskedEncoder(model)


def test_every_kind_of_name_has_the_parameters_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name of each kind, built narrower and with two blocks: what tells kinds apart stays as it is."""
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    monkeypatch.setattr(encoders, "encoder_arguments", lambda model: {**encoder_arguments(model), **shape})
    narrow = {"width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    kinds = {json.dumps(find_peculiarities(name)): name for name in list_shapes()}
    assert len(kinds) >= 15
    for name in kinds.values():
        model = ModelConfig(name=name, image_size=24, patch_size=8).model_copy(update=narrow)
        assert list(encoder_parameters(model)) == of_modules(encoder(model)), name


@pytest.mark.parametrize("name", ["vit_dwee_patch16_reg1_gap_256", "vit_so150m_patch16_reg4_gap_256"])
def test_a_named_encoder_has_the_parameters_of_its_modules(name: str) -> None:
    assert list(encoder_parameters(ModelConfig(name=name))) == of_modules(encoder(ModelConfig(name=name)))


@pytest.mark.slow
def test_every_named_encoder_has_the_parameters_of_its_modules() -> None:
    for name in list_shapes().keys() - SIZES.keys():
        model = ModelConfig(name=name, image_size=4 * list_shapes()[name]["patch_size"])
        assert list(encoder_parameters(model)) == of_modules(encoder(model)), name


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ({}, {}),
        ({"mlp_ratio": 2.7, "positions": "learned"}, {}),
        ({"fusion": "multi_head"}, {"relation": 0}),
        ({"fusion": "attention"}, {"person_reconstruction": True}),
        ({"fusion": "gated_mlp"}, {"similarity": 0}),
        ({"fusion": "none"}, {}),
        ({}, {"reconstruction": 0}),
        ({}, {"relation": 0, "similarity": 0}),
    ],
)
def test_a_student_has_the_parameters_that_its_settings_say(
    model: dict[str, Any], loss: dict[str, Any]
) -> None:
    sections = ModelConfig(**{**SMALL, **model}), LossConfig(**loss)
    width = E if sections[1].needs_teacher else None
    student = Student(*sections, width)
    assert list(student_parameters(*sections, width)) == of_modules(student)


@pytest.mark.parametrize("persons", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("name", [None, "vit_xsmall_patch16_clip_224", "vit_medium_patch16_reg4_gap_256"])
def test_a_classifier_has_the_parameters_that_its_settings_say(
    name: str | None, pooling: Any, persons: bool
) -> None:
    sizes = SMALL if name is None else {"name": name, "image_size": 32}
    model = ModelConfig(**{**sizes, "positions": "learned" if persons else "fixed"})
    outputs = Outputs("single", ("joy", "fear", "awe"), persons=persons, pooling=pooling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        classifier = Classifier(model, outputs)
    found = classifier_parameters(model, 3, persons=persons, pooling=pooling)
    assert list(found) == of_modules(classifier)


def test_the_optimizers_groups_follow_from_names_and_shapes() -> None:
    model, loss = ModelConfig(**SMALL), LossConfig()
    student = Student(model, loss, E)
    for decay in (1.0, 0.7):
        groups = parameter_groups(student, OptimConfig().weight_decay, decay)
        ours: dict[tuple[float, bool], list[int]] = {}
        for p in student_parameters(model, loss, E):
            if p.trained:
                ours.setdefault(optimizer_group(p.name, len(p.shape), model.depth, decay), []).append(
                    p.numbers
                )
        assert len(groups) == len(ours) == (2 if decay == 1.0 else 2 * (model.depth + 2))
        for group, key in zip(groups, sorted(ours, reverse=True)):
            assert [p.numel() for p in group["params"]] == ours[key]


def test_the_paper_size_counts_by_hand() -> None:
    """ViT-L/16: a block has 4D norms, 4D² + 4D attention and 8D² + 5D MLP numbers."""
    model = ModelConfig(name="vit_large_patch16_224")
    D, N, F = 1024, 196, 512
    encoder = D + 768 * D + D + 24 * (12 * D * D + 13 * D) + 2 * D
    decoder = F + 8 * (12 * F * F + 13 * F) + 2 * F + F * 768 + 768
    rest = D * F + F + F + 2 * F + F * E + E
    found = student_parameters(model, LossConfig(), E)
    assert sum(p.numbers for p in found if p.trained) == encoder + decoder + rest == 329_253_144
    assert sum(p.numbers for p in found if not p.trained) == (1 + N) * (D + F)
