"""FLOPs of a teacher's picture tower: from its configuration file without torch, or from its modules."""

import logging
from importlib import resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.files import read_json
from uniemox_dist.models.flops import tower_flops

if TYPE_CHECKING:
    from torch import nn

    from uniemox_dist.teacher.model import Teacher

log = logging.getLogger("uniemox")


def stated_tower(config: TeacherConfig) -> tuple[int, int | None] | None:
    """Embedding width, and FLOPs of one picture, of the teacher that the settings name; torch is not imported.

    FLOPs are None for a tower that is no plain vision transformer: only its modules know. None altogether where
    the file that describes the model cannot be found.
    """
    model = model_config(config.name)
    if model is None:
        return None
    vision, embedding_width = model["vision_cfg"], int(model["embed_dim"])
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    layers = vision.get("layers", 12)
    plain = all(isinstance(x, int) for x in (size, patch, layers))
    if not plain or vision.get("timm_model_name") or vision.get("attentional_pool"):
        return embedding_width, None
    flops = tower_flops(
        image_size=size,
        patch_size=patch,
        width=vision.get("width", 768),
        layers=layers,
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        embedding_width=embedding_width,
    )
    return embedding_width, flops


def count_tower(visual: "nn.Module", size: int) -> int:
    """FLOPs of one picture, size × size pixels, through any tower: counted once on the meta device, where nothing is
    computed and no weight is copied.

    Raises:
        Exception: of many types, if the tower does what the meta device cannot.
    """
    import torch
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    named = [*visual.named_parameters(), *visual.named_buffers()]
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    dtype = next(visual.parameters()).dtype
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(visual, state, (torch.empty(1, 3, size, size, dtype=dtype, device="meta"),))
    return int(counter.get_total_flops())


def teacher_flops(teacher: "Teacher | None") -> int:
    """FLOPs of one picture through a teacher's picture tower; 0 without one, or (logged) where none can be counted."""
    if teacher is None:
        return 0
    try:
        return count_tower(teacher.model.visual, teacher.size)
    except Exception as error:  # towers are other people's code: what they raise on meta is theirs
        reason = " ".join(str(error).split())[:200]
        log.warning("FLOPs of the teacher are not counted: %s: %s", type(error).__name__, reason)
        return 0


def model_config(name: str) -> dict[str, Any] | None:
    """open_clip's description of a model, `local-dir:PATH`, `shipped:demo` or one of its own."""
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
    elif name == "shipped:demo":
        path = Path(
            str(resources.files("uniemox_dist").joinpath("teacher/demo_teacher/open_clip_config.json"))
        )
    else:
        package = util.find_spec("open_clip")  # finds the folder, imports nothing
        if package is None or package.origin is None:
            return None
        path = Path(package.origin).parent / "model_configs" / f"{name.replace('/', '-')}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    return content.get("model_cfg", content)
