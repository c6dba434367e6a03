"""The frozen teacher: an open_clip model with its own pixel statistics. It is never part of an engine or a checkpoint.

Shape legend: B pictures, T texts or tokens, E embedding width, D tower width, H heads.
"""

import logging
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_file
from uniemox_dist.models.compilation import compile_options, use_private_cache
from uniemox_dist.models.patches import load_statistics, standardise
from uniemox_dist.teacher.folder_config import check_model_config
from uniemox_dist.teacher.identity import (
    CONFIG,
    LOCAL,
    TeacherFacts,
    describe_source,
    find_local_folder,
    find_weights_file,
    read_statistics,
)
from uniemox_dist.teacher.torchscript import is_torchscript, read_torchscript

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives store among their tensors."""
QUICK_GELU_SLOPE = 1.702
"""QuickGELU is x·σ(1.702·x)."""


class Teacher:
    """A frozen CLIP that embeds pictures and texts as unit rows of one space.

    Raises:
        UserError: if a file is missing or unsafe, weights do not match the model or are not finite, or pictures and
            texts have different embedding widths.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        folder = find_local_folder(config)
        weights = find_weights_file(config, folder)
        mean, std = read_statistics(config, folder)
        name = config.name if folder is None else f"{LOCAL}{folder}"
        self.model = _create_model(name, weights, config).eval().requires_grad_(False)
        _check_finite(self.model, config)
        self.model.to(self.device)
        self.tokenizer = _load_tokenizer(name, folder, config)
        self.mean, self.std = mean, std
        size = self.model.visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        self.logit_scale = float(self.model.logit_scale.exp())
        self.width = self._measure_width(config)
        self.dtype = _choose_dtype(config.precision, self.device)
        self.model.visual.to(self.dtype)
        self._prepare_pixels: Callable[..., Tensor] = _prepare_pixels
        identity = {
            "name": config.name,
            "weights_sha256": sha256_file(weights),
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "activation": type(_find_activation(self.model.visual)).__name__,
            "embedding_width": self.width,
        }
        self.facts = TeacherFacts(identity, self.width, self.logit_scale)
        speed_up_tower(self.model.visual)
        if config.compile:
            use_private_cache()
            self.compile()

    @property
    def identity(self) -> dict[str, Any]:
        """The identity that checkpoints and caches record."""
        return self.facts.identity

    @property
    def id(self) -> str:
        """Short hash of what determines text embeddings; names the cache folder."""
        return self.facts.id

    @property
    def precision(self) -> str:
        """Number format of the image tower: fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @torch.no_grad()
    def embed_pictures(self, pixels_B3HW: Tensor) -> Tensor:
        """Embeds uint8 pixels of any size as unit rows Ω, B×E in fp32."""
        statistics = load_statistics(self.mean, self.std, pixels_B3HW.device)
        pixels = self._prepare_pixels(pixels_B3HW, *statistics, self.dtype, self.size)
        return F.normalize(self.model.encode_image(pixels).float(), dim=1)

    def compile(self, *, cuda_graphs: bool = False) -> None:
        """Compiles the picture tower and the preparation of its pixels."""
        options = compile_options(cuda_graphs=cuda_graphs)
        self.model.visual.compile(**options)
        self._prepare_pixels = torch.compile(_prepare_pixels, **options)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embeds captions as unit rows, T×E in fp32."""
        if self.model is None or not hasattr(self.model, "encode_text"):
            raise RuntimeError("drop_text_tower() has removed the text tower")
        return F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=1)

    def drop_text_tower(self) -> None:
        """Frees the text tower. Call it once all captions are cached."""
        self.model = _ImageTower(self.model.visual)

    @torch.no_grad()
    def _measure_width(self, config: TeacherConfig) -> int:
        """Returns E, measured with one blank picture and one empty text.

        Towers state their widths under different names, so measuring is simpler than reading.
        """
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        pictures = int(self.model.encode_image(pixels).shape[1])
        texts = int(self.model.encode_text(self.tokenizer([""]).to(self.device)).shape[1])
        if pictures != texts or pictures < 1:
            raise UserError(
                f"{describe_source(config)}: embeds pictures in {pictures} numbers and texts in {texts}; use a CLIP "
                f"whose towers have the same embedding width"
            )
        return pictures


def _prepare_pixels(
    pixels_B3HW: Tensor, mean_1311: Tensor, std_1311: Tensor, dtype: torch.dtype, size: int
) -> Tensor:
    """Standardises uint8 pixels, and resizes them to the tower's input."""
    pixels = standardise(pixels_B3HW, mean_1311, std_1311, dtype)
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True).to(dtype)
    return pixels


class _ImageTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self.visual(pixels)
        return embedded


class FusedAttention(nn.MultiheadAttention):
    """Self-attention with torch's fused kernel.

    On a CPU the gain is very small, because nn.MultiheadAttention has its own fast path for frozen weights
    (docs/benchmarks/step.md).
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = options.get("attn_mask") is None and not options.get("need_weights", True)
        if query is not key or key is not value or not plain:
            return super().forward(query, key, value, **options)
        B, T, D = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        joined_BTD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        return self.out_proj(joined_BTD), None


class QuickGELU(OpenClipQuickGELU):
    """x·σ(1.702·x) = SiLU(1.702·x) / 1.702, computed in place.

    open_clip's version writes three tensors of the MLP's hidden width; without autograd one is enough.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return F.silu(x.mul_(QUICK_GELU_SLOPE), inplace=True).mul_(1 / QUICK_GELU_SLOPE)


def speed_up_tower(visual: nn.Module) -> nn.Module:
    """Replaces attention and QuickGELU of open_clip's blocks by faster versions, in place.

    Weights and their names stay the same; results stay the same up to rounding. Other towers are not changed.
    """
    for block in visual.modules():
        if not isinstance(block, ResidualAttentionBlock):
            continue
        attention = block.attn
        if (
            type(attention) is nn.MultiheadAttention
            and attention.batch_first
            and attention.in_proj_weight is not None
        ):
            attention.__class__ = FusedAttention
        for module in block.mlp:
            # Safe in place: nothing else reads its input, the output of a linear layer.
            if type(module) is OpenClipQuickGELU:
                module.__class__ = QuickGELU
    return visual


def _load_tokenizer(name: str, folder: Path | None, config: TeacherConfig) -> Any:
    if folder is None or not check_model_config(folder / CONFIG, describe_source(config)):
        return open_clip.get_tokenizer(name)
    try:
        # Without this setting transformers would ask at the terminal whether it may run the folder's Python files.
        return open_clip.get_tokenizer(name, trust_remote_code=False)
    except Exception as error:  # transformers raises different types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{describe_source(config)}: its tokenizer cannot be loaded: {reason}") from None


def _create_model(name: str, weights: Path, config: TeacherConfig) -> Any:
    level = logging.root.level
    logging.root.setLevel(
        logging.ERROR
    )  # open_clip logs details at INFO and warns about what is checked here
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
            f"{describe_source(config)}: holds more than weights{what}: pickled code, which is never run; give a "
            f".safetensors file, or a state_dict that torch.load(weights_only=True) reads"
        ) from None
    except Exception as error:  # torch, safetensors, json and open_clip raise different types here
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{describe_source(config)}: does not fit the model {config.name}: {reason}"
        ) from None
    finally:
        logging.root.setLevel(level)


def _create_from_torchscript(name: str, weights: Path) -> Any:
    """Creates a model with the weights of a TorchScript archive, such as OpenAI's."""
    tensors = read_torchscript(weights)
    is_openai = all(key in tensors for key in OPENAI_NUMBERS)
    if is_openai and not (open_clip.get_model_config(name) or {}).get("quick_gelu"):
        # The wrong activation would load without an error and give other embeddings.
        raise UserError(f"teacher.name={name}: OpenAI's weights need QuickGELU; use {name}-quickgelu")
    model = open_clip.create_model(name, pretrained_text=False)
    # An archive stores the causal mask like a weight, but the model computes it.
    ignored = {*OPENAI_NUMBERS, *(key for key in tensors if key.rpartition(".")[2] == "attn_mask")}
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in ignored})
    return model


def _check_finite(model: nn.Module, config: TeacherConfig) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            wrong = int(finite.numel() - finite.sum())
            raise UserError(
                f"{describe_source(config)}: tensor {name} holds {wrong} numbers that are NaN or infinite; get the "
                f"file again"
            )


def _find_activation(visual: nn.Module) -> nn.Module:
    names = ("GELU", "QuickGELU", "GELUTanh", "SiLU", "ReLU")
    return next((m for m in visual.modules() if type(m).__name__ in names), visual)


def _choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
