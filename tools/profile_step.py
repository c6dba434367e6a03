"""Profiles a training step: writes a trace of torch's profiler and prints the ten most expensive operations.

The trace is Chrome's JSON for chrome://tracing or Perfetto. Operations are ranked by their own time. Rows and options
are those of bench_step.py.
"""

import warnings
from pathlib import Path

from benchmark import Parser, run_main
from options import local_path, positive_int
from step_rows import ROWS, add_options, device, setting
from torch.profiler import ProfilerActivity, profile

from uniemox_dist.core.files import check_output

OPERATIONS = 10


def main() -> None:
    parser = Parser(__doc__.partition(":")[0])
    add_options(parser)
    parser.add_argument("--row", choices=list(ROWS), default="a")
    parser.add_argument("--steps", type=positive_int, default=3)
    parser.add_argument("--trace", type=local_path, default=Path("step_trace.json"))
    options = parser.parse_args()
    check_output(options.trace, "--trace")
    warnings.filterwarnings("ignore")
    step = setting(options, options.mask[0]).of(options.row)
    step()
    cuda = device().type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(options.steps):
            step()
    profiler.export_chrome_trace(str(options.trace))
    time_field = "self_device_time_total" if cuda else "self_cpu_time_total"
    operations = sorted(profiler.key_averages(), key=lambda event: getattr(event, time_field), reverse=True)
    whole = sum(getattr(event, time_field) for event in operations)
    print(
        f"({options.row}) {ROWS[options.row]}, mask {options.mask[0]:g}, {options.steps} steps of micro-batch "
        f"{options.micro_batch}: {whole / 1e3 / options.steps:.1f} ms of operations a step\n"
    )
    print(f"{'operation':58} {'ms a step':>9} {'share':>6} {'calls a step':>12}")
    for event in operations[:OPERATIONS]:
        own = getattr(event, time_field)
        print(
            f"{event.key[:58]:58} {own / 1e3 / options.steps:9.2f} {own / whole:6.1%} "
            f"{event.count / options.steps:12.0f}"
        )
    print(f"\n{options.trace}: the trace")


if __name__ == "__main__":
    run_main(main)
