"""The frozen teacher: an open_clip model with its own pixel statistics. Never part of the engine or a checkpoint.

Shape legend: B pictures, T texts, E embedding width.
"""

import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_file
from uniemox_dist.models.patches import normalise
from uniemox_dist.teacher.facts import TeacherFacts
from uniemox_dist.teacher.fast_tower import quicken
from uniemox_dist.teacher.files import LOCAL, local_folder, statistics, weights_file, where
from uniemox_dist.teacher.torchscript import is_torchscript, read_torchscript

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives keep among their tensors."""


class Teacher:
    """A frozen CLIP: pictures and texts to unit rows of one space.

    Raises:
        UserError: if a file is missing or unsafe, its weights do not fit the model or are no numbers, or pictures and
            texts have no common width.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        folder = local_folder(config)
        weights = weights_file(config, folder)
        mean, std = statistics(config, folder)
        name = config.name if folder is None else f"{LOCAL}{folder}"
        self.model = _create(name, weights, config).eval().requires_grad_(False)
        _check_finite(self.model, config)
        self.model.to(self.device)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.mean, self.std = mean, std
        size = self.model.visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        self.logit_scale = float(self.model.logit_scale.exp())
        self.width = self._common_width(config)
        self.dtype = _dtype(config.precision, self.device)
        self.model.visual.to(self.dtype)
        if config.compile:
            self.model.visual.compile()
        identity = {
            "name": config.name,
            "weights_sha256": sha256_file(weights),
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "activation": type(_first_activation(self.model.visual)).__name__,
            "embedding_width": self.width,
        }
        self.facts = TeacherFacts(identity, self.width, self.logit_scale)
        quicken(self.model.visual)

    @property
    def identity(self) -> dict[str, Any]:
        """What checkpoints and caches record of it."""
        return self.facts.identity

    @property
    def id(self) -> str:
        """Short name of what decides the embeddings of texts; caches are filed under it."""
        return self.facts.id

    @property
    def precision(self) -> str:
        """Number format of the picture tower: fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

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

    @torch.no_grad()
    def _common_width(self, config: TeacherConfig) -> int:
        """E, from one empty picture and one empty text: what towers state of themselves differs among them."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        pictures = int(self.model.encode_image(pixels).shape[1])
        texts = int(self.model.encode_text(self.tokenizer([""]).to(self.device)).shape[1])
        if pictures != texts or pictures < 1:
            raise UserError(
                f"{where(config)}: embeds pictures in {pictures} numbers and texts in {texts}, which no projection "
                f"can fit; give a CLIP whose towers share one width"
            )
        return pictures


class _PictureTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self.visual(pixels)
        return embedded


def _create(name: str, weights: Path, config: TeacherConfig) -> Any:
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # open_clip narrates at INFO and warns of what we check ourselves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not name.startswith(LOCAL) and is_torchscript(weights):
                return _create_from_torchscript(name, weights)
            pretrained = None if name.startswith(LOCAL) else str(weights)
            return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({foreign[1]})" if foreign else ""
        raise UserError(
            f"{where(config)}: holds more than weights{what}: pickled code, which is never run; give a .safetensors "
            f"file, or a state_dict that torch.load(weights_only=True) reads"
        ) from None
    except Exception as error:  # torch, safetensors, json and open_clip all raise their own types here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where(config)}: does not fit the model {config.name}: {reason}") from None
    finally:
        logging.root.setLevel(level)


def _create_from_torchscript(name: str, weights: Path) -> Any:
    """A model with the weights of an archive like OpenAI's."""
    tensors = read_torchscript(weights)
    is_openais = all(key in tensors for key in OPENAI_NUMBERS)
    if is_openais and not (open_clip.get_model_config(name) or {}).get("quick_gelu"):
        # The wrong activation would load without a word and give other embeddings.
        raise UserError(f"teacher.name={name}: OpenAI's weights need QuickGELU; use {name}-quickgelu")
    model = open_clip.create_model(name, pretrained_text=False)
    # The causal mask is no weight, but an archive does not tell the two apart.
    no_weights = {*OPENAI_NUMBERS, *(key for key in tensors if key.rpartition(".")[2] == "attn_mask")}
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in no_weights})
    return model


def _check_finite(model: nn.Module, config: TeacherConfig) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            wrong = int(finite.numel() - finite.sum())
            raise UserError(
                f"{where(config)}: tensor {name} holds {wrong} numbers that are NaN or infinite; get the file again"
            )


def _first_activation(visual: nn.Module) -> nn.Module:
    names = ("GELU", "QuickGELU", "GELUTanh", "SiLU", "ReLU")
    return next((m for m in visual.modules() if type(m).__name__ in names), visual)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
