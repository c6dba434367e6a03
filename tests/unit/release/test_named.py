"""Releases of encoders that have a timm name: timm loads them as it loads its own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from handmade import config_of, write_checkpoint

from uniemox_dist.checkpoints.folders import open_checkpoint
from uniemox_dist.models.patches import normalise
from uniemox_dist.models.student import Student
from uniemox_dist.release.export import load_student, release

E = 12


@pytest.mark.parametrize(
    ("name", "image_size", "patch_size"),
    [
        ("vit_tiny", 48, 16),
        ("vit_xsmall_patch16_clip_224", 40, 8),  # a norm before the blocks, no bias in the projection
        (
            "vit_wee_patch16_reg1_gap_256",
            48,
            16,
        ),  # registers, LayerScale; pools without a class token by itself
    ],
)
def test_timm_loads_a_release_and_gives_the_students_class_tokens(
    tmp_path: Path, name: str, image_size: int, patch_size: int
) -> None:
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    config = config_of({"name": name, "image_size": image_size, "patch_size": patch_size, **decoder})
    torch.manual_seed(0)
    student = Student(config.model, config.loss, E).eval()
    with torch.no_grad():
        for p in student.parameters():
            if p.ndim == 1 or p.ndim == 3:  # norms, scales, tokens and positions: all that starts at 0 or 1
                p += 0.1 * torch.randn_like(p)
    write_checkpoint(tmp_path / "run", student, config, E)
    out = tmp_path / "release"
    release(tmp_path / "run", out)
    assert "started from" not in (out / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder: Any = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
        classifier: Any = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=8)
    pixels = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8)
    seen = normalise(pixels, config.model.mean, config.model.std, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(seen), student.embed(pixels, pixels)[0], rtol=1e-5, atol=1e-5)
        assert classifier(seen).shape == (2, 8)
    again = load_student(open_checkpoint(tmp_path / "run", "RUN"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters()))


def test_a_checkpoint_of_an_earlier_version_is_released_with_the_positions_that_it_had(
    tmp_path: Path,
) -> None:
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    config = config_of({**shape, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})
    student = Student(config.model, config.loss, E).eval()
    write_checkpoint(tmp_path / "run", student, config, E, fixed=False)
    release(tmp_path / "run", tmp_path / "release")
    encoder: Any = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True, num_classes=0)
    assert torch.equal(encoder.pos_embed, student.encoder.state_dict()["pos_embed"])


def test_the_card_names_the_weights_that_a_run_started_from(tmp_path: Path) -> None:
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    config = config_of({**shape, **decoder, "init_from": "weights/mae_pretrain_vit_base.pth"})
    write_checkpoint(tmp_path / "run", Student(config.model, config.loss, E), config, E)
    release(tmp_path / "run", tmp_path / "release")  # the file itself is not opened
    card = (tmp_path / "release" / "README.md").read_text()
    assert "| started from | `mae_pretrain_vit_base.pth` |\n| data |" in card
    assert "of the weights that it started from and of the teacher apply" in card
