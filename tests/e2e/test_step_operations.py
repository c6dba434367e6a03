"""What a training step launches: the number of operations, and one wait of the host, after all of them."""

import argparse
import contextlib
import io
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from ranks import PRELOAD

ROOT = Path(__file__).parents[2]
Counts = dict[str, tuple[int, int, int]]
"""Operations, waits, and operations after the last wait, by layout."""


def count_layouts(pipe: Any, teacher: str, layouts: list[str], compiled: bool) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import step_rows
    import torch
    from count_operations import count_compiled, count_layout, step_of

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    step_rows.add_options(parser)
    parsed = parser.parse_args(["--micro-batch", "2", "--teacher-shape", f"local-dir:{teacher}"])
    options = argparse.Namespace(**vars(parsed), row="a'", compile=compiled)
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for layout in layouts:
            if compiled:
                found[layout] = (count_compiled(step_of(layout, options)).total(), 0, 0)
                continue
            counter = count_layout(layout, options)
            found[layout] = (counter.operations.total(), len(counter.waits), counter.after_last_wait)
    pipe.send(found)


def count(teacher: Path, *layouts: str, compiled: bool = False) -> Counts:
    """Counts in a process of its own, because DeepSpeed changes torch for the rest of one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=count_layouts, args=(theirs, str(teacher), list(layouts), compiled))
    process.start()
    theirs.close()
    try:
        found: Counts = ours.recv()
    finally:
        process.kill()
        process.join()
    return found


@pytest.fixture(scope="module")
def counts(tiny_teacher: Path) -> Counts:
    layouts = (
        "plain engine, fp32",
        *(f"DeepSpeed, {name}" for name in ("fp32, ZeRO-1", "bf16, ZeRO-1", "bf16, ZeRO-2")),
    )
    return count(tiny_teacher, *layouts, "DeepSpeed, fp32, ZeRO-3")


def test_a_step_of_vit_b_launches_at_most_900_operations(counts: Counts) -> None:
    """In fp32 and bf16 alike, few more than with the plain engine, which has no partitions."""
    for layout in ("fp32, ZeRO-1", "bf16, ZeRO-1", "bf16, ZeRO-2"):
        assert counts[f"DeepSpeed, {layout}"][0] <= 900
    assert counts["DeepSpeed, fp32, ZeRO-1"][0] <= counts["plain engine, fp32"][0] + 30


def test_the_host_waits_once_in_a_step_after_everything_is_launched(counts: Counts) -> None:
    for layout, (_, waits, after) in counts.items():
        # In ZeRO-3 DeepSpeed also compares a number that is on the CPU.
        assert (waits, after) == (2 if "ZeRO-3" in layout else 1, 0)


@pytest.mark.slow
def test_a_compiled_step_launches_at_most_200_operations_and_passes(tiny_teacher: Path) -> None:
    """In ZeRO-1 and bf16; a compiled pass counts as one."""
    layout = "DeepSpeed, bf16, ZeRO-1"
    assert count(tiny_teacher, layout, compiled=True)[layout][0] <= 200
