"""Packs that do not end well: killed, out of room, started twice; and going on."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards.pack.packer
from shards.format.manifest import read_manifest
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER, UserError

ROOT = Path(__file__).parents[4]


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def settings(table: Path, **more: Any) -> PackSettings:
    return PackSettings(str(table), "table", **{"persons": "none", "shard_samples": 7, **more})


class Stopping(shards.pack.packer.ShardWriter):
    """Ends with an error when `after` shards are whole."""

    after = 2
    error: BaseException = RuntimeError("stop")

    def add_encoded(self, sample: Any) -> None:
        if len(self.entries) == self.after:
            raise self.error
        super().add_encoded(sample)


@pytest.fixture
def dirty_table(emoji_table: Path, tmp_path: Path) -> Path:
    """96 pictures in two splits with a broken one and a duplicate after every tenth."""
    rows = pq.read_table(emoji_table).to_pylist()
    for i in range(0, 90, 10):
        rows += [{**rows[i], "key": f"copy{i}"}, {**rows[i], "key": f"bad{i}", "image": b"no picture"}]
    table = pa.Table.from_pylist(rows).drop_columns(
        ["caption"]
    )  # with captions the duplicates would be joined
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    return tmp_path / "t.parquet"


@pytest.mark.parametrize("after", [0, 1, 3, 8])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["fault", "interrupt"])
def test_resuming_writes_the_bytes_of_an_undisturbed_pack(
    after: int, error: BaseException, dirty_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(settings(dirty_table), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(shards.pack.packer, "ShardWriter", Stopping)
        patch.setattr(Stopping, "after", after)
        patch.setattr(Stopping, "error", error)
        with pytest.raises(type(error)):
            pack(settings(dirty_table), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without a whole shard nothing is kept, so that another try can start at once.
    assert (tmp_path / "out.partial").exists() == (after > 0)
    resumed = pack(settings(dirty_table), tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (resumed.records, resumed.packed, resumed.with_person) == (
        whole.records,
        whole.packed,
        whole.with_person,
    )
    assert resumed.rejected == whole.rejected
    assert (resumed.resumed > 0) == (after > 0)


def test_an_interrupted_pack_is_not_overwritten_unasked(
    dirty_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards.pack.packer, "ShardWriter", Stopping)
        with pytest.raises(RuntimeError):
            pack(settings(dirty_table), tmp_path / "out")
    before = files(tmp_path / "out.partial")
    with pytest.raises(
        UserError, match=r"an interrupted pack is in out\.partial; continue it with --resume, or delete"
    ):
        pack(settings(dirty_table), tmp_path / "out")
    with pytest.raises(
        UserError, match="cannot resume: other settings: seed=1 was 0, part=2/3 was none; use"
    ):
        pack(settings(dirty_table, seed=1), tmp_path / "out", resume=True, part=(2, 3))
    with pytest.raises(UserError, match="cannot resume: other settings: part=2/3 was none; use"):
        pack(settings(dirty_table), tmp_path / "out", resume=True, part=(2, 3))
    rows = pq.read_table(dirty_table)
    pq.write_table(rows.slice(0, 100), dirty_table)
    with pytest.raises(UserError, match="cannot resume: its source has changed"):
        pack(settings(dirty_table), tmp_path / "out", resume=True)
    after = files(tmp_path / "out.partial")
    assert {k: v for k, v in after.items() if not k.endswith("records.jsonl")} == {
        k: v for k, v in before.items() if not k.endswith("records.jsonl")
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_killed_at_any_moment_resumes_without_loss_or_duplicate(
    workers: int, dirty_table: Path, tmp_path: Path
) -> None:
    pack(settings(dirty_table, shard_samples=3), tmp_path / "whole")
    kill_until_complete(dirty_table, tmp_path, workers)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_killed_pack_of_joined_rows_resumes_without_loss_or_duplicate(
    emoji_table: Path, tmp_path: Path
) -> None:
    """Five rows of each picture, in any order, become one sample; two pictures are refused, one for its labels."""
    names = []
    for number, row in enumerate(pq.read_table(emoji_table, columns=["image"]).to_pylist()[:60]):
        names.append(f"{number}.png")
        (tmp_path / names[-1]).write_bytes(row["image"] if number else b"no picture")
    rows = [{"path": name, "caption": f"{name} {i}", "n": i} for name in names for i in range(5)]
    rows[7]["label"], rows[8]["label"] = "joy", "fear"
    random.Random(0).shuffle(rows)
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    whole = pack(settings(table, shard_samples=3), tmp_path / "whole")
    assert (whole.records, whole.packed, whole.contents["captions"]) == (60, {"": 58}, 290)
    assert {refused.reason for refused in whole.rejected} == {"corrupt", "conflict"}
    kill_until_complete(table, tmp_path, workers=0)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def kill_until_complete(table: Path, tmp_path: Path, workers: int) -> None:
    """kill -9 of the real command, again and again, until one attempt reaches the end."""
    options = ["--persons", "none", "--shard-samples", "3", "--workers", str(workers), "--resume"]
    command = [sys.executable, "-m", "uniemox_dist.cli", "shards", "pack", str(table)]
    command += [str(tmp_path / "out"), *options]
    kills = 0
    for attempt in range(20):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        shards_before = whole_shards(tmp_path)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if kills < 2 and whole_shards(tmp_path) - shards_before >= 2 + attempt:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            if kills == 0:  # it was too fast for this process: try again from the beginning
                shutil.rmtree(tmp_path / "out")
                continue
            break
        assert _ends_soon(os.getpgid(process.pid) if process.poll() is None else process.pid)
    assert kills >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_names_the_option_that_continues(
    number: signal.Signals, dirty_table: Path, tmp_path: Path
) -> None:
    """The signal is sent to all processes of the command, as a terminal and Slurm do."""
    pack(settings(dirty_table, shard_samples=3), tmp_path / "whole")
    command = [sys.executable, "-m", "uniemox_dist.cli", "shards", "pack", str(dirty_table)]
    command += [str(tmp_path / "out"), "--persons", "none", "--shard-samples", "3", "--workers", "1"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while whole_shards(tmp_path) < 2:
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, number)
        _, errors = process.communicate()
    assert process.returncode == EXIT_FAULT
    assert errors.strip().splitlines()[-1] == (
        f"uniemox: error: OUT={tmp_path / 'out'}: interrupted; continue after the complete shards with the same "
        "command and --resume"
    )
    assert run([*command[3:], "--resume"]) == EXIT_DONE
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def whole_shards(folder: Path) -> int:
    """Tars of the interrupted pack; the folder may be renamed at any time."""
    return sum(len(glob(f"{folder}/out.partial/{pattern}")) for pattern in ("*.tar", "*/*.tar"))


def _ends_soon(group: int) -> bool:
    """Whether no process of a killed pack is left: its workers notice that their parent has ended."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_two_packs_do_not_write_into_one_folder(dirty_table: Path, tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / "out.partial/.work"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing into"):
            pack(settings(dirty_table), tmp_path / "out")
    pack(settings(dirty_table), tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system with room for half of the pictures."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def test_a_full_disk_is_one_line_and_complete_shards_stay_intact(
    emoji_table: Path, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--persons", "none", "--shard-samples", "7", "--workers", "0"]
    out = small_disk / "out"
    assert run(["shards", "pack", str(emoji_table), str(out), *options]) == EXIT_USER
    [line] = [text for text in capfd.readouterr().err.splitlines() if text.startswith("uniemox: error")]
    assert line.endswith(
        f"OUT={out}: No space left on device; complete shards are in out.partial; free some space, then "
        "continue with the same command and --resume"
    )
    tars = list((small_disk / "out.partial").rglob("*.tar"))
    assert tars
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    kept = {tar.name: tar.stat().st_mtime_ns for tar in tars}
    assert run(["shards", "pack", str(emoji_table), str(out), *options, "--resume"]) == EXIT_DONE
    pack(settings(emoji_table), tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert {name: (out / "test" / name).stat().st_mtime_ns for name in kept if (out / "test" / name).exists()}


def test_a_read_only_target_is_one_line(
    emoji_table: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert (
        run(["shards", "pack", str(emoji_table), str(small_disk / "out"), "--persons", "none"]) == EXIT_USER
    )
    assert "cannot be written (Read-only file system); give another folder" in capfd.readouterr().err


def test_a_leftover_of_the_last_moment_is_cleared_by_resume(emoji_table: Path, tmp_path: Path) -> None:
    """Killed between the renaming to OUT and the deletion of the working folder."""
    pack(settings(emoji_table), tmp_path / "out")
    (tmp_path / "out/.work").mkdir()
    (tmp_path / "out/.work/journal.jsonl").write_text("")
    result = pack(settings(emoji_table), tmp_path / "out", resume=True)
    assert result.reused
    assert result.records == read_manifest(tmp_path / "out/train").samples + 24
    assert not (tmp_path / "out/.work").exists()


def test_a_killed_pack_without_a_complete_shard_is_replaced(emoji_table: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial/train").mkdir(parents=True)
    (tmp_path / "out.partial/train/999999.tar").write_bytes(b"half")
    pack(settings(emoji_table), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/train/999999.tar").exists()
    shutil.rmtree(tmp_path / "out")
