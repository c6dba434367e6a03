"""The report of a long run: bounded memory, the same page as from a list of lines, and spikes that stay visible."""

import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told_run import BEGAN, told_run

from uniemox_dist.cli.main import run as command
from uniemox_dist.cli.status import METRICS_BYTES
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import KEYS, column, read_metrics
from uniemox_dist.runs.report.curves import draw

REPORT = """
import re, sys
from pathlib import Path
from uniemox_dist.cli.main import run
assert run(["report", *sys.argv[1:]]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
SPIKE_AT, SPIKE = 31_234, 77.25


def write_long_run(folder: Path, lines: int) -> RunFolder:
    """A run that was restarted in its middle and repeated 100 steps; one step has a very high loss."""
    folder.mkdir()
    run = RunFolder(folder)
    run.config.write_text("run: {max_steps: 2000000}\nloss: {relation: 1.0, reconstruction: 1.0}\n")
    starts = [(0.0, 0), (lines / 2 + 0.5, lines // 2 - 100)]
    run.events.write_text(
        "".join(json.dumps({"time": BEGAN + t, "event": "start", "step": step}) + "\n" for t, step in starts)
    )
    rest = ", ".join(f'"{key}": 12345.678' for key in ("tflops_per_s", "own_step_s", "host_memory_gb", "mfu"))
    steps = chain(range(1, lines // 2 + 1), range(lines // 2 - 99, lines - 99))
    with open(run.metrics, "w", encoding="utf-8") as file:
        for i, step in enumerate(steps, 1):
            loss = SPIKE if step == SPIKE_AT else 1.5 + 1.0 / step
            file.write(
                f'{{"step": {step}, "epoch": {step / 1000}, "slots": {step * 64}, "loss": {loss}, '
                f'"relation": {loss / 3}, "reconstruction": {loss / 2}, "lr": 0.001, "grad_norm": {1 / step}, '
                f'"samples_per_s": 640.5, "data_wait_share": 0.25, {rest}, "time": {BEGAN + i}}}\n'
            )
    return run


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_long_run(tmp_path_factory.mktemp("runs") / "long", 60_000)


def peak_bytes(run: RunFolder) -> int:
    """The peak memory of `uniemox report`."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(run.path)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1]) * 1024


def test_a_line_of_metrics_takes_little_memory(long: RunFolder, tmp_path: Path) -> None:
    short = write_long_run(tmp_path / "short", 1000)
    # One line as a dictionary takes more than 4,000 bytes.
    assert peak_bytes(long) - peak_bytes(short) < 59_000 * 400


@pytest.mark.slow
def test_a_million_lines_take_less_than_300_mb(tmp_path: Path) -> None:
    assert peak_bytes(write_long_run(tmp_path / "run", 1_000_000)) < 300e6


def test_a_single_spike_among_many_lines_is_in_the_curve(long: RunFolder) -> None:
    history = History(read_metrics(long.metrics), read_lines(long.events))
    assert len(history.lines) == 60_000 - 100
    total = draw(history, {})[0]
    assert (total.panel.key, total.highest) == ("loss", "77.25")


def histories(folder: RunFolder) -> tuple[History, History]:
    events = read_lines(folder.events)
    return History(read_metrics(folder.metrics), events), History(read_lines(folder.metrics), events)


def test_a_table_and_a_list_of_lines_tell_the_same(long: RunFolder, tmp_path: Path) -> None:
    for folder in (long, told_run(tmp_path / "told")):
        table, plain = histories(folder)
        assert table.attempts == plain.attempts
        assert table.step == plain.step
        config: dict[str, Any] = {"run": {"epochs": 10}, "batch": {"global_batch": 24}}
        assert table.length(config) == plain.length(config)
        assert len(table.lines) == len(plain.lines)
        for key in KEYS:
            assert np.array_equal(column(table.lines, key), column(plain.lines, key), equal_nan=True)
        assert table.lines[-1] == {key: plain.lines[-1][key] for key in KEYS if key in plain.lines[-1]}
        assert [line["step"] for line in table.lines[-3:]] == [line["step"] for line in plain.lines[-3:]]


def test_odd_lines_are_read_like_by_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(
        b'{"step": 1, "loss": NaN, "lr": Infinity, "time": 5}\n'
        b'{"step": "x", "time": "y", "loss": 2}\n'
        b'{"step": 2.5, "loss": 3}\n'
        b'{"step": 3, "loss": null, "note": "\\ud800 \xe2\x80\xa8"}\n'
        b'{"step": 4, "loss": 4, "note": "\xff"}\n'
        b'[1]\n\n{}\n{"step": 5, "lo'
    )
    table, plain = histories(folder)
    assert list(column(table.lines, "step")) == [1, 3, 4]
    for key in KEYS:
        assert np.array_equal(column(table.metrics, key), column(plain.metrics, key), equal_nan=True)
    assert table.lines[0] == {"step": 1, "time": 5.0}
    assert math.isnan(column(table.lines, "loss")[1])
    assert len(read_metrics(tmp_path / "none.jsonl")) == 0


def test_status_reads_only_the_end_of_the_metrics(
    long: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def status() -> int:
        """Runs the command; returns the bytes that it read."""
        before = read_bytes()
        assert command(["status", str(long.path)]) == 0
        return read_bytes() - before

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    status()  # imports
    assert long.metrics.stat().st_size > 50 * METRICS_BYTES
    assert METRICS_BYTES < status() < METRICS_BYTES + 100_000
    assert "59,900" in capsys.readouterr().out
