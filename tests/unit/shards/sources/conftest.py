"""Runs the commands of shards/sources/README.md on miniatures of published sets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_sets import SETS, command_of, refusals, samples

from uniemox_dist.cli.main import run


class Packed:
    """A pack that ran: its samples by their names in the source, the refused records, and the printed summary."""

    def __init__(self, out: Path, summary: str) -> None:
        self.samples: dict[str, dict[str, Any]] = samples(out)
        self.summary = summary
        self.refused = refusals(out)

    def column(self, field: str) -> dict[str, Any]:
        """One field of all samples."""
        return {name: sample[field] for name, sample in self.samples.items()}


@pytest.fixture
def pack_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Writes a miniature, runs the document's command for its SOURCE, and returns what was packed."""

    def packed(source: str, write: Callable[[Path], None] | None = None) -> Packed:
        monkeypatch.chdir(tmp_path)
        (SETS[source] if write is None else write)(tmp_path / source)
        words = command_of(source)
        code = run([*words, "--workers", "0"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return Packed(tmp_path / words[3], out)

    return packed


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `shards pack` with a line of arguments; returns its exit code and what it printed to both streams."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        code = run(["shards", "pack", "--persons", "none", *line.split(), "--workers", "0"])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def pack_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a pack that must end with exit code 2 and one line; returns that line."""

    def failed(line: str) -> str:
        monkeypatch.chdir(tmp_path)
        code = run(["shards", "pack", "--persons", "none", *line.split(), "--workers", "0"])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (2, 1), err
        assert not Path("out").exists()
        return str(err)

    return failed
