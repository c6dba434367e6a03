"""A teacher's identity and files, read without torch: the path of its weights and the facts in its configuration."""

import difflib
import json
import math
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, sha256_file
from uniemox_dist.teacher.folder_config import check_model_config

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
LOCAL, SHIPPED = "local-dir:", "shipped:"


@dataclass(frozen=True)
class TeacherFacts:
    """Identity, embedding width E and logit scale of a teacher.

    They come from the model itself, or from the cache of its views when the model is not loaded.
    """

    identity: dict[str, Any]
    """name, weights_sha256, size, mean, std, activation, embedding_width."""
    width: int
    logit_scale: float

    @property
    def id(self) -> str:
        """Short hash of what determines text embeddings; names the cache folder.

        It covers neither the name (the same weights in another folder are the same teacher) nor pixel statistics.
        """
        content = {k: self.identity[k] for k in ("weights_sha256", "activation", "embedding_width")}
        return sha256_bytes(canonical_json(content))[:16]

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as a JSON object."""
        return {"identity": self.identity, "width": self.width, "logit_scale": self.logit_scale}

    @classmethod
    def from_json(cls, record: Any) -> "TeacherFacts":
        """Parses the object that `to_json` returns.

        Raises:
            ValueError: if a key is missing or a value is invalid.
        """
        try:
            facts = cls(dict(record["identity"]), record["width"], float(record["logit_scale"]))
            name, sha256, size = (facts.identity[k] for k in ("name", "weights_sha256", "size"))
            valid = isinstance(name, str) and isinstance(sha256, str) and isinstance(size, int)
            statistics = [facts.identity[k] for k in ("mean", "std")]
            valid = valid and all(len([float(x) for x in values]) == 3 for values in statistics)
            valid = valid and isinstance(facts.width, int) and facts.width > 0
            valid = valid and facts.width == facts.identity["embedding_width"]
            if not valid or not math.isfinite(facts.logit_scale) or not facts.id:
                raise ValueError("a value in the teacher's description is invalid")
        except (KeyError, TypeError) as error:
            raise ValueError(f"the teacher's description lacks {error}") from None
        return facts


def find_local_folder(config: TeacherConfig) -> Path | None:
    """Returns the open_clip local-dir folder that `teacher.name` refers to; None for an open_clip model name."""
    if config.name.startswith(LOCAL):
        return Path(config.name.removeprefix(LOCAL))
    if config.name.startswith(SHIPPED):
        if config.name != "shipped:demo":
            raise UserError(f"teacher.name={config.name}: no such shipped teacher; use shipped:demo")
        return Path(str(resources.files("uniemox_dist").joinpath("teacher/demo_teacher")))
    return None


def read_stated_facts(config: TeacherConfig) -> dict[str, Any]:
    """Collects the facts about a teacher that are known without loading it, under the keys of its identity.

    Contains the SHA-256 of the weights where the file exists, otherwise the name; and pixel mean and standard
    deviation where they are stated.
    """
    folder = find_local_folder(config)
    weights = Path(str(config.weights)) if folder is None else folder / WEIGHTS
    facts: dict[str, Any] = {}
    if weights.is_file():
        facts["weights_sha256"] = sha256_file(weights)
    if folder is None or not facts:
        # An open_clip name also selects the activation, which the hash of the weights does not cover.
        facts["name"] = config.name
    if folder is None or (folder / CONFIG).is_file():
        facts["mean"], facts["std"] = map(list, read_statistics(config, folder))
    return facts


def describe_source(config: TeacherConfig) -> str:
    """Names the setting that locates the weights, for error messages."""
    return f"teacher.name={config.name}" if ":" in config.name else f"teacher.weights={config.weights}"


def find_weights_file(config: TeacherConfig, folder: Path | None) -> Path:
    """Returns the path of a teacher's weights.

    Raises:
        UserError: if the file is missing, the folder is incomplete or has settings that are not allowed, or open_clip
            does not know the model name.
    """
    if folder is not None:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"teacher.name={config.name}: {folder} lacks {name} (open_clip's local-dir layout)"
                )
        check_model_config(folder / CONFIG, f"teacher.name={config.name}")
        return folder / WEIGHTS
    import open_clip  # imported late: a run with cached views does not need it

    known = open_clip.list_models()
    if config.name not in known:
        near = difflib.get_close_matches(config.name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        if Path(config.name).is_dir():
            hint = f"a folder is given as local-dir:{config.name}"
        raise UserError(f"teacher.name={config.name}: not an open_clip model; {hint}")
    weights = Path(str(config.weights))
    if not weights.is_file():
        raise UserError(f"teacher.weights={weights}: no such file")
    return weights


def read_statistics(
    config: TeacherConfig, folder: Path | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Reads mean and standard deviation of the teacher's pixels from the settings, or from its folder.

    Raises:
        UserError: if one of them is missing or invalid.
    """
    stated: dict[str, Any]
    if folder is None:
        source, stated = "teacher", {"mean": config.mean, "std": config.std}
    else:
        source = f"teacher.name={config.name}: preprocess_cfg in {CONFIG}"
        try:
            stated = dict(read_json(folder / CONFIG)["preprocess_cfg"])
        except (ValueError, KeyError, TypeError):
            stated = {}
    numbers = []
    for key in ("mean", "std"):
        if stated.get(key) is None:
            raise UserError(f"{source} does not state {key}; add it")
        try:
            values = tuple(float(x) for x in stated[key])
        except (TypeError, ValueError):
            values = ()
        if len(values) != 3 or not all(abs(x) < 1e6 for x in values) or (key == "std" and min(values) <= 0):
            required = "positive numbers" if key == "std" else "numbers"
            raise UserError(f"{source}: {key} is {json.dumps(stated[key])}; give three {required}")
        numbers.append(values)
    return numbers[0], numbers[1]


def read_model_config(config: TeacherConfig) -> dict[str, Any] | None:
    """Reads open_clip's `model_cfg` of a teacher; None if the file that holds it cannot be found."""
    folder = find_local_folder(config)
    if folder is not None:
        path = folder / CONFIG
    else:
        package = util.find_spec("open_clip")  # locates the package without importing it
        if package is None or package.origin is None:
            return None
        path = Path(package.origin).parent / "model_configs" / f"{config.name.replace('/', '-')}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    return content.get("model_cfg", content)
