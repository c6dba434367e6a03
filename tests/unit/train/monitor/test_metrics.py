"""Computing rates in a line of metrics: useful FLOPs per rank and second, and their share of the peak."""

import json
import logging
from pathlib import Path

import pytest

from uniemox_dist.core.devices import DEVICES, peak_tflops
from uniemox_dist.data.plan import Plan
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.monitor.metrics import Metrics
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.step import StepResult

PARTS = {"relation": 0.1, "similarity": 0.2, "reconstruction": 0.7}
RESULT = StepResult(1.0, PARTS, 1.0, applied=True, stop=False, damaged=0, samples=12)


def line_of(folder: Path, *, peak: float | None, sample_flops: int = 2 * 10**12) -> dict[str, float]:
    """A line of a real meter after one step of 12 samples."""
    run = RunFolder(folder)
    run.create()
    plan = Plan([[60]], [1.0], streams=12, global_batch=12, seed=0, window=8)
    meter = Metrics(
        run,
        Schedule(10, 1, 1.0, 0.0, 60),
        plan,
        World(),
        first_step=0,
        sample_flops=sample_flops,
        peak_tflops=peak,
    )
    meter.add(RESULT, [], 0.0)
    line = meter.write(1, RESULT, lr=0.1)
    meter.close()
    assert json.loads((folder / "metrics.jsonl").read_text()) == line
    return line


def test_useful_flops_follow_from_the_rate_of_samples(tmp_path: Path) -> None:
    line = line_of(tmp_path / "run", peak=None)
    assert line["tflops_per_s"] == pytest.approx(2 * line["samples_per_s"], rel=1e-3)
    assert "mfu" not in line


def test_utilisation_is_their_share_of_the_peak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        line = line_of(tmp_path / "run", peak=10**6)
    assert line["mfu"] == pytest.approx(line["tflops_per_s"] / 10**6, rel=1e-3)
    assert "of peak)  data wait" in caplog.text


def test_tensorboard_gets_both(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = line_of(tmp_path / "run", peak=100.0)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("tflops_per_s", "mfu"):
        assert board.Scalars(f"run/{name}")[0].value == pytest.approx(line[name], rel=1e-6)


@pytest.mark.parametrize(
    ("device", "number_format", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H800 PCIe", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L40", "bf16", 181.0),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peaks_by_torchs_name_of_the_device(device: str, number_format: str, expected: float) -> None:
    assert peak_tflops(device, number_format) == expected


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A40-48Q",
        "NVIDIA Z100",
    ],
)
def test_a_device_that_only_resembles_a_known_one_has_no_peak(device: str) -> None:
    assert peak_tflops(device, "bf16") is None


def test_a_format_that_a_device_lacks_has_no_peak_and_tf32_is_never_below_fp32_by_mistake() -> None:
    assert peak_tflops("Tesla V100-SXM2-16GB", "bf16") is None
    for device in DEVICES:
        bf16, tf32, fp32 = map(device.peak, ("bf16", "tf32", "fp32"))
        if bf16 is not None and tf32 is not None and fp32 is not None:
            assert bf16 > 1.8 * tf32 >= 1.8 * 0.99 * fp32, device.name
