"""Wrong command lines get one line and exit code 2, leave nothing, and `--help` speaks in the imperative."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from uniemox_dist.cli.main import run, uniemox

RELEASE = Path(__file__).parents[2] / "golden/release"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file, an empty folder and a folder of one unreadable picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_text("no picture")
    (tmp_path / "site.yaml").write_text("{gpus_per_node: 0, ranks_per_node: 1, time: 60}")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("nosuch", "No such command 'nosuch'. See `uniemox --help`"),
        ("pretrain", "Missing argument 'RECIPE'. See `uniemox pretrain --help`"),
        (
            "pretrain empty --dry-run",
            "recipe empty: no such file, nor a shipped recipe; shipped are: ablation",
        ),
        ("finetune demo --dry-run", "finetune: this recipe has no such section"),
        (
            "plan demo --nodes 1 --gpus-per-node 1 --samples 9 --gpu x",
            "--gpu=x: not in the table; valid are b200, ",
        ),
        (
            "plan demo --nodes 1 --gpus-per-node 1 --from-run file",
            "--from-run=file: is a file; give run.dir/run.name",
        ),
        (
            "pretrain demo data.resize=box --dry-run",
            "data.resize='box': input should be 'bicubic' or 'bilinear'",
        ),
        (
            "teach empty --teacher shipped:demo --views 1 --resize box",
            "Invalid value for '--resize': 'box' is not one of 'bicubic', 'bilinear'.",
        ),
        ("doctor --data empty --short", "--data=empty: --short does not check shards; leave one of them out"),
        ("report nowhere", "RUN=nowhere: no such folder; give run.dir/run.name"),
        ("report file", "RUN=file: is a file; give run.dir/run.name"),
        (
            "report . --evaluation empty",
            "--evaluation=empty: is a folder; write it with `uniemox evaluate protocol",
        ),
        ("report . --evaluation x", "--evaluation=x: no such file; write it with `uniemox evaluate protocol"),
        ("report . --out empty", "--out=empty: is a folder; give a file"),
        ("report . --out ''", "--out is empty; give a file"),
        ("checkpoint list file", "RUN=file: is a file; give run.dir/run.name"),
        ("release x y --evaluation empty", "--evaluation=empty: is a folder; write it with"),
        (
            "evaluate probe file data",
            "RELEASE=file: is a file; give a folder that `uniemox release RUN OUT` wrote",
        ),
        (
            "evaluate probe empty data",
            "RELEASE=empty: lacks uniemox.json; write it with `uniemox release RUN OUT`",
        ),
        (
            "evaluate knn timm:a=b data",
            "timm:a=b: b is not a safetensors file; give timm:NAME=FILE.safetensors",
        ),
        (
            "embed nowhere out.parquet --release RELEASE",
            "INPUT=nowhere: no such file or folder; give a picture",
        ),
        ("embed pictures out.parquet --release empty", "--release=empty: lacks uniemox.json"),
        ("embed pictures empty --release RELEASE", "OUT=empty: is a folder; give a file"),
        ("predict empty pictures", "MODEL=empty: lacks uniemox.json"),
        ("reconstruct RELEASE pictures out.jpg", "is written as PNG; give a name that ends with .png"),
        (
            "shards pack pictures out --layout ''",
            "--layout=: not known; valid are coco, ",
        ),
        (
            "shards pack pictures out --layout coco --column image=x",
            "--column=image=x: --layout coco has no columns; leave it out, or give --layout folder or table",
        ),
        (
            "shards pack pictures out --layout folder --persons source",
            "--persons=source: --layout folder has no person boxes; give nanodet, onnx:FILE or none",
        ),
        (
            "shards pack pictures out --layout folder --captions empty",
            "--captions=empty: cannot be read (Is a dir",
        ),
        ("shards verify nowhere", "DIR=nowhere: no such folder; build it with `uniemox shards pack`"),
        ("shards stats file", "DIR=file: is a file; build it with `uniemox shards pack`"),
        ("shards stats empty --json empty", "--json=empty: is a folder; give a file"),
        ("shards index file", "DIR=file: is a file; give a folder with .tar files"),
        ("teach file --teacher shipped:demo", "DIR=file: is a file; build it with `uniemox shards pack`"),
        ("launch slurm demo --cluster empty", "--cluster=empty: no such file, nor a shipped cluster"),
        (
            "launch slurm --cluster site.yaml --",
            "RECIPE: missing; give a recipe, or another command after --",
        ),
        ("launch scripts file", "DIR=file: cannot be written"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(
    line: str, text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert run([word.strip("'") for word in line.replace("RELEASE", str(RELEASE)).split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("uniemox: error: ")
    assert text in err
    assert sorted(place.rglob("*")) == before


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    yield context.command_path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, click.Context(found, info_name=name, parent=context))


def test_help_speaks_in_the_imperative_and_every_option_has_a_text() -> None:
    for path, command in commands(uniemox, click.Context(uniemox, info_name="uniemox")):
        assert command.help, path
        first = command.help.split()[0]
        assert re.fullmatch(r"[A-Z][a-z-]*[^s]", first), f"{path}: {first}"
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{path} {option.name}"


def test_filter_names_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    from shards.edit.expressions import NUMBERS, TEXTS
    from shards.format.index import SCHEMA

    assert run(["shards", "select", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert f"Its names are {', '.join([*TEXTS, *NUMBERS])}." in page
    columns = set(SCHEMA.names) - {"sample_offset", "sample_length", "image_offset"}
    assert columns <= {*TEXTS, *NUMBERS}
