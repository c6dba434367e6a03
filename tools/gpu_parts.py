"""The parts of gpu_check.py: their commands, time limits and results.

A part is a command that writes a JSON file as it goes. Each has two forms: the real one for a GPU, and a tiny one that
any CPU runs.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniemox_dist.core.files import read_json

TOOLS = Path(__file__).parent
ROOT = TOOLS.parent
VIT_L, VIT_B = "vit_large_patch16_224", "vit_base_patch16_224"
MASKS = ("0.75", "0.9")
MICRO_BATCHES = ("64", "256", "largest")
SHARED = ("model.heads=2", "model.decoder_heads=2", "model.image_size=32", "model.patch_size=8")
TINY_MODEL = (
    *SHARED,
    "model.name=null",
    "model.width=32",
    "model.depth=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
)
"""Settings of a student that trains in no time."""
STATES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
"""Outcomes of a test, in pytest's words."""
Case = tuple[str, str, str, str]
"""Encoder, mask ratio, micro-batch and compilation, as in bench_step_cases.py."""
Results = Mapping[str, Mapping[str, Any]]
"""What each part has found so far, by its name."""


@dataclass(frozen=True)
class Form:
    """The form of a whole check."""

    scratch: Path
    """A folder for the files of parts."""
    tiny: bool
    """Tiny models on CPUs."""
    cores: int

    @property
    def workers(self) -> int:
        """Loader processes: one core is left to the training process."""
        return max(1, self.cores - 1)

    @property
    def teacher(self) -> str:
        """The teacher of all parts: CLIP ViT-B/16 with random weights, or the small one that is shipped."""
        return f"local-dir:{ROOT}/uniemox_dist/teacher/demo_teacher" if self.tiny else "ViT-B-16-quickgelu"

    def json(self, part: str) -> Path:
        return self.scratch / f"{part}.json"


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    title: str
    limit_s: float
    """Time limit in a check of 8 minutes."""
    command: Callable[[Form, float, Results], list[str]]
    """Builds the command from the form, the part's time limit and the results of earlier parts; an empty one if nothing
    is left to do."""
    read: Callable[[Form, str, str], dict[str, Any]]
    """Reads the results from the form, the part's name and its output; also while it runs."""


def list_cases(tiny: bool) -> list[Case]:
    """All steps to measure, those that the aims need first."""
    if tiny:
        return [("tiny", "0.75", "2", "off"), ("tiny", "0.75", "2", "on"), ("tiny", "0.9", "largest", "off")]
    first = [
        (VIT_L, "0.75", "256", "off"),
        (VIT_B, "0.75", "64", "off"),
        (VIT_L, "0.75", "256", "on"),
        (VIT_B, "0.75", "64", "on"),
        (VIT_L, "0.75", "largest", "off"),
        (VIT_L, "0.9", "256", "off"),
        (VIT_B, "0.9", "64", "off"),
        (VIT_B, "0.75", "256", "on"),  # the real run uses its compiled code
        (VIT_B, "0.75", "256", "off"),
        (VIT_L, "0.75", "64", "off"),
        (VIT_B, "0.75", "largest", "off"),
    ]
    # Without compilation a case takes seconds, so those come first.
    rest = itertools.product(("off", "on"), MASKS, (VIT_L, VIT_B), MICRO_BATCHES)
    others = [(model, mask, micro_batch, compiles) for compiles, mask, model, micro_batch in rest]
    return [*first, *(case for case in others if case not in first)]


def case_of(row: Mapping[str, Any]) -> Case:
    """Returns the case of a row of results."""
    return row["model"], f"{row['mask']:g}", str(row["wanted"]), row["compile"]


def measured_cases(results: Results) -> set[Case]:
    """Returns the cases that parts have tried, successfully or not."""
    rows = (row for part in ("steps", "more-steps") for row in results.get(part, {}).get("rows", ()))
    return {case_of(row) for row in rows if "not_run" not in row}


def _tests(form: Form, limit_s: float, results: Results) -> list[str]:
    # The line of `make test-gpu SHORT=1`, with this Python; -vv prints each result as it comes.
    pytest = [sys.executable, "-m", "pytest", "-vv", "-n", "1" if form.tiny else "4", "-rs"]
    if form.tiny:
        return [*pytest, "-m", "not gpu and not slow", "-k", "a_run_is_on_the_device", "tests/gpu"]
    return [*pytest, "-m", "gpu and not slow", "tests/gpu"]


def _read_tests(form: Form, name: str, output: str) -> dict[str, Any]:
    """Counts results from pytest's lines, which exist also for a session that did not end."""
    lines = re.findall(rf"\b({'|'.join(STATES)})\s+(tests/\S+::\S+)", output)
    outcome = {test: state for state, test in lines}
    counts = {state.lower(): list(outcome.values()).count(state) for state in STATES}
    return {**counts, "bad": sorted(test for test, state in outcome.items() if state in STATES[1:3])}


def _steps(form: Form, limit_s: float, results: Results, part: str = "steps") -> list[str]:
    done = measured_cases(results)
    cases = [case for case in list_cases(form.tiny) if case not in done]
    if not cases:
        return []
    command = [sys.executable, str(TOOLS / "bench_step_cases.py"), "--json", str(form.json(part))]
    for case in cases:
        command += ["--case", *case]
    command += ["--teacher-shape", form.teacher, "--seconds", f"{0.95 * limit_s:.0f}"]
    if not form.tiny:
        return command
    tiny = ["--precision", "fp32", "--rounds", "1", "--steps", "1", "--multiple", "2", "--at-most", "4"]
    return [*command, *tiny, "--matrix-size", "256", *_pairs(TINY_MODEL)]


def _more_steps(form: Form, limit_s: float, results: Results) -> list[str]:
    return _steps(form, limit_s, results, "more-steps")


def _pretrain(form: Form, limit_s: float, results: Results) -> list[str]:
    command = [sys.executable, str(TOOLS / "bench_pretrain.py"), "--json", str(form.json("pretrain"))]
    command += ["--teacher-shape", form.teacher, "--seconds", f"{max(5, limit_s - 30):.0f}"]
    if not form.tiny:
        command += ["--pictures", "2048", "--workers", str(form.workers)]
        return [*command, *_pairs(("batch.micro_batch=256", "compute.compile=auto"))]
    command += ["--recipe", "demo", "--pictures", "24", "--steps", "4", "--warm-up", "2", "--log-every", "1"]
    batch = ("batch.global_batch=12", "batch.micro_batch=6", "optim.precision=fp32")
    return [*command, "--workers", "1", *_pairs((*TINY_MODEL, *batch))]


def _saves(form: Form, limit_s: float, results: Results) -> list[str]:
    command = [sys.executable, str(TOOLS / "bench_checkpoint.py"), "--json", str(form.json("saves"))]
    command += ["--dir", str(form.scratch)]
    if form.tiny:
        return [*command, "--saves", "2", *_pairs(TINY_MODEL)]
    more = ["--model", VIT_B, "--precision", "bf16", "--micro-batch", "64", "--saves", "4", "--ema"]
    return [*command, *more, "--threads", str(form.workers)]


def _embed(form: Form, limit_s: float, results: Results) -> list[str]:
    command = [sys.executable, str(TOOLS / "bench_embed.py"), "--json", str(form.json("embed")), "--no-onnx"]
    if form.tiny:
        return [*command, "--model", "vit_tiny", "--pictures", "4", "--batch", "4", "--rounds", "1"]
    more = ["--device", "cuda", "--pictures", "1024", "--batch", "256", "--rounds", "2"]
    return [*command, *more, "--workers", str(form.workers)]


def _decode(form: Form, limit_s: float, results: Results) -> list[str]:
    command = [sys.executable, str(TOOLS / "bench_gpu_decode.py"), "--json", str(form.json("decode"))]
    if form.tiny:
        small = ["--pictures", "16", "--micro-batch", "8", "--seconds", "0.2", "--workers", "1"]
        return [*command, "--device", "cpu", *small]
    return [*command, "--workers", str(form.workers)]


def _pairs(settings: Sequence[str]) -> list[str]:
    return [word for pair in settings for word in ("--set", pair)]


def _read_json(form: Form, name: str, output: str) -> dict[str, Any]:
    """Reads the part's file; empty before it exists."""
    try:
        found: dict[str, Any] = read_json(form.json(name))
    except (OSError, ValueError):
        return {}
    return found


PARTS = (
    Part("tests", "Tests of the promises on this device", 110, _tests, _read_tests),
    Part("steps", "Training steps", 150, _steps, _read_json),
    Part("pretrain", "A real run on JPEGs of 500 pixels", 80, _pretrain, _read_json),
    Part("saves", "Saving", 40, _saves, _read_json),
    Part("embed", "Embedding", 45, _embed, _read_json),
    Part("decode", "Decoding on the GPU", 35, _decode, _read_json),
    Part("more-steps", "More training steps", 200, _more_steps, _read_json),
)
"""In the order of their worth. `more-steps` uses the time that is left for the cases that `steps` did not reach."""


def environment(form: Form, part: Part) -> dict[str, str]:
    """The environment of a part's command."""
    found = dict(os.environ)
    if form.tiny:
        found["CUDA_VISIBLE_DEVICES"] = ""
    if form.tiny or part.name == "tests":  # tests run at the same time
        found["OMP_NUM_THREADS"] = "1"
    return found
