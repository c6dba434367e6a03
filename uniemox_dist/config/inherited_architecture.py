"""The encoder's architecture of a fine-tuning run, from what it starts from: a release and a run say theirs, so that
nobody has to say it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SHAPE = ("name", "patch_size", "width", "depth", "heads", "mlp_ratio")
"""Who sets one of these means another architecture."""
INPUT = ("image_size", "mean", "std")
FOLDERS = ("uniemox.json", "complete.json", "config.yaml")
"""Of a release, a checkpoint and a run: each holds the whole configuration."""


def adopted(values: Mapping[str, Any], set_by_user: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section `model` that come from `model.init_from`, for between recipe and key=value pairs.

    Args:
        values: the configuration so far, recipe and pairs.
        set_by_user: the section `model` of the pairs alone. An architecture that is stated there stands.

    Returns:
        Nothing where `init_from` is no folder that says its architecture; reading weights tells what is wrong with it.
    """
    model, run = _section(values, "model"), _section(values, "run")
    start = model.get("init_from")
    if not isinstance(start, str):
        return {}
    found = _model_of(Path(start))
    if not found and not Path(start).exists():  # a run that goes on does not need it any more
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
