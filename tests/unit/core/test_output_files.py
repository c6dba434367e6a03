"""Outputs are checked before the work begins, and one line reports a problem."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from uniemox_dist.cli.main import run, uniemox
from uniemox_dist.cli.one_run import RunPath
from uniemox_dist.core.errors import EXIT_USER, UserError
from uniemox_dist.core.files import check_output, hide_secrets, require_local

RELEASE = str(Path(__file__).parents[2] / "golden/release")


def test_a_writable_output_passes_and_no_file_is_left(tmp_path: Path) -> None:
    check_output(None, "--json")
    check_output(tmp_path / "a/b/c.json", "--json")
    check_output(tmp_path / "C.PNG", "--confusion", ".png")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_reported_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, suffix, says in (
        (tmp_path, "", "is a folder; give a file"),
        (tmp_path / "c.txt", ".png", "is written as PNG; give a name that ends with .png"),
        (tmp_path / "file/c.json", "", "cannot be written (Not a directory)"),
        (Path("/proc/c.json"), "", "cannot be written"),
    ):
        with pytest.raises(UserError) as caught:
            check_output(path, "--there", suffix)
        assert str(caught.value).startswith(f"--there={path}: ")
        assert says in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "knn", "nothing", "nowhere", "--json", "OUT"],
        ["evaluate", "probe", "nothing", "nowhere", "--confusion", "OUT.png"],
        ["evaluate", "protocol", "nothing", "nowhere", "--scores", "OUT"],
        ["evaluate", "gallery", "nothing", "nowhere", "--out", "OUT"],
        ["embed", RELEASE, "OUT", "--release", RELEASE],
        ["predict", "nothing", "pictures", "--labels", "a,b", "--save-texts", "OUT"],
        ["reconstruct", RELEASE, RELEASE, "OUT.png"],
        ["report", "nothing", "--out", "OUT"],
        ["release", "nothing", "OUT"],
    ],
)
def test_commands_ask_before_they_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run([word.replace("OUT", f"{tmp_path}/file/x") for word in command]) == EXIT_USER
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "cannot be written (Not a directory)" in lines[0]


RECIPE = ["demo", "data.path=nowhere", "--dry-run"]


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (["shards", "index", "URL"], "DIR"),
        (["shards", "stats", ".", "--json", "URL"], "--json"),
        (["shards", "verify", ".", "--json", "URL"], "--json"),
        (["evaluate", "knn", "nothing", "nowhere", "--json", "URL"], "--json"),
        (["evaluate", "probe", "nothing", "nowhere", "--confusion", "URL.png"], "--confusion"),
        (["evaluate", "protocol", "nothing", "nowhere", "--scores", "URL"], "--scores"),
        (["evaluate", "gallery", "nothing", "nowhere", "--out", "URL"], "--out"),
        (["embed", RELEASE, "URL", "--release", RELEASE], "OUT"),
        (["predict", "nothing", "pictures", "--labels", "a,b", "--save-texts", "URL"], "--save-texts"),
        (["reconstruct", RELEASE, RELEASE, "URL.png"], "OUT"),
        (["report", ".", "--out", "URL"], "--out"),
        (["report", "URL"], "RUN"),
        (["checkpoint", "prune", "URL"], "RUN"),
        (["release", "nothing", "URL"], "OUT"),
        (["doctor", "--run-dir", "URL"], "--run-dir"),
        (["doctor", "--json", "URL"], "--json"),
        (["launch", "scripts", "URL"], "DIR"),
        (["launch", "slurm", "demo", "--jobs", "URL"], "--jobs"),
        (["pretrain", *RECIPE, "run.dir=URL"], "run.dir"),
        (["pretrain", *RECIPE, "data.cache_dir=URL"], "data.cache_dir"),
        (["finetune", "finetune", "--dry-run", "run.dir=URL"], "run.dir"),
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/z", "s3:/bucket/z", "https://key:secret@host/z"])
def test_a_url_is_refused_in_one_line_where_only_local_files_can_be_written(
    command: list[str],
    field: str,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([word.replace("URL", url) for word in command]) == EXIT_USER
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"{field}={url.replace('key:secret', '…')}" in lines[0]
    assert lines[0].endswith("is a URL, but this must be on a local or network file system; give a path")
    assert list(tmp_path.iterdir()) == []


def list_commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield (f"{name} {word}", command)
        if isinstance(command, click.Group):
            yield from list_commands(command, f"{name} {word}")


def test_no_command_takes_a_path_without_the_check_for_urls() -> None:
    unchecked = [
        (name, param.name)
        for name, command in list_commands(uniemox, "uniemox")
        for param in command.params
        if isinstance(param.type, click.Path | click.File) and not isinstance(param.type, RunPath)
    ]
    assert unchecked == []


def test_urls_of_local_files_are_paths() -> None:
    assert require_local("file:///a/b", "OUT") == "/a/b"
    assert require_local("./s3:/b", "OUT") == "./s3:/b"
    assert require_local("day:1/x", "OUT") == "day:1/x"


def test_messages_show_a_url_without_its_secrets() -> None:
    assert hide_secrets("s3://bucket/a b?c") == "s3://bucket/a b?c"
    assert hide_secrets("https://u:p@h:8/x.tar?X-Amz-Signature=abc&X=1#a") == "https://…@h:8/x.tar?…"
    assert hide_secrets("/data/u:p@x?a=b") == "/data/u:p@x?a=b"
