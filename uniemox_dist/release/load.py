"""Loading a release: the encoder for downstream use, or the whole student. Needs torch and timm only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.pictures import on_background
from uniemox_dist.config.schema import Config
from uniemox_dist.data.views import whole
from uniemox_dist.models.student import Student
from uniemox_dist.release.export import ENCODER, FACTS, REST
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, sha256_file

Preprocess = Callable[[Image.Image], Tensor]


def load_encoder(path: str | Path, *, verify: bool = False) -> tuple[nn.Module, Preprocess]:
    """The released encoder and its preprocessing.

    The encoder is a timm VisionTransformer in eval mode: B×3×size×size normalised pixels to B×D class tokens.
    The preprocessing takes a PIL picture (transparency on white) to 3×size×size.

    Args:
        path: folder of a release.
        verify: check SHA256SUMS first.

    Raises:
        UserError: if the folder is no release, or (with verify) a file was altered.
    """
    facts = read_release(path, verify=verify)
    model = Config.model_validate(facts["config"]).model
    encoder = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    mean_311, std_311 = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))

    def preprocess(picture: Image.Image) -> Tensor:
        rgb = on_background(picture, (255, 255, 255))
        pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        pixels_3HW = pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)
        return (whole(pixels_3HW, model.image_size).float() / 255 - mean_311) / std_311

    return encoder, preprocess


def load_pretrained(path: str | Path, *, verify: bool = False) -> Student:
    """The whole student of a release: encoder, projection, fusion and decoder, in eval mode.

    Raises:
        UserError: as `load_encoder`.
    """
    facts = read_release(path, verify=verify)
    config = Config.model_validate(facts["config"])
    student = Student(config.model, config.loss, facts["embedding_width"])
    weights = {f"encoder.{k}": v for k, v in load_file(Path(path) / ENCODER).items()}
    missing, unexpected = student.load_state_dict({**weights, **load_file(Path(path) / REST)}, strict=False)
    if unexpected or set(missing) - {"decoder.pos_embed"}:  # a fixed table, not stored by earlier versions
        raise UserError(f"RELEASE={path}: its weights do not fit its settings: {(unexpected or missing)[0]}")
    return student.eval()


def read_release(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """What uniemox.json says, after a look whether this is a release.

    Raises:
        UserError: as `load_encoder`.
    """
    folder = Path(path)
    for name in (FACTS, ENCODER, REST, "config.json", "SHA256SUMS"):
        if not (folder / name).is_file():
            raise UserError(f"RELEASE={folder}: lacks {name}; write it with `uniemox release RUN OUT`")
    if verify:
        for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            if sha256_file(folder / name) != digest:
                raise UserError(
                    f"RELEASE={folder}: {name} was altered (SHA-256 differs); copy the release again"
                )
    facts: dict[str, Any] = read_json(folder / FACTS)
    return facts
