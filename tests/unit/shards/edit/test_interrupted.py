"""`shards select`, `split` and `merge` that are killed, and started twice."""

import io
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from killed_commands import SMALL, run_and_kill_at_change, run_and_kill_at_request
from s3 import list_local, list_objects, serve_s3

import shards.edit.select
import shards.pack.remote
from shards.format.manifest import find_manifest_folders
from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER

COMMANDS = {
    "select": ["select", "{a}", "{out}", "--filter", "side > 0"],
    "link": ["select", "{a}", "{out}", "--link"],
    "split": ["split", "{a}", "{out}", "--shares", "train=60,test=40"],
    "merge": ["merge", "{out}", "{a}", "{b}", "--same-key", "rename"],
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.edit.select, "COPY_SAMPLES", SMALL)


@pytest.fixture(scope="module")
def sets(emoji_table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets without splits: of 40 and 20 pictures, 10 of which are the same."""
    folder = tmp_path_factory.mktemp("sets")
    rows = pq.read_table(emoji_table).drop_columns("split")
    for name, part in (("a", rows.slice(0, 40)), ("b", rows.slice(30, 20))):
        pq.write_table(part, folder / f"{name}.parquet")
        pack(PackSettings(str(folder / f"{name}.parquet"), persons="none", shard_samples=9), folder / name)
    return {"a": folder / "a", "b": folder / "b"}


def words(command: str, sets: dict[str, Path], out: object) -> list[str]:
    return ["shards", *(word.format(**sets, out=out) for word in COMMANDS[command])]


def killed(kind: str, work: Callable[[int, list[str]], None], number: int, arguments: list[str]) -> bool:
    """Runs a command in another process; returns whether it was killed, and not already done before."""
    process = multiprocessing.get_context(kind).Process(target=work, args=(number, arguments))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


@pytest.mark.parametrize("moments", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("into", ["new", "empty"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_any_moment_gives_the_same_bytes_when_it_is_run_again(
    command: str,
    into: str,
    moments: str,
    sets: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(words(command, sets, tmp_path / "whole")) == EXIT_DONE
    expected = list_local(tmp_path / "whole")
    said = set[str]()
    for number in range(1, 1000, 1 if moments == "all" else 12):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if into == "empty":
            out.mkdir()
        if not killed("fork", run_and_kill_at_change, number, words(command, sets, out)):
            break
        found = list_local(out)
        is_complete = {name: content for name, content in found.items() if name[0] != "."} == expected
        if out.is_dir() and find_manifest_folders(out) != [] and command != "split":
            assert is_complete, number
        capfd.readouterr()
        code = run(words(command, sets, out))
        said |= set(capfd.readouterr().out.replace(str(out), "OUT").splitlines()[:1])
        assert code == EXIT_DONE or (is_complete and code == EXIT_USER), number
        assert list_local(out) == expected, number
        assert [path.name for path in out.parent.iterdir()] == ["out"], number
    if command in ("select", "split"):
        continues = f"OUT: continues an interrupted `shards {command}`; "
        kept = sorted(int(line.removeprefix(continues).split()[0]) for line in said if continues in line)
        assert set(kept) <= {1, 2, 3, 4, 5, 6, 7}
        assert len(kept) >= (6 if moments == "all" else 2)
    assert (
        f"OUT: an interrupted `shards {words(command, sets, '')[1]}` left nothing of use; starts again"
        in said
    )


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3("data"):
        yield "s3://data"


@pytest.mark.parametrize("moments", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["select", "split", "merge"])
def test_a_command_killed_at_any_request_to_a_store_gives_the_same_bytes_when_it_is_run_again(
    command: str,
    moments: str,
    bucket: str,
    sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shards.pack.remote, "SETTLE_S", 0.0)
    assert run(words(command, sets, tmp_path / "whole")) == EXIT_DONE
    expected = list_local(tmp_path / "whole")
    for number in range(1, 1000, 5) if moments == "all" else (25,):  # 25: some shards are stored
        out = f"{bucket}/{moments}-{command}-{number}"
        if not killed("spawn", run_and_kill_at_request, number, words(command, sets, out)):
            break
        found = list_objects(out)
        is_complete = {name: content for name, content in found.items() if name[0] != "."} == expected
        if command != "split":
            assert is_complete or "manifest.json" not in found
        capfd.readouterr()
        code = run(words(command, sets, out))
        assert code == EXIT_DONE or (is_complete and code == EXIT_USER), number
        assert list_objects(out) == expected, number
        if number == 25:
            does = (
                "left nothing of use"
                if command == "merge"
                else f"continues an interrupted `shards {command}`"
            )
            assert does in capfd.readouterr().out


def start_together(kind: str, arguments: list[list[str]]) -> list[tuple[int, str]]:
    """Runs commands at the same time; returns the exit code and the last error line of each."""
    context = multiprocessing.get_context(kind)
    barrier, results = context.Barrier(len(arguments)), context.SimpleQueue()
    processes = [context.Process(target=_run_together, args=(barrier, results, some)) for some in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sorted(results.get() for _ in processes)


def _run_together(barrier: Any, results: Any, arguments: list[str]) -> None:
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    shards.edit.select.COPY_SAMPLES = SMALL
    barrier.wait()
    code = run(arguments)
    results.put((code, (sys.stderr.getvalue().splitlines() or [""])[-1]))


LOSERS = (
    "another process is writing into",
    "has started to write into it; this one ends",
    "another process has completed a data set there meanwhile",
    "exists; give another folder",
    "an interrupted pack is in",  # on a busy machine one may start when the other has begun
)


def line_of(command: str, sets: dict[str, Path], out: object) -> list[str]:
    if command != "pack":
        return words(command, sets, out)
    options = ["--persons", "none", "--workers", "0", "--shard-samples", "9"]
    return ["shards", "pack", str(sets["a"].with_suffix(".parquet")), str(out), *options]


@pytest.mark.parametrize("tries", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("into", ["new", "empty"])
@pytest.mark.parametrize("command", [*COMMANDS, "pack"])
def test_of_two_commands_started_together_exactly_one_wins(
    command: str, into: str, tries: int, sets: dict[str, Path], tmp_path: Path
) -> None:
    assert run(line_of(command, sets, tmp_path / "whole")) == EXIT_DONE
    expected = list_local(tmp_path / "whole")
    for number in range(tries):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if into == "empty":
            out.mkdir()
        (first, _), (second, says) = start_together("fork", [line_of(command, sets, out)] * 2)
        assert (first, second) == (EXIT_DONE, EXIT_USER), says
        assert any(reason in says for reason in LOSERS), says
        assert list_local(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("tries", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_two_appends_started_together_do_not_mix(tries: int, sets: dict[str, Path], tmp_path: Path) -> None:
    def append(out: Path) -> list[str]:
        table = str(sets["b"].with_suffix(".parquet"))
        return ["shards", "pack", table, str(out), "--append", "--persons", "none", "--workers", "0"]

    shutil.copytree(sets["a"], tmp_path / "whole")
    assert run(append(tmp_path / "whole")) == EXIT_DONE
    expected = list_local(tmp_path / "whole")
    for number in range(tries):
        out = tmp_path / str(number) / "out"
        shutil.copytree(sets["a"], out)
        (first, _), (second, says) = start_together("fork", [append(out)] * 2)
        # A process that starts after the other one has ended finds nothing to append.
        assert (first, second) in ((EXIT_DONE, EXIT_USER), (EXIT_DONE, EXIT_DONE)), says
        assert second == EXIT_DONE or any(
            reason in says
            for reason in ("another process is writing into", "has changed the data set meanwhile")
        ), says
        assert list_local(out) == expected


@pytest.mark.parametrize("tries", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["select", "merge", "pack"])
def test_of_two_commands_started_together_on_a_store_exactly_one_wins(
    command: str, tries: int, bucket: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    assert run(line_of(command, sets, tmp_path / "whole")) == EXIT_DONE
    expected = list_local(tmp_path / "whole")
    for number in range(tries):
        out = f"{bucket}/together-{tries}-{command}-{number}"
        (first, _), (second, says) = start_together("spawn", [line_of(command, sets, out)] * 2)
        assert (first, second) == (EXIT_DONE, EXIT_USER), says
        assert any(reason in says for reason in LOSERS), says
        assert list_objects(out) == expected
