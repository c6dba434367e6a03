"""Outputs are checked before the work begins, and one line reports a problem."""

from pathlib import Path

import pytest

from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_USER, UserError
from uniemox_dist.core.files import check_output

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
