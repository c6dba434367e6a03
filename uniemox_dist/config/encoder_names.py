"""Shapes of timm's vision transformers by name, without torch: read from vits.json, which tools/list_vits.py
writes."""

import difflib
import json
from functools import cache
from importlib import resources
from typing import Any

SIZES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}
FREE = ("image_size", "patch_size")
"""Settings that may differ from those of the named encoder."""
PECULIAR = (
    "registers",
    "gated_mlp",
    "layer_scale",
    "post_norm",
    "differential_attention",
    "no_qkv_bias",
    "pre_norm",
    "no_patch_bias",
    "no_final_norm",
    "prefix_positions",
)
"""Properties of some named encoders for which there is no setting: extra tokens, the kind of MLP and attention, scales
and norms behind a block's parts, missing biases, additional or missing norms, and the number of rows in the position
table before those of the patches (if it is not 1, for the class token)."""


@cache
def list_shapes() -> dict[str, dict[str, Any]]:
    """Shapes by name: image_size, patch_size, width, depth, heads and mlp_ratio; for some also keys of PECULIAR."""
    table: dict[str, dict[str, Any]] = json.loads(
        resources.files("uniemox_dist").joinpath("config/vits.json").read_text(encoding="utf-8")
    )
    return {**table, **{short: table[name] for short, name in SIZES.items()}}


def timm_name(name: str) -> str:
    """timm's name of an encoder."""
    return SIZES.get(name, name)


def find_peculiarities(name: str | None) -> dict[str, Any]:
    """The properties of a named encoder that are listed in PECULIAR."""
    return {key: value for key, value in list_shapes().get(name or "", {}).items() if key in PECULIAR}


def fill_in(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the settings that follow from `model.name` to a section `model`.

    Raises:
        ValueError: for an unknown name, or a value that contradicts the name.
    """
    name = values.get("name")
    if not isinstance(name, str):
        return values
    if name not in list_shapes():
        near = difflib.get_close_matches(name, list(list_shapes()), n=3, cutoff=0.4) or list(SIZES)
        raise ValueError(f"model.name={name}: not a vision transformer of timm; nearest: {', '.join(near)}")
    shape = {key: value for key, value in list_shapes()[name].items() if key not in PECULIAR}
    given = {key: value for key, value in values.items() if value is not None or key not in shape}
    for key, value in shape.items():
        if key not in FREE and key in given and given[key] != value:
            raise ValueError(
                f"model.{key}={given[key]} contradicts model.name={name}, whose {key} is {value:g}; give "
                f"model.{key}=null, or no name"
            )
    return {**shape, **given}
