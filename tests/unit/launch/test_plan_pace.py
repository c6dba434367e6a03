"""Hours, loader cores and the balance of data, worked out by hand."""

from pathlib import Path

import pytest

from launch.plan.data import (
    MS_PER_SAMPLE,
    Spread,
    compute_balance,
    compute_loading,
    count_bytes_in_use,
    describe_balance,
    describe_loading,
    make_stated_data,
    open_data,
)
from launch.plan.pace import ASSUMED_MFU, Measured, find_pace, run_steps
from shards.format.entries import ShardEntry
from shards.format.manifest import Manifest
from uniemox_dist.config.load import load_config
from uniemox_dist.core.devices import find_device
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.flops import Flops

FLOPS = Flops(encoder=10**9, projection=0, decoder=0, fusion=0, relation=0, teacher=10**9, again=0)
"""4 x 10^9 a sample in training."""


def test_a_run_is_as_long_as_its_epochs() -> None:
    config = load_config("demo")  # 24 epochs in steps of 96
    assert run_steps(config, 1000) == 250
    assert run_steps(config, 1001) == 251  # 250.25
    assert run_steps(load_config("demo", ["run.epochs=null", "run.max_steps=7"]), 1000) == 7


def test_a_pace_is_stated_measured_or_assumed() -> None:
    config, h100 = load_config("demo"), find_device("h100", None)
    peak = 989.4e12
    stated = find_pace(config, FLOPS, h100, "bf16", 8, mfu=0.5)
    assert stated is not None
    assert stated.samples_per_s == pytest.approx(0.5 * peak * 8 / 4e9)
    assumed = find_pace(config, FLOPS, h100, "bf16", 8)
    assert assumed is not None
    assert (assumed.assumed, assumed.mfu) == (True, ASSUMED_MFU)
    told = find_pace(config, FLOPS, h100, "bf16", 8, samples_per_s=1000.0)
    assert told is not None
    assert told.mfu == pytest.approx(1000 * 4e9 / 8 / peak)
    earlier = find_pace(config, FLOPS, h100, "bf16", 8, earlier=Measured(samples_per_s=500.0, ranks=2))
    assert earlier is not None
    assert earlier.samples_per_s == 2000.0
    assert earlier.source == "--from-run: 500 samples/s on 2 ranks, in proportion"
    own_peak = load_config("demo", ["compute.peak_tflops=100"])
    found = find_pace(own_peak, FLOPS, find_device("cpu", None), "fp32", 2, mfu=0.4)
    assert found is not None
    assert found.samples_per_s == pytest.approx(0.4 * 1e14 * 2 / 4e9)


def test_without_a_peak_there_is_no_pace() -> None:
    config, cpu = load_config("demo"), find_device("cpu", None)
    assert find_pace(config, FLOPS, cpu, "fp32", 2) is None
    with pytest.raises(
        UserError, match=r"--mfu=0\.3: the peak of cpu in fp32 is not known; set compute\.peak_tflops"
    ):
        find_pace(config, FLOPS, cpu, "fp32", 2, mfu=0.3)


def test_cores_for_a_pace() -> None:
    need = compute_loading(1000.0, per_node=4, ms_per_sample=10.0)
    assert (need.busy, need.workers, need.cores) == (10.0, 3, 16)
    assert compute_loading(1000.0, per_node=4).busy == pytest.approx(MS_PER_SAMPLE)
    demo = load_config("demo")  # one loader process a rank
    assert describe_loading(need, demo, 4, None) == [
        ("warn", "data.workers=1 is too few: loading fills 10.0 cores; set data.workers=3")
    ]
    enough = load_config("demo", ["data.workers=3"])
    assert [status for status, _ in describe_loading(need, enough, 4, 16)] == ["ok", "ok"]
    [_, (status, text)] = describe_loading(need, enough, 4, 9)
    assert status == "warn"
    assert "--cpus-per-node=9 is too few: GPUs would wait for data (50 % of the pace)" in text


def shard(number: int, samples: int, size: int) -> ShardEntry:
    return ShardEntry(f"s{number}.tar", samples, size, *(f"{number}{i}".zfill(64) for i in range(3)))


def test_an_epoch_is_dealt_evenly(tmp_path: Path) -> None:
    """Two shards of 40 samples for 4 streams and 2 ranks: 20 a stream, 40 a rank; one shard is three times as heavy."""
    Manifest((shard(1, 40, 4000), shard(2, 40, 12000)), {}).write(tmp_path)
    pairs = ["batch.streams=4", "batch.global_batch=8", "batch.micro_batch=2", f"data.path={tmp_path}"]
    config = load_config("demo", pairs)
    data = open_data(config)
    assert (data.samples, data.epoch_samples, data.bytes, data.shards) == (80, 80, 16000, 2)
    found = compute_balance(config, data, ranks=2)
    assert found.samples_per_stream == Spread(20, 20, 20)
    assert found.samples_per_rank == Spread(40, 40, 40)
    assert found.bytes_per_rank == Spread(4000, 8000, 12000)
    assert found.shards_per_rank.most == 2  # each of a rank's streams reads of one shard
    assert describe_balance(config, data, found, node_streams=4) == [
        ("ok", "2 shards for 4 streams: several streams read parts of one shard"),
        ("warn", "the rank with most bytes reads 1.50 times the mean"),
    ]
    assert found.shards_at_a_time == 2  # a window of 512 is more than both
    assert count_bytes_in_use(config, data, streams=1) == 16000
    cached = load_config("demo", [*pairs, "data.cache_dir=/cache", "data.cache_gb=1e-6"])
    assert describe_balance(cached, data, found, node_streams=4)[1][1].startswith(
        "data.cache_gb=1e-06 is too small"
    )
    uneven = compute_balance(
        load_config("demo", [*pairs[2:], "batch.streams=3", "batch.global_batch=6"]), data, ranks=1
    )
    assert uneven.samples_per_stream == Spread(26, pytest.approx(80 / 3), 27)


def test_a_mix_is_weighed_as_in_a_run(tmp_path: Path) -> None:
    for name, samples in (("a", 90), ("b", 30)):
        (tmp_path / name).mkdir()
        Manifest((shard(1, samples, 1000),), {}).write(tmp_path / name)
    mix = [{"path": str(tmp_path / "a"), "repeat": 1.0}, {"path": str(tmp_path / "b"), "repeat": 3.0}]
    config = load_config(
        "demo", ["data.path=null", f"data.sources={mix}", "batch.streams=4", "batch.global_batch=8"]
    )
    data = open_data(config)
    assert (data.samples, data.epoch_samples) == (120, 180)
    assert compute_balance(config, data, ranks=1).streams == (2, 2)


def test_few_samples_repeat_within_a_step() -> None:
    config = load_config("demo")
    remarks = describe_balance(config, make_stated_data(config, 50), None, node_streams=12)
    assert remarks == [("warn", "50 samples are fewer than batch.global_batch=96: steps repeat samples")]
