"""Caption embeddings beside the shards are row-aligned and used only for their own teacher and captions."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from inputs import make_teacher
from safetensors.torch import load_file, save_file

from shards.edit.merge import merge
from shards.format.index import index_path, read_index, rows_sha256, write_index
from shards.format.manifest import Manifest, read_manifest
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER
from uniemox_dist.core.files import sha256_file
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.text_cache import TextVectors, build, choose_folder


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))


@pytest.fixture
def captioned(emoji_table: Path, tmp_path: Path) -> Path:
    """30 pictures with 0, 1 or 2 captions each, in three shards."""
    rows = pq.read_table(emoji_table).slice(0, 30).to_pylist()
    for i, row in enumerate(rows):
        row["caption"] = [f"caption {i % 7}", f"another {i}"][: i % 3]
        row.pop("split")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    pack(PackSettings(str(tmp_path / "t.parquet"), persons="none", shard_samples=12), tmp_path / "data")
    return tmp_path / "data"


def check_rows(reader: ShardReader, folder: Path, teacher: Teacher) -> int:
    """Compares every caption's vector with the teacher's own; returns how many there are."""
    vectors = TextVectors(reader, folder)
    count = 0
    for shard, entry in enumerate(reader.manifest.shards):
        for row in range(entry.samples):
            captions = list(reader.read(shard, row).captions) or [""]
            expected = teacher.embed_texts(captions)
            for number in range(len(captions)):
                found = vectors.vector(shard, row, number).float()
                torch.testing.assert_close(found, expected[number], rtol=0, atol=2e-3)
                count += 1
    return count


def test_every_caption_of_every_row_has_its_vector(captioned: Path, teacher: Teacher, tmp_path: Path) -> None:
    reader = ShardReader.from_folder(captioned, "data.path")
    folder = choose_folder(reader, teacher.id, tmp_path / "fallback")
    assert folder == captioned / "cache" / teacher.id
    build(reader, teacher, folder, batch=8)
    assert check_rows(reader, folder, teacher) == 40


def test_rows_that_a_merge_marked_have_no_vector_and_shift_none(
    emoji_table: Path, teacher: Teacher, tmp_path: Path
) -> None:
    rows = [
        {k: v for k, v in row.items() if k != "split"} for row in pq.read_table(emoji_table).to_pylist()[:30]
    ]
    rows += [{**rows[i], "key": f"copy{i}", "caption": f"copy {i}"} for i in range(10)]
    for (
        row
    ) in rows:  # as files, because rows with the same bytes in a column are joined before they are packed
        (tmp_path / f"{row['key']}.webp").write_bytes(row.pop("image"))
        row["path"] = f"{row['key']}.webp"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    settings = PackSettings(str(tmp_path / "t.parquet"), persons="none", shard_samples=8)
    for i in (1, 2, 3):
        pack(settings, tmp_path / f"p{i}", part=(i, 3))
    result = merge(tmp_path / "out", [tmp_path / f"p{i}" for i in (1, 2, 3)])
    assert result.marked > 0
    reader = ShardReader.from_folder(tmp_path / "out", "data.path")
    build(reader, teacher, tmp_path / "cache", batch=64)
    assert check_rows(reader, tmp_path / "cache", teacher) == 30


def test_a_shard_of_marked_samples_only_has_no_vectors(
    captioned: Path, teacher: Teacher, tmp_path: Path
) -> None:
    manifest = read_manifest(captioned)
    entries = list(manifest.shards)
    index = index_path(captioned, entries[1].name)
    rows = [{**row, "refused": "duplicate"} for row in read_index(index).to_pylist()]
    write_index(index, rows)
    entries[1] = replace(
        entries[1], samples=0, index_sha256=sha256_file(index), rows_sha256=rows_sha256(rows)
    )
    Manifest(tuple(entries), manifest.provenance).write(captioned)
    reader = ShardReader.from_folder(captioned, "data.path")
    build(reader, teacher, tmp_path / "cache", batch=8)
    empty = load_file(tmp_path / "cache/000001.safetensors")
    assert (empty["texts"].shape, empty["first"].tolist()) == ((0, teacher.width), [0])
    left = 40 - sum(len(row["captions"]) or 1 for row in rows)
    assert check_rows(reader, tmp_path / "cache", teacher) == left
    assert build(reader, teacher, tmp_path / "cache", batch=8) == 0


@pytest.fixture
def read_only(captioned: Path) -> Iterator[Path]:
    """`captioned` on a read-only file system, which not even root can write."""
    command = ["mount", "--bind", str(captioned), str(captioned)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs privileges")
    subprocess.run(["mount", "-o", "remount,bind,ro", captioned], check=True)
    yield captioned
    subprocess.run(["umount", "-l", captioned], check=False)


def test_a_folder_that_cannot_be_written_gets_no_cache(
    read_only: Path, tiny_teacher: Path, teacher: Teacher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = ShardReader.from_folder(read_only, "data.path")
    assert choose_folder(reader, teacher.id, tmp_path / "run").is_relative_to(tmp_path / "run")
    assert run(["teach", str(read_only), "--teacher", f"local-dir:{tiny_teacher}"]) == EXIT_USER
    says = f"uniemox: error: DIR={read_only}: its cache: cannot be written (Read-only file system); run it on"
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith(says)]


def test_a_read_only_cache_is_used_if_it_is_complete(
    captioned: Path, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader.from_folder(captioned, "data.path")
    beside = captioned / "cache" / teacher.id
    build(reader, teacher, beside, batch=64)
    monkeypatch.setattr("uniemox_dist.teacher.text_cache._can_write", lambda _: False)
    assert choose_folder(reader, teacher.id, tmp_path / "run") == beside
    (beside / "000002.safetensors").unlink()
    assert choose_folder(reader, teacher.id, tmp_path / "run").is_relative_to(tmp_path / "run")


def test_a_cache_is_kept_while_teacher_and_captions_are_the_same(
    captioned: Path, teacher: Teacher, tmp_path: Path
) -> None:
    reader = ShardReader.from_folder(captioned, "data.path")
    folder = tmp_path / "cache"
    assert build(reader, teacher, folder, batch=64) > 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(reader, teacher, folder, batch=64) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "000000.safetensors").write_bytes(b"damaged")
    (folder / "000001.safetensors").unlink()
    assert build(reader, teacher, folder, batch=64) > 0
    assert check_rows(reader, folder, teacher) == 40


def test_vectors_of_other_captions_or_another_teacher_are_not_used(
    captioned: Path, teacher: Teacher, tmp_path: Path
) -> None:
    reader = ShardReader.from_folder(captioned, "data.path")
    folder = tmp_path / "cache"
    build(reader, teacher, folder, batch=64)
    other = Teacher(TeacherConfig(name=f"local-dir:{make_teacher(tmp_path / 'other', seed=1)}"))
    assert other.id != teacher.id
    assert build(reader, other, folder, batch=64) > 0  # even in the same folder
    assert check_rows(reader, folder, other) == 40
    path = folder / "000000.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, {"format": "uniemox-texts-1", "teacher": other.id, "captions_sha256": "0" * 64})
    assert build(reader, other, folder, batch=64) > 0


def test_a_cache_of_remote_shards_lies_in_the_runs_folder(
    captioned: Path, teacher: Teacher, tmp_path: Path
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(captioned), "/captioned", recursive=True)
    reader = ShardReader.from_folder("memory://captioned", "data.path")
    folder = choose_folder(reader, teacher.id, tmp_path / "run")
    assert folder.is_relative_to(tmp_path / "run")
    build(reader, teacher, folder, batch=64)
    assert check_rows(reader, folder, teacher) == 40


def test_the_command_prints_how_much_it_embedded(
    captioned: Path, tiny_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["teach", str(captioned), "--teacher", f"local-dir:{tiny_teacher}"]) == EXIT_DONE
    assert f"{captioned}: " in capfd.readouterr().out
    assert len(list((captioned / "cache").glob("*/*.safetensors"))) == 3
    shutil.rmtree(captioned / "cache")
    assert run(["teach", str(captioned), "--teacher", "ViT-B-16"]) == EXIT_USER
    assert "an open_clip model name needs --weights FILE" in capfd.readouterr().err
    assert run(["teach", str(tmp_path / "no"), "--teacher", f"local-dir:{tiny_teacher}"]) == EXIT_USER
    assert not (captioned / "cache").exists()
