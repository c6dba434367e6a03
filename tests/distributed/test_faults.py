"""Damage in a run's folder, and how the next start handles it."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from ranks import TINY, losses, run_ranks

from shards.format.index import index_path, read_index, write_index
from shards.format.manifest import read_manifest
from uniemox_dist.checkpoints.folders import list_complete_checkpoints


@pytest.fixture
def settings(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> list[str]:
    return [
        *TINY,
        f"run.dir={tmp_path}",
        "run.name=run",
        "run.max_steps=4",
        "run.save_every=1",
        f"data.path={tiny_data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{tiny_teacher}",
        "batch.micro_batch=24",
    ]


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, settings: list[str]
) -> None:
    assert run_ranks(settings, world_size=1) == [0]
    run, before = tmp_path / "run", losses(tmp_path / "run")
    part = run / "checkpoints" / "step_00000004" / "part_00000.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert run_ranks(settings, world_size=1) == [0]
    assert losses(run) == before
    found = events(run)
    assert any(
        "was altered: its SHA-256 differs" in str(e.get("error")) for e in found if e["event"] == "fault"
    )
    assert [e["step"] for e in found if e["event"] == "resume"] == [3]
    newest = list_complete_checkpoints(run / "checkpoints")[-1]
    assert newest.step == 4
    assert newest.problem(hashes=True) is None


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, settings: list[str]) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w") as lock:
        lock.write("node7 pid 1234\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AssertionError, match=r"UserError.*node7 pid 1234 is training here"):
            run_ranks(settings, world_size=1)
    assert run_ranks(settings, world_size=1) == [0]


def test_resuming_with_settings_that_decide_data_or_model_is_refused(
    tmp_path: Path, settings: list[str]
) -> None:
    assert run_ranks(settings, world_size=1) == [0]
    for change, says in (
        ("run.seed=1", "run.seed was 0 and is 1"),
        ("model.depth=3", "model.depth was 2 and is 3"),
        ("data.flip=false", "data.flip was True and is False"),
        ("data.resize=bilinear", "data.resize was bicubic and is bilinear"),
        ("data.verify_hash=false", "data.verify_hash was True and is False"),
    ):
        with pytest.raises(AssertionError, match=says):
            run_ranks([*settings, change], world_size=1)
    assert run_ranks([*settings, "data.workers=1", "zero.stage=2", "run.max_steps=5"], world_size=1) == [0]


def test_a_damaged_picture_is_replaced_and_counted(
    tmp_path: Path, settings: list[str], tiny_data: Path
) -> None:
    shutil.copytree(tiny_data / "train", tmp_path / "data")
    tar = tmp_path / "data" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 255  # inside the first picture, which begins after one header of 512 bytes
    tar.write_bytes(data)
    assert run_ranks([*settings, f"data.path={tmp_path / 'data'}"], world_size=1) == [0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["damaged_samples"] >= 1  # four steps of 24 see each of 60 pictures
    assert any("bytes differ from the index" in str(e.get("damaged")) for e in events(tmp_path / "run"))


def test_too_many_damaged_pictures_end_the_run(tmp_path: Path, settings: list[str], tiny_data: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data / "train", folder)
    for shard in read_manifest(folder).shards:
        data = bytearray((folder / shard.name).read_bytes())
        for offset in read_index(index_path(folder, shard.name))["image_offset"].to_pylist()[::3]:
            data[offset + 50] ^= 255
        (folder / shard.name).write_bytes(data)
    assert run_ranks([*settings, f"data.path={folder}"], world_size=1) == [1]
    says = str(events(tmp_path / "run")[-1]["error"])
    assert "pictures are damaged, more than data.max_bad_share=0.01: 00000" in says
    named = says.partition("=0.01: ")[2].split("; ")
    assert len(named) > 8
    assert len(set(named)) == len(named)
    keys = set(read_index(index_path(folder, "000000.tar"), ["key"])["key"].to_pylist())
    ours = [line for line in named if line.startswith("000000.tar: ")]
    assert ours
    for line in ours:
        tar, key, why = line.split(": ")
        assert (tar, why) == ("000000.tar", "bytes differ from the index")
        assert key in keys


def test_a_precision_that_was_measured_is_kept_when_resuming(tmp_path: Path, settings: list[str]) -> None:
    assert run_ranks([*settings, "optim.precision=bf16", "run.max_steps=2"], world_size=1) == [0]
    assert run_ranks([*settings, "optim.precision=auto", "run.max_steps=3"], world_size=1) == [0]
    assert [e["precision"] for e in events(tmp_path / "run") if e["event"] == "start"] == ["bf16", "bf16"]


def test_a_mix_by_weights_does_not_resume_with_repeats(
    tmp_path: Path, settings: list[str], tiny_data: Path
) -> None:
    def mix(share: str) -> list[str]:
        sources = ", ".join(f"{{path: {tiny_data / name}, {share}: 1}}" for name in ("train", "test"))
        return [*settings, "data.path=null", f"data.sources=[{sources}]"]

    assert run_ranks(mix("weight"), world_size=1) == [0]
    says = "the weights or repeats of data.sources were weight 1, weight 1 and are repeat 1, repeat 1"
    with pytest.raises(AssertionError, match=says):
        run_ranks(mix("repeat"), world_size=1)


def test_missing_held_out_pictures_are_reported_before_the_first_step(
    tmp_path: Path, settings: list[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(AssertionError, match=f"UserError: data.eval_path={nowhere}: no such folder"):
        run_ranks([*settings, f"data.eval_path={nowhere}"], world_size=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_index_that_is_not_the_manifests_ends_the_run(
    tmp_path: Path, settings: list[str], tiny_data: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_data / "train", folder)
    path = index_path(folder, "000001.tar")
    rows = read_index(path).to_pylist()
    write_index(path, rows[::-1])
    with pytest.raises(AssertionError, match=r"000001\.parquet: the index is not the one that was written"):
        run_ranks([*settings, f"data.path={folder}"], world_size=1)
