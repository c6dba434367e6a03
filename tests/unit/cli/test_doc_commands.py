"""Every command line of README and docs names a command and options that exist."""

from itertools import takewhile
from pathlib import Path

import click
import pytest
from doc_lines import command_lines

from uniemox_dist.cli.main import uniemox

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "shards").rglob("*.md")),
]


def parts(words: list[str]) -> list[list[str]]:
    """The words after `--` of `launch` are a command line of their own."""
    at = words.index("--") if words[0] == "launch" and "--" in words else len(words)
    return [part for part in (words[:at], words[at + 1 :]) if part]


LINES = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for path in DOCUMENTS
    for line in command_lines(path.read_text(encoding="utf-8"))
    for words in parts(line)
]


@pytest.mark.parametrize("words", LINES)
def test_command_lines_in_the_docs_name_existing_options(words: list[str]) -> None:
    command: click.Command = uniemox
    context = click.Context(command)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0).split("|")[0]
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {
        "--help",
        "--version",
    }
    for word in takewhile(lambda word: word != "--", rest):  # another command follows it
        name = word.strip("[]").split("=")[0].split("|")[0]
        if name.startswith("--") and name != "--":
            assert name in options, f"uniemox {' '.join(words)}: no option {name}"


def test_the_docs_contain_command_lines() -> None:
    assert len(LINES) > 40
