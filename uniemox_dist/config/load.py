"""Loads a recipe (a path or a shipped name) and key=value pairs into a checked `Config`.

A recipe is YAML. `extends: NAME` takes another recipe (shipped, or beside the file) as its base. All
mistakes are reported at once, each with its dotted path and, for a misspelt key, the nearest known one.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.model_sections import ModelConfig
from uniemox_dist.config.schema import Config
from uniemox_dist.config.sections import explain_errors
from uniemox_dist.config.yaml_text import Dumper, parse_yaml
from uniemox_dist.core.errors import UserError

ENCODER_KEYS = ("name", "patch_size", "width", "depth", "heads", "mlp_ratio")
"""Settings of the encoder that a fine-tuning run inherits; a user who sets one of them chooses another architecture."""
INPUT_KEYS = ("image_size", "mean", "std")
"""Settings of the encoder's input, inherited unless the user sets them."""
CONFIG_FILES = ("uniemox.json", "complete.json", "config.yaml")
"""Files of a release, a checkpoint and a run; each contains the whole configuration."""


def list_shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("launch") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def read_recipe(
    recipe: str, beside: Path | None = None, above: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """Returns the merged mapping of a recipe and its bases, and the recipe's name in error messages.

    `beside` is the folder of the recipe that extends this one; `above` has the names of all recipes that extend it.
    """
    path = Path(recipe)
    if beside is not None:
        near = (beside / f"{recipe}.yaml", beside / recipe)
        path = next((Path(os.path.normpath(p)) for p in near if p.is_file()), path)
    if path.is_file():
        text, where, folder = _read_text(path), str(path), path.parent
    elif recipe in list_shipped_recipes():
        text = (resources.files("launch") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
        where, folder = f"recipe {recipe}", None
    else:
        names = ", ".join(list_shipped_recipes())
        what = f"recipe {recipe}: no such file, nor a shipped recipe" if recipe else "RECIPE is empty"
        raise UserError(f"{what}; shipped are: {names}")
    if where in above:
        raise UserError(f"{where}: extends itself: {' -> '.join((*above, where))}")
    values = parse_yaml(text, where) or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: a recipe is a mapping of sections, found {type(values).__name__}")
    base = values.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{where}: extends={base!r} must name another recipe")
        values = merge(read_recipe(base, folder, (*above, where))[0], values)
    return values, where


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; give a YAML file or the name of a recipe") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; `over` wins, lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(pair: str) -> dict[str, Any]:
    """`a.b=1` as the nested mapping {"a": {"b": 1}}."""
    key, equals, text = pair.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise UserError(f"{pair}: expected key=value with a dotted key, such as optim.blr=1e-3")
    value: Any = parse_yaml(text, key) if text else None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolves a recipe and key=value pairs. A fine-tuning run gets the encoder of the release or run that it starts
    from (`model.init_from`), unless a pair or a resolved configuration states another one.

    Raises:
        UserError: with one line for every mistake.
    """
    values, where = read_recipe(recipe)
    pairs: dict[str, Any] = {}
    for pair in overrides:
        pairs = merge(pairs, parse_override(pair))
    whole = merge(values, pairs)
    if "finetune" in whole:
        stated = pairs.get("model")
        stated = stated if isinstance(stated, dict) else {}
        own = values.get("model")
        if (
            "init_from" not in stated
            and isinstance(own, dict)
            and own.keys() >= ModelConfig.model_fields.keys()
        ):
            stated = own  # a resolved configuration, such as a submitted job's
        encoder = _inherit_architecture(whole, stated)
        whole = merge(whole, {"model": encoder}) if encoder else whole
    return validate_config(whole, where)


def _inherit_architecture(values: Mapping[str, Any], set_by_user: Mapping[str, Any]) -> dict[str, Any]:
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
    wanted = INPUT_KEYS if set(ENCODER_KEYS) & set(set_by_user) else (*ENCODER_KEYS, *INPUT_KEYS)
    return {key: found[key] for key in wanted if key in found and key not in set_by_user}


def _model_of(folder: Path) -> dict[str, Any]:
    for name in CONFIG_FILES:
        try:
            text = (folder / name).read_text(encoding="utf-8")
            read = json.loads(text) if name.endswith(".json") else {"config": parse_yaml(text, name)}
            return dict(read["config"]["model"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return {}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def validate_config(values: dict[str, Any], where: str) -> Config:
    """Makes a configuration from values; with a section `finetune` it is for fine-tuning. `where` names the values
    in errors.

    Raises:
        UserError: with one line for every mistake.
    """
    schema = FinetuneRun if "finetune" in values else Config
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in explain_errors(error, schema))) from None


def require_pretraining(config: Config) -> Config:
    """Returns the configuration if it is for pretraining.

    Raises:
        UserError: if it is for fine-tuning.
    """
    if isinstance(config, FinetuneRun):
        raise UserError(
            "finetune.*: this recipe is for fine-tuning; use `uniemox finetune` or slurm/finetune.sbatch"
        )
    return config


def require_finetuning(config: Config) -> FinetuneRun:
    """Returns the configuration if it is for fine-tuning.

    Raises:
        UserError: if it is for pretraining.
    """
    if not isinstance(config, FinetuneRun):
        raise UserError(
            "finetune: this recipe has no such section, so it is for pretraining; extend finetune, or use "
            "`uniemox pretrain`"
        )
    return config


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML that loads back to the same values."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
