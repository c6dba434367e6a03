"""Reads the encoder's architecture of a fine-tuning run from `model.init_from`: a release or a run states it, so the
user need not repeat it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SHAPE = ("name", "patch_size", "width", "depth", "heads", "mlp_ratio")
"""A user who sets one of these chooses another architecture."""
INPUT = ("image_size", "mean", "std")
FOLDERS = ("uniemox.json", "complete.json", "config.yaml")
"""Files of a release, a checkpoint and a run; each contains the whole configuration."""


def adopted(values: Mapping[str, Any], set_by_user: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the section `model` that `model.init_from` states. They override the recipe; key=value
    pairs override them.

    Args:
        values: the configuration so far, recipe and pairs.
        set_by_user: the section `model` of the pairs only. An architecture that is set there takes precedence.

    Returns:
        An empty mapping if `init_from` is not a folder that states its architecture. Reading the weights later reports
        the error.
    """
    model, run = _section(values, "model"), _section(values, "run")
    start = model.get("init_from")
    if not isinstance(start, str):
        return {}
    found = _model_of(Path(start))
    if not found and not Path(start).exists():  # a resumed run no longer needs it
        earlier = _model_of(Path(str(run.get("dir", "runs")), str(run.get("name", "run"))))
        found = earlier if earlier.get("init_from") == start else {}
    wanted = INPUT if set(SHAPE) & set(set_by_user) else (*SHAPE, *INPUT)
    return {key: found[key] for key in wanted if key in found and key not in set_by_user}


def _model_of(folder: Path) -> dict[str, Any]:
    for name in FOLDERS:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            read = json.loads(text) if name.endswith(".json") else {"config": yaml.safe_load(text)}
            return dict(read["config"]["model"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return {}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}
