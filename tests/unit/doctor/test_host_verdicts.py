"""Verdicts on versions, devices, cores, memory, limits and clocks, from facts as ranks measure them."""

from dataclasses import replace

import pytest

from uniemox_dist.doctor import clock, devices, limits, memory, versions
from uniemox_dist.doctor.clock import ClockFacts
from uniemox_dist.doctor.devices import DeviceFacts
from uniemox_dist.doctor.findings import Finding, RankFacts
from uniemox_dist.doctor.limits import LimitFacts
from uniemox_dist.doctor.memory import MemoryFacts
from uniemox_dist.doctor.subject import LoaderNeeds, Sizes
from uniemox_dist.doctor.versions import Bound, VersionFacts, read_bounds

GB = 10**9
SOUND = VersionFacts({"python": "3.11.7", "torch": "2.14.1"}, (Bound("torch", ">=2.11", "train"),))
GPU = DeviceFacts(("NVIDIA H100",) * 2, 0, "a", (0, 1, 2, 3), None, 2)
MEMORY = MemoryFacts(64 * GB, None, 64 * GB, GB)
LIMITS = LimitFacts(8 * GB, 8 * GB, 65536, 65536, None)
LOADER = LoaderNeeds(workers=4, shared_bytes=GB, index_bytes=GB // 4, handover_bytes=GB // 10, data_sets=1)


def told(*facts: object, ranks_on_a_host: int = 1) -> list[RankFacts]:
    return [RankFacts(rank, f"node{rank // ranks_on_a_host}", one) for rank, one in enumerate(facts)]


def short(found: list[Finding]) -> list[tuple[str, int | None, str | None]]:
    return [(finding.status, finding.rank, finding.host) for finding in found]


def test_versions_that_fit_are_listed() -> None:
    found = versions.judge(told(SOUND, SOUND))
    assert found == [Finding("ok", "versions", "python 3.11.7, torch 2.14.1; the same on all 2 ranks")]


@pytest.mark.parametrize(
    ("installed", "value", "remedy"),
    [
        ("2.9.0", "torch 2.9.0 (needs >=2.11)", 'pip install "torch>=2.11"'),
        (None, "not installed: torch", 'run pip install -e ".[train]" in your clone of uniemox-dist'),
    ],
)
def test_a_version_that_is_too_old_or_missing_fails(installed: str | None, value: str, remedy: str) -> None:
    facts = replace(SOUND, versions={**SOUND.versions, "torch": installed})
    assert versions.judge(told(facts)) == [Finding("fail", "versions", value, remedy, 0, "node0")]
    assert versions.judge(told(facts), bounds=False)[0].status == "ok"


def test_the_rank_with_another_version_is_named() -> None:
    other = replace(SOUND, versions={**SOUND.versions, "torch": "2.15.0"})
    (found,) = versions.judge(told(SOUND, other, SOUND), bounds=False)
    assert (found.status, found.rank, found.host) == ("fail", 1, "node1")
    assert found.value == "torch 2.15.0 (others: 2.14.1)"


def test_a_version_built_by_hand_is_compared_as_pip_would() -> None:
    facts = replace(SOUND, versions={**SOUND.versions, "torch": "2.12.0a0+git1234"})
    assert versions.judge(told(facts))[0].status == "ok"


def test_a_package_without_metadata_is_warned_of() -> None:
    (found,) = versions.judge(told(replace(SOUND, bounds=())))
    assert found.status == "warn"
    assert "its bounds are unknown" in found.value


def test_bounds_are_those_of_the_base_install_and_the_extras_asked_for() -> None:
    stated = ["click>=8.1", 'torch>=2.11; extra == "train"', 'onnx>=1.16; extra == "onnx"', "a broken @ line"]
    assert read_bounds(stated, ">=3.10", ["train"]) == (
        Bound("python", ">=3.10", ""),
        Bound("click", ">=8.1", ""),
        Bound("torch", ">=2.11", "train"),
    )
    assert [bound.name for bound in read_bounds(stated, None, [])] == ["click"]


def test_the_installed_package_states_bounds_that_hold_here() -> None:
    facts = versions.measure(training=True)
    assert {"deepspeed", "torch", "numpy", "python"} <= {bound.name for bound in facts.bounds}
    assert versions.judge(told(facts))[0].status == "ok"


def test_a_gpu_for_each_rank_is_well() -> None:
    facts = told(GPU, replace(GPU, own=1, uuid="b"), ranks_on_a_host=2)
    value = "NVIDIA H100, 2 GPUs visible; 2 ranks on 1 host"
    assert devices.judge_devices(facts) == [Finding("ok", "devices", value)]


@pytest.mark.parametrize(
    ("second", "status", "value"),
    [
        (replace(GPU, visible=(), own=None, uuid=None), "fail", "sees no GPU, while other ranks do"),
        (replace(GPU, own=2, uuid=None), "fail", "is local rank 2 and sees 2 GPUs"),
        (GPU, "fail", "has the same GPU as rank 0"),
        (
            replace(GPU, visible=("NVIDIA A100",) * 2, uuid="b"),
            "warn",
            "computes on NVIDIA A100, most ranks on NVIDIA H100",
        ),
    ],
)
def test_a_rank_with_a_wrong_device_is_named(second: DeviceFacts, status: str, value: str) -> None:
    (found,) = devices.judge_devices(told(GPU, second, ranks_on_a_host=2))
    assert (found.status, found.value, found.rank, found.host) == (status, value, 1, "node0")


def test_equal_gpus_of_two_hosts_are_not_the_same_one() -> None:
    assert devices.judge_devices(told(GPU, GPU))[0].status == "ok"


def test_cores_are_divided_among_the_ranks_that_may_use_them() -> None:
    bound = replace(GPU, cores=(4, 5))
    facts = told(GPU, GPU, bound, ranks_on_a_host=3)
    assert devices.count_cores(facts) == {0: 2, 1: 2, 2: 2}
    limited = told(replace(GPU, quota=1.0), replace(GPU, quota=1.0), ranks_on_a_host=2)
    assert devices.count_cores(limited) == {0: 0.5, 1: 0.5}


def test_more_threads_or_loader_processes_than_cores_are_warned_of() -> None:
    assert devices.judge_cores(told(GPU), 4)[0].value == "4 per rank, 2 threads per operation, data.workers=4"
    (threads,) = devices.judge_cores(told(replace(GPU, threads=8)), 1)
    assert (threads.status, threads.value) == ("warn", "8 threads per operation on 4 cores")
    assert threads.remedy.startswith("export OMP_NUM_THREADS=4")
    (workers,) = devices.judge_cores(told(GPU), 5)
    assert (workers.status, workers.value) == ("warn", "5 loader processes on 4 cores")
    assert workers.remedy.startswith("set data.workers=4")


@pytest.mark.parametrize(("left", "status"), [(64, "ok"), (4.5, "warn"), (3.9, "fail")])
def test_memory_is_held_against_what_all_loaders_of_a_host_take(left: float, status: str) -> None:
    # Two ranks with 1 GB of views and 4 times 0.25 GB of rows each: 4 GB.
    facts = replace(MEMORY, left=int(left * GB))
    found = memory.judge_host(told(facts, facts, ranks_on_a_host=2), LOADER)
    assert [finding.status for finding in found] == [status]


def test_memory_without_a_recipe_is_warned_of_below_a_gigabyte_a_rank() -> None:
    assert memory.judge_host(told(MEMORY), None)[0].status == "ok"
    assert memory.judge_host(told(replace(MEMORY, left=GB // 2)), None)[0].status == "warn"


def test_a_gpu_that_is_too_small_or_in_use_is_named() -> None:
    free = replace(MEMORY, gpu_free=79 * GB, gpu_total=80 * GB)
    sizes = Sizes(trained=4 * GB, checkpoint_bytes=48 * GB)  # 16 GB, and 48 GB shared by two ranks
    assert memory.judge_gpu(told(MEMORY), sizes, 1) == []
    assert memory.judge_gpu(told(free, free), sizes, 1)[0].status == "ok"
    used = replace(free, gpu_free=50 * GB)
    assert short(memory.judge_gpu(told(free, used), sizes, 1)) == [("warn", 1, "node1")]
    full = replace(free, gpu_free=39 * GB)
    assert short(memory.judge_gpu(told(free, full), sizes, 1)) == [("fail", 1, "node1")]
    # Stage 3 shares weights and gradients too: 32 GB a rank.
    assert short(memory.judge_gpu(told(free, full), sizes, 3)) == [("warn", 1, "node1")]


@pytest.mark.parametrize(
    ("free", "gpu", "status"),
    [
        (8 * GB, True, "ok"),
        (GB, False, "ok"),
        (GB, True, "warn"),
        (GB // 8, False, "warn"),
        (1 << 20, False, "fail"),
        (None, False, "fail"),
    ],
)
def test_shared_memory_against_loaders_and_nccl(free: int | None, gpu: bool, status: str) -> None:
    facts = replace(LIMITS, shm_free=free, gpu=gpu)
    found = limits.judge_shm(told(facts, facts, ranks_on_a_host=2), LOADER)
    assert [finding.status for finding in found] == [status]


@pytest.mark.parametrize(("files", "status"), [(65536, "ok"), (772, "ok"), (700, "warn"), (256, "fail")])
def test_open_files_against_shards_and_peers(files: int, status: str) -> None:
    # 256, 128 of one data set, and 2 for the other rank: 386.
    (found,) = limits.judge_files(told(replace(LIMITS, files=files), LIMITS), LOADER)
    assert found.status == status
    assert found.remedy == ("" if status == "ok" else "ulimit -n 4096")


def test_a_hard_limit_that_is_too_low_is_reported() -> None:
    (found,) = limits.judge_files(told(replace(LIMITS, files=256, files_hard=512)), LOADER)
    assert "after raising the hard limit, 512" in found.remedy


@pytest.mark.parametrize(("left", "status"), [(None, "ok"), (144, "ok"), (100, "warn"), (20, "fail")])
def test_processes_that_may_still_be_started(left: int | None, status: str) -> None:
    facts = replace(LIMITS, processes=left)
    found = limits.judge_processes(told(facts, facts, ranks_on_a_host=2), LOADER)
    assert [finding.status for finding in found] == [status]


def test_clocks_within_a_second_are_well() -> None:
    found = clock.judge(told(ClockFacts((100.0, 200.0)), ClockFacts((100.5, 200.002))))
    assert found == [Finding("ok", "clock", "at most 2.0 ms from the ranks' median")]


@pytest.mark.parametrize(
    ("off", "status", "value"),
    [
        (2.0, "warn", "2.0 s ahead of the ranks' median"),
        (-31.0, "fail", "31.0 s behind the ranks' median"),
    ],
)
def test_a_clock_that_differs_is_reported_with_its_rank(off: float, status: str, value: str) -> None:
    right = ClockFacts((100.0, 200.0, 300.0))
    wrong = ClockFacts((100.0 + off, 200.0 + off, 300.0 + off))
    (found,) = clock.judge(told(right, right, wrong))
    assert (found.status, found.value, found.rank, found.host) == (status, value, 2, "node2")


def test_of_two_clocks_the_whole_difference_counts() -> None:
    found = clock.judge(told(ClockFacts((100.0,)), ClockFacts((131.0,))))
    assert short(found) == [("fail", 1, "node1")]


def test_a_rank_that_was_late_once_has_no_wrong_clock() -> None:
    right, late = ClockFacts((100.0, 200.0, 300.0)), ClockFacts((105.0, 200.0, 300.0))
    assert clock.judge(told(right, right, late))[0].status == "ok"
