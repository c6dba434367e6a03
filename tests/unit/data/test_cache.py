"""The shard cache of a node, tested with real processes, kills and a full disk."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.format.entries import ShardEntry
from uniemox_dist.core.errors import UserError
from uniemox_dist.data import cache as cache_module
from uniemox_dist.data.cache import ShardCache

CHUNK = 1000
FORK = multiprocessing.get_context("fork")
DIFFERS = "its copy has another SHA-256 than the manifest; it was not cached"


class Origin:
    """Shards of pseudo-random bytes, and a log of the ranges that were fetched, shared by all processes."""

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        self.log = folder / "fetched.jsonl"
        self.contents = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
        self.entries = [
            ShardEntry(f"{i:06d}.tar", 1, len(data), hashlib.sha256(data).hexdigest(), "", "")
            for i, data in enumerate(self.contents)
        ]

    def fetch(self, shard: int) -> Callable[[int, int], bytes]:
        def fetch(offset: int, length: int) -> bytes:
            with open(self.log, "a") as log:
                log.write(json.dumps([shard, offset, length]) + "\n")
            time.sleep(0.002)  # a network: lets the other processes ask meanwhile
            return self.contents[shard][offset : offset + length]

        return fetch

    def fetched(self) -> list[tuple[int, int, int]]:
        """(shard, offset, length) of every fetch so far."""
        if not self.log.exists():
            return []
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]

    def ranges(self, shard: int) -> list[tuple[int, int, int]]:
        """The byte ranges that one transfer of a shard fetches."""
        size = len(self.contents[shard])
        return [(shard, start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]


class Gate:
    """A fetch that waits at one range until it is let through."""

    def __init__(self, fetch: Callable[[int, int], bytes], at: int = CHUNK) -> None:
        self.inner, self.at = fetch, at
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, offset: int, length: int) -> bytes:
        if offset == self.at:
            self.reached.set()
            assert self.opened.wait(60)
        return self.inner(offset, length)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(cache_module, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def caches() -> Iterator[Callable[..., ShardCache]]:
    """Makes caches that are closed after the test."""
    made: list[ShardCache] = []

    def make(folder: Path, max_bytes: int = 10**6) -> ShardCache:
        made.append(ShardCache(folder, max_bytes, chunk_bytes=CHUNK))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def wait_for(reached: Callable[[], Any]) -> Any:
    """Polls until a condition is true. No test asserts how long that takes."""
    for _ in range(60_000):
        if value := reached():
            return value
        time.sleep(0.001)
    raise AssertionError("waited in vain")


def content(cache: ShardCache, entry: ShardEntry) -> bytes | None:
    handle = cache.open(entry)
    if handle is None:
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read()


def bring(cache: ShardCache, origin: Origin, shard: int) -> None:
    """Requests a shard and waits until it is there; does not touch when it was used."""
    cache.request(origin.entries[shard], origin.fetch(shard))
    wait_for((cache.folder / f"{origin.entries[shard].sha256}.tar").exists)
    wait_for(lambda: idle(cache))


def idle(cache: ShardCache) -> bool:
    """Whether this process's thread has done all that was asked for."""
    return cache._mine().thread is None


def files(cache: ShardCache) -> dict[str, int]:
    """Names and sizes of what a cache holds, without its lock."""
    return {path.name: path.stat().st_size for path in cache.folder.iterdir() if path.name != "lock"}


def tars(origin: Origin, *shards: int) -> dict[str, int]:
    return {f"{origin.entries[i].sha256}.tar": origin.entries[i].bytes for i in shards}


@contextmanager
def node_lock(folder: Path) -> Iterator[None]:
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_all(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Calls a function in as many processes, which start together."""
    barrier = FORK.Barrier(len(arguments))

    def run(*args: Any) -> None:
        barrier.wait(60)
        target(*args)

    processes = [FORK.Process(target=run, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


# ── one process


def test_a_shard_is_fetched_once_by_ranges_in_order_and_served_whole(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500]), caches(tmp_path / "cache")
    assert cache.open(origin.entries[0]) is None
    for _ in range(3):
        cache.request(origin.entries[0], origin.fetch(0))
    assert wait_for(lambda: content(cache, origin.entries[0])) == origin.contents[0]
    cache.request(origin.entries[0], origin.fetch(0))
    wait_for(lambda: idle(cache))
    assert origin.fetched() == [(0, 0, 1000), (0, 1000, 1000), (0, 2000, 500)]
    assert files(cache) == tars(origin, 0)
    assert cache.take_problems() == []


def test_an_unfinished_shard_is_not_served_and_counts_with_its_full_size(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500]), caches(tmp_path / "cache")
    gate = Gate(origin.fetch(0))
    cache.request(origin.entries[0], gate)
    assert gate.reached.wait(60)
    assert files(cache) == {f"{origin.entries[0].sha256}.part": 2500}
    assert cache.open(origin.entries[0]) is None
    gate.opened.set()
    assert wait_for(lambda: content(cache, origin.entries[0])) == origin.contents[0]


def test_shards_are_brought_in_in_the_order_of_their_requests(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [1500] * 4), caches(tmp_path / "cache")
    gate = Gate(origin.fetch(2), at=0)
    cache.request(origin.entries[2], gate)
    for shard in (3, 0, 1):
        cache.request(origin.entries[shard], origin.fetch(shard))
    assert cache.open(origin.entries[3]) is None
    gate.opened.set()
    wait_for(lambda: idle(cache))
    assert origin.fetched() == [part for shard in (2, 3, 0, 1) for part in origin.ranges(shard)]


def test_the_shards_used_longest_ago_make_room(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [1000, 1000, 1000, 1000, 1700]), caches(tmp_path / "cache", 3000)
    for shard in (0, 1, 2):
        bring(cache, origin, shard)
        os.utime(cache.folder / f"{origin.entries[shard].sha256}.tar", (shard, shard))
    assert content(cache, origin.entries[0]) == origin.contents[0]  # now 1 is the oldest
    bring(cache, origin, 3)
    assert files(cache) == tars(origin, 0, 2, 3)
    bring(cache, origin, 4)  # needs the place of two
    assert files(cache) == tars(origin, 3, 4)
    assert sum(files(cache).values()) <= 3000


def test_a_shard_that_was_evicted_is_read_on_by_who_has_it_open(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500, 2500]), caches(tmp_path / "cache", 3000)
    bring(cache, origin, 0)
    handle = cache.open(origin.entries[0])
    bring(cache, origin, 1)
    assert files(cache) == tars(origin, 1)
    assert cache.open(origin.entries[0]) is None
    assert os.pread(handle, 5000, 0) == origin.contents[0]
    os.close(handle)


def test_a_shard_larger_than_the_bound_is_left_at_its_origin(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [3001, 3000, 1000]), caches(tmp_path / "cache", 3000)
    bring(cache, origin, 2)
    with node_lock(cache.folder):  # a thread would wait here
        cache.request(origin.entries[0], origin.fetch(0))
        assert idle(cache)
    bring(cache, origin, 1)  # as large as the bound
    assert origin.fetched() == origin.ranges(2) + origin.ranges(1)
    assert files(cache) == tars(origin, 1)


def test_no_shard_is_evicted_if_parts_in_flight_leave_no_space_for_another(
    tmp_path: Path, caches: Any, clock: Clock
) -> None:
    origin = Origin(tmp_path, [1500, 1000, 2000])
    writer, other = caches(tmp_path / "cache", 3000), caches(tmp_path / "cache", 3000)
    bring(other, origin, 1)
    gate = Gate(origin.fetch(0))
    writer.request(origin.entries[0], gate)
    assert gate.reached.wait(60)
    other.request(origin.entries[2], origin.fetch(2))
    wait_for(lambda: idle(other))
    assert files(other) == {**tars(origin, 1), f"{origin.entries[0].sha256}.part": 1500}
    gate.opened.set()
    wait_for(lambda: idle(writer))
    other.request(origin.entries[2], origin.fetch(2))  # too soon: with every sample a folder would be listed
    assert idle(other)
    clock.now_s += ShardCache.RETRY_S
    bring(other, origin, 2)
    assert files(other) == tars(origin, 2)
    assert writer.take_problems() + other.take_problems() == []


def test_a_shard_that_differs_from_the_manifest_is_neither_kept_nor_fetched_again(
    tmp_path: Path, caches: Any, clock: Clock
) -> None:
    origin, cache = Origin(tmp_path, [2500, 1000]), caches(tmp_path / "cache")
    right = origin.contents[0]
    origin.contents[0] = right[:1200] + bytes([right[1200] ^ 1]) + right[1201:]
    cache.request(origin.entries[0], origin.fetch(0))
    wait_for(lambda: idle(cache))
    assert files(cache) == {}
    assert cache.take_problems() == [f"shard 000000.tar: {DIFFERS}"]
    assert cache.take_problems() == []
    origin.contents[0] = right
    clock.now_s += 1e9
    cache.request(origin.entries[0], origin.fetch(0))
    bring(cache, origin, 1)
    assert origin.fetched() == origin.ranges(0) + origin.ranges(1)
    assert files(cache) == tars(origin, 1)


@pytest.mark.parametrize("lengths", [(1000, 1000, 499), (1000, 400, 500), (1000, 1001, 500), (0, 0, 0)])
def test_a_range_of_another_length_spoils_the_copy(
    tmp_path: Path, caches: Any, lengths: tuple[int, ...]
) -> None:
    origin, cache = Origin(tmp_path, [2500]), caches(tmp_path / "cache")
    served = iter(lengths)
    cut = iter(
        np.cumsum((0, *lengths)).tolist()
    )  # what arrives is the shard, in pieces that were not asked for

    def fetch(offset: int, length: int) -> bytes:
        start = next(cut)
        return origin.contents[0][start : start + next(served)]

    cache.request(origin.entries[0], fetch)
    wait_for(lambda: idle(cache))
    assert files(cache) == {}
    assert cache.take_problems() == [f"shard 000000.tar: {DIFFERS}"]


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), ValueError("reset by peer")])
def test_a_shard_whose_origin_failed_is_brought_in_later(
    tmp_path: Path, caches: Any, clock: Clock, error: Exception
) -> None:
    origin, cache = Origin(tmp_path, [2500]), caches(tmp_path / "cache")

    def fail(offset: int, length: int) -> bytes:
        if offset:
            raise error
        return origin.contents[0][:length]

    for _ in range(2):
        cache.request(origin.entries[0], fail)
        wait_for(lambda: idle(cache))
        clock.now_s += ShardCache.RETRY_S
    assert files(cache) == {}
    assert cache.take_problems() == ["shard 000000.tar: reset by peer; it was not cached"]
    bring(cache, origin, 0)
    assert content(cache, origin.entries[0]) == origin.contents[0]
    assert cache.take_problems() == []


@pytest.mark.parametrize("size", [0, 2499, 2501])
def test_a_copy_of_another_size_is_removed_and_brought_in_again(
    tmp_path: Path, caches: Any, size: int
) -> None:
    origin, cache = Origin(tmp_path, [2500]), caches(tmp_path / "cache")
    for look in (True, False):  # by open(), or by the request alone
        bring(cache, origin, 0)
        os.truncate(cache.folder / f"{origin.entries[0].sha256}.tar", size)
        if look:
            assert cache.open(origin.entries[0]) is None
            assert files(cache) == {}
    cache.request(origin.entries[0], origin.fetch(0))
    wait_for(lambda: idle(cache))
    assert content(cache, origin.entries[0]) == origin.contents[0]


def test_a_part_deleted_by_hand_never_becomes_another_writers_shard(tmp_path: Path, caches: Any) -> None:
    origin = Origin(tmp_path, [2500])
    first, second = caches(tmp_path / "cache"), caches(tmp_path / "cache")
    gates = [Gate(origin.fetch(0)), Gate(origin.fetch(0))]
    first.request(origin.entries[0], gates[0])
    assert gates[0].reached.wait(60)
    part = first.folder / f"{origin.entries[0].sha256}.part"
    part.unlink()
    second.request(origin.entries[0], gates[1])
    assert gates[1].reached.wait(60)
    gates[0].opened.set()
    wait_for(lambda: idle(first))
    assert files(first) == {part.name: 2500}  # the second's, still half empty
    gates[1].opened.set()
    wait_for(lambda: idle(second))
    assert content(second, origin.entries[0]) == origin.contents[0]
    assert first.take_problems() + second.take_problems() == []


def test_close_deletes_the_unfinished_part_and_drops_requests(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500, 1000]), caches(tmp_path / "cache")
    gate = Gate(origin.fetch(0), at=0)
    cache.request(origin.entries[0], gate)
    cache.request(origin.entries[1], origin.fetch(1))
    assert gate.reached.wait(60)
    closing = threading.Thread(target=cache.close)
    closing.start()
    wait_for(lambda: cache._mine().stop)
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()
    assert idle(cache)
    assert files(cache) == {}
    assert origin.fetched() == [(0, 0, 1000)]
    for shard in (0, 1):
        bring(cache, origin, shard)
        cache.close()  # also when nothing is under way
    assert files(cache) == tars(origin, 0, 1)


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(UserError) as raised:
            ShardCache(tmp_path / folder, 1000)
        start = f"data.cache_dir={tmp_path / folder}: cannot be written ({reason}); give a writable folder"
        assert str(raised.value).startswith(start)


# ── a disk that fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def test_a_full_disk_pauses_the_cache_and_leaves_no_part(
    small_disk: Path, tmp_path: Path, caches: Any, clock: Clock
) -> None:
    # The last 1,000 bytes of shard 1 would fit by 744: a system call that succeeds in part.
    origin, cache = Origin(tmp_path, [100_000, 160_000, 5_000, 6_000]), caches(small_disk / "cache", 10**9)
    bring(cache, origin, 0)
    gate = Gate(origin.fetch(1))
    cache.request(origin.entries[1], gate)
    cache.request(origin.entries[2], origin.fetch(2))
    gate.opened.set()
    wait_for(lambda: idle(cache))
    line = f"cache {small_disk}/cache: No space left on device; paused for 60 s"
    assert cache.take_problems() == [line]
    assert files(cache) == tars(origin, 0)
    assert {shard for shard, _, _ in origin.fetched()} == {0, 1}
    before = len(origin.fetched())
    clock.now_s += 59.9
    cache.request(origin.entries[2], origin.fetch(2))
    clock.now_s += 0.1
    bring(cache, origin, 3)
    assert origin.fetched()[before:] == origin.ranges(3)
    assert files(cache) == tars(origin, 0, 3)
    assert content(cache, origin.entries[0]) == origin.contents[0]


def test_a_disk_that_became_read_only_still_serves(small_disk: Path, tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [5_000, 6_000]), caches(small_disk / "cache")
    bring(cache, origin, 0)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache.request(origin.entries[1], origin.fetch(1))
    wait_for(lambda: idle(cache))
    assert cache.take_problems() == [f"cache {cache.folder}: Read-only file system; paused for 60 s"]
    assert content(cache, origin.entries[0]) == origin.contents[0]
    assert origin.fetched() == origin.ranges(0)
    with pytest.raises(UserError, match=r"data.cache_dir=.*cannot be written \(Read-only file system\)"):
        ShardCache(small_disk / "cache", 1000)


def test_a_folder_removed_under_the_cache_pauses_it(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [1000]), caches(tmp_path / "cache")
    cache.folder.rmdir()  # a disk that was unmounted: its mount point must not be filled instead
    cache.request(origin.entries[0], origin.fetch(0))
    wait_for(lambda: idle(cache))
    assert cache.take_problems() == [f"cache {cache.folder}: No such file or directory; paused for 60 s"]
    assert not cache.folder.exists()
    assert origin.fetched() == []


# ── many processes


def read_until_there(cache: ShardCache, origin: Origin, shards: list[int]) -> None:
    """As a loader does, which asks for a shard with every sample while it is not there."""
    ShardCache.RETRY_S = 0.0
    for shard in shards:
        entry = origin.entries[shard]
        while (found := content(cache, entry)) is None:
            cache.request(entry, origin.fetch(shard))
            time.sleep(0.001)
        assert found == origin.contents[shard]
    assert cache.take_problems() == []


def test_one_process_brings_a_shard_in_for_all_others(tmp_path: Path) -> None:
    origin, cache = (
        Origin(tmp_path, [20_500, 9_000, 14_001, 700]),
        ShardCache(tmp_path / "cache", 10**6, chunk_bytes=CHUNK),
    )
    orders = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [0, 3, 1, 2], [0, 1, 3, 2]]
    run_all(read_until_there, [(cache, origin, order) for order in orders])
    expected = [part for shard in range(4) for part in origin.ranges(shard)]
    assert Counter(origin.fetched()) == Counter(expected)
    assert files(cache) == tars(origin, 0, 1, 2, 3)


def read_and_measure(cache: ShardCache, origin: Origin, shards: list[int], sizes: Path) -> None:
    """Also writes down, at every fetch, what the folder holds."""
    fetch_of = origin.fetch

    def measured(shard: int) -> Callable[[int, int], bytes]:
        def fetch(offset: int, length: int) -> bytes:
            with node_lock(cache.folder), open(sizes, "a") as out:
                out.write(f"{sum(files(cache).values())}\n")
            return fetch_of(shard)(offset, length)

        return fetch

    origin.fetch = measured  # type: ignore[method-assign]
    read_until_there(cache, origin, shards)


def test_the_bound_holds_while_many_processes_bring_in_different_shards(tmp_path: Path) -> None:
    sizes = [4000, 5500, 3000, 6000, 2000, 4500, 5000, 3500, 2500, 6000, 4000, 5000]
    bound = 13_000  # two or three of them: there are more writers than room
    origin, cache = Origin(tmp_path, sizes), ShardCache(tmp_path / "cache", bound, chunk_bytes=CHUNK)
    orders = [list(range(start, 12, 4)) + [(start + 1) % 12, 0] for start in range(4)]
    log = tmp_path / "sizes.txt"
    run_all(read_and_measure, [(cache, origin, order, log) for order in orders])
    seen = [int(line) for line in log.read_text().split()]
    assert max(seen) <= bound
    assert max(seen) > bound - 6000, "the room was not used"
    assert {shard for shard, _, _ in origin.fetched()} == set(range(12))
    assert all(name.endswith(".tar") for name in files(cache))
    assert sum(files(cache).values()) <= bound


def hold_half(cache: ShardCache, origin: Origin, shard: int, says: Any) -> None:
    """Brings half a shard in, and is then killed."""
    gate = Gate(origin.fetch(shard))
    cache.request(origin.entries[shard], gate)
    gate.reached.wait(60)
    says.send("half")
    time.sleep(60)


def test_a_shard_of_a_killed_process_is_taken_over(tmp_path: Path, caches: Any, clock: Clock) -> None:
    origin, cache = Origin(tmp_path, [2500, 1000]), caches(tmp_path / "cache")
    hears, says = FORK.Pipe(duplex=False)
    victim = FORK.Process(target=hold_half, args=(cache, origin, 0, says))
    victim.start()
    assert hears.recv() == "half"
    cache.request(origin.entries[0], origin.fetch(0))  # is left to the other
    bring(cache, origin, 1)
    assert origin.fetched() == [(0, 0, 1000), *origin.ranges(1)]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(60)
    assert files(cache) == {f"{origin.entries[0].sha256}.part": 2500, **tars(origin, 1)}
    clock.now_s += ShardCache.RETRY_S
    bring(cache, origin, 0)
    assert origin.fetched() == [(0, 0, 1000), *origin.ranges(1), *origin.ranges(0)]
    assert content(cache, origin.entries[0]) == origin.contents[0]
    assert files(cache) == tars(origin, 0, 1)


def test_files_of_a_killed_process_take_no_space_from_other_shards(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500, 2000]), caches(tmp_path / "cache", 3000)
    hears, says = FORK.Pipe(duplex=False)
    victim = FORK.Process(target=hold_half, args=(cache, origin, 0, says))
    victim.start()
    assert hears.recv() == "half"
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(60)
    bring(cache, origin, 1)
    assert files(cache) == tars(origin, 1)


def test_a_process_forked_in_mid_transfer_brings_shards_in_itself(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [2500, 2500]), caches(tmp_path / "cache")
    gate = Gate(origin.fetch(0))
    cache.request(origin.entries[0], gate)
    assert gate.reached.wait(60)
    with cache._mine().lock:  # held at the fork, so that it stays held in the child
        child = FORK.Process(target=read_until_there, args=(cache, origin, [1]))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert files(cache) == {f"{origin.entries[0].sha256}.part": 2500, **tars(origin, 1)}
    gate.opened.set()
    wait_for(lambda: idle(cache))
    assert files(cache) == tars(origin, 0, 1)


def test_a_child_forked_under_the_nodes_lock_does_not_keep_it(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [1000]), caches(tmp_path / "cache")
    with cache._locked():
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    try:
        bring(cache, origin, 0)
    finally:
        child.kill()
        child.join(60)
    assert files(cache) == tars(origin, 0)


def test_a_pickled_cache_is_shared_by_spawned_processes(tmp_path: Path, caches: Any) -> None:
    origin, cache = Origin(tmp_path, [1500, 1500]), caches(tmp_path / "cache")
    bring(cache, origin, 0)
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps((cache, origin.entries)))
    # Ends while an origin hangs: the thread must not hold the interpreter up.
    code = (
        "import os, pickle, sys, threading\n"
        "cache, entries = pickle.load(open(sys.argv[1], 'rb'))\n"
        "hangs = threading.Event()\n"
        "cache.request(entries[1], lambda *_: (hangs.set(), threading.Event().wait()))\n"
        "assert hangs.wait(60)\n"
        "sys.stdout.buffer.write(os.read(cache.open(entries[0]), 5000))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cache.pkl"],
        capture_output=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == origin.contents[0]
    bring(cache, origin, 1)
    assert files(cache) == tars(origin, 0, 1)


def test_files_that_are_not_the_caches_own_are_neither_counted_nor_deleted(
    tmp_path: Path, caches: Any
) -> None:
    origin = Origin(tmp_path, [3000, 3000])
    folder = tmp_path / "cache"
    folder.mkdir()
    others = {"backup.tar": 5000, "000000.tar": 4000, f"{'x' * 64}.tar": 10, "unfinished.part": 7}
    for name, size in others.items():
        (folder / name).write_bytes(bytes(size))
    cache = caches(folder, 4000)
    for shard in (0, 1):
        bring(cache, origin, shard)
        assert content(cache, origin.entries[shard]) == origin.contents[shard]
    assert files(cache) == {**others, **tars(origin, 1)}


def test_a_data_sets_own_folder_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a data set \(it has a"):
        ShardCache(tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]
