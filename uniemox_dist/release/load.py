"""Loading a release: the encoder for downstream use, or the whole student. Needs torch and timm only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shards.pictures.decode import read_upright_pixels
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.views import resize_whole
from uniemox_dist.models.patches import normalise
from uniemox_dist.models.student import Student
from uniemox_dist.release.embedder import UniEmoX
from uniemox_dist.release.format import CONFIG, ENCODER, REST, read_release
from uniemox_dist.release.weights import PREFIX

Preprocess = Callable[[Image.Image], Tensor]
DRAWS = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_})


class Undrawn(TorchFunctionMode):
    """Context manager: modules built inside skip the random initialisation of weights, which takes most of the time
    and is overwritten by the loaded weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in DRAWS else func(*args, **(kwargs or {}))


def load_encoder(path: str | Path, *, verify: bool = False) -> tuple[nn.Module, Preprocess]:
    """Loads the released encoder and its preprocessing.

    The encoder is a timm VisionTransformer in eval mode: B×3×size×size normalised pixels to B×D class tokens.
    The preprocessing turns a PIL picture upright by its EXIF orientation, puts transparency on white, and returns
    3×size×size.

    Args:
        path: folder of a release.
        verify: check SHA256SUMS first.

    Raises:
        UserError: if the folder is not a release, or (with verify) a file was altered.
    """
    facts = read_release(path, verify=verify)
    model = Config.model_validate(facts["config"]).model
    try:
        encoder = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    except SafetensorError as error:
        raise _unreadable(path, ENCODER, error) from None
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # The last line holds the cause; the first ones only state that something does not fit.
        reason = str(error).strip().splitlines()[-1].strip()[:200] if str(error).strip() else "it is damaged"
        raise UserError(
            f"RELEASE={path}: timm {timm.__version__} cannot build what {CONFIG} names ({reason}); update timm, "
            "or copy the release again"
        ) from None

    def preprocess(picture: Image.Image) -> Tensor:
        pixels_3HW = to_pixels(picture)
        view_13SS = resize_whole(pixels_3HW, model.image_size)[None]
        return normalise(view_13SS, model.mean, model.std, torch.float32)[0]

    return encoder, preprocess


def load_uniemox(path: str | Path, *, verify: bool = False, device: str | torch.device = "cpu") -> UniEmoX:
    """Loads a release whose methods take pictures: `.encode` returns the encoder's features, `.embed` vectors in the
    space of the teacher's pictures and texts.

    Args:
        path: folder of a release.
        verify: check SHA256SUMS first.
        device: name of the torch device.

    Raises:
        UserError: like `load_encoder`, and for a device that does not exist.
    """
    where = check_device(str(device), "device")
    facts = read_release(path, verify=verify)
    return UniEmoX(load_pretrained(path), facts, to_pixels, torch.device(where))


def check_device(name: str, field: str = "--device") -> str:
    """Returns the name of an available torch device; `auto` is the first GPU if there is one, otherwise the CPU.

    Raises:
        UserError: if the device does not exist on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0][:120]
        raise UserError(f"{field}={name}: cannot be used ({reason}); give cpu, or auto") from None
    return name


def load_pretrained(path: str | Path, *, verify: bool = False) -> Student:
    """Loads the whole student of a release: encoder, projection, fusion and decoder, in eval mode.

    Raises:
        UserError: like `load_encoder`.
    """
    facts = read_release(path, verify=verify)
    config = Config.model_validate(facts["config"])
    with Undrawn():
        student = Student(config.model, config.loss, facts["embedding_width"])
    weights = {f"{PREFIX}{k}": v for k, v in _tensors(path, ENCODER).items()}
    try:
        found = student.load_state_dict({**weights, **_tensors(path, REST)}, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"RELEASE={path}: its weights do not fit its settings: {reason}") from None
    missing = set(found.missing_keys) - {"decoder.pos_embed"}  # a fixed table, not stored by earlier versions
    if missing or found.unexpected_keys:
        name = sorted(missing or found.unexpected_keys)[0]
        raise UserError(f"RELEASE={path}: its weights do not fit its settings: {name}")
    return student.eval()


def _tensors(path: str | Path, file: str) -> dict[str, Tensor]:
    try:
        return load_file(Path(path) / file)
    except SafetensorError as error:
        raise _unreadable(path, file, error) from None


def _unreadable(path: str | Path, file: str, error: SafetensorError) -> UserError:
    return UserError(f"RELEASE={path}: {file} cannot be read ({error}); copy the release again")


def to_pixels(picture: Image.Image) -> Tensor:
    """A PIL picture as uint8 3×H×W: upright, on white."""
    return torch.from_numpy(np.array(read_upright_pixels(picture))).permute(2, 0, 1)
