"""One stream for any ranks, kills and restarts: the same samples, crops, captions and masks for every slot."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import TINY, run_ranks

from uniemox_dist.config.load import load_config
from uniemox_dist.models.flops import sample_flops
from uniemox_dist.teacher.flops import read_stated_tower

STEPS, GLOBAL_BATCH = 30, 24


def traced(run: Path) -> dict[int, set[tuple[Any, ...]]]:
    """Slot -> all that was ever noted of it, by any rank in any attempt: key, and checksums of views, text, masks."""
    found: dict[int, set[tuple[Any, ...]]] = {}
    for path in run.glob("trace/rank*.jsonl"):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut by the kill
            for slot, key, sums in zip(line["slots"], line["keys"], line["sums"]):
                found.setdefault(slot, set()).add((key, *sums))
    return found


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether rank 0 has noted down this step in the present attempt or an earlier one."""
    path = run / "trace" / "rank0.jsonl"

    def look() -> bool:
        return path.is_file() and f'{{"step": {step},' in path.read_text()

    return look


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_and_resumed_on_other_ranks_has_the_slots_of_an_uninterrupted_one(
    seed: int, tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = [
        *TINY,
        f"run.dir={tmp_path}",
        f"run.max_steps={STEPS}",
        "run.save_every=2",
        "run.trace=true",
        f"data.sources=[{{path: {tiny_data / 'train'}, repeat: 2}}, {{path: {tiny_data / 'test'}, repeat: 1}}]",
        "data.path=null",
        "data.eval_path=null",
        "data.shuffle_window=8",
        "data.colour_jitter=0.3",
        "data.workers=1",
        f"teacher.name=local-dir:{tiny_teacher}",
    ]
    assert run_ranks([*settings, "run.name=whole", "batch.micro_batch=12"], world_size=1) == [0]
    whole = traced(tmp_path / "whole")
    assert sorted(whole) == list(range(STEPS * GLOBAL_BATCH))
    assert all(len(noted) == 1 for noted in whole.values())
    assert len(next(iter(whole[0]))) == 6  # key, scene, person, text, two masks

    run, dice = tmp_path / "pieces", random.Random(seed)
    step = 0
    for ranks, micro_batch in ((4, 3), (2, 6), (3, 8)):
        step += dice.randint(3, 7)
        run_ranks(
            [*settings, "run.name=pieces", f"batch.micro_batch={micro_batch}"],
            world_size=ranks,
            kill_when=reached(run, step),
        )
        assert 0 < len(traced(run)) < STEPS * GLOBAL_BATCH
    assert run_ranks([*settings, "run.name=pieces", "batch.micro_batch=6"], world_size=4) == [0] * 4
    assert traced(run) == whole
    resumed = [
        json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"resume"' in line
    ]
    assert [event["ranks"] for event in resumed] == [4, 2, 3]  # those of the checkpoints
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # 60 samples seen twice and 20 once: 12 streams as 10 and 2 (120 : 20 would be 10.3 : 1.7).
    assert lines[-1]["source_samples"] == [STEPS * GLOBAL_BATCH * share // 12 for share in (10, 2)]
    assert {"data_wait_share_max", "bytes_read_per_rank", "read_retries"} <= lines[-1].keys()
    config = load_config("demo", settings)
    width, tower = read_stated_tower(config.teacher) or (0, None)
    expected = sample_flops(config, width, tower or 0).training
    assert 4e12 * lines[-1]["tflops_per_s"] / lines[-1]["samples_per_s"] == pytest.approx(expected, rel=0.01)
