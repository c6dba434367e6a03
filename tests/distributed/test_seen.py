"""Samples shown while training on real ranks: the same for any ZeRO stage, and without effect on the run."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import TINY, run_ranks


def settings(tmp_path: Path, data: Path, teacher: Path, name: str) -> list[str]:
    return [
        *TINY,
        f"run.dir={tmp_path}",
        f"run.name={name}",
        "run.max_steps=3",
        "run.pictures_every=2",
        "batch.micro_batch=12",
        f"data.path={data / 'train'}",
        f"data.eval_path={data / 'test'}",
        f"teacher.name=local-dir:{teacher}",
        "model.mask=person",
        "loss.person_reconstruction=true",
    ]


def record(run: Path, step: int) -> Any:
    return json.loads((run / "samples" / f"step_{step:08d}.json").read_text())


def test_ranks_that_shard_the_weights_show_the_same_samples_as_one_rank(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    for name, ranks, stage in (("one", 1, 1), ("two", 2, 3)):
        run = [*settings(tmp_path, tiny_data, tiny_teacher, name), f"zero.stage={stage}"]
        assert run_ranks(run, world_size=ranks) == [0] * ranks
    for step in (2, 3):
        one, two = record(tmp_path / "one", step), record(tmp_path / "two", step)
        assert one["texts"] == 20
        assert len(one["pictures"]) == 8
        for a, b in zip(one["pictures"], two["pictures"]):
            assert a["masked_mse"] == pytest.approx(b["masked_mse"], rel=1e-4)
            assert a["teacher"] == b["teacher"]
            near = [line["cosine"] for line in a["student"]["nearest"]]
            assert near == pytest.approx([line["cosine"] for line in b["student"]["nearest"]], abs=3e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "two" / "tensorboard")).Reload()
    assert [image.step for image in board.Images("reconstructions")] == [2, 3]
    texts = board.Tensors("nearest_texts/text_summary")
    assert [text.step for text in texts] == [2, 3]
    first = record(tmp_path / "two", 2)["pictures"][0]["caption"].split(":")[0]
    assert f"| {first}" in texts[0].tensor_proto.string_val[0].decode()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """The folder for pictures of a run, without room for one."""
    folder = tmp_path / "run" / "samples"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_a_full_disk_costs_the_pictures_and_never_the_run(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, full: Path
) -> None:
    assert run_ranks(settings(tmp_path, tiny_data, tiny_teacher, "run"), world_size=1) == [0]
    assert list(full.iterdir()) == []
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert log.count(f"{full}: No space left on device; training continues without it") == 2
