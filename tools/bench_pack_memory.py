"""Measures the memory of a pack by number of pictures: the peak resident memory of the parent and of its largest
worker.

Packs folders of small JPEGs (with `--layout table` a Parquet file that contains them), no two of them equal, and
samples the memory of the processes twenty times a second. Prints a table, and writes it with `--json FILE`.
"""

import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark import make_parser, run_main, save_results
from options import positive_int
from PIL import Image

MB = 1 << 20


def pictures(count: int) -> list[bytes]:
    """Small JPEGs. Pixels repeat after 500 pictures; a comment in each makes the bytes differ."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(count, 500)):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 96)).save(
            buffer, "JPEG", quality=80
        )
        encoded.append(buffer.getvalue())
    return [
        base[:2] + b"\xff\xfe\x00\x0a" + b"%08d" % i + base[2:]
        for i in range(count)
        for base in (encoded[i % len(encoded)],)
    ]


def make_source(folder: Path, layout: str, count: int) -> Path:
    """Writes the source."""
    if layout == "table":
        rows = {"image": pictures(count), "caption": [f"picture number {i}" for i in range(count)]}
        pq.write_table(pa.table(rows), folder / "t.parquet", row_group_size=1000)
        return folder / "t.parquet"
    for i, data in enumerate(pictures(count)):
        path = folder / "in" / f"label{i % 8}" / f"{i:07d}.jpg"
        if i < 8:
            path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return folder / "in"


def watch(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; returns seconds, its peak memory in MB, and that of its largest child."""
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    parent = child = 0
    while process.poll() is None:
        try:
            parent = max(parent, process.memory_info().rss)
            for found in process.children(recursive=True):
                child = max(child, found.memory_info().rss)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the pack ended with {process.returncode}")
    return time.perf_counter() - start, parent / MB, child / MB


def main() -> int:
    """Measures and prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--counts", type=positive_int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--layout", choices=["folder", "table"], default="folder")
    parser.add_argument("--persons", default="none")
    parser.add_argument("--workers", type=positive_int, default=2)
    arguments = parser.parse_args()
    rows = []
    print(f"{'pictures':>9} {'seconds':>8} {'pictures/s':>11} {'parent, MB':>11} {'a worker, MB':>13}")
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(prefix="bench_memory_") as name:
            source = make_source(Path(name), arguments.layout, count)
            options = ["--layout", arguments.layout, "--persons", arguments.persons]
            options += ["--workers", str(arguments.workers), "--shard-size", "32"]
            command = [sys.executable, "-m", "uniemox_dist.cli", "shards", "pack", str(source), f"{name}/out"]
            seconds, parent, worker = watch([*command, *options])
        rows.append({"pictures": count, "seconds": seconds, "parent_mb": parent, "worker_mb": worker})
        print(f"{count:9} {seconds:8.1f} {count / seconds:11.0f} {parent:11.0f} {worker:13.0f}", flush=True)
    save_results(arguments, {"layout": arguments.layout, "rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
