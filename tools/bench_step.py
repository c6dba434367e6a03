"""Compares our training step with the released code's schedule, in one process and in turn; prints a table.

Rows: (a) ours with a live teacher, (a') ours with cached embeddings, (b) the released schedule, (c) plain MAE;
step_rows.py describes them. All have the same weights, batch, precision and losses. After one warm-up step each, rows
take turns for `--rounds` rounds, and the median counts. There is no loader: the batch is on the device.

FLOPs per sample are counted by torch in a step of the row. Peak memory is measured in a separate process for each row:
on a GPU max_memory_allocated; on a CPU the peak resident memory over two steps minus that before the first step, when
weights and batch are loaded, so it covers activations, gradients and moments. On a GPU the rate of bf16 matrix products
is measured too, and useful FLOPs (uniemox_dist/models/flops.py) are shown as a share of it. `--memory` prints only the
largest micro-batch of (a) that fits on the GPU, up to 1,024.

`--against-loop` measures something else: (a') with the engine of training, DeepSpeed, against a bare loop in
plain torch with the same student, in turn. It prints the ratios of wall-clock and of processor time.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmark import make_parser, run_json, run_main, save_results, time_in_turn
from options import positive_int
from step_rows import ROWS, Setting, add_options, countable, device, make_config, setting
from torch.utils.flop_counter import FlopCounterMode

from uniemox_dist.core.devices import peak_tflops
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.flops import sample_flops
from uniemox_dist.teacher.flops import count_teacher_flops

LARGEST = 1024


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=positive_int, default=5, help="of which the median counts")
    parser.add_argument("--steps", type=positive_int, default=1, help="steps of a row in a round")
    parser.add_argument("--memory", action="store_true", help="only the largest micro-batch of (a) that fits")
    parser.add_argument("--against-loop", action="store_true", help="only the engine against a bare loop")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--peak-of", choices=list(ROWS), help=argparse.SUPPRESS)  # used in a separate process
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for mask in options.mask:
        make_config(options, mask)  # finds mistakes before the work
    if options.peak_of:
        print(peak_bytes(options))
        return
    if options.memory:
        print(f"largest micro-batch of (a) at mask {options.mask[0]:g}: {largest_micro_batch(options)}")
        return
    machine = describe_machine()
    if options.against_loop:
        rows = [measure_against_loop(options, mask) for mask in options.mask]
        save_results(options, {"command": sys.argv, "machine": machine, "rows": rows})
        return
    print(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; {options.model}, "
        f"micro-batch {options.micro_batch}, {options.precision}, teacher {options.teacher_shape}, "
        f"{options.engine} engine, median of {options.rounds} rounds"
    )
    matrix = matrix_tflops() if device().type == "cuda" else None
    if matrix:
        stated = peak_tflops(machine["device"], "bf16")
        print(f"bf16 matrix products: {matrix:.0f} TFLOP/s measured, {stated or 'not'} stated")
    rows = [row for mask in options.mask for row in measure(options, mask, matrix)]
    save_results(options, {"command": sys.argv, "machine": machine, "matrix_tflops": matrix, "rows": rows})


def measure(options: argparse.Namespace, mask: float, matrix: float | None) -> list[dict[str, Any]]:
    """Measures all rows at one mask ratio; prints and returns them."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()  # frees memory of the previous mask's rows for other processes
    peaks = {} if options.no_peaks else {row: peak_in_own_process(row, mask) for row in ROWS}
    at = setting(options, mask)
    steps = {row: at.of(row) for row in ROWS}
    flops = {
        row: counted(step) / options.micro_batch for row, step in steps.items()
    }  # a step of warm-up, too
    seconds = time_in_turn(steps, options.rounds, lambda step: timed(step, options.steps))
    rates = {row: [options.micro_batch / s for s in seconds[row]] for row in ROWS}
    print(
        f"\nmask {mask:g}\n{'':33}samples/s  of (b)  peak GB  GFLOPs a sample  TFLOP/s  useful"
        + ("  of matrix rate" if matrix else "")
    )
    table = []
    for row, name in ROWS.items():
        rate = statistics.median(rates[row])
        useful = useful_flops(at, row)
        entry = {
            "mask": mask,
            "row": row,
            "name": name,
            "samples_per_s": rate,
            "rounds": rates[row],
            "ratio": rate / statistics.median(rates["b"]),
            "ratio_by_round": [a / b for a, b in zip(rates[row], rates["b"])],
            "peak_bytes": peaks.get(row),
            "flops": flops[row],
            "tflops_per_s": rate * flops[row] / 1e12,
            "useful_flops": useful,
            "useful_tflops_per_s": rate * useful / 1e12,
            "share_of_matrix_rate": rate * useful / 1e12 / matrix if matrix else None,
        }
        table.append(entry)
        peak = f"{entry['peak_bytes'] / 1e9:7.2f}" if entry["peak_bytes"] else "      -"
        print(
            f"({row})".ljust(5) + f"{name:28}{rate:9.2f}  {entry['ratio']:6.2f}  {peak}  "
            f"{flops[row] / 1e9:15.1f}  {entry['tflops_per_s']:7.3f}  {entry['useful_tflops_per_s']:6.3f}"
            + (f"  {100 * entry['share_of_matrix_rate']:13.0f}%" if matrix else ""),
            flush=True,
        )
    return table


def measure_against_loop(options: argparse.Namespace, mask: float) -> dict[str, Any]:
    """Measures (a') with DeepSpeed's engine against a bare loop; prints and returns the ratios."""
    options.engine = "deepspeed"
    at = setting(options, mask)
    at.clip = at.teacher.model = None  # (a') needs neither
    steps = {"engine": at.of("a'"), "loop": at.bare_loop()}
    for step in steps.values():
        step()
    processor: dict[str, list[float]] = {name: [] for name in steps}

    def both(name: str) -> float:
        before = time.process_time()
        seconds = timed(steps[name], options.steps)
        processor[name].append((time.process_time() - before) / options.steps)
        return seconds

    wall = time_in_turn({name: name for name in steps}, options.rounds, both)
    found: dict[str, Any] = {
        "mask": mask,
        "precision": options.precision,
        "wall_s": wall,
        "processor_s": processor,
    }
    for kind, seconds in (("wall-clock", wall), ("processor", processor)):
        ratio = statistics.median(loop / engine for loop, engine in zip(seconds["loop"], seconds["engine"]))
        found[kind] = ratio
        print(
            f"{options.model}, {options.precision}, mask {mask:g}, micro-batch {options.micro_batch}: the engine has "
            f"{ratio:.3f} of the bare loop's speed by {kind} time ({statistics.median(seconds['engine']):.3f} s and "
            f"{statistics.median(seconds['loop']):.3f} s a step)",
            flush=True,
        )
    return found


def useful_flops(at: Setting, row: str) -> int:
    """Returns the useful FLOPs of a sample, without redundant work; for (b) those of (a)."""
    config, tower = at.config, count_teacher_flops(at.teacher)
    if row == "c":
        loss = config.loss.model_copy(update={"relation": 0.0, "similarity": 0.0})
        return sample_flops(config.model_copy(update={"loss": loss}), None).training
    return sample_flops(config, at.teacher.width, 0 if row == "a'" else tower).training


def counted(step: Callable[[], Any]) -> int:
    """Counts the FLOPs of a step with torch."""
    with FlopCounterMode(display=False) as counter, countable():
        step()
    return int(counter.get_total_flops())


def timed(step: Callable[[], Any], steps: int) -> float:
    """Returns the mean seconds of a step. A step ends with reading its losses, before the update is complete."""
    _wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    return (time.perf_counter() - began) / steps


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_in_own_process(row: str, mask: float) -> int:
    """Measures `peak_bytes` of a row in a new process, without the memory of other rows and of allocators."""
    command = [*sys.argv, "--mask", str(mask), "--peak-of", row]  # the last --mask counts
    return int(run_json(command))


def peak_bytes(options: argparse.Namespace) -> int:
    """Measures the peak memory of one row in this process, as described at the top of this file."""
    at = setting(options, options.mask[0])
    if options.peak_of != "b":
        at.clip = None
    if options.peak_of in ("a'", "b", "c"):
        at.teacher.model = None  # (b) has its own, and the others none
    step = at.of(options.peak_of)
    gc.collect()
    if device().type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the weights has raised
    before = psutil.Process().memory_info().rss
    step()
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) - before


def largest_micro_batch(options: argparse.Namespace) -> int:
    """Returns the largest power of two, up to 1,024, at which two steps of (a) fit on the GPU; 0 if none fits."""
    if device().type != "cuda":
        raise UserError("--memory: needs a GPU; a CPU would swap instead of failing")
    fits, options.micro_batch = 0, 8
    while options.micro_batch <= LARGEST:
        try:
            step = setting(options, options.mask[0]).of("a")
            step()
            step()
        except torch.OutOfMemoryError:
            break
        fits = options.micro_batch
        print(f"{fits}: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
        options.micro_batch *= 2
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return fits


def matrix_tflops(size: int = 8192, repeats: int = 20) -> float:
    """Measures the rate of bf16 products of large matrices (median)."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, 5) for _ in range(repeats)) / 1e12


def describe_machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    run_main(main)
