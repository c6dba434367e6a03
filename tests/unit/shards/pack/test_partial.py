"""Valid places of OUT: links, mount points, existing folders; invalid names; and a move that was killed."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from killed_pack import Killed

import shards.pack.partial
import shards.pack.pipeline
from shards.format.manifest import MANIFEST, find_manifest_folders
from shards.pack.partial import INSIDE, PART
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.core.errors import UserError


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def of(table: Path, **more: Any) -> PackSettings:
    return PackSettings(str(table), "table", **{"persons": "none", "shard_samples": 16, **more})


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An empty, separate file system, like a Docker volume."""
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_an_empty_mount_point_is_packed_into(mount: Path, emoji_table: Path, emoji_shards: Path) -> None:
    (mount / "lost+found").mkdir()  # as every fresh ext4 has it
    result = pack(of(emoji_table), mount)
    assert result.folders == [mount / "test", mount / "train"]
    assert sorted(path.name for path in mount.iterdir()) == [
        "lost+found",
        "rejected.parquet",
        "test",
        "train",
    ]
    written = files(mount)
    assert {name: sha for name, sha in written.items() if name.endswith(".tar")} == {
        name: sha for name, sha in files(emoji_shards).items() if name.endswith(".tar")
    }
    assert pack(of(emoji_table), mount, resume=True).reused
    assert files(mount) == written


def test_a_link_to_a_folder_is_packed_into_and_stays_a_link(emoji_table: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert pack(of(emoji_table), tmp_path / "link").packed == {"test": 24, "train": 72}
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert [folder.name for folder in find_manifest_folders(tmp_path / "real")] == ["test", "train"]


def test_an_existing_folder_keeps_its_permissions(emoji_table: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o2750)
    (tmp_path / "out").chmod(0o2750)
    before = (tmp_path / "out").stat()
    pack(of(emoji_table), tmp_path / "out")
    after = (tmp_path / "out").stat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dangling", "a broken link; delete it, or create the folder it points to"),
        ("loop", "a broken link; delete it, or create the folder it points to"),
        ("x" * 300, "File name too long; give another folder"),
        ("x" * 250, "File name too long; give another folder"),  # with .partial behind it
    ],
)
def test_an_impossible_name_is_a_one_line_error_before_anything_is_read(
    name: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught:
        pack(of(tmp_path / "no such source"), tmp_path / name)
    assert str(caught.value) == f"OUT={tmp_path / name}: {says}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "loop"]


@pytest.mark.parametrize("moved", range(9))
@pytest.mark.parametrize("part", [None, (1, 1)], ids=["whole", "part"])
def test_a_killed_move_leaves_nothing_that_looks_complete_and_resume_finishes_it(
    moved: int,
    part: tuple[int, int] | None,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = PackSettings(str(photo_folder), "folder", persons="none", shard_samples=8)
    pack(settings, tmp_path / "whole", part=part)
    out = tmp_path / "out"
    out.mkdir()
    names: list[str] = []

    def rename(source: Path, target: Path) -> None:
        if len(names) == moved:
            raise Killed
        names.append(target.name)
        real(source, target)

    real = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(shards.pack.partial.os, "rename", rename)
        patch.setattr(shards.pack.partial.shutil, "rmtree", lambda *_, **__: None)
        with suppress(Killed):
            pack(settings, out, part=part)
    assert len(names) == min(moved, 8 if part else 7)
    expected = files(tmp_path / "whole")
    if (out / MANIFEST).exists():
        present = files(out)
        assert all(present.get(name) == sha for name, sha in expected.items() if name != PART)
    if (out / PART).exists():
        assert (out / MANIFEST).exists()
    if names:
        with pytest.raises(UserError, match="use --resume to keep a complete pack"):
            pack(settings, out, part=part)
    result = pack(settings, out, part=part, resume=True)
    assert files(out) == expected
    assert not (out / INSIDE).exists()
    assert sum(result.packed.values()) == 20


def test_a_full_volume_is_an_error_that_names_the_kept_shards(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    settings = PackSettings(str(photo_folder), "folder", persons="none", shard_samples=8)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.pack.pipeline, "write_rejected", full)
        with pytest.raises(
            UserError, match=r"complete shards are in out/\.partial; free some space, then continue"
        ):
            pack(settings, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"an interrupted pack is in out/\.partial; continue it with --resume"
    ):
        pack(settings, tmp_path / "out")
    assert pack(settings, tmp_path / "out", resume=True).resumed == 20
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("other", [{"part": (3, 5)}, {"part": None}, {"part": (1, 4)}, {"seed": 9}])
def test_a_part_without_any_sample_is_kept_only_for_its_own_settings(
    other: dict[str, Any], emoji_table: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(emoji_table).slice(0, 1), tmp_path / "one.parquet")
    out = tmp_path / "out"
    assert pack(of(tmp_path / "one.parquet"), out, part=(1, 5)).records == 0
    assert pack(of(tmp_path / "one.parquet"), out, part=(1, 5), resume=True).reused
    asked = {"part": (1, 5), **other}
    part = asked.pop("part")
    with pytest.raises(UserError, match="was packed with other settings; give another folder, or delete it"):
        pack(of(tmp_path / "one.parquet", **asked), out, part=part, resume=True)
    (out / PART).write_text("{")
    with pytest.raises(UserError, match=r"part\.json cannot be read; delete OUT and pack this part again"):
        pack(of(tmp_path / "one.parquet"), out, part=(1, 5), resume=True)
