"""Names of a source's files: unique, for local and remote sources."""

from pathlib import Path

import pytest
from upath import UPath

from shards.sources.files import is_clutter, name_below
from shards.storage import match_pattern, parse_place


@pytest.mark.parametrize(
    ("source", "path", "name"),
    [
        ("/data/x.tar", "/data/x.tar", "x.tar"),
        ("x.tar", "x.tar", "x.tar"),
        ("/data", "/data/x.tar", "x.tar"),
        ("/data/", "/data/train/x.tar", "train/x.tar"),
        ("/data/*/x.tar", "/data/train/x.tar", "train/x.tar"),
        ("/data/*.tar", "/data/x.tar", "x.tar"),
        ("/*/x.tar", "/data/x.tar", "data/x.tar"),
        ("*/x.tar", "train/x.tar", "train/x.tar"),
        ("./in/**/x.tar", "in/a/b/x.tar", "a/b/x.tar"),
        ("file:///data/[ab]/x.tar", "/data/a/x.tar", "a/x.tar"),
    ],
)
def test_a_file_is_called_by_its_path_below_the_source(source: str, path: str, name: str) -> None:
    assert name_below(Path(path), source) == name


def test_files_of_a_pattern_are_named_below_its_fixed_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.tar", "b/x.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
        remote = UPath("memory://named") / name
        remote.parent.mkdir(parents=True, exist_ok=True)
        remote.touch()
    monkeypatch.chdir(tmp_path)
    for base in (f"{tmp_path}/", "", "./", f"file://{tmp_path}/", "memory://named/"):
        source = f"{base}*/x.tar"
        assert [name_below(path, source) for path in match_pattern(source) or ()] == ["a/x.tar", "b/x.tar"]
        below = [
            name_below(path, base or ".")
            for path in sorted(parse_place(base or ".").glob("*/*.tar"), key=str)
        ]
        assert below == ["a/x.tar", "b/x.tar"]


@pytest.mark.parametrize(
    ("folder", "expected"), [("__MACOSX", True), (".git", True), ("macosx", False), ("a.b", False)]
)
def test_hidden_folders_and_those_of_macos_archives_are_clutter(folder: str, expected: bool) -> None:
    assert is_clutter(folder) is expected
