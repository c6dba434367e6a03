"""A complete.json that is well-formed JSON, whose hash fits, and that holds what no save writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.handmade import TINY_STUDENT, config_of, write_checkpoint
from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    digest,
    find_checkpoint,
    find_newest_sound,
    list_unreadable,
    read_checkpoint,
)
from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER, UserError
from uniemox_dist.core.files import read_json, write_json
from uniemox_dist.models.student import Student

PART = "part_00000.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = config_of(TINY_STUDENT.model_dump(), relation=0.0, similarity=0.0)
    write_checkpoint(tmp_path / "run", Student(config.model, config.loss, None), config, None)
    return tmp_path / "run"


def damage(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes the content of complete.json, and its hash with it."""
    path = run / "checkpoints" / "step_00000007" / COMPLETE
    info = read_json(path)
    change(info)
    write_json(path, {**info, "sha256": digest(info)})
    return path


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda info: info.__setitem__(key, value)


def of_part(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda info: info["files"][PART].__setitem__(key, value)


def rename_part(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda info: info["files"].__setitem__(name, info["files"].pop(PART))


WRONG = {
    "negative bytes": (of_part("bytes", -5), f"has files.{PART}.bytes=-5 instead of a whole number"),
    "bytes beyond int64": (of_part("bytes", 1 << 63), f"has files.{PART}.bytes=9223372036854775808 instead"),
    "bytes a bool": (of_part("bytes", True), f"has files.{PART}.bytes=true instead"),
    "sha256 null": (of_part("sha256", None), f"has files.{PART}.sha256=null instead of a text"),
    "this folder": (rename_part("."), "has the file name '.' in files"),
    "the folder above": (rename_part(".."), "has the file name '..' in files"),
    "no name": (rename_part(""), "has the file name '' in files"),
    "another folder": (rename_part("../x"), "has the file name '../x' in files"),
    "NUL in a name": (rename_part("a\0b"), r"has the file name 'a\x00b' in files"),
    "line break in a name": (rename_part("a\n"), r"has the file name 'a\n' in files"),
    "parameters null": (entry("parameters", None), "has parameters=null instead of an object of shapes"),
    "shape a text": (entry("parameters", {"a": "x"}), "has parameters.a=x instead of a list"),
    "shape negative": (entry("parameters", {"a": [-1]}), "has parameters.a=-1 instead of a list"),
    "adam_step a text": (entry("adam_step", "x"), "has adam_step=x instead of a number of at least 0"),
    "config a list": (entry("config", [1]), "has config=1 instead of an object of sections"),
    "section null": (lambda info: info["config"].update(data=None), "has config.data=null instead of"),
    "zero_stage 4": (entry("zero_stage", 4), "has zero_stage=4 instead of 0, 1, 2 or 3"),
    "world_size 0": (entry("world_size", 0), "has world_size=0 instead of a whole number of at least 1"),
    "teacher a text": (entry("teacher", "x" * 1000), f"has teacher={'x' * 80} … instead of null or an"),
    "embedding_width a text": (entry("embedding_width", "x"), "has embedding_width=x instead of null"),
    "files a list": (entry("files", []), "has files=none instead of an object"),
    "another step": (entry("step", 8), "is that of step 8"),
    "config empty": (entry("config", {}), "lacks config.run"),
    "config without data": (lambda info: info["config"].pop("data"), "lacks config.data"),
    "no parameters": (lambda info: info.pop("parameters"), "lacks parameters"),
    "no data_identity": (lambda info: info.pop("data_identity"), "lacks data_identity"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_entry_is_damage_for_starts_verify_and_release(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    reason: str,
) -> None:
    path = damage(run, change)
    # A start sets aside folders that cannot be read, and then the checkpoints that have a problem.
    problems = [text for _, text in list_unreadable(path.parent.parent)]
    sound, others = find_newest_sound(path.parent.parent)
    assert sound is None
    assert [text.startswith(f"{path} {reason}") for text in problems + others] == [True], problems + others
    assert uniemox(["checkpoint", "verify", str(run)]) == EXIT_FAULT
    assert f"DAMAGED: {path} {reason}" in capsys.readouterr().out
    for named in (path.parent, run):
        assert uniemox(["release", str(named), str(tmp_path / "out")]) == EXIT_USER
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"uniemox: error: RUN={named}: ")
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_that_these_tests_damage_is_sound(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run, lambda info: None)
    assert uniemox(["checkpoint", "verify", str(run)]) == EXIT_DONE
    assert uniemox(["release", str(run), str(tmp_path / "out")]) == EXIT_DONE


def test_sizes_are_compared_before_memory_is_allocated(run: Path) -> None:
    path = damage(run, of_part("bytes", 1 << 62))
    checkpoint = read_checkpoint(path.parent)
    assert checkpoint is not None
    problem = checkpoint.problem(hashes=True, files=[PART], keep=True)
    assert problem is not None
    assert problem.endswith(f"bytes instead of {1 << 62}")


@pytest.mark.parametrize("text", ["[" * 100_000, "\0", '{"format": "uniemox-checkpoint", "step": NaN}'])
def test_what_is_no_json_object_is_damage(run: Path, text: str) -> None:
    path = run / "checkpoints" / "step_00000007" / COMPLETE
    path.write_text(text)
    assert [folder for folder, _ in list_unreadable(path.parent.parent)] == [path.parent]
    with pytest.raises(UserError, match="use another checkpoint"):
        find_checkpoint(path.parent, "RUN")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda info: info["config"]["model"].update(width="x"), "config: model.width='x': "),
        (lambda info: info["config"]["run"].pop("max_steps"), "config: give one of run.max_steps"),
    ],
)
def test_a_release_of_a_config_with_a_wrong_value_is_a_user_error(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    reason: str,
) -> None:
    path = damage(run, change)
    assert uniemox(["release", str(run), str(tmp_path / "out")]) == EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"uniemox: error: {path}: {reason}")


def test_the_recorded_checkpoint_of_an_earlier_version_has_right_entries(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden/checkpoint"
    folder = tmp_path / "step_00000002"
    folder.symlink_to(golden)
    checkpoint = read_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.problem(hashes=True) is None
    assert "fragments" not in json.loads((golden / COMPLETE).read_text())
