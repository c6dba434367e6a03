"""Grids of original, masked and reconstructed pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small import make_release

from uniemox_dist import load_pretrained
from uniemox_dist.cli.main import run
from uniemox_dist.inference.reconstruct import GREY, make_tiles


def test_visible_patches_are_the_originals_and_masked_ones_the_students(small_release: Path) -> None:
    student = load_pretrained(small_release)
    torch.manual_seed(0)
    scene = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    original, hidden, filled = make_tiles(student, scene, seed=5).unbind(1)
    assert torch.equal(original, scene.float() / 255)
    masked = (hidden == GREY).all(1)
    share = masked.float().mean((1, 2))
    assert torch.allclose(share, torch.full((3,), 1 - student.model.visible / student.model.patches))
    visible = ~masked[:, None].expand_as(original)
    assert torch.equal(filled[visible], original[visible])
    assert not torch.equal(filled, original)
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_a_grid_is_written_and_unreadable_pictures_are_reported(
    small_release: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    assert run(["reconstruct", str(small_release), str(picture_folder), str(out), "--mask-ratio", "0.5"]) == 0
    told = capsys.readouterr()
    assert "21 pictures" in told.out
    assert told.err.count("cannot be decoded") == 2
    assert told.err.endswith("uniemox: warning: 2 of 23 pictures cannot be read\n")
    with Image.open(out) as grid:
        assert grid.height > 11 * 224
    plain = make_release(tmp_path / "plain", reconstruction=0.0)
    for arguments, says in (
        ([str(plain), str(picture_folder), "x.png"], "was trained without reconstruction"),
        (
            [str(small_release), str(picture_folder / "06.jpg"), "x.png"],
            "06.jpg: its only picture cannot be read (06.jpg: ",
        ),
        ([str(small_release), str(picture_folder), "x.png", "--mask-ratio", "1.5"], "--mask-ratio=1.5"),
    ):
        assert run(["reconstruct", *arguments]) == 2
        assert says in capsys.readouterr().err
