"""TensorBoard over attempts: each step once, with the value of the last attempt that did it."""

import io
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from uniemox_dist.train.monitor.tensorboard import TensorBoard, keep_order
from uniemox_dist.train.samples.pictures import encode_png

LINES: dict[str, Any] = {"epoch": 0.1, "relation": 0.2, "lr": 0.1, "source_samples": [3, 4], "time": 5.0}


def write(folder: Path, first: int, last: int, base: float) -> TensorBoard:
    """An attempt that resumes after `first` and writes a line for each step to `last`; left open."""
    board = TensorBoard(folder, first)
    for step in range(first + 1, last + 1):
        board.add_scalars(step, {**LINES, "step": step, "loss": base + step})
    return board


def killed(folder: Path, first: int, last: int, base: float) -> None:
    """Such an attempt in a process that is killed with its last line just written."""
    write(folder, first, last, base)
    os.kill(os.getpid(), signal.SIGKILL)


def read(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses as TensorBoard reads them, by both of its readers."""
    single = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    seen = [(event.step, event.value) for event in single.Scalars("loss/loss")]
    many = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    many.AddRunsFromDirectory(str(folder)).Reload()
    assert list(many.Runs()) == ["."]
    assert [event.step for event in many.Tensors(".", "loss/loss")] == [step for step, _ in seen]
    assert [event.step for event in many.Tensors(".", "data/source_samples/1")] == [step for step, _ in seen]
    return seen


def expected(*parts: tuple[int, int, float]) -> list[tuple[int, float]]:
    return [(step, base + step) for first, last, base in parts for step in range(first + 1, last + 1)]


def test_attempts_that_are_killed_leave_every_line_and_one_curve(tmp_path: Path) -> None:
    # The second goes back some steps, the third is killed early, the fourth goes back to where that one began.
    context = multiprocessing.get_context("fork")
    for attempt in ((0, 30, 1000.0), (20, 45, 2000.0), (40, 43, 3000.0), (40, 50, 4000.0)):
        process = context.Process(target=killed, args=(tmp_path, *attempt))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert read(tmp_path) == expected((0, 20, 1000.0), (20, 40, 2000.0), (40, 50, 4000.0))


def test_an_attempt_without_lines_hides_the_steps_that_it_will_repeat(tmp_path: Path) -> None:
    write(tmp_path, 0, 9, 1000.0).close()
    write(tmp_path, 4, 4, 2000.0).close()
    assert read(tmp_path) == expected((0, 4, 1000.0))


def test_a_record_that_a_kill_cut_costs_only_itself(tmp_path: Path) -> None:
    write(tmp_path, 0, 9, 1000.0).close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # of the last scalar, which is not the loss
    write(tmp_path, 6, 12, 2000.0).close()
    assert read(tmp_path) == expected((0, 6, 1000.0), (6, 12, 2000.0))


def on(monkeypatch: pytest.MonkeyPatch, host: str, pid: int, second: float) -> None:
    """Makes TensorBoard name its next file as if it were made at that time and place."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(time, "time", lambda: second)
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.mark.parametrize(
    "places",
    [
        [("n1", 7, 5000.0), ("n1", 7, 5000.0), ("n1", 7, 5000.0)],  # as in containers: the very same name
        [
            ("n2", 9, 5000.0),
            ("n1", 7, 5000.0),
            ("n0", 5, 5000.0),
        ],  # the same second, names in the wrong order
        [("n2", 9, 5000.0), ("n1", 7, 4900.0), ("n3", 7, 4950.0)],  # clocks that differ
        [("n1", 9, 5000.0), ("n1", 10, 5001.0), ("n1", 7, 4990.5)],
    ],
)
def test_attempts_keep_their_order_for_any_hosts_clocks_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[tuple[str, int, float]]
) -> None:
    attempts = ((0, 30, 1000.0), (20, 45, 2000.0), (40, 50, 3000.0))
    for place, attempt in zip(places, attempts, strict=True):
        on(monkeypatch, *place)
        write(tmp_path, *attempt).close()
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    assert read(tmp_path) == expected((0, 20, 1000.0), (20, 40, 2000.0), (40, 50, 3000.0))


def test_older_files_keep_their_names_and_foreign_files_are_not_touched(tmp_path: Path) -> None:
    names = [
        "events.out.tfevents.0000004000.n1.7.0",
        "events.out.tfevents.0000004999.n1.7.0",
        "notes",
        "events.x",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    keep_order(tmp_path, 5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    keep_order(tmp_path, 4999)
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == [
        "events.out.tfevents.0000004000.n1.7.0",
        "events.out.tfevents.0000004998.n1.7.0",
    ]


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_an_unwritable_folder_is_reported_once_and_has_no_other_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    folder = tmp_path / "board"
    if moment == "before":
        folder.write_text("not a folder")
        board = TensorBoard(folder, 0)
    else:
        board = write(folder, 0, 2, 1000.0)
        shutil.rmtree(folder)
    for step in range(3, 6):
        board.add_scalars(step, {**LINES, "step": step, "loss": 1.0})
        board.add_pictures(step, (2, 2), encode_png(np.zeros((2, 2, 3), np.uint8)), "text")
    board.close()
    assert [record.message.partition(": ")[0] for record in caplog.records] == [str(folder)]
    assert caplog.records[0].message.endswith("; training continues without TensorBoard")


def test_a_sheet_is_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    sheet = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    board = TensorBoard(tmp_path / "board", 0)
    board.add_pictures(3, (5, 7), encode_png(sheet), "")
    board.close()
    found = EventAccumulator(str(tmp_path / "board")).Reload().Images("reconstructions")
    assert [(image.step, image.height, image.width) for image in found] == [(3, 5, 7)]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[0].encoded_image_string))), sheet)
