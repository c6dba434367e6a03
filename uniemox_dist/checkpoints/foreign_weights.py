"""Reads weights of other projects and of earlier runs, and renames them to the student's parameter names.

Supported sources are a file with a state dict in timm's names or in those of MAE's official checkpoints (He et al.
2022), a folder in timm's local-dir layout, a release of this project, and a run or one of its checkpoints. Code inside
a file is never run.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from uniemox_dist.checkpoints.folders import COMPLETE, find_missing_weights, open_checkpoint
from uniemox_dist.checkpoints.format import FragmentReader, read_fixed_tensors
from uniemox_dist.config.encoder_names import list_shapes
from uniemox_dist.config.finetune import CLASSIFIER
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which training scripts keep the state dict."""
HEADS = ("head.", "head_dist.", "pre_logits.")
ANCHOR = "patch_embed.proj.weight"
"""A name that every vision transformer of timm has; it reveals the prefix of all names."""
PARTS = ("to_decoder.", "fusion.", "decoder.")
"""The student's modules besides its encoder."""
MAE_NAMES = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "to_decoder.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.prediction.",
}


@dataclass(frozen=True)
class Weights:
    """Tensors by the student's names, and the facts that their source states."""

    tensors: dict[str, Tensor]
    layout: str
    """The kind of source, for messages."""
    stated: dict[str, Any] = field(default_factory=dict)
    """The encoder's settings that the source states, such as name and heads."""


def read_weights(path: Path, key: str) -> Weights:
    """Reads all weights of a source; `key` is the setting that names it.

    Raises:
        UserError: if it is missing, cannot be read without running code, or contains no vision transformer.
    """
    where = f"{key}={path}"
    if (problem := find_missing_weights(path)) is not None:
        raise UserError(f"{where}: {problem}")
    if path.is_file():
        return rename_as_ours(_read_file(path, where), where)
    stated = _json(path / "uniemox.json", where) if (path / "uniemox.json").is_file() else {}
    if stated and stated.get("format") != CLASSIFIER:
        model = dict(stated.get("config", {}).get("model", {}))
        encoder = _read_file(path / "model.safetensors", where)
        tensors = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
        return Weights({**tensors, **_read_file(path / "uniemox.safetensors", where)}, "a release", model)
    if (path / COMPLETE).is_file() or (path / "checkpoints").is_dir():
        checkpoint = open_checkpoint(path, key)
        reader = FragmentReader(checkpoint)
        tensors = {name: reader.parameter(name) for name in reader.shapes}
        layout = f"a run's checkpoint of step {checkpoint.step}"
        return Weights(
            {**tensors, **read_fixed_tensors(checkpoint)}, layout, dict(checkpoint.info["config"]["model"])
        )
    found = rename_as_ours(_read_file(path / "model.safetensors", where), where)
    kind = "a fine-tuned classifier" if stated else "timm's local-dir"
    return Weights(found.tensors, kind, _stated(_json(path / "config.json", where)))


def rename_as_ours(tensors: Mapping[str, Tensor], where: str) -> Weights:
    """Renames a state dict in timm's, MAE's or our names, with any common prefix; leaves classifiers out.

    Raises:
        UserError: if it contains no vision transformer, or several.
    """
    prefixes = [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    if len(prefixes) != 1:
        if prefixes:
            raise UserError(
                f"{where}: holds {len(prefixes)} encoders ({', '.join(prefixes)}); save one alone"
            )
        some = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(
            f"{where}: nothing in it matches a vision transformer in timm's or MAE's names (it has {some}, … and no "
            f"{ANCHOR})"
        )
    prefix = prefixes[0]
    ours = prefix.removesuffix("encoder.") if prefix.endswith("encoder.") else None
    mae = f"{prefix}decoder_embed.weight" in tensors
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ours is not None and name.removeprefix(ours).startswith(PARTS):
            found[name.removeprefix(ours)] = tensor
        elif not name.startswith(prefix):
            found[name] = tensor
        elif not (inner := name.removeprefix(prefix)).startswith(HEADS):
            renamed = _from_mae(inner) if mae else None
            found[renamed or f"encoder.{inner}"] = _channels_first(tensor, inner) if renamed else tensor
    return Weights(found, "MAE's names" if mae else "timm's names" if ours is None else "our names")


def _from_mae(name: str) -> str | None:
    """The student's name for a part of MAE's decoder."""
    for theirs, ours in MAE_NAMES.items():
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return ours + name.removeprefix(theirs)
    return None


def _channels_first(tensor: Tensor, name: str) -> Tensor:
    """Reorders the values of a patch: MAE predicts row, column, channel; the student predicts channel, row, column."""
    side = round((tensor.shape[0] / 3) ** 0.5) if tensor.ndim else 0
    if not name.startswith("decoder_pred.") or 3 * side**2 != tensor.shape[0]:
        return tensor
    return tensor.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)


def _read_file(path: Path, where: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{where}: lacks {path.name}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(f"{where}: {path.name} is not readable as weights") from None
        raise UserError(
            f"{where}: holds pickled code ({code[1]}), which is not run; save its state dict alone, as safetensors"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
        # Damaged files raise exceptions of many types.
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = words.splitlines()[0].split(". ")[0]
        raise UserError(f"{where}: {path.name} is not readable as weights ({reason})") from None
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        content = inner
    raise UserError(
        f"{where}: holds a {type(content).__name__} instead of tensors by name; save a state dict"
    )


def _unpickle(path: Path) -> Any:
    # MAE's files contain their command line as a Namespace, a class without code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (ValueError, TypeError):
        raise UserError(f"{where}: {path.name} is not a JSON object") from None


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The name and number of heads that a timm local-dir configuration states."""
    name, given = config.get("architecture"), config.get("model_args") or {}
    shape = list_shapes().get(name) if isinstance(name, str) else None
    heads = given.get("num_heads") or (shape or {}).get("heads")
    changed = {"embed_dim", "depth", "num_heads", "mlp_ratio"} & set(given)
    stated = {"name": name if shape and not changed else None, "heads": heads}
    return {key: value for key, value in stated.items() if value is not None}
