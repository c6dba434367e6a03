"""docs/elastic.md as a reader follows it: all its code runs, prints what the page says, and its Lightning run is killed
and goes on with other numbers of ranks."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from doc_lines import command_lines

from uniemox_dist.cli.main import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/elastic.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?([\w.=-]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def find_blocks(language: str, mark: str) -> list[str]:
    return [text for found, word, text in BLOCKS if (found, word) == (language, mark)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


def test_the_code_of_the_page_prints_what_it_says(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    ran = 0
    for language, mark, text in BLOCKS:
        if (language, mark) == ("sh", ""):
            lines = command_lines(f"```sh\n{text}```")
            for words in lines:
                if "s3://" not in words[2]:  # nobody's bucket
                    assert run(words) == 0
            capsys.readouterr()
        elif (language, mark) == ("python", ""):
            exec(compile(text, "docs/elastic.md", "exec"), names)
            says = [line[2:] for line in text.splitlines() if line.startswith("# ")]
            assert capsys.readouterr().out.splitlines() == says
            ran += 1
    assert ran >= 8


def torchrun(ranks: int, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [
            *command,
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "train.py",
        ]
        + [folder.name],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_steps(run_folder: Path) -> dict[int, list[str]]:
    """The keys of each step, by the page's own function."""
    names: dict[str, object] = {}
    (text,) = find_blocks("python", "lightning")
    exec(text.partition("whole = ")[0], names)
    return names["read_steps"](run_folder)  # type: ignore[operator,no-any-return]


@pytest.mark.slow
def test_the_lightning_run_of_the_page_is_killed_and_goes_on_with_other_ranks(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(place)
    if not Path("bars").exists():
        exec(find_blocks("python", "")[0], {})
        assert run(["shards", "index", "bars", "--members"]) == 0
    (script,) = find_blocks("python", "file=train.py")
    Path("train.py").write_text(script)
    for line in find_blocks("sh", "lightning")[0].splitlines():
        words = line.partition("#")[0].split()
        settings = dict(word.split("=") for word in words if word.isupper() or "KILL_AT" in word)
        ranks, folder = int(words[words.index("--nproc-per-node") + 1]), place / words[-1]
        result = torchrun(ranks, folder, **settings)
        assert (result.returncode == 0) == (not settings), result.stderr
        if settings:
            assert "SIGKILL" in result.stderr
    exec(find_blocks("python", "lightning")[0], {})
    whole = read_steps(place / "whole")

    # Fewer ranks with the same micro-batch, hence more micro-batches in a step, and then more ranks again.
    chain = place / "chain"
    attempts = ((2, 1, "7"), (1, 2, "13"), (4, 1, None))
    for ranks, accumulate, kill_at in attempts:
        result = torchrun(
            ranks, chain, ACCUMULATE=str(accumulate), **({"KILL_AT": kill_at} if kill_at else {})
        )
        assert (result.returncode == 0) == (kill_at is None), result.stderr
    assert sorted(path.name for path in (chain / "seen").iterdir()) == [
        "000-0", "000-1", "006-0", "012-0", "012-1", "012-2", "012-3",
    ]  # fmt: skip
    assert read_steps(chain) == whole
    counts = [len((chain / "seen" / name).read_text().splitlines()) for name in ("000-1", "006-0", "012-3")]
    assert counts == [8, 15, 6]
    batches: dict[int, int] = defaultdict(int)
    for line in (chain / "seen/006-0").open():
        step, keys = json.loads(line)
        batches[step] += 1
        assert len(keys) == 12
    assert batches == {6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2, 13: 1}
    assert set(Counter(key for step in range(9) for key in whole[step]).values()) == {1, 2}
