"""Measures real training steps of DeepSpeed's engine for a list of cases, with a live and with a cached teacher.

    python tools/bench_step_cases.py --case vit_large_patch16_224 0.75 256 off --json cases.json
    python tools/bench_step_cases.py --case vit_base_patch16_224 0.9 largest on --case … --json cases.json

A case is the student's encoder, the mask ratio, the micro-batch and torch.compile (on or off). `largest` is the largest
multiple of --multiple whose memory fits on the GPU by `uniemox plan`; if it does not fit, that is recorded, and three
quarters of it are tried. Steps are those of step_rows.py, rows (a) and (a'). For each teacher the result has samples/s
(the median of --rounds), the useful FLOPs as a share of the measured rate of bf16 matrix products, and the peak memory
beside the one that `uniemox plan` estimates. On a CPU no memory is measured.

The file is written after each case, and a case that fails is recorded with its reason, so an interrupted run leaves its
results. A process that dies (an illegal memory access spoils a CUDA context) is replaced for the cases that are left.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench_checkpoint import random_batch
from bench_plan_memory import allocated
from bench_step import matrix_tflops, timed
from benchmark import make_parser, run_main
from options import add_settings, positive_int, positive_number, ratio, teacher_shape
from released_step import device
from step_rows import Setting, write_teacher
from torch.nn import functional as F

from launch.plan.model import read_tower
from uniemox_dist.config.load import merge, parse_override, validate_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import Device
from uniemox_dist.core.files import read_json, write_json
from uniemox_dist.models.compilation import find_obstacle, use_private_cache
from uniemox_dist.models.flops import sample_flops
from uniemox_dist.models.student import Student
from uniemox_dist.teacher.flops import count_teacher_flops
from uniemox_dist.teacher.model import Teacher

LARGEST = "largest"
RESTART = 3
"""Exit code of a worker whose device can no longer be used; the case is recorded."""
ROWS = {"cached": "a'", "live": "a"}
"""Rows of step_rows.py by teacher, in the order of measuring: first without the teacher on the device."""


@dataclass(frozen=True)
class Case:
    """One training step to measure."""

    model: str
    mask: float
    micro_batch: int | None
    """None for the largest that fits."""
    compiles: bool

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Case":
        model, mask, micro_batch, compiles = words
        if compiles not in ("on", "off"):
            raise ValueError(f"compile is on or off, not {compiles}")
        try:
            number = None if micro_batch == LARGEST else positive_int(micro_batch)
            return cls(model, ratio(mask), number, compiles == "on")
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None

    def describe(self) -> dict[str, Any]:
        micro_batch = LARGEST if self.micro_batch is None else self.micro_batch
        return {
            "model": self.model,
            "mask": self.mask,
            "wanted": micro_batch,
            "compile": "on" if self.compiles else "off",
        }


def main() -> int:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--case",
        nargs=4,
        action="append",
        required=True,
        metavar=("MODEL", "MASK", "MICRO_BATCH", "COMPILE"),
        help="a case to measure; MICRO_BATCH is a number or `largest`, COMPILE on or off",
    )
    parser.add_argument(
        "--teacher-shape",
        type=teacher_shape,
        default="ViT-B-16-quickgelu",
        help="an open_clip model, with random weights, or local-dir:PATH",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    add_settings(parser)
    parser.add_argument("--rounds", type=positive_int, default=3, help="of which the median counts")
    parser.add_argument("--steps", type=positive_int, default=4, help="steps in a round")
    parser.add_argument(
        "--multiple", type=positive_int, default=64, help="of which the largest micro-batch is one"
    )
    parser.add_argument("--at-most", type=positive_int, default=4096, help="limit of the largest micro-batch")
    parser.add_argument("--matrix-size", type=positive_int, default=8192, help="side of the bf16 matrices")
    parser.add_argument(
        "--seconds", type=positive_number, help="start no case that would probably end later than this"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # used in another process
    options = parser.parse_args()
    try:
        cases = [Case.parse(words) for words in options.case]
    except ValueError as error:
        parser.error(f"--case: {error}")
    if options.json is None:
        parser.error("--json FILE is required")
    warnings.filterwarnings("ignore")
    if options.worker:
        return measure_all(options, cases)
    write_json(options.json, {"command": sys.argv, "began": time.time(), "rows": []})
    with tempfile.TemporaryDirectory() as folder:
        shape = options.teacher_shape
        if not shape.startswith("local-dir:"):
            write_teacher(shape, Path(folder))
            shape = f"local-dir:{folder}"
        # The last --teacher-shape counts.
        return run_workers([sys.executable, *sys.argv, "--worker", "--teacher-shape", shape], options, cases)


def run_workers(command: list[str], options: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Measures all cases in one process, and after a crash the rest of them in the next."""
    while True:
        code = subprocess.run(command, check=False).returncode
        found = read_json(options.json)
        left = cases[len(found["rows"]) :]
        if code == 0 or not left:
            return 0
        if code == RESTART:
            continue
        reason = f"its process ended with exit code {code}"
        found["rows"].append({**left[0].describe(), "failed": reason})
        write_json(options.json, found)


def measure_all(options: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Measures the cases that the file does not have yet, and writes the file after each."""
    found = read_json(options.json)
    if "matrix_tflops" not in found:
        found["device"] = torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
        found["matrix_tflops"] = matrix_tflops(options.matrix_size)
        write_json(options.json, found)
    bench = Bench(options, found["matrix_tflops"])
    longest = {True: 0.0, False: 0.0}
    for case in cases[len(found["rows"]) :]:
        began = time.time()
        row = case.describe()
        if options.seconds and began - found["began"] + longest[case.compiles] > options.seconds:
            row["not_run"] = "no time was left"
        else:
            row |= bench.try_case(case)
            row["seconds"] = round(time.time() - began, 1)
            longest[case.compiles] = max(longest[case.compiles], row["seconds"])
        found["rows"].append(row)
        write_json(options.json, found)
        print(json.dumps(row), flush=True)
        if "CUDA error" in row.get("failed", ""):
            return RESTART
    return 0


@dataclass
class Bench:
    """What cases share: options, the measured matrix rate and the teachers."""

    options: argparse.Namespace
    matrix: float
    _teachers: dict[bool, Teacher] = field(default_factory=dict)

    def try_case(self, case: Case) -> dict[str, Any]:
        """Measures a case. A failure is returned as `failed` with its reason."""
        if case.compiles and (obstacle := find_obstacle(device().type)):
            return {"failed": f"cannot compile: {obstacle}"}
        config = self._config(case, case.micro_batch or self.options.multiple)
        if case.micro_batch is None:
            micro_batch = self._largest(config)
            tried = self._try_size(case, micro_batch)
            if "failed" in tried and tried["failed"].startswith("out of memory"):
                smaller = max(1, micro_batch * 3 // 4)
                return {**self._try_size(case, smaller), "too_large_though_planned": micro_batch}
            return tried
        return self._try_size(case, case.micro_batch)

    def _try_size(self, case: Case, micro_batch: int) -> dict[str, Any]:
        try:
            return {"micro_batch": micro_batch, **self._measure(case, self._config(case, micro_batch))}
        except torch.OutOfMemoryError as error:
            return {"micro_batch": micro_batch, "failed": f"out of memory: {str(error).splitlines()[0]}"}
        except RuntimeError as error:
            return {"micro_batch": micro_batch, "failed": f"{type(error).__name__}: {error}"[:500]}
        finally:
            torch._dynamo.reset()  # other shapes would exceed the number of compilations of one function
            _free()

    def _measure(self, case: Case, config: Config) -> dict[str, Any]:
        if case.compiles:
            use_private_cache()
        teacher = self._teacher(config, compiles=case.compiles)
        teacher.model.to("cpu")
        before = _allocated()
        with torch.device(device()), torch.random.fork_rng():
            torch.manual_seed(0)
            student = Student(config.model, config.loss, teacher.width)
        at = self._setting(config, student, teacher, compiles=case.compiles)
        steps: dict[str, Callable[[], Any]] = {name: at.of(row) for name, row in ROWS.items()}
        del student
        at.student = None  # type: ignore[assignment]  # the engine has a copy, and memory is measured
        found: dict[str, Any] = {"left_over_bytes": before}
        for name, step in steps.items():
            if name == "live":
                teacher.model.to(device())
            first = timed(step, 1)
            timed(step, 1)
            _free()
            if device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rounds = [timed(step, self.options.steps) for _ in range(self.options.rounds)]
            peak = torch.cuda.max_memory_allocated() - before if device().type == "cuda" else None
            found[name] = self._row(config, name, teacher, rounds, peak) | {"first_step_s": first}
        return found

    def _row(
        self, config: Config, name: str, teacher: Teacher, rounds: list[float], peak: int | None
    ) -> dict[str, Any]:
        live = name == "live"
        tower = count_teacher_flops(teacher) if live else 0
        useful = sample_flops(config, teacher.width, tower).training
        rates = [config.batch.micro_batch / seconds for seconds in rounds]
        tflops = statistics.median(rates) * useful / 1e12
        return {
            "samples_per_s": statistics.median(rates),
            "rounds": rates,
            "useful_flops": useful,
            "useful_tflops_per_s": tflops,
            "share_of_matrix_rate": tflops / self.matrix,
            "peak_bytes": peak,
            "planned_bytes": self._plan(config, cached=not live),
        }

    def _setting(self, config: Config, student: Student, teacher: Teacher, *, compiles: bool) -> Setting:
        there, B = device(), config.batch.micro_batch
        texts_BE, pictures_BE = (
            F.normalize(torch.randn(B, teacher.width, device=there), dim=1) for _ in range(2)
        )
        batch = replace(
            random_batch(config, there),
            person_B3HW=random_batch(config, there).scene_B3HW,
            texts_BE=texts_BE,
            pictures_BE=pictures_BE,
        )
        precision = self.options.precision
        return Setting(config, student, teacher, None, batch, [], "deepspeed", precision, compiles=compiles)

    def _teacher(self, config: Config, *, compiles: bool) -> Teacher:
        """Returns the teacher without its text tower. The compiled one is another object than the plain one."""
        if compiles not in self._teachers:
            teacher = Teacher(config.teacher, device())
            teacher.drop_text_tower()
            if compiles:
                teacher.compile()
            self._teachers[compiles] = teacher
            for other in self._teachers.values():
                other.model.to("cpu")
        return self._teachers[compiles]

    def _config(self, case: Case, micro_batch: int) -> Config:
        values: dict[str, Any] = {
            "run": {"max_steps": 1},
            "data": {"path": "none"},
            "batch": {"global_batch": micro_batch, "micro_batch": micro_batch, "streams": 1},
            "model": {"name": case.model, "mask_ratio": case.mask},
            "teacher": {"name": self.options.teacher_shape, "precision": self.options.precision},
            "optim": {"precision": self.options.precision},
        }
        for pair in self.options.set:
            values = merge(values, parse_override(pair))
        return validate_config(values, "--case and --set")

    def _plan(self, config: Config, *, cached: bool) -> int:
        """Returns the largest amount of memory that `uniemox plan` expects torch to allocate."""
        source = "cache" if cached else "live"
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"source": source})})
        return allocated(config, read_tower(config), _planned_device()).allocated

    def _largest(self, config: Config) -> int:
        """Returns the largest micro-batch, a multiple of --multiple, that fits by `uniemox plan`."""
        there, multiple = _planned_device(), self.options.multiple
        tower, fits = read_tower(config), multiple
        for B in range(multiple, self.options.at_most + 1, multiple):
            batch = config.batch.model_copy(update={"global_batch": B, "micro_batch": B})
            if allocated(config.model_copy(update={"batch": batch}), tower, there).fits(there) is False:
                break
            fits = B
        return fits


def _planned_device() -> Device:
    """The device as `uniemox plan` describes it."""
    if device().type != "cuda":
        return Device("cpu", is_gpu=False)
    return Device("here", memory_bytes=float(torch.cuda.get_device_properties(0).total_memory))


def _allocated() -> int:
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if device().type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of the device nothing can be freed
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
