"""Failing reads are retried for the stated time and then reported in one line; caches never make a read fail."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.format.index import index_path, read_index
from uniemox_dist.core.errors import Fault
from uniemox_dist.data import origin as module
from uniemox_dist.data.cache import ShardCache
from uniemox_dist.data.origin import ReadCounts, ShardOrigin
from uniemox_dist.data.reader import DamagedSample, ShardReader


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only by sleeping: the clock of the module is the sum of its sleeps."""
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module.time, "monotonic", lambda: sum(waits))
    return waits


@pytest.fixture
def copy(emoji_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emoji_shards / "train", tmp_path / "train"))


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def read() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "read"

    return read


STALE = OSError(errno.ESTALE, "Stale file handle")


def test_a_read_is_tried_again_with_longer_and_longer_waits(no_waiting: list[float]) -> None:
    origin = ShardOrigin("/data", "data.path")
    origin.retry_s = 1000
    assert origin.retry("shard x", failing(12, STALE)) == "read"
    assert origin.counts.retries == 12
    for i, wait in enumerate(no_waiting):
        longest = min(module.LONGEST_WAIT_S, module.FIRST_WAIT_S * 2**i)
        assert longest / 2 <= wait <= longest


def test_an_unreachable_source_ends_the_run_in_one_line_after_the_stated_time(
    no_waiting: list[float],
) -> None:
    origin = ShardOrigin("s3://bucket/data", "data.path")
    origin.retry_s = 30
    for error in (STALE, TimeoutError("no answer"), RuntimeError("client closed\nmore")):
        no_waiting.clear()
        with pytest.raises(Fault) as caught:
            origin.retry("shard 000012.tar", failing(10**6, error))
        says = str(caught.value)
        assert says.startswith("data.path=s3://bucket/data: shard 000012.tar could not be read for 30 s (")
        assert says.endswith("resume the run when the source is available again")
        assert "\n" not in says
        assert 10 < sum(no_waiting) <= 30


def test_a_missing_file_is_reported_without_retries(copy: Path, no_waiting: list[float]) -> None:
    reader = ShardReader.from_folder(copy, "data.path")
    reader.origin.retry_s = 1000
    (copy / "000002.tar").unlink()
    with pytest.raises(Fault) as caught:
        reader.read(2, 0)
    fix = "copy it again, then start again"
    assert str(caught.value) == f"data.path={copy}: shard 000002.tar: No such file or directory; {fix}"
    assert no_waiting == []


def test_a_stale_handle_is_opened_anew(
    copy: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    reader = ShardReader.from_folder(copy, "data.path")
    reader.origin.retry_s = 10
    before = reader.read(0, 0)
    real, failed = os.pread, []

    def pread(handle: int, length: int, offset: int) -> bytes:
        if not failed:
            failed.append(handle)
            raise STALE
        return real(handle, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert reader.read(0, 0) == before
    assert len(failed) == reader.origin.counts.retries == len(no_waiting) == 1


def test_a_short_answer_is_a_read_error_and_no_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float]
) -> None:
    reader = ShardReader.from_folder(copy, "data.path")
    reader.origin.retry_s = 10
    before = reader.read(0, 0)
    real, short = os.pread, [3]

    def pread(handle: int, length: int, offset: int) -> bytes:
        short[0] -= 1
        return real(handle, length if short[0] < 0 else length // 2, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert reader.read(0, 0) == before
    assert reader.origin.counts.retries == len(no_waiting) == 3


def test_wrong_bytes_are_read_once_more_before_a_sample_is_called_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader.from_folder(copy, "data.path")
    before = reader.read(0, 0)
    real, wrong = os.pread, [1]

    def pread(handle: int, length: int, offset: int) -> bytes:
        wrong[0] -= 1
        data = real(handle, length, offset)
        return data if wrong[0] < 0 else bytes(len(data))

    monkeypatch.setattr(os, "pread", pread)
    assert reader.read(0, 0) == before
    wrong[0] = 2
    with pytest.raises(DamagedSample, match="bytes differ from the index"):
        reader.read(0, 1)


# ---- the cache


@pytest.fixture
def cached(copy: Path, tmp_path: Path) -> ShardReader:
    reader = ShardReader.from_folder(copy, "data.path")
    reader.origin.cache = ShardCache(tmp_path / "cache", 10**8)
    return reader


def bring_in(reader: ShardReader) -> None:
    """Waits until what was asked for is there."""
    assert reader.origin.cache is not None
    thread = reader.origin.cache._mine().thread
    if thread is not None:
        thread.join(30)


def test_ranges_come_first_and_the_shard_behind_them_answers_the_later_reads(
    copy: Path, cached: ShardReader
) -> None:
    plain = ShardReader.from_folder(copy, "data.path")
    entry = cached.manifest.shards[1]
    first = cached.read(1, 0)
    assert first == plain.read(1, 0)
    bring_in(cached)
    assert cached.origin.counts == ReadCounts(reads=1, bytes=len(first.image) + entry.bytes)
    assert [cached.read(1, row) for row in range(16)] == [plain.read(1, row) for row in range(16)]
    assert cached.origin.counts == ReadCounts(reads=17, bytes=len(first.image) + entry.bytes, hits=16)
    sixth = plain.read(1, 5)
    (copy / entry.name).unlink()
    assert cached.read(1, 5) == sixth  # the origin is not asked


def test_a_damaged_copy_does_not_change_the_data(copy: Path, cached: ShardReader, tmp_path: Path) -> None:
    sound = [cached.read(0, row) for row in range(16)]
    bring_in(cached)
    entry = cached.manifest.shards[0]
    file = tmp_path / "cache" / f"{entry.sha256}.tar"
    data = bytearray(file.read_bytes())
    for offset in read_index(index_path(copy, entry.name))["image_offset"].to_pylist():
        data[offset + 30] ^= 1
    file.write_bytes(data)
    assert [cached.read(0, row) for row in range(16)] == sound
    bring_in(cached)
    assert not file.exists() or file.read_bytes() == (copy / entry.name).read_bytes()


def test_if_the_caches_disk_fails_the_origin_is_read(
    cached: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = [cached.read(1, row) for row in range(16)]
    bring_in(cached)
    entry = cached.manifest.shards[1]
    assert cached.origin.cache is not None
    copy = cached.origin.cache.open(entry)
    assert copy is not None
    inode = os.fstat(copy).st_ino
    os.close(copy)
    real = os.pread

    def pread(handle: int, length: int, offset: int) -> bytes:
        if os.fstat(handle).st_ino == inode:
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    hits = cached.origin.counts.hits
    assert [cached.read(1, row) for row in range(16)] == sound
    assert cached.origin.counts.hits == hits


def test_a_cache_too_small_for_a_shard_changes_nothing(copy: Path, tmp_path: Path) -> None:
    reader, plain = (ShardReader.from_folder(copy, "data.path") for _ in range(2))
    reader.origin.cache = ShardCache(tmp_path / "cache", 1000)
    assert [reader.read(s, 0) for s in range(5)] == [plain.read(s, 0) for s in range(5)]
    assert not list((tmp_path / "cache").glob("*.tar"))
