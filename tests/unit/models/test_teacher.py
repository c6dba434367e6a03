"""The teacher sees pixels with its own statistics and size, is frozen, and refuses what does not fit."""

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.models.teacher import Teacher
from uniemox_dist.runtime.errors import UserError


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))


def test_pictures_are_normalised_with_the_teachers_statistics_and_resized_to_its_size(
    teacher: Teacher, tiny_teacher: Path
) -> None:
    assert (teacher.size, teacher.width) == (32, 32)
    pixels = torch.randint(
        0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    small = F.interpolate((pixels / 255 - mean) / std, (32, 32), mode="bicubic", antialias=True)
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    with torch.no_grad():
        expected = model.encode_image(small, normalize=True)
    torch.testing.assert_close(teacher.embed_pictures(pixels), expected, rtol=1e-5, atol=1e-5)


def test_texts_are_unit_rows_of_the_same_space(teacher: Teacher, tiny_teacher: Path) -> None:
    found = teacher.embed_texts(["a cat", ""])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    with torch.no_grad():
        expected = model.encode_text(
            open_clip.get_tokenizer(f"local-dir:{tiny_teacher}")(["a cat", ""]), normalize=True
        )
    torch.testing.assert_close(found, expected)


def test_the_teacher_is_frozen_and_gives_no_gradient(teacher: Teacher) -> None:
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher.embed_pictures(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad


def test_without_its_text_tower_pictures_are_the_same(tiny_teacher: Path) -> None:
    teacher = Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    pixels = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    before = teacher.embed_pictures(pixels)
    total = sum(p.numel() for p in teacher.model.parameters())
    teacher.drop_text_tower()
    assert torch.equal(teacher.embed_pictures(pixels), before)
    assert sum(p.numel() for p in teacher.model.parameters()) < total / 2


@pytest.mark.parametrize("name", ["local-dir:/nowhere", "shipped:other"])
def test_a_folder_that_is_none_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"teacher.name={name}"):
        Teacher(TeacherConfig(name=name))


def test_missing_statistics_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(tiny_teacher, tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["preprocess_cfg"]["std"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not state std"):
        Teacher(TeacherConfig(name=f"local-dir:{tmp_path / 'clip'}"))


def test_an_unknown_open_clip_name_is_refused(tiny_teacher: Path) -> None:
    weights = str(tiny_teacher / "open_clip_model.safetensors")
    statistics = (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="not an open_clip model"):
        Teacher(TeacherConfig(name="ViT-B-61", weights=weights, mean=statistics, std=statistics))


def test_the_shipped_teacher_loads_offline_and_knows_a_heart_from_a_house(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import pyarrow.parquet as pq

    from uniemox_dist.data.views import decode_rgb, whole

    teacher = Teacher(TeacherConfig(name="shipped:demo"))
    assert (teacher.size, teacher.width, teacher.mean) == (80, 128, (0.5, 0.5, 0.5))
    table = pq.read_table(Path(__file__).parents[3] / "shards/demo/fluent_emoji.parquet")
    rows = [
        r
        for r in table.to_pylist()
        if r["caption"].split(":")[0] in ("red heart", "house", "dog face", "pizza")
    ]
    assert len(rows) == 4
    pictures = teacher.embed_pictures(torch.stack([whole(decode_rgb(r["image"]), 80) for r in rows]))
    similarity = pictures @ teacher.embed_texts([r["caption"] for r in rows]).T
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
