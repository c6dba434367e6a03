"""The files of a teacher: where they lie, and what they state, before any of it becomes a model."""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json, sha256_file

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
LOCAL, SHIPPED = "local-dir:", "shipped:"


def local_folder(config: TeacherConfig) -> Path | None:
    """The open_clip local-dir folder that a teacher's name refers to, if it does."""
    if config.name.startswith(LOCAL):
        return Path(config.name.removeprefix(LOCAL))
    if config.name.startswith(SHIPPED):
        if config.name != "shipped:demo":
            raise UserError(f"teacher.name={config.name}: not shipped; there is shipped:demo")
        return Path(str(resources.files("uniemox_dist").joinpath("teacher/demo_teacher")))
    return None


def stated_facts(config: TeacherConfig) -> dict[str, Any]:
    """What is known of a teacher that is not opened, as keys of its identity: the SHA-256 of its weights if they are
    here, otherwise its name alone; and its pixel statistics where they are stated."""
    folder = local_folder(config)
    weights = Path(str(config.weights)) if folder is None else folder / WEIGHTS
    facts: dict[str, Any] = {}
    if weights.is_file():
        facts["weights_sha256"] = sha256_file(weights)
    if folder is None or not facts:
        # Also beside a hash: one file can be read with either activation, and an open_clip name says with which.
        facts["name"] = config.name
    if folder is None or (folder / CONFIG).is_file():
        facts["mean"], facts["std"] = map(list, statistics(config, folder))
    return facts


def where(config: TeacherConfig) -> str:
    """What error lines call a teacher's weights."""
    return f"teacher.name={config.name}" if ":" in config.name else f"teacher.weights={config.weights}"


def weights_file(config: TeacherConfig, folder: Path | None) -> Path:
    """The file of a teacher's weights, which is there, in a layout that open_clip knows."""
    if folder is not None:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"teacher.name={config.name}: {folder} lacks {name} (open_clip's local-dir layout)"
                )
        return folder / WEIGHTS
    import open_clip  # here: a run without a live teacher has no use for it

    known = open_clip.list_models()
    if config.name not in known:
        near = difflib.get_close_matches(config.name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise UserError(f"teacher.name={config.name}: not an open_clip model; {hint}")
    weights = Path(str(config.weights))
    if not weights.is_file():
        raise UserError(f"teacher.weights={weights}: no such file")
    return weights


def statistics(config: TeacherConfig, folder: Path | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the teacher's pixels: of the settings, or of its folder."""
    found: dict[str, Any]
    if folder is None:
        whose, found = "teacher", {"mean": config.mean, "std": config.std}
    else:
        whose = f"teacher.name={config.name}: preprocess_cfg in {CONFIG}"
        try:
            found = dict(read_json(folder / CONFIG)["preprocess_cfg"])
        except (ValueError, KeyError, TypeError):
            found = {}
    numbers = []
    for key in ("mean", "std"):
        if found.get(key) is None:
            raise UserError(f"{whose} does not state {key}; add it")
        try:
            values = tuple(float(x) for x in found[key])
        except (TypeError, ValueError):
            values = ()
        if len(values) != 3 or not all(abs(x) < 1e6 for x in values) or (key == "std" and min(values) <= 0):
            least = "positive numbers" if key == "std" else "numbers"
            raise UserError(f"{whose}: {key} is {json.dumps(found[key])}; give three {least}")
        numbers.append(values)
    return numbers[0], numbers[1]
