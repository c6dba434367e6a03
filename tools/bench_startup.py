"""Measures what a process loads before it does any work: CPU seconds, modules, and processes that it starts. Rows:
`import torch`, `load_encoder`, and one rank of `uniemox pretrain` from its start to the end of its first step, on a
tiny student. Each row is the median of fresh processes in turn. Prints a table.

    python tools/bench_startup.py [--rounds 5] [--json FILE]
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from benchmark import make_parser, print_markdown, run_json, run_main, save_results
from options import positive_int

from shards.pack.pipeline import PackSettings, pack

PICTURES = Path(__file__).parents[1] / "shards/demo/fluent_emoji.parquet"
TORCH = "import torch"
ENCODER = "from uniemox_dist import load_encoder"
RANK = """
from uniemox_dist.cli.main import run
assert run(json.loads(sys.argv[1])) == 0
"""
REPORT = """
import resource
own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({
    "cpu_s": own.ru_utime + own.ru_stime,
    "modules": len(sys.modules),
    "children_cpu_s": children.ru_utime + children.ru_stime,
}))
"""
TINY = (
    "run.max_steps=1",
    "run.epochs=null",
    "run.pictures_every=null",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=0",
    "optim.precision=fp32",
    "batch.global_batch=12",
    "batch.micro_batch=12",
    "data.eval_path=null",
    "data.workers=0",
    "model.depth=1",
    "model.decoder_depth=1",
)


def pack_pictures(folder: Path) -> Path:
    """Packs a few shipped pictures; returns the folder of the training data."""
    pq.write_table(pq.read_table(PICTURES).slice(0, 64), folder / "table.parquet")
    pack(PackSettings(str(folder / "table.parquet"), "table", persons="none"), folder / "shards")
    return folder / "shards/train"


def measure(code: str, command: list[str]) -> dict[str, Any]:
    """Runs code in a fresh process."""
    run: dict[str, Any] = run_json(["-c", f"import json, sys\n{code}{REPORT}", json.dumps(command)])
    return run


def main() -> None:
    """Measures, and prints a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=positive_int, default=5, help="processes per row")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = pack_pictures(Path(folder))
        for number in range(given.rounds):
            place = [f"data.path={data}", f"run.dir={folder}", f"run.name=run{number}"]
            for name, code, command in (
                ("`import torch`", TORCH, []),
                ("`load_encoder`", ENCODER, []),
                ("`pretrain`, first step done", RANK, ["pretrain", "demo", *TINY, *place]),
            ):
                found.setdefault(name, []).append(measure(code, command))
    keys = ("cpu_s", "modules", "children_cpu_s")
    rows = [
        {"what": name, **{key: statistics.median(one[key] for one in runs) for key in keys}}
        for name, runs in found.items()
    ]
    header = ("until", "CPU seconds", "of `import torch`", "modules", "CPU seconds of child processes")
    cells = [
        (
            row["what"],
            f"{row['cpu_s']:.2f}",
            f"{row['cpu_s'] / rows[0]['cpu_s']:.2f}",
            f"{row['modules']:.0f}",
            f"{row['children_cpu_s']:.2f}",
        )
        for row in rows
    ]
    print_markdown(header, cells)
    save_results(given, {"torch": torch.__version__, "time": round(time.time()), "rows": rows})


if __name__ == "__main__":
    run_main(main)
