"""Encoders by timm's names compute timm's own function for every kind of architecture."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from uniemox_dist.config.encoder_names import SIZES, list_shapes, timm_name
from uniemox_dist.config.schema import LossConfig, ModelConfig
from uniemox_dist.models import encoder as encoders
from uniemox_dist.models.encoder import MaskedEncoder, encoder_arguments, initialise_weights
from uniemox_dist.models.patches import patchify
from uniemox_dist.models.student import Student

TOOLS = Path(__file__).parents[3] / "tools"
# One of each kind: plain; no class row and LayerScale; registers and no class token; LayerScale at patch 14; the same
# with registers; a norm before the blocks; differential attention; registers with rows of their own.
NAMES = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
    "vit_dwee_patch16_reg1_gap_256",
)
QUICK = ("vit_tiny_patch16_224", "vit_xsmall_patch16_clip_224", "vit_dwee_patch16_reg1_gap_256")
"""The smallest of them, which are cheap to build at their full size."""


@pytest.fixture(autouse=True)
def unset_memory_is_nan() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that its use becomes visible."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names that timm calls deprecated
        yield
    torch.use_deterministic_algorithms(False)


def stirred(model: ModelConfig) -> MaskedEncoder:
    """An encoder with initial weights, checked, and then with positions and scales that make every part count."""
    torch.manual_seed(0)
    encoder = MaskedEncoder(model)
    encoder.apply(initialise_weights)
    unset = [name for name, p in encoder.named_parameters() if not p.isfinite().all()]
    assert unset == [], model.name
    with torch.no_grad():
        for p in encoder.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
        assert encoder.pos_embed is not None
        encoder.pos_embed.normal_()
    return encoder.eval()


def timms(model: ModelConfig, encoder: nn.Module) -> Any:
    reference: Any = timm.create_model(
        timm_name(str(model.name)), num_classes=0, **encoders.encoder_arguments(model)
    )
    reference.load_state_dict(encoder.state_dict())
    return reference.eval()


def largest_difference(model: ModelConfig) -> float:
    """Between our tokens with everything visible and timm's, class token and patches, registers left out."""
    encoder = stirred(model)
    reference = timms(model, encoder)
    pixels = torch.randn(2, 3, model.image_size, model.image_size)
    with torch.no_grad():
        expected: Tensor = reference.forward_features(pixels)
        expected = torch.cat([expected[:, :1], expected[:, reference.num_prefix_tokens :]], dim=1)
        everything = torch.arange(model.patches).expand(2, -1)
        found = encoder(patchify(pixels, model.patch_size), everything)
        assert found.shape == expected.shape
        assert torch.allclose(
            reference(pixels), found[:, 0], atol=1e-5
        )  # what timm returns is the class token
        return float((expected - found).abs().max())


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders are built narrower and with two blocks; everything else that distinguishes a name stays."""

    def arguments(model: ModelConfig) -> dict[str, Any]:
        shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
        return {**encoder_arguments(model), **shape}

    monkeypatch.setattr(encoders, "encoder_arguments", arguments)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_with_everything_visible_the_tokens_are_timms(name: str) -> None:
    patch = list_shapes()[name]["patch_size"]
    assert largest_difference(ModelConfig(name=name, image_size=4 * patch)) < 1e-5


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("image_size", "patch_size"), [(96, 32), (40, 8)])
def test_at_other_picture_and_patch_sizes_too(image_size: int, patch_size: int) -> None:
    for name in ("deit3_small_patch16_224", "vit_medium_patch16_reg4_gap_256", "vit_xsmall_patch16_clip_224"):
        assert largest_difference(ModelConfig(name=name, image_size=image_size, patch_size=patch_size)) < 1e-5


@pytest.mark.usefixtures("narrow")
def test_every_name_has_timms_tokens_and_no_unset_weight() -> None:
    for name in list_shapes().keys() - SIZES.keys():
        assert largest_difference(ModelConfig(name=name, image_size=24, patch_size=8)) < 1e-5, name


def test_a_student_without_a_name_has_no_unset_weight() -> None:
    model = ModelConfig(
        image_size=32, patch_size=8, width=32, depth=2, heads=2, decoder_width=16, decoder_heads=2
    )
    for fusion in ("prior", "multi_head", "attention", "gated_mlp"):
        student = Student(model.model_copy(update={"fusion": fusion}), LossConfig(), 12)
        assert [name for name, p in student.named_parameters() if not p.isfinite().all()] == []


@pytest.mark.usefixtures("narrow")
def test_a_block_that_starts_near_zero_keeps_its_start() -> None:
    """LayerScale, and the norms of residual post-norm blocks: their small start belongs to the architecture."""
    for name, parameter in (
        ("deit3_small_patch16_224", "blocks.0.ls1.gamma"),
        ("vit_base_patch16_rpn_224", "blocks.0.norm1.weight"),
    ):
        encoder = MaskedEncoder(ModelConfig(name=name, image_size=32))
        own = dict(encoder.named_parameters())[parameter].detach().clone()
        assert 0 < own.max() < 1e-3
        encoder.apply(initialise_weights)
        assert torch.equal(dict(encoder.named_parameters())[parameter], own)


@pytest.mark.parametrize("names", [NAMES, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_table_of_shapes_is_the_installed_timms(
    names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    torch.use_deterministic_algorithms(False)  # the tool builds without memory
    sys.modules.pop("list_vits", None)
    from list_vits import shapes as read_from_timm  # type: ignore[import-not-found]

    installed = read_from_timm(names)
    both = installed.keys() & list_shapes().keys()
    assert set(NAMES) <= both
    assert {name: list_shapes()[name] for name in both} == {name: installed[name] for name in both}
