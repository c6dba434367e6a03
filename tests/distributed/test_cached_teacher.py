"""Runs from cached views on real ranks: equal for any number of them, without the teacher, resumed as they began."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from inputs import teach_options
from ranks import TINY, largest_difference, losses, run_ranks

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.cli.main import run


@pytest.fixture(scope="module")
def without_teacher(
    tiny_data: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Settings of a cached run, whose teacher is gone since it taught."""
    folder = tmp_path_factory.mktemp("without")
    shutil.copytree(tiny_data / "train", folder / "data")
    shutil.copytree(tiny_teacher, folder / "teacher")
    assert run(["teach", str(folder / "data"), *teach_options(folder / "teacher")]) == 0
    shutil.rmtree(folder / "teacher")
    return [
        *TINY,
        "run.name=run",
        "run.save_every=2",
        "run.trace=true",
        f"data.path={folder / 'data'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{folder / 'teacher'}",
        "teacher.source=cache",
        "batch.micro_batch=6",
    ]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def traced(folder: Path) -> dict[int, list[int]]:
    """Slot -> checksums of its views, caption and masks; after a resume the later line of a step counts."""
    found = {}
    for path in (folder / "trace").iterdir():
        for line in map(json.loads, path.read_text().splitlines()):
            found.update(zip(line["slots"], line["sums"]))
    return found


def test_ranks_and_restarts_change_nothing_and_no_teacher_is_needed(
    without_teacher: list[str], tmp_path: Path
) -> None:
    # A constant learning rate, which does not notice that the first part stops early.
    settings = [*without_teacher, "optim.min_lr=1e-4", "optim.blr=1.0666666666666667e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_ranks([*settings, f"run.dir={one}", "run.max_steps=6"], world_size=1) == [0]
    # Two ranks, then one with a loader process and another ZeRO stage.
    assert run_ranks([*settings, f"run.dir={two}", "run.max_steps=4"], world_size=2) == [0, 0]
    other = ["data.workers=1", "zero.stage=3"]
    assert run_ranks([*settings, *other, f"run.dir={two}", "run.max_steps=6"], world_size=1) == [0]
    assert largest_difference(losses(one / "run"), losses(two / "run")) < 1e-5
    assert traced(two / "run") == traced(one / "run")
    assert all(line[1] > 0 and line[2] > 0 for line in losses(one / "run").values())
    starts = [event for event in events(two / "run") if event["event"] == "start"]
    assert [event["teacher"] for event in starts] == ["cache", "cache"]
    teacher = list_complete_checkpoints(two / "run" / "checkpoints")[-1].info["teacher"]
    assert teacher["source"] == "cache"
    assert teacher["views"][0].startswith("views-")
    assert (
        f"3 cached views of each picture ({teacher['views'][0]})"
        in (two / "run" / "logs" / "rank0.log").read_text()
    )


def test_a_cached_run_resumes_neither_live_nor_with_other_views(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_data, tmp_path / "data")
    settings = [
        *TINY,
        f"run.dir={tmp_path}",
        "run.max_steps=1",
        "optim.warmup_steps=0",
        f"data.path={tmp_path / 'data'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{tiny_teacher}",
        "batch.micro_batch=24",
    ]
    cached, live = [*settings, "teacher.source=cache", "run.name=cached"], [*settings, "run.name=live"]
    assert run_ranks(cached, world_size=1) == [0]
    assert run_ranks(live, world_size=1) == [0]
    starts = [event["teacher"] for name in ("cached", "live") for event in events(tmp_path / name)[:1]]
    assert starts == ["cache", "live"]
    says = r"scenes were replayed from views-\w+ \(teacher.source=cache\) and are drawn for a live teacher"
    with pytest.raises(AssertionError, match=says):
        run_ranks([*cached, "teacher.source=live"], world_size=1)
    with pytest.raises(
        AssertionError, match=r"scenes were drawn for a live teacher .* and are replayed from views"
    ):
        run_ranks([*live, "teacher.source=cache"], world_size=1)
    # Of two caches that fit, a run resumes with its own; without it the run does not resume.
    own = next((tmp_path / "data").glob("cache/*/views-*"))
    assert run(["teach", str(tmp_path / "data"), *teach_options(tiny_teacher, views=4)]) == 0
    assert run_ranks([*cached, "run.max_steps=2"], world_size=1) == [0]
    shutil.rmtree(own)
    with pytest.raises(
        AssertionError, match=rf"scenes were replayed from {own.name} .* and are replayed from views-"
    ):
        run_ranks([*cached, "run.max_steps=3"], world_size=1)


def test_an_unfinished_cache_is_reported_once_for_all_ranks(
    taught_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_data, tmp_path / "data")
    next((tmp_path / "data").glob("cache/*/views-*/000001.safetensors")).unlink()
    settings = [
        *TINY,
        f"run.dir={tmp_path}",
        "run.max_steps=1",
        "optim.warmup_steps=0",
        f"data.path={tmp_path / 'data'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{tiny_teacher}",
        "teacher.source=cache",
        "batch.micro_batch=12",
    ]
    with pytest.raises(
        AssertionError, match=r"UserError: teacher.source=cache: .* lacks the views of 000001.tar"
    ):
        run_ranks(settings, world_size=2)
