"""`uniemox reconstruct`: original, masked and reconstructed pictures side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.masks import SCENE_VIEW, choose_patch_order
from uniemox_dist.inference.inputs import Pictures, load_batches, none_readable
from uniemox_dist.models.patches import patchify, unpatchify
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import read_release
from uniemox_dist.release.load import load_pretrained

TILE, GAP = 224, 6
GREY = 0.75
"""The colour of masked patches."""
MOST_PICTURES = 64


@torch.no_grad()
def make_tiles(student: Student, scene_B3HW: Tensor, seed: int) -> Tensor:
    """Original, masked and reconstructed views, B×3×3×S×S in 0…1; visible patches are the original's."""
    model = student.model
    order_BN = choose_patch_order(model, torch.arange(len(scene_B3HW)), SCENE_VIEW, seed)
    masked_BM = student.split(order_BN)[1]
    original = scene_B3HW.float() / 255
    patches_BNP = patchify(original, model.patch_size)
    index = masked_BM[..., None].expand(-1, -1, patches_BNP.shape[2])
    hidden = patches_BNP.scatter(1, index, GREY)
    predicted = student.reconstruct(scene_B3HW, order_BN).clamp(0, 1)
    filled = patches_BNP.scatter(1, index, predicted)
    views = (original, *(unpatchify(p, model.patch_size) for p in (hidden, filled)))
    return torch.stack(views, dim=1)


def reconstruct(
    release: Path, sources: Sequence[str], out: Path, *, mask_ratio: float | None = None, seed: int = 0
) -> tuple[int, list[tuple[str, str]]]:
    """Writes a PNG with a row of three tiles per picture. Returns their number, and name and reason of each unreadable
    picture.

    Args:
        mask_ratio: share of masked patches; the default is that of the training.

    Raises:
        UserError: if the release has no decoder, or none of the pictures can be read.
    """
    facts = read_release(release, verify=True)
    student = load_pretrained(release)
    if student.decoder is None:
        raise UserError(
            f"RELEASE={release}: was trained without reconstruction (loss.reconstruction=0); "
            "give another release"
        )
    if mask_ratio is not None:
        if not 1 / student.model.patches <= mask_ratio <= 1 - 1 / student.model.patches:
            raise UserError(
                f"--mask-ratio={mask_ratio}: leaves no patch visible, or none masked; give 0.1 to 0.95"
            )
        student.model = student.model.model_copy(update={"mask_ratio": mask_ratio})
    settings = view_settings(Config.model_validate(facts["config"]))
    rows: list[Tensor] = []
    problems: list[tuple[str, str]] = []
    for source in sources:
        for some in load_batches(Pictures(source), settings, batch=16):
            sound = [i for i, error in enumerate(some.errors) if error is None]
            problems += [(n, e) for n, e in zip(some.names, some.errors) if e is not None]
            rows += list(some.scene_B3HW[sound])
            if len(rows) >= MOST_PICTURES:
                break
    if not rows:
        raise none_readable(f"PICTURES={' '.join(sources)}", len(problems), problems)
    found = make_tiles(student, torch.stack(rows[:MOST_PICTURES]), seed)
    with atomic_path(out) as temporary:
        _grid(found).save(temporary, format="PNG")
    return len(found), problems


def _grid(tiles_BC3HW: Tensor) -> Image.Image:
    count, columns = tiles_BC3HW.shape[:2]
    per_line = 1 if count <= 4 else 2
    card = columns * (TILE + GAP)
    lines = -(-count // per_line)
    sheet = Image.new(
        "RGB", (per_line * card + (per_line - 1) * 4 * GAP + GAP, lines * (TILE + GAP) + GAP), (255, 255, 255)
    )
    for number, views in enumerate(tiles_BC3HW):
        top = GAP + number // per_line * (TILE + GAP)
        left = GAP + number % per_line * (card + 4 * GAP)
        for column, view_3HW in enumerate(views):
            pixels = (view_3HW.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (TILE + GAP), top))
    return sheet
