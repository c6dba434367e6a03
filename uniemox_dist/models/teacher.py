"""The frozen teacher: an open_clip model with its own pixel statistics. Never part of the engine or a checkpoint.

Shape legend: B pictures, T texts, E embedding width.
"""

import logging
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.models.patches import normalise
from uniemox_dist.models.quick_tower import quicken
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import canonical_json, read_json, sha256_bytes, sha256_file

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
LOCAL, SHIPPED = "local-dir:", "shipped:"


class Teacher:
    """A frozen CLIP: pictures and texts to unit rows of one space.

    Raises:
        UserError: if a file is missing, or its weights do not fit the model.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        folder = local_folder(config)
        if folder is not None:
            statistics, weights = _read_local(folder, config)
            name, pretrained = f"{LOCAL}{folder}", None
        else:
            statistics, weights = {"mean": config.mean, "std": config.std}, Path(str(config.weights))
            name, pretrained = config.name, str(weights)
            if not weights.is_file():
                raise UserError(f"teacher.weights={weights}: no such file")
            if config.name not in open_clip.list_models():
                raise UserError(
                    f"teacher.name={config.name}: not an open_clip model; see open_clip.list_models()"
                )
        self.model = _create(name, pretrained, config).eval().requires_grad_(False).to(self.device)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.mean, self.std = tuple(statistics["mean"]), tuple(statistics["std"])
        size = self.model.visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        self.logit_scale = float(self.model.logit_scale.exp())
        self.width = _embedding_width(self.model)
        self.dtype = _dtype(config.precision, self.device)
        self.model.visual.to(self.dtype)
        self.identity: dict[str, Any] = {
            "name": config.name,
            "weights_sha256": sha256_file(weights),
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "activation": type(_first_activation(self.model.visual)).__name__,
            "embedding_width": self.width,
        }
        quicken(self.model.visual)

    @property
    def id(self) -> str:
        """Short name of what decides the embeddings of texts; text caches are filed under it."""
        # Neither the name (the same weights in another folder are the same teacher) nor what concerns pixels.
        content = {k: self.identity[k] for k in ("weights_sha256", "activation", "embedding_width")}
        return sha256_bytes(canonical_json(content))[:16]

    @torch.no_grad()
    def embed_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 pixels of any size to unit rows Ω, B×E in fp32."""
        pixels = normalise(pixels_B3HW, self.mean, self.std, self.dtype)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(
                pixels.float(), size=(self.size, self.size), mode="bicubic", antialias=True
            ).to(self.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Captions to unit rows, T×E in fp32."""
        if self.model is None or not hasattr(self.model, "encode_text"):
            raise RuntimeError("the text tower was dropped")
        return F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=1)

    def drop_text_tower(self) -> None:
        """Frees the text tower once all captions are cached."""
        self.model = _PictureTower(self.model.visual)


class _PictureTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self.visual(pixels)
        return embedded


def local_folder(config: TeacherConfig) -> Path | None:
    """The open_clip local-dir folder that a teacher's name refers to, if it does."""
    if config.name.startswith(LOCAL):
        return Path(config.name.removeprefix(LOCAL))
    if config.name.startswith(SHIPPED):
        if config.name != "shipped:demo":
            raise UserError(f"teacher.name={config.name}: not shipped; there is shipped:demo")
        return Path(str(resources.files("uniemox_dist").joinpath("teach/demo_teacher")))
    return None


def _read_local(folder: Path, config: TeacherConfig) -> tuple[dict[str, Any], Path]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"teacher.name={config.name}: {folder} lacks {name} (open_clip's local-dir layout)"
            )
    statistics = read_json(folder / CONFIG).get("preprocess_cfg", {})
    for key in ("mean", "std"):
        if key not in statistics:
            raise UserError(
                f"teacher.name={config.name}: preprocess_cfg in {CONFIG} does not state {key}; add it"
            )
    return statistics, folder / WEIGHTS


def _create(name: str, pretrained: str | None, config: TeacherConfig) -> Any:
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # open_clip narrates at INFO and warns of what we check ourselves
    try:
        return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except Exception as error:  # torch, safetensors, json and open_clip all raise their own types here
        reason = " ".join(str(error).split())[:200]
        where = f"teacher.weights={config.weights}" if pretrained else f"teacher.name={config.name}"
        raise UserError(f"{where}: does not fit the model {config.name}: {reason}") from None
    finally:
        logging.root.setLevel(level)


def _embedding_width(model: Any) -> int:
    projection = getattr(model, "text_projection", None)
    if isinstance(projection, Tensor):
        return int(projection.shape[1])
    return int(model.encode_text(torch.zeros(1, model.context_length, dtype=torch.long)).shape[1])


def _first_activation(visual: nn.Module) -> nn.Module:
    names = ("GELU", "QuickGELU", "GELUTanh", "SiLU", "ReLU")
    return next((m for m in visual.modules() if type(m).__name__ in names), visual)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
