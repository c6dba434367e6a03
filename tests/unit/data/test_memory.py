"""The memory of loader processes stays constant over time."""

from pathlib import Path

import psutil
import pytest
from inputs import DEMO
from loader_parts import config, dataset

from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.data.sources import estimate_loader_bytes
from uniemox_dist.data.step_batches import StepBatches

EPOCHS = 20


@pytest.mark.slow
def test_resident_size_is_flat_over_twenty_epochs(tmp_path: Path) -> None:
    pack(PackSettings(str(DEMO), "table", persons="none", shard_samples=100), tmp_path / "data")
    of = config(
        tmp_path / "data" / "train", workers=2, global_batch=48, micro_batch=24, streams=12
    ).model_copy(update={"model": config(tmp_path).model.model_copy(update={"image_size": 224})})
    data = dataset(of)
    steps = data.plan.sources[0].samples // 48
    sizes: list[list[int]] = []
    with StepBatches(data, of, first_step=0, pin=False) as batches:
        processes = [psutil.Process(), *(psutil.Process(p.pid) for p in batches._processes)]
        for _ in range(EPOCHS):
            for _ in range(steps):
                batches.next_step()
            sizes.append([process.memory_info().rss - process.memory_info().shared for process in processes])
    # Two epochs to fill what is kept on purpose: open files, rows of indexes, the allocator's own pools.
    after_two, last = sizes[1], sizes[-1]
    for before, now in zip(after_two, last):
        assert now - before < 8 << 20, sizes
    # The numbers printed at a run's start: 4 micro-batches ahead, 2 of a step and one more; and 65,536 rows.
    assert estimate_loader_bytes(of, 1) == (7 * 24 * 2 * 3 * 224 * 224, 65536 * 400)
