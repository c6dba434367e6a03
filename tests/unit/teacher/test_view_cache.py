"""Cached views hold the teacher's embeddings of exactly their pixels, for their own pictures and settings only."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import start_fork
from inputs import make_teacher, teach_options
from safetensors.torch import load_file, save_file

from shards.format.index import index_path, read_index, rows_sha256, write_index
from shards.format.manifest import Manifest, read_manifest
from uniemox_dist.cli.main import run
from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import Fault
from uniemox_dist.core.files import sha256_file
from uniemox_dist.data.crops import plan_cached_scene
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import allocate_views, render
from uniemox_dist.teacher.cache_files import read_metadata
from uniemox_dist.teacher.identity import TeacherFacts
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.view_builder import BuildResult, build
from uniemox_dist.teacher.view_cache import ViewCache, ViewSpec, is_current, read_description

FP16 = 2.0**-11
"""Largest error of a number below 1 in fp16, rounded to nearest."""


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path) -> Path:
    """60 pictures in 3 shards, without a cache."""
    shutil.copytree(tiny_data / "train", tmp_path / "data")
    return tmp_path / "data"


def views(teacher: Teacher, **changes: Any) -> ViewSpec:
    made = ViewSpec(teacher.facts, 32, (0.4, 1.0), True, "random", 0.2, count=2, seed=5, precision="fp32")
    return replace(made, **changes)


def make(folder: Path, teacher: Teacher, made: ViewSpec | None = None, **options: Any) -> BuildResult:
    reader = ShardReader.from_folder(folder, "DIR")
    return build(reader, teacher, made or views(teacher), **{"batch": 32, "workers": 0, **options})


@pytest.fixture(scope="module")
def made_folder(tiny_data: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `folder` with a finished cache. No test writes into it."""
    made = tmp_path_factory.mktemp("made") / "data"
    shutil.copytree(tiny_data / "train", made)
    assert (built := make(made, teacher)).embedded == 120
    assert (built.pictures, built.unreadable) == (60, [])
    return made


@pytest.fixture
def cached(made_folder: Path, tmp_path: Path) -> Path:
    """A copy of `made_folder`."""
    return shutil.copytree(made_folder, tmp_path / "data")


Content = dict[str, tuple[dict[str, str], dict[str, torch.Tensor]]]


def files(folder: Path) -> Content:
    """Metadata and tensors of each shard's file (their order within a file is not fixed)."""

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in load_file(path).items()}  # not mapped: tests cut files

    paths = folder.glob("cache/*/views-*/*.safetensors")
    return {path.name: (read_metadata(path) or {}, tensors(path)) for path in paths}


def assert_equal(a: Content, b: Content, *, largest: float = 0.0) -> None:
    """Equal views of equal pictures; embeddings may differ by `largest`."""
    assert a.keys() == b.keys()
    for name, (metadata, tensors) in a.items():
        assert metadata == b[name][0]
        assert tensors.keys() == b[name][1].keys()
        for key, tensor in tensors.items():
            if key != "embedding":
                assert torch.equal(tensor, b[name][1][key]), key
        difference = tensors["embedding"].float() - b[name][1]["embedding"].float()
        assert difference.abs().max() <= largest


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/*/views-*/*.safetensors")}


def damage(folder: Path, shard: int, row: int) -> str:
    """Turns some bytes of a picture over; returns its key."""
    name = read_manifest(folder).shards[shard].name
    index = read_index(index_path(folder, name))
    data = bytearray((folder / name).read_bytes())
    data[index["image_offset"][row].as_py() + 40] ^= 255
    (folder / name).write_bytes(data)
    return str(index["key"][row].as_py())


def test_each_embedding_is_that_of_the_view_as_drawn(made_folder: Path, teacher: Teacher) -> None:
    made = views(teacher)
    reader = ShardReader.from_folder(made_folder, "DIR")
    cache = ViewCache(reader, made)
    seen = set()
    for shard, entry in enumerate(reader.manifest.shards):
        for row in range(entry.samples):
            raw = reader.read(shard, row)
            size = raw.width, raw.height
            for number in range(2):
                found = cache.view(shard, row, number)
                assert found.plan == plan_cached_scene(*size, made.settings, 5, raw.image_sha256, number)
                scene = allocate_views(1, 32)
                render(raw.image, size, found.plan, scene[0], None)
                expected = teacher.embed_pictures(scene)[0]
                assert (found.picture_E.float() - expected).abs().max() < FP16
                seen.add(found.plan.scene)
    assert len(seen) == 120


def test_the_cache_describes_itself(folder: Path, teacher: Teacher) -> None:
    made = views(teacher)
    built = make(folder, teacher)
    reader = ShardReader.from_folder(folder, "DIR")
    path = made.folder(reader) / "views.json"
    assert path == folder / "cache" / teacher.id / made.id / "views.json"
    assert read_description(path) == (made, reader.manifest.identity)
    record = json.loads(path.read_text())
    assert (record["format"], record["format_version"]) == ("uniemox-views", 1)
    assert record["teacher"]["identity"]["mean"] == [0.5, 0.4, 0.3]
    assert record["teacher"]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-3)
    assert record["views"]["background"] == "random"
    assert (record["views_per_picture"], record["seed"], record["precision"]) == (2, 5, "fp32")
    tensors = load_file(made.folder(reader) / "000000.safetensors")
    rows = reader.manifest.shards[0].samples
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "embedding": ((rows, 2, 32), torch.half),
        "box": ((rows, 2, 4), torch.int32),
        "scale": ((rows, 2), torch.uint8),
        "mirror": ((rows, 2), torch.bool),
        "background": ((rows, 2, 3), torch.uint8),
        "jitter": ((rows, 2, 3), torch.float64),
        "valid": ((rows,), torch.bool),
    }
    stated = 2 * (2 * 32 + 21 + 24) + 1  # as docs/teacher_cache.md has it
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stated * rows
    assert built.bytes - stated * 60 < 3 * 1500  # headers


def test_loader_processes_and_batches_change_no_view(
    folder: Path, made_folder: Path, teacher: Teacher
) -> None:
    whole = files(made_folder)
    for options, largest in (({"workers": 1}, 0.0), ({"workers": 2}, 0.0), ({"batch": 1}, 2 * FP16)):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        make(folder, teacher, **options)
        assert_equal(files(folder), whole, largest=largest)


def test_finished_files_are_kept_and_others_made_again(cached: Path, teacher: Teacher) -> None:
    folder = cached
    before, content = times(folder), files(folder)
    assert make(folder, teacher).embedded == 0
    assert times(folder) == before
    cache = views(teacher).folder(ShardReader.from_folder(folder, "DIR"))
    (cache / "000000.safetensors").write_bytes(b"cut")
    (cache / "000002.safetensors").unlink()
    rows = [shard.samples for shard in read_manifest(folder).shards]
    assert make(folder, teacher).embedded == 2 * (rows[0] + rows[2])
    assert_equal(files(folder), content)
    assert times(folder)["000001.safetensors"] == before["000001.safetensors"]


def test_other_settings_and_teachers_have_other_caches(
    folder: Path, teacher: Teacher, tmp_path: Path
) -> None:
    made = views(teacher)
    changes: list[dict[str, Any]] = [
        {"image_size": 40},
        {"scene_scale": (0.3, 1.0)},
        {"flip": False},
        {"background": "white"},
        {"colour_jitter": 0.0},
        {"resize": "bilinear"},
        {"count": 3},
        {"seed": 6},
        {"precision": "bf16"},
    ]
    other = Teacher(TeacherConfig(name=f"local-dir:{make_teacher(tmp_path / 'other', seed=1)}"))
    identity = {**teacher.identity, "mean": [0.5, 0.4, 0.2]}
    facts = [other.facts, replace(teacher.facts, identity=identity)]
    all_of_them = [made, *(replace(made, **c) for c in changes), *(replace(made, facts=f) for f in facts)]
    reader = ShardReader.from_folder(folder, "DIR")
    assert len({one.folder(reader) for one in all_of_them}) == len(all_of_them)
    assert len({one.sha256 for one in all_of_them}) == len(all_of_them)
    # The same weights in another folder are the same teacher.
    moved = replace(teacher.facts, identity={**teacher.identity, "name": "local-dir:elsewhere"})
    assert replace(made, facts=moved).folder(reader) == made.folder(reader)


def test_views_by_the_bicubic_filter_keep_the_name_they_had_before_there_was_another(
    cached: Path, teacher: Teacher
) -> None:
    identity = {"name": "x", "weights_sha256": "0" * 64, "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    facts = TeacherFacts({**identity, "activation": "gelu", "embedding_width": 8}, 8, 14.0)
    assert views(teacher, facts=facts).id == "views-b4376d0b71d6d4dd"
    # A description that does not state the filter is one of bicubic views.
    path = views(teacher).folder(ShardReader.from_folder(cached, "DIR")) / "views.json"
    record = json.loads(path.read_text())
    assert record["views"].pop("resize") == "bicubic"
    path.write_text(json.dumps(record))
    assert read_description(path)[0] == views(teacher)
    assert make(cached, teacher).embedded == 0


def test_views_by_the_bilinear_filter_are_drawn_and_replayed_by_it(folder: Path, teacher: Teacher) -> None:
    spec = views(teacher, resize="bilinear")
    make(folder, teacher, spec)
    reader = ShardReader.from_folder(folder, "DIR")
    raw = reader.read(0, 4)
    found = ViewCache(reader, spec).view(0, 4, 1)
    assert found.plan.scene.resize == "bilinear"
    scene = allocate_views(2, 32)
    render(raw.image, (raw.width, raw.height), found.plan, scene[0], None)
    bicubic = replace(found.plan, scene=replace(found.plan.scene, resize="bicubic"))
    render(raw.image, (raw.width, raw.height), bicubic, scene[1], None)
    embeddings = teacher.embed_pictures(scene)
    assert not torch.equal(scene[0], scene[1])
    assert (found.picture_E.float() - embeddings[0]).abs().max() < FP16


def test_new_captions_keep_the_views_and_new_pictures_do_not(cached: Path, teacher: Teacher) -> None:
    folder = cached

    def rewrite(shard: int, change: dict[str, Any]) -> None:
        manifest = read_manifest(folder)
        entries = list(manifest.shards)
        index = index_path(folder, entries[shard].name)
        rows = read_index(index).to_pylist()
        rows[3] = {**rows[3], **change}
        write_index(index, rows)
        entries[shard] = replace(
            entries[shard], index_sha256=sha256_file(index), rows_sha256=rows_sha256(rows)
        )
        Manifest(tuple(entries), manifest.provenance).write(folder)

    made = views(teacher)
    before = load_file(made.folder(ShardReader.from_folder(folder, "DIR")) / "000001.safetensors")
    rewrite(1, {"captions": ["another caption"]})
    reader = ShardReader.from_folder(folder, "DIR")
    assert [is_current(reader, made, shard) for shard in range(3)] == [True, False, True]
    assert make(folder, teacher).embedded == 0
    assert [is_current(reader, made, shard) for shard in range(3)] == [True, True, True]
    assert read_description(made.folder(reader) / "views.json")[1] == reader.manifest.identity
    after = load_file(made.folder(reader) / "000001.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    rewrite(2, {"width": 159})
    assert make(folder, teacher).embedded == 2 * reader.manifest.shards[2].samples
    assert make(folder, teacher).unreadable == [f"{reader.manifest.shards[2].name}: row 3: marked before"]


def test_a_picture_that_cannot_be_read_is_marked_and_named(
    folder: Path, tiny_teacher: Path, teacher: Teacher, capfd: pytest.CaptureFixture[str]
) -> None:
    key = damage(folder, 1, 7)
    assert run(["teach", str(folder), *teach_options(tiny_teacher, views=2)]) == 0
    says = capfd.readouterr()
    assert "120 views of 60 pictures embedded" in says.out
    assert "1 pictures are unreadable and marked in the cache:" in says.err
    assert f"000001.tar: {key}: bytes differ from the index" in says.err
    made = views(teacher, background="white", colour_jitter=0.0, seed=0)
    reader = ShardReader.from_folder(folder, "DIR")
    tensors = load_file(made.folder(reader) / "000001.safetensors")
    assert (~tensors["valid"]).nonzero().flatten().tolist() == [7]
    assert not tensors["embedding"][7].any()
    cache = ViewCache(reader, made)
    with pytest.raises(ValueError, match="was unreadable when its views were drawn"):
        cache.view(1, 7, 0)
    assert cache.view(1, 8, 1).picture_E.shape == (32,)


def test_parts_and_ranks_share_the_shards_and_give_the_same_files(
    folder: Path,
    tiny_teacher: Path,
    taught_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = ["teach", str(folder), *teach_options(tiny_teacher)]
    whole = files(taught_data)
    for part in ("1/2", "2/2"):
        assert run([*options, "--part", part]) == 0
    assert_equal(files(folder), whole)
    shutil.rmtree(folder / "cache")
    capfd.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert run([*options, "--part", "1/2"]) == 0
        assert f" in 1 of 3 shards of {folder}" in capfd.readouterr().out
    assert len(times(folder)) == 2
    monkeypatch.delenv("WORLD_SIZE")
    assert run(options) == 0
    assert_equal(files(folder), whole)


def test_a_killed_teach_leaves_complete_files_and_continues(
    folder: Path, tiny_teacher: Path, taught_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["teach", str(folder), *teach_options(tiny_teacher), "--batch", "3"]
    options[options.index("--workers") + 1] = "1"
    process = start_fork(run, options)
    deadline = time.monotonic() + 120
    while not times(folder) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    before = times(folder)
    assert before
    assert run(options) == 0
    assert f"{sum(_rows(folder)) * 3} views of 60 pictures embedded" not in capfd.readouterr().out
    after = times(folder)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert_equal(files(folder), files(taught_data), largest=2 * FP16)


def _rows(folder: Path) -> list[int]:
    return [shard.samples for shard in read_manifest(folder).shards]


@pytest.mark.parametrize("kind", ["cut", "zero", "missing", "box", "valid", "jitter"])
def test_a_damaged_cache_is_a_one_line_error(kind: str, cached: Path, teacher: Teacher) -> None:
    folder = cached
    content = files(folder)
    reader = ShardReader.from_folder(folder, "DIR")
    made = views(teacher)
    path = made.folder(reader) / "000001.safetensors"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "missing":
        path.unlink()
    else:
        metadata, tensors = content[path.name]
        damaged = {key: tensor.clone() for key, tensor in tensors.items()}
        damaged["embedding" if kind == "zero" else kind][2].zero_()
        save_file(damaged, path, metadata)
    with pytest.raises(Fault, match=f"^{path}: ") as error:
        ViewCache(reader, made).view(1, 2, 1)
    assert len(str(error.value).splitlines()) == 1
    if kind == "zero":
        assert str(error.value).endswith(
            "the embedding is not a unit vector, so the file is damaged; delete it"
        )
        path.unlink()
    else:
        assert "run the same `uniemox teach` again, which rebuilds it" in str(error.value)
    assert make(folder, teacher).embedded == 2 * reader.manifest.shards[1].samples
    assert_equal(files(folder), content)


def test_a_killed_loader_process_is_a_one_line_error(folder: Path, teacher: Teacher) -> None:
    killed = teacher.embed_pictures

    class Killing:
        device, facts = teacher.device, teacher.facts

        def embed_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
            import multiprocessing

            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.3)
            return killed(pixels)

    with pytest.raises(Fault, match=r"DataLoader worker .* run the command again to continue"):
        make(folder, Killing(), views(teacher), workers=1, batch=2)  # type: ignore[arg-type]
    assert make(folder, teacher).embedded == 120
