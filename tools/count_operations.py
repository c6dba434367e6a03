"""Counts what a training step launches: dispatched operations that are not views, and waits of the host for the device.

Operation counts do not depend on widths, so the student is as deep as ViT-B/16 with MAE's decoder (12 and 8 blocks) but
narrow. A step is a row of step_rows.py: forward and backward pass, reduction, check and update on one rank. The step
that is counted is the third.

A wait is a call that hands values of a tensor to Python or copies them to the CPU, such as `item`, `tolist` or `bool`.
On a GPU the host then waits for the device. On a CPU it never does, but the calls are the same.

"plain engine" is the same step with torch's AdamW and fp32 master weights in the place of DeepSpeed.

With `--compile` torch's profiler counts, because nothing is compiled while dispatched operations are observed. A
compiled pass of a block then counts as one, as a CUDA graph does; without CUDA graphs it launches its kernels itself.
"""

import argparse
import collections
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark import make_parser, print_markdown, run_main, save_results
from options import non_negative_int
from step_rows import ROWS, add_options, setting
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NARROW = (
    "model.name=null",
    "model.width=48",
    "model.depth=12",
    "model.heads=3",
    "model.image_size=32",
    "model.patch_size=8",
    "model.decoder_width=32",
    "model.decoder_depth=8",
    "model.decoder_heads=2",
    # Gradients fill five buckets, as those of ViT-B do at the size that training uses.
    "deepspeed.zero_optimization.reduce_bucket_size=120000",
)
LAYOUTS = {
    "plain engine, fp32": ("plain", "fp32", 1),
    "plain engine, bf16": ("plain", "bf16", 1),
    "DeepSpeed, fp32, ZeRO-0": ("deepspeed", "fp32", 0),
    "DeepSpeed, fp32, ZeRO-1": ("deepspeed", "fp32", 1),
    "DeepSpeed, fp32, ZeRO-2": ("deepspeed", "fp32", 2),
    "DeepSpeed, bf16, ZeRO-1": ("deepspeed", "bf16", 1),
    "DeepSpeed, bf16, ZeRO-2": ("deepspeed", "bf16", 2),
    # ZeRO-3 replaces torch's linear function for the rest of the process, so it comes last.
    "DeepSpeed, fp32, ZeRO-3": ("deepspeed", "fp32", 3),
    "DeepSpeed, bf16, ZeRO-3": ("deepspeed", "bf16", 3),
}
WAITS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero")
"""Operations that make the host wait."""
WAITING_METHODS = ("tolist", "numpy", "cpu")
"""Methods of a tensor that make the host wait, and dispatch no operation if the tensor is on a CPU."""


LAUNCH_NOTHING = frozenset(
    (
        *(
            "_has_compatible_shallow_copy_type",
            "alias",
            "as_strided",
            "detach",
            "empty",
            "empty_like",
            "empty_strided",
        ),
        *(
            "expand",
            "narrow",
            "permute",
            "resolve_conj",
            "resolve_neg",
            "select",
            "slice",
            "split",
            "squeeze",
            "t",
        ),
        *("split_with_sizes", "transpose", "unbind", "unsqueeze", "view", "view_as"),
    )
)
"""Operations of torch's profiler that are views, or only allocate memory."""
COMPOSITE = ("to", "reshape", "contiguous", "flatten", "chunk")
"""Operations that are counted by what they call, which can be nothing."""


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched while it is active, without views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()
        self.waits: list[str] = []
        """Names of the waits, in their order."""
        self.after_last_wait = 0
        """Operations since the last wait."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.replace("::", ".")
        if not func.is_view:
            self.operations[name] += 1
            self.after_last_wait += 1
        if name in WAITS:
            self.add_wait(name)
        return func(*args, **(kwargs or {}))

    def add_wait(self, name: str) -> None:
        self.waits.append(name)
        self.after_last_wait = 0


class MethodCounter(TorchFunctionMode):
    """Reports calls of WAITING_METHODS to a Counter."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in [getattr(torch.Tensor, name) for name in WAITING_METHODS]:
            self.counter.add_wait(func.__name__)
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], Any], warm_up: int = 2) -> Counter:
    """Counts the operations of a step, after `warm_up` steps."""
    for _ in range(warm_up):
        step()
    with Counter() as counter, MethodCounter(counter):
        step()
    return counter


def count_compiled(step: Callable[[], Any], warm_up: int = 3) -> collections.Counter[str]:
    """Counts the operations of a compiled step, after `warm_up` steps."""
    for _ in range(warm_up):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found: collections.Counter[str] = collections.Counter()
    waiting = [event for event in profiler.events() if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        kind, _, name = event.name.rpartition("::")
        if "CompiledFxGraph" in event.name:
            found["a compiled pass"] += 1
        elif kind not in ("aten", "c10d") or name in COMPOSITE:
            waiting += event.cpu_children
        elif name not in LAUNCH_NOTHING:
            found[f"{kind}.{name}"] += 1
    return found


def count_layout(layout: str, options: argparse.Namespace) -> Counter:
    """Counts the operations of a step of one of LAYOUTS, eager."""
    return count(step_of(layout, options))


def step_of(layout: str, options: argparse.Namespace) -> Callable[[], Any]:
    """Returns the step of one of LAYOUTS."""
    engine, precision, stage = LAYOUTS[layout]
    changed = {
        "engine": engine,
        "precision": precision,
        "set": [*NARROW, *options.set, f"zero.stage={stage}"],
    }
    at = setting(argparse.Namespace(**{**vars(options), **changed}), options.mask[0])
    at.compiles = options.compile
    return at.of(options.row)


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    add_options(parser)
    parser.add_argument("--row", choices=list(ROWS), default="a'")
    parser.add_argument("--compile", action="store_true", help="with compute.compile=true")
    parser.add_argument("--layout", choices=list(LAYOUTS), action="append", help="only these (default: all)")
    parser.add_argument(
        "--names", type=non_negative_int, default=0, metavar="N", help="also print the N most frequent names"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for layout in options.layout or LAYOUTS:
        if options.compile:
            compiled = count_compiled(step_of(layout, options))
            rows.append([layout, f"{compiled.total():,}", "-", "-"])
            results[layout] = {"operations": dict(compiled.most_common())}
            continue
        counter = count_layout(layout, options)
        total = counter.operations.total()
        rows.append([layout, f"{total:,}", str(len(counter.waits)), f"{counter.after_last_wait:,}"])
        results[layout] = {"operations": dict(counter.operations.most_common()), "waits": counter.waits}
    print_markdown(["engine", "operations", "waits", "operations after the last wait"], rows)
    for layout, found in results.items():
        for name, number in list(found["operations"].items())[: options.names]:
            print(f"{layout:28} {number:6} {name}")
    save_results(options, {"command": sys.argv, "layouts": results})


if __name__ == "__main__":
    run_main(main)
