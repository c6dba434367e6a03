"""Checkpoints: their size, how long they take, how often to write them, and how early a job must be signalled."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launch.plan.pace import Measured, read_measured_pace, read_run
from launch.plan.saving import (
    EXCHANGES_S,
    HEADER_BYTES,
    STEP_S,
    CheckpointSize,
    SaveTime,
    advise_interval,
    checkpoint_size,
    estimate_save,
    signal_lead,
)
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.parameters import Parameter
from uniemox_dist.runs.folder import RunFolder

PARAMETERS = (
    Parameter("encoder.cls_token", (1, 1, 10)),
    Parameter("encoder.pos_embed", (1, 5, 10), trained=False),
    Parameter("decoder.weight", (30, 3)),
)
"""100 trained numbers, 10 of them the encoder's, and 50 fixed ones."""


def test_a_checkpoint_holds_weights_and_moments_and_the_encoders_average() -> None:
    one = checkpoint_size(load_config("demo"), PARAMETERS, ranks=1)
    assert one.total == 4 * (3 * 100 + 50) + 6 * HEADER_BYTES
    assert one.per_rank == one.total - 4 * 50  # the fixed ones are rank 0's
    assert one.kept == 3 * one.total  # the demo keeps 2, and one is being written
    averaged = checkpoint_size(load_config("demo", ["optim.ema_decay=0.999"]), PARAMETERS, ranks=1)
    assert averaged.total == one.total + 4 * 10 + HEADER_BYTES
    kept = checkpoint_size(load_config("demo", ["run.keep_every=300"]), PARAMETERS, ranks=1, max_steps=1000)
    assert kept.kept == (3 + 3) * one.total  # steps 300, 600 and 900


def test_a_save_at_a_stated_speed() -> None:
    size = CheckpointSize(total=4_000_000_000, per_rank=1_200_000_000, kept=0)
    save = estimate_save(size, 2.0)
    assert save.waits_s == pytest.approx(1.2 / 2.1 + EXCHANGES_S)
    assert save.seconds == pytest.approx(1.2 / 2.1 + EXCHANGES_S + 4 / 2 + 1.2 / 1.2)
    assert "assumed" not in save.source
    assert "assumed" in estimate_save(size).source


def test_the_interval_is_dalys() -> None:
    """A save holds steps up for 2 s; 10 nodes that each fail every 1,000 h fail together every 100 h."""
    advice = advise_interval(
        SaveTime(2.0, 20.0, ""), step_s=4.0, nodes=10, node_mtbf_h=1000, save_every=1000, max_steps=10**6
    )
    assert advice.job_mtbf_s == 360_000
    assert advice.seconds == pytest.approx(math.sqrt(2 * 2 * 360_000) - 2) == 1198.0
    assert advice.steps == 300  # 299.5
    assert advice.lost_share == pytest.approx(2 / 1200 + (600 + 20) / 360_000)
    assert advice.lost_share_now == pytest.approx(2 / 4000 + (2000 + 20) / 360_000)
    often = advise_interval(
        SaveTime(0.001, 50.0, ""), step_s=4.0, nodes=10, node_mtbf_h=1, save_every=1, max_steps=10**6
    )
    assert often.seconds == 50.0  # no shorter than a save, of which one is under way at a time
    short = advise_interval(
        SaveTime(2.0, 20.0, ""), step_s=4.0, nodes=10, node_mtbf_h=1000, save_every=1000, max_steps=200
    )
    assert (short.steps, short.seconds) == (200, 800.0)  # no longer than the run


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "earlier")
    folder.path.mkdir(parents=True)
    write(
        folder.metrics,
        [
            {"step": 10 * i, "slots": 960 * i, "samples_per_s": rate, "mfu": 0.25}
            for i, rate in enumerate((40, 48, 60), 1)
        ],
    )
    saves = [{"event": "save", "seconds": s, "blocked_s": 0.5} for s in (7.0, 3.0)]
    write(folder.events, [{"event": "start", "ranks": 8}, *saves])
    return folder


def test_an_earlier_run_gives_pace_and_saves(run: RunFolder) -> None:
    assert read_measured_pace(run) == Measured(
        samples_per_s=48, step_s=2.0, mfu=0.25, tflops_per_s=None, ranks=8, save_s=7.0, waits_s=0.5
    )
    assert read_run(run.path).samples_per_s == 48


def test_a_run_without_a_pace_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--from-run=.*: no such folder; give run\.dir/run\.name"):
        read_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no config\.yaml and no events\.jsonl"):
        read_run(tmp_path)
    run.metrics.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(UserError, match="no line with samples_per_s; let the run log one"):
        read_run(run.path)


def test_the_lead_is_two_saves_and_a_step(run: RunFolder) -> None:
    config = load_config("demo")
    lead = signal_lead(config, run)
    assert lead.seconds == float(lead) == 2 * 7.0 + 2.0
    assert lead.source == "2 x the longest of the last saves measured, 7 s, plus a step measured, 2 s"


def test_without_a_run_the_lead_is_estimated_from_the_checkpoint(tmp_path: Path) -> None:
    config = load_config("demo")
    slow, fast = (
        signal_lead(config, None, ranks=2, disk_gb_s=speed, step_s=1.0).seconds for speed in (0.01, 10)
    )
    assert slow > 4.0 > fast > 1.0  # 20 MB at 10 MB/s, twice
    unmeasured = signal_lead(config, RunFolder(tmp_path / "new"))
    assert unmeasured.seconds > STEP_S
    assert "30 s for a step that was not measured" in unmeasured.source
    assert "assumed (set it with --disk)" in unmeasured.source
