"""Verdicts on rates, collective operations, disks and reading, from facts as ranks measure them."""

from dataclasses import replace

import pytest

from uniemox_dist.doctor import collective, disk, rate, reading
from uniemox_dist.doctor.collective import CollectiveFacts
from uniemox_dist.doctor.disk import DiskFacts
from uniemox_dist.doctor.findings import RankFacts
from uniemox_dist.doctor.rate import RateFacts
from uniemox_dist.doctor.reading import ReadFacts
from uniemox_dist.doctor.subject import Sizes

GB = 10**9
H100 = RateFacts("NVIDIA H100", True, 700.0, 989.4)
CPU = RateFacts("CPU", False, 0.5, None)
EXACT = CollectiveFacts(
    {"all_reduce of 1000000 bytes": 0, "all_gather": 0}, {10**6: 0.001, 10**8: 0.01}, 10**8, 0.1
)
DISK = DiskFacts("/runs", 1000 * GB, 10**6, 64 * 10**6, 0.1)
READ = ReadFacts("data", 10, 10_000, GB, 64 * 10**6, 0.1, 64, 0.1, True)


def told(*facts: object, ranks_on_a_host: int = 1) -> list[RankFacts]:
    return [RankFacts(rank, f"node{rank // ranks_on_a_host}", one) for rank, one in enumerate(facts)]


@pytest.mark.parametrize(
    ("tflops", "status"), [(700, "ok"), (495, "ok"), (490, "warn"), (200, "warn"), (190, "fail")]
)
def test_a_rate_is_held_against_the_stated_peak(tflops: float, status: str) -> None:
    found = rate.judge(told(replace(H100, tflops=tflops)))
    assert [finding.status for finding in found] == [status]
    share = f"{100 * tflops / 989.4:.0f} %"
    assert share in found[0].value or status == "ok"


def test_a_rank_that_lags_behind_the_others_is_named() -> None:
    (found,) = rate.judge(told(CPU, CPU, replace(CPU, tflops=0.3)))
    assert (found.status, found.rank, found.host) == ("warn", 2, "node2")
    assert found.value == "300 GFLOP/s, the ranks' median is 500 GFLOP/s"


def test_a_rate_without_a_peak_is_stated_only() -> None:
    (found,) = rate.judge(told(CPU))
    assert (found.status, found.value) == ("ok", "500 GFLOP/s on CPU; no peak is known to compare with")


def test_a_rank_with_a_wrong_sum_fails_and_is_named() -> None:
    wrong = replace(EXACT, wrong={"all_reduce of 1000000 bytes": 3, "all_gather": 0})
    (found,) = collective.judge_results(told(EXACT, wrong, EXACT))
    assert (found.status, found.rank, found.host) == ("fail", 1, "node1")
    assert found.value == "3 wrong numbers from all_reduce of 1000000 bytes"


def test_exact_results_are_one_line() -> None:
    (found,) = collective.judge_results(told(EXACT, EXACT))
    assert (found.status, found.value) == ("ok", "2 operations gave the exact result on all 2 ranks")


def test_bandwidth_by_size_names_the_slowest_rank() -> None:
    slow = replace(EXACT, seconds={10**6: 0.002, 10**8: 0.02})
    (found,) = collective.judge_speed(told(EXACT, slow, EXACT, EXACT), gradient_bytes=2 * 10**8)
    # Bus bandwidth 2 · 3/4 · bytes / s; gradients of twice the vector take twice its time.
    assert found.value == (
        "0.75 GB/s at 1.0 MB, 7.5 GB/s at 100.0 MB; slowest: rank 1 on node1; a step's gradients (200.0 MB) take 0.04 s"
    )
    assert found.status == "ok"
    assert collective.judge_speed(told(EXACT), None) == []


def test_gpus_that_talk_slower_than_a_network_are_warned_of() -> None:
    slow = replace(EXACT, seconds={10**8: 1.0}, gpu=True)
    (found,) = collective.judge_speed(told(replace(slow, seconds={10**8: 0.9}), slow), None)
    assert (found.status, found.rank) == ("warn", 1)


def test_a_slow_link_is_compared_with_links_of_its_kind() -> None:
    # Hosts of two ranks: ranks 1, 3, 5 have a link within a host, 0, 2, 4 between hosts.
    within, between = replace(EXACT, link_s=0.001), replace(EXACT, link_s=0.1)
    sound = told(between, within, between, within, between, within, ranks_on_a_host=2)
    assert [finding.status for finding in collective.judge_links(sound)] == ["ok"]
    lame = told(between, within, between, between, between, within, ranks_on_a_host=2)
    (found,) = collective.judge_links(lame)
    assert (found.status, found.rank, found.host) == ("warn", 3, "node1")
    assert found.value == "1 GB/s from rank 2 on node1, the median of such links is 100 GB/s"


@pytest.mark.parametrize(
    ("free", "saved", "status"),
    [(40, 0, "ok"), (39, 0, "warn"), (19, 0, "fail"), (10, 3, "ok"), (9, 3, "fail")],
)
def test_free_disk_is_held_against_the_checkpoints_that_are_kept(free: int, saved: int, status: str) -> None:
    sizes = Sizes(trained=GB, checkpoint_bytes=10 * GB)
    facts = replace(DISK, free=free * GB, saved=saved)
    (found,) = disk.judge(told(facts, facts), sizes, 3)
    assert found.status == status


@pytest.mark.parametrize(("free", "status"), [(1000 * GB, "ok"), (5 * GB, "warn"), (10**7, "fail")])
def test_free_disk_without_a_recipe(free: int, status: str) -> None:
    assert disk.judge(told(replace(DISK, free=free)), None, 1)[0].status == status


def test_a_file_system_without_inodes_fails() -> None:
    assert disk.judge(told(replace(DISK, inodes=10)), None, 1)[0].status == "fail"
    assert disk.judge(told(replace(DISK, inodes=None)), None, 1)[0].status == "ok"


def test_a_checkpoint_that_takes_minutes_to_write_gives_a_warning() -> None:
    sizes, slow = Sizes(trained=GB, checkpoint_bytes=10 * GB), replace(DISK, seconds=4.0)
    (found,) = disk.judge(told(slow, slow), sizes, 1)  # 2 x 16 MB/s
    assert (found.status, found.value) == (
        "warn",
        "32.0 MB/s with fsync: a checkpoint takes 312 s (on all 2 ranks)",
    )
    assert disk.judge(told(slow, slow), sizes, 1, speed=False)[0].status == "ok"
    assert disk.judge(told(slow), None, 1)[0].status == "warn"


def test_a_rank_that_reads_much_slower_than_the_others_is_named() -> None:
    assert [f.status for f in reading.judge(told(READ, READ))] == ["ok"]
    (found,) = reading.judge(told(READ, replace(READ, in_a_row_s=0.5), READ))
    assert (found.status, found.rank, found.host) == ("warn", 1, "node1")
    assert found.value == "data: 128 MB/s, the ranks' median is 640 MB/s"


def test_a_read_that_lasts_milliseconds_gives_no_warning() -> None:
    short, hiccup = (
        replace(READ, in_a_row=10**5, in_a_row_s=0.0003),
        replace(READ, in_a_row=10**5, in_a_row_s=0.09),
    )
    assert [f.status for f in reading.judge(told(short, hiccup))] == ["ok"]
    assert [f.status for f in reading.judge(told(short, replace(hiccup, in_a_row_s=0.2)))] == ["warn"]


def test_shards_that_all_ranks_read_slowly_are_warned_of() -> None:
    slow = replace(READ, in_a_row=10**6, in_a_row_s=1.0)
    assert reading.judge(told(slow, slow))[0].status == "warn"
