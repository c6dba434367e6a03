"""Runs from cached views use the same slots with the cached scenes; errors name what is missing and the fix."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import make_teacher, teach_options
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.format.index import index_path, read_index
from shards.format.manifest import read_manifest
from uniemox_dist.cli.main import run
from uniemox_dist.config.schema import Config, TeacherConfig
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data.crops import plan_with_cached_scene
from uniemox_dist.data.loader import MicroBatch, PlannedDataset, choose_cached_view, view_settings
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.data.views import allocate_views, render
from uniemox_dist.models import losses
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.text_cache import TextVectors, folder_beside_shards
from uniemox_dist.teacher.view_cache import PLANS_KEY, hash_plans
from uniemox_dist.teacher.view_selection import check_shards, select_views


def config(data: Path | list[Path], teacher: Path, /, *, workers: int = 0, **sections: Any) -> Config:
    """A run whose views `taught_data` has."""
    origins = {"path": str(data)} if isinstance(data, Path) else {"sources": [{"path": str(d)} for d in data]}
    settings: dict[str, Any] = {
        "run": {"max_steps": 1, "seed": 3},
        "data": {**origins, "workers": workers, "scene_scale": (0.4, 1.0), "shuffle_window": 8},
        "batch": {"global_batch": 12, "micro_batch": 6, "streams": 6},
        "model": {"image_size": 32, "patch_size": 8, "width": 32, "heads": 2},
        "teacher": {"name": f"local-dir:{teacher}", "source": "cache"},
    }
    for section, changes in sections.items():
        settings[section] = {**settings.get(section, {}), **changes}
    return Config.model_validate(settings)


def dataset(of: Config, *, cached: bool = True, with_person: bool = True) -> PlannedDataset:
    readers = (sources := Sources(of)).readers
    replay = select_views(of, readers)
    texts = [TextVectors(reader, folder_beside_shards(reader, replay.facts.id)) for reader in readers]
    stored = replay.open(readers) if cached else None
    settings = view_settings(of, with_person=with_person)
    return PlannedDataset(sources, texts, settings, cached_views=stored)


def steps(of: Config, count: int, **options: bool) -> list[MicroBatch]:
    data = dataset(of, **options)
    with StepBatches(data, of, first_step=0, pin=False) as batches:
        return [batch for _ in range(count) for batch in batches.next_step()]


def by_slot(batches: list[MicroBatch], name: str) -> dict[int, Any]:
    return {
        slot: getattr(batch, name)[i] for batch in batches for i, slot in enumerate(batch.slots_B.tolist())
    }


def test_a_slot_shows_the_stored_scene_of_its_epoch_and_all_else_as_with_a_live_teacher(
    taught_data: Path, tiny_teacher: Path
) -> None:
    of = config(taught_data, tiny_teacher)
    cached, live = steps(of, 12), steps(of, 12, cached=False)
    for name in ("keys", "sources", "texts_BE"):
        now, then = by_slot(cached, name), by_slot(live, name)
        assert all(
            torch.equal(now[s], then[s]) if isinstance(now[s], Tensor) else now[s] == then[s] for s in then
        )
    assert all(batch.pictures_BE is None for batch in live)
    data = dataset(of)
    assert data.cached_views is not None
    scenes, pictures = by_slot(cached, "scene_B3HW"), by_slot(cached, "pictures_BE")
    persons = by_slot(cached, "person_B3HW")
    shown: dict[str, list[int]] = {}
    for slot in sorted(scenes):
        place = data.plan.locate(slot)
        raw = data.readers[0].read(place.shard, place.row)
        number = choose_cached_view(3, 3, raw.image_sha256, place.epoch)
        shown.setdefault(raw.key, []).append(number)
        stored = data.cached_views[0].view(place.shard, place.row, number)
        scene = allocate_views(1, 32)
        render(raw.image, (raw.width, raw.height), stored.plan, scene[0], None)
        assert torch.equal(scenes[slot], scene[0])
        assert pictures[slot].dtype == torch.float32
        assert torch.equal(pictures[slot], stored.picture_E.float())
        plan = plan_with_cached_scene(stored.plan, raw.width, raw.height, raw.persons, data.settings, 3, slot)
        person = allocate_views(1, 32)
        render(raw.image, (raw.width, raw.height), plan, scene[0], person[0])
        assert torch.equal(persons[slot], person[0])
    # 144 slots of 60 pictures: each is seen twice or three times, and never twice in one view.
    assert {len(numbers) for numbers in shown.values()} == {2, 3}
    assert all(len(set(numbers)) == len(numbers) for numbers in shown.values())


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_bring_the_same_embeddings(
    workers: int, taught_data: Path, tiny_teacher: Path
) -> None:
    one = steps(config(taught_data, tiny_teacher), 4)
    other = steps(config(taught_data, tiny_teacher, workers=workers), 4)
    for a, b in zip(one, other, strict=True):
        for name in ("slots_B", "scene_B3HW", "person_B3HW", "texts_BE", "pictures_BE"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_relation_and_similarity_are_those_of_the_live_teacher_to_fp16_precision(
    taught_data: Path, tiny_teacher: Path
) -> None:
    teacher = Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    batches = steps(config(taught_data, tiny_teacher), 5)
    texts_GE = torch.cat([batch.texts_BE for batch in batches if batch.texts_BE is not None])
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        assert batch.pictures_BE is not None
        live_BE = teacher.embed_pictures(batch.scene_B3HW)
        assert (batch.pictures_BE - live_BE).abs().max() < 2**-11
        # A student that knows nothing, and one that is nearly there.
        for noise in (1.0, 0.01):
            fused_BE = live_BE + noise * torch.randn(live_BE.shape, generator=generator)
            for form in ("cosine", "kl"):
                now, then = (
                    losses.relation_loss(fused_BE, one, texts_GE, form=form, logit_scale=14.3)
                    for one in (batch.pictures_BE, live_BE)
                )
                assert abs(now - then) < 2**-11
            now, then = (losses.similarity_loss(fused_BE, one) for one in (batch.pictures_BE, live_BE))
            assert abs(now - then) < 2**-11


def test_a_damaged_picture_is_replaced_in_a_cached_run_as_in_a_live_one(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(taught_data, folder)
    name = read_manifest(folder).shards[1].name
    index = read_index(index_path(folder, name))
    data = bytearray((folder / name).read_bytes())
    data[index["image_offset"][4].as_py() + 40] ^= 255
    (folder / name).write_bytes(data)
    of = config(folder, tiny_teacher)
    cached, live = steps(of, 5), steps(of, 5, cached=False)
    assert [batch.damaged for batch in cached] == [batch.damaged for batch in live]
    assert by_slot(cached, "keys") == by_slot(live, "keys")
    assert any(batch.damaged for batch in cached)
    # And so is one that was damaged when it was taught, though it can be read now.
    shutil.copy(taught_data / name, folder / name)
    path = next(folder.glob("cache/*/views-*/000001.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors["valid"][4] = False
    made = select_views(of, Sources(of).readers).specs[0]
    metadata = {**made.metadata(Sources(of).readers[0], 1), PLANS_KEY: hash_plans(tensors)}
    save_file(tensors, path, metadata)
    again = steps(of, 5)
    assert by_slot(again, "keys") == by_slot(cached, "keys")
    key = index["key"][4].as_py()
    lines = [line for batch in again for line in batch.damaged]
    assert lines
    assert all(
        line.endswith(f"000001.tar: {key}: was unreadable when its views were drawn") for line in lines
    )


def test_a_damaged_cache_ends_a_run_in_one_line(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_data, tmp_path / "data")
    of = config(tmp_path / "data", tiny_teacher, workers=1)
    path = next((tmp_path / "data").glob("cache/*/views-*/000001.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Fault, match=f"^{path}: cannot read the cache of views") as error:
        steps(of, 5)
    assert len(str(error.value).splitlines()) == 1


# ---- which cache a run takes


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"image_size": 40}}, "model.image_size is 32 there and 40 here; build the views"),
        ({"data": {"scene_scale": (0.2, 1.0)}}, "data.scene_scale is [0.4, 1.0] there and [0.2, 1.0] here"),
        ({"data": {"flip": False}}, "data.flip is True there and False here"),
        ({"data": {"background": "random"}}, "data.background is white there and random here"),
        ({"data": {"colour_jitter": 0.25}}, "data.colour_jitter is 0.0 there and 0.25 here"),
        ({"data": {"resize": "bilinear"}}, "data.resize is bicubic there and bilinear here"),
        ({"teacher": {"precision": "bf16"}}, "teacher.precision is fp32 there and bf16 here"),
        (
            {"data": {"flip": False}, "model": {"image_size": 40}},
            "model.image_size is 32 there and 40 here; data.flip is True there and False here",
        ),
    ],
)
def test_views_of_other_settings_are_refused_with_the_command_that_makes_the_right_ones(
    taught_data: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    says: str,
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(taught_data, folder)
    sections = {name: {**changes} for name, changes in sections.items()}
    base = {"scene_scale": (0.4, 1.0), "path": str(folder)}
    if "data" in sections:
        sections["data"] = {**base, **sections["data"]}
    of = config(folder, tiny_teacher, **sections)
    with pytest.raises(UserError) as error:
        select_views(of, Sources(of).readers)
    text = str(error.value)
    assert text.startswith(f"teacher.source=cache: {folder}: none of its 1 caches of views matches; views-")
    assert says in text
    # The command is one that works, and then the run has what it asks for.
    command = text.partition("with `")[2].rstrip("`").split()
    assert command[:2] == ["uniemox", "teach"]
    assert run([*command[1:], "--workers", "0"]) == 0
    replay = select_views(of, readers := Sources(of).readers)
    check_shards(of, readers[0], replay.specs[0], range(3))
    assert replay.specs[0].count == 3


def test_another_teacher_is_recognised_by_its_weights_or_its_name(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def refused(teacher: str, **more: Any) -> str:
        of = config(taught_data, tiny_teacher, teacher={"name": teacher, **more})
        with pytest.raises(UserError) as error:
            select_views(of, Sources(of).readers)
        return str(error.value)

    other = make_teacher(tmp_path / "other", seed=1)
    assert "the teacher's weights differ; build" in refused(f"local-dir:{other}")
    assert f"name is local-dir:{tiny_teacher} there and local-dir:/gone here" in refused("local-dir:/gone")
    half = {"weights": str(other / "open_clip_model.safetensors"), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    text = refused("ViT-B-16", **half)
    assert "mean is [0.5, 0.4, 0.3] there and [0.5, 0.5, 0.5] here" in text
    assert f"--weights {other}/open_clip_model.safetensors --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5" in text
    # The same weights in another folder are the same teacher; another folder's pixel statistics are not.
    shutil.copytree(tiny_teacher, tmp_path / "moved")
    of = config(taught_data, tmp_path / "moved")
    assert select_views(of, Sources(of).readers).facts.identity["name"] == f"local-dir:{tiny_teacher}"
    path = tmp_path / "moved" / "open_clip_config.json"
    described = json.loads(path.read_text())
    described["preprocess_cfg"]["mean"] = [0.5, 0.4, 0.2]
    path.write_text(json.dumps(described))
    assert "mean is [0.5, 0.4, 0.3] there and [0.5, 0.4, 0.2] here" in refused(
        f"local-dir:{tmp_path / 'moved'}"
    )


def test_a_run_takes_the_matching_cache_with_most_views_and_keeps_it_on_resume(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(taught_data, folder)
    of = config(folder, tiny_teacher)
    first = select_views(of, Sources(of).readers)
    assert run(["teach", str(folder), *teach_options(tiny_teacher, views=4)]) == 0
    later = select_views(of, Sources(of).readers)
    assert (first.specs[0].count, later.specs[0].count) == (3, 4)
    assert select_views(of, Sources(of).readers, first.ids) == first
    assert str(first) == f"3 cached views of each picture ({first.ids[0]})"


def test_unfinished_shards_are_named_with_the_command_that_completes_them(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(taught_data, folder)
    of = config(folder, tiny_teacher)
    made = select_views(of, (readers := Sources(of).readers)).specs[0]
    check_shards(of, readers[0], made, range(3))
    texts = folder_beside_shards(readers[0], made.facts.id)
    (texts / "000000.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the captions of 000000.tar; complete it with `uniemox teach"):
        check_shards(of, readers[0], made, range(3))
    check_shards(config(folder, tiny_teacher, loss={"relation": 0}), readers[0], made, range(3))
    (made.folder(readers[0]) / "000002.safetensors").write_bytes(b"cut")
    check_shards(of, readers[0], made, [1])
    with pytest.raises(UserError, match=r"lacks the views of 000002.tar.*--precision fp32`"):
        check_shards(of, readers[0], made, [1, 2])
    shutil.rmtree(folder / "cache")
    with pytest.raises(UserError, match=r"has no cached views; build them with `uniemox teach .* --views 8"):
        select_views(of, readers)


def test_views_of_other_pictures_under_the_same_names_are_refused(
    taught_data: Path, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data / "test", tmp_path / "data")
    shutil.copytree(taught_data / "cache", tmp_path / "data" / "cache", dirs_exist_ok=True)
    of = config(tmp_path / "data", tiny_teacher)
    with pytest.raises(
        UserError, match="they are of other pictures, captions or labels than the shards hold"
    ):
        select_views(of, (readers := Sources(of).readers))
    assert run(["teach", str(tmp_path / "data"), *teach_options(tiny_teacher)]) == 0
    check_shards(of, readers[0], select_views(of, readers).specs[0], range(len(readers[0].manifest.shards)))
    assert len(steps(of, 2)) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "uniemox-views", "format_version": 9}'])
def test_an_invalid_description_is_a_one_line_error(
    content: str, taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_data, tmp_path / "data")
    path = next((tmp_path / "data").glob("cache/*/views-*/views.json"))
    path.write_text(content)
    of = config(tmp_path / "data", tiny_teacher)
    with pytest.raises(UserError, match=f"^{path}: describes no cached views") as error:
        select_views(of, Sources(of).readers)
    assert len(str(error.value).splitlines()) == 1


def test_a_mix_replays_a_cache_of_each_source(
    taught_data: Path, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data / "test", tmp_path / "test")
    of = config([taught_data, tmp_path / "test"], tiny_teacher)
    with pytest.raises(UserError, match=f"teacher.source=cache: {tmp_path / 'test'}: has no cached views"):
        select_views(of, Sources(of).readers)
    assert run(["teach", str(tmp_path / "test"), *teach_options(tiny_teacher, views=2)]) == 0
    replay = select_views(of, Sources(of).readers)
    assert [made.count for made in replay.specs] == [3, 2]
    assert str(replay).startswith("2 to 3 cached views of each picture (views-")
    batches = steps(of, 3)
    assert {source for batch in batches for source in batch.sources} == {0, 1}
    assert all(batch.pictures_BE is not None for batch in batches)
