"""The faster image tower gives open_clip's embeddings up to rounding."""

import open_clip
import pytest
import torch

from uniemox_dist.teacher.model import FusedAttention, QuickGELU, speed_up_tower


def tower(**vision: object) -> torch.nn.Module:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    shape = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = CLIP(embed_dim=16, vision_cfg={**shape, **vision}, text_cfg=text, quick_gelu=True)
    return model.visual.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_equal_open_clips_up_to_rounding(dtype: torch.dtype) -> None:
    plain, quick = tower().to(dtype), speed_up_tower(tower().to(dtype))
    pixels = torch.randn(3, 3, 32, 32, dtype=dtype)
    before = pixels.clone()
    with torch.no_grad():
        expected, found = plain(pixels), quick(pixels)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(pixels, before)
    assert sum(type(m) is FusedAttention for m in quick.modules()) == 3
    assert sum(type(m) is QuickGELU for m in quick.modules()) == 3


def test_the_fast_activation_is_exact_in_the_relevant_range() -> None:
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    with torch.no_grad():
        found = QuickGELU()(x.clone())
    torch.testing.assert_close(found, x * torch.sigmoid(1.702 * x), rtol=1e-12, atol=1e-12)


def test_weights_names_and_gradients_are_unchanged() -> None:
    plain, quick = tower(), speed_up_tower(tower())
    assert list(plain.state_dict()) == list(quick.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for visual in (plain, quick):
        asked = pixels.clone().requires_grad_()
        visual(asked).square().sum().backward()
        gradients.append(asked.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_other_towers_stay_as_they_are() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    custom = tower(block_type="custom")
    with torch.no_grad():
        assert torch.equal(speed_up_tower(custom)(pixels), tower(block_type="custom")(pixels))
    resnet = open_clip.create_model("RN50", load_weights=False, device="meta").visual
    assert speed_up_tower(resnet) is resnet
    assert not any(isinstance(m, FusedAttention) for m in resnet.modules())
