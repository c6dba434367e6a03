"""The frozen code: named by its content, whole, used again, and what a program that is started from it imports."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import freeze
from launch.freeze import code_name, content_hash, freeze_code
from uniemox_dist.core.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze_code(tmp_path_factory.mktemp("frozen") / "code", shipped_teacher=False)


def test_a_copy_is_named_by_its_content_and_used_again(copy: Path) -> None:
    assert copy.name == content_hash(copy) == code_name(shipped_teacher=False)
    before = (copy / "launch/freeze.py").stat()
    assert freeze_code(copy.parent, shipped_teacher=False) == copy
    assert (copy / "launch/freeze.py").stat() == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_a_copy_contains_exactly_the_files_that_training_reads(copy: Path) -> None:
    names = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    for needed in ("uniemox_dist/train/loop.py", "uniemox_dist/config/vits.json", "launch/recipes/demo.yaml"):
        assert needed in names
    assert not [n for n in names if n.startswith(("shards/demo/", "shards/detect/weights/", "tests/"))]
    assert not [n for n in names if "demo_teacher" in n]
    assert sum((copy / n).stat().st_size for n in names) < 5e6
    assert stat.S_IMODE((copy / "shards/format/sample.py").stat().st_mode) == 0o444


def test_the_shipped_teacher_is_copied_if_a_run_needs_it(tmp_path: Path) -> None:
    with_teacher = freeze_code(tmp_path / "code", shipped_teacher=True)
    assert (with_teacher / freeze.SHIPPED_TEACHER / "open_clip_config.json").is_file()
    assert with_teacher.name != code_name(shipped_teacher=False)


def test_compiled_files_are_not_an_edit_and_an_edit_is_refused(copy: Path, tmp_path: Path) -> None:
    edited = tmp_path / "code" / copy.name
    shutil.copytree(copy, edited)
    (edited / "launch/__pycache__").mkdir(exist_ok=True)
    (edited / "launch/__pycache__/x.pyc").write_bytes(b"x")
    assert freeze_code(edited.parent, shipped_teacher=False) == edited
    (edited / "uniemox_dist/distributed/local_launcher.py").chmod(0o644)
    (edited / "uniemox_dist/distributed/local_launcher.py").write_text("# edited\n")
    with pytest.raises(UserError, match="was edited since it was frozen"):
        freeze_code(edited.parent, shipped_teacher=False)


def test_a_copy_that_fails_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(freeze, "_copy", full)
    with pytest.raises(UserError, match=r"cannot be made \(No space left on device\)"):
        freeze_code(tmp_path / "code", shipped_teacher=False)
    assert list((tmp_path / "code").iterdir()) == []


def test_a_frozen_program_does_not_import_from_the_working_directory(copy: Path, tmp_path: Path) -> None:
    """Neither a folder `shards/` there, nor a checkout."""
    for package in ("shards", "uniemox_dist"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(copy), "launch", "scripts", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
