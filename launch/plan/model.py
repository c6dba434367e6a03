"""Parameters and FLOPs of a run's model and its teacher, computed from the settings without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.sources.layouts.emotic import CATEGORIES
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.models.flops import Flops, classifier_flops, sample_flops, tower_flops
from uniemox_dist.models.parameters import Parameter, classifier_parameters, student_parameters
from uniemox_dist.teacher.flops import read_stated_tower
from uniemox_dist.teacher.identity import read_model_config

EMBEDDING_WIDTH = 512
"""Embedding width assumed for a teacher without a configuration file: that of CLIP ViT-B."""
ASSUMED_LABELS = 8
"""Assumed for a classifier without data; a label costs one number per feature."""
PARTS = ("encoder", "to_decoder", "fusion", "decoder", "head")
"""Parts of a student or classifier: the first components of their parameters' names."""


@dataclass(frozen=True)
class Tower:
    """A teacher's picture tower."""

    embedding_width: int | None
    """E; None if no loss uses a teacher."""
    flops: int = 0
    """FLOPs of one picture."""
    parameters: int = 0
    image_size: int = 0
    tokens: int = 0
    width: int = 0
    hidden: int = 0
    remark: str = ""
    """Assumptions made, in words."""


def list_trained_parameters(config: Config, tower: Tower, labels: int | None = None) -> tuple[Parameter, ...]:
    """The parameters of the run's student, or of its classifier with so many labels."""
    if not isinstance(config, FinetuneRun):
        return student_parameters(config.model, config.loss, tower.embedding_width)
    settings = config.finetune
    outputs = count_outputs(config, labels)
    return classifier_parameters(config.model, outputs, persons=settings.persons, pooling=settings.pooling)


def run_flops(config: Config, tower: Tower, labels: int | None = None) -> Flops:
    """FLOPs of one sample."""
    if not isinstance(config, FinetuneRun):
        return sample_flops(config, tower.embedding_width, tower.flops)
    return classifier_flops(config.model, 2 if config.finetune.persons else 1, count_outputs(config, labels))


def count_outputs(config: FinetuneRun, labels: int | None = None) -> int:
    """Number of outputs of a classifier: its labels, as stated or assumed, and the dimensions."""
    settings = config.finetune
    multi = settings.task == "multi"
    if settings.target == "dimensions":
        return len(settings.learned_dimensions)
    count = labels or len(settings.labels) or (len(CATEGORIES) if multi else ASSUMED_LABELS)
    return count + len(settings.learned_dimensions)


def count_numbers(parameters: Sequence[Parameter], part: str) -> int:
    """Number of trained values of one part."""
    return sum(p.numbers for p in parameters if p.trained and p.name.startswith(f"{part}."))


def read_tower(config: Config) -> Tower:
    """Reads the teacher of a run: always its embedding width, the rest only if the tower runs in each step."""
    if not config.loss.needs_teacher:
        return Tower(None)
    stated = read_stated_tower(config.teacher)
    width = stated[0] if stated else EMBEDDING_WIDTH
    unknown = f"{config.teacher.name} has no configuration file here: "
    if config.teacher.source == "cache":
        return Tower(width, remark="" if stated else f"{unknown}an embedding width of {width} is assumed")
    if stated is None:
        return _make_tower({}, width, f"{unknown}CLIP ViT-B/16 is assumed")
    if stated[1] is None:
        away = "no plain vision transformer; memory and FLOPs of its tower are left out"
        return Tower(width, remark=f"{config.teacher.name}: {away}")
    return _make_tower((read_model_config(config.teacher) or {}).get("vision_cfg", {}), width, "")


def _make_tower(vision: dict[str, Any], embedding_width: int, remark: str) -> Tower:
    """A CLIP vision transformer (open_clip's defaults), with norms before and after its blocks."""
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    width, layers, ratio = (
        vision.get("width", 768),
        vision.get("layers", 12),
        vision.get("mlp_ratio", 4.0),
    )
    hidden = int(width * ratio)
    patches = (size // patch) ** 2
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    around = 3 * patch**2 * width + width + (1 + patches) * width + 4 * width + width * embedding_width
    flops = tower_flops(
        image_size=size,
        patch_size=patch,
        width=width,
        layers=layers,
        mlp_ratio=ratio,
        embedding_width=embedding_width,
    )
    return Tower(embedding_width, flops, around + layers * block, size, 1 + patches, width, hidden, remark)
