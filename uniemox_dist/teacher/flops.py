"""FLOPs of a teacher's image tower, from its configuration file without torch or from its modules."""

import logging
from typing import TYPE_CHECKING

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.models.flops import tower_flops
from uniemox_dist.teacher.identity import read_model_config

if TYPE_CHECKING:
    from torch import nn

    from uniemox_dist.teacher.model import Teacher

log = logging.getLogger("uniemox")


def read_stated_tower(config: TeacherConfig) -> tuple[int, int | None] | None:
    """Returns embedding width and FLOPs per picture of a teacher, from its configuration file and without torch.

    FLOPs are None if the tower is not a plain vision transformer, because only its modules can tell. The result is
    None if the configuration file cannot be found.
    """
    model = read_model_config(config)
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


def count_tower_flops(visual: "nn.Module", size: int) -> int:
    """Counts the FLOPs of one picture of size × size pixels through any tower.

    Runs once on the meta device, which computes nothing and copies no weights.

    Raises:
        Exception: of many types, if the tower uses an operation that the meta device does not support.
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


def count_teacher_flops(teacher: "Teacher | None") -> int:
    """Counts the FLOPs of one picture through a teacher's image tower; 0 without a teacher or if counting fails."""
    if teacher is None:
        return 0
    try:
        return count_tower_flops(teacher.model.visual, teacher.size)
    except Exception as error:  # third-party towers raise arbitrary types on the meta device
        reason = " ".join(str(error).split())[:200]
        log.warning("FLOPs of the teacher are not counted: %s: %s", type(error).__name__, reason)
        return 0
