"""A plan's facts about a teacher match the model that open_clip builds."""

import open_clip
import pytest

from launch.plan.model import EMBEDDING_WIDTH, read_tower
from uniemox_dist.config.load import load_config

STATED = ["teacher.weights=x", "teacher.mean=[0.5,0.5,0.5]", "teacher.std=[0.5,0.5,0.5]"]


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-S-16-alt"])
def test_a_towers_parameters_are_counted(name: str) -> None:
    tower = read_tower(load_config("demo", [f"teacher.name={name}", *STATED]))
    visual = open_clip.create_model(name, load_weights=False).visual
    assert tower.parameters == sum(p.numel() for p in visual.parameters())
    assert tower.embedding_width == visual.output_dim
    assert tower.tokens == 1 + (tower.image_size // visual.conv1.kernel_size[0]) ** 2
    assert tower.flops > 0
    assert tower.remark == ""


def test_a_teacher_that_is_missing_is_assumed_and_the_plan_says_so() -> None:
    away = read_tower(load_config("demo", ["teacher.name=local-dir:nowhere"]))
    assert (away.embedding_width, away.tokens) == (EMBEDDING_WIDTH, 197)
    assert "CLIP ViT-B/16 is assumed" in away.remark
    cached = read_tower(load_config("demo", ["teacher.name=local-dir:nowhere", "teacher.source=cache"]))
    assert (cached.parameters, cached.flops) == (0, 0)
    assert "an embedding width of 512 is assumed" in cached.remark
    assert read_tower(load_config("demo", ["loss.relation=0", "loss.similarity=0"])).embedding_width is None
    assert "no plain vision transformer" in read_tower(load_config("demo")).remark
