"""Measures the cost of starting a rank at scale, without data; prints a table.

Writes the manifest of a data set with uneven shards. Then, in fresh processes that import only what planning needs, it
reads the manifest, builds the plan and locates one rank's slots of a step, at step 0 and at `--step`. A second table
has the balance of ranks over one epoch in samples, bytes and shards, from the plan's ranges.
"""

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import make_parser, run_json, run_main, save_results
from options import non_negative_int, positive_int, positive_number

from shards.format.entries import ShardEntry
from shards.format.manifest import Manifest, read_manifest
from uniemox_dist.data.plan import Plan

MB = 1e6
SAMPLE_BYTES = 100_000
WINDOW = 512


def peak_mb() -> float:
    """Returns the peak resident memory of this process; ru_maxrss is in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def write(folder: str, samples: int, shards: int) -> dict[str, Any]:
    """Writes a manifest whose shards differ by an order of magnitude in samples, and a little in sample size."""
    rng = np.random.default_rng(0)
    share_M = rng.lognormal(sigma=0.7, size=shards)
    counts_M = (share_M / share_M.sum() * samples).astype(np.int64)
    counts_M[: samples - counts_M.sum()] += 1
    bytes_M = (counts_M * SAMPLE_BYTES * rng.lognormal(sigma=0.1, size=shards)).astype(np.int64)
    entries = [
        ShardEntry(
            f"{i:06d}.tar",
            count,
            size,
            *(hashlib.sha256(f"{kind} {i}".encode()).hexdigest() for kind in ("tar", "index", "rows")),
        )
        for i, (count, size) in enumerate(zip(counts_M.tolist(), bytes_M.tolist()))
    ]
    manifest = Manifest(tuple(entries), {"settings": {"synthetic": True}})
    manifest.write(Path(folder))
    return {
        "samples": manifest.samples,
        "smallest_shard": int(counts_M.min()),
        "largest_shard": int(counts_M.max()),
        "manifest_mb": (Path(folder) / "manifest.json").stat().st_size / MB,
    }


def start(folder: str, streams: int, global_batch: int, ranks: int, step: int) -> dict[str, float]:
    """Starts like a rank in the middle: reads the manifest, builds the plan, locates the slots of a step."""
    bare = peak_mb()
    times = [time.perf_counter()]
    manifest = read_manifest(folder)
    times.append(time.perf_counter())
    counts = [shard.samples for shard in manifest.shards]
    plan = Plan([counts], [1.0], streams=streams, global_batch=global_batch, seed=0, window=WINDOW)
    times.append(time.perf_counter())
    slots = plan.rank_slots(step, ranks // 2, ranks)
    places = [plan.locate(slot) for slot in slots]
    times.append(time.perf_counter())
    assert len(set(places)) == global_batch // ranks
    read, build, place = np.diff(times).tolist()
    return {
        "step": step,
        "seconds": times[-1] - times[0],
        "read_s": read,
        "plan_s": build,
        "place_s": place,
        "bare_mb": bare,
        "peak_mb": peak_mb(),
    }


def balance(folder: str, streams: int, global_batch: int, ranks: int, epoch: int) -> dict[str, list[float]]:
    """Returns minimum, mean and maximum over the ranks in one epoch.

    All samples of a shard count as equally large. A shard counts once for each stream that reads from it.

    Shapes: M shards, S streams, W ranks.
    """
    shards = read_manifest(folder).shards
    counts = [shard.samples for shard in shards]
    plan = Plan([counts], [1.0], streams=streams, global_batch=global_batch, seed=0, window=WINDOW)
    [source] = plan.sources
    first_S, end_S = (rows[plan.nth_S] for rows in source.ranges(epoch))
    order_M, ends = source.shard_order(epoch)
    bytes_M = np.array([shard.bytes for shard in shards])[order_M]
    before = np.concatenate([[0], np.cumsum(bytes_M)])  # bytes before each row in `ends`
    bytes_S = np.interp(end_S, ends, before) - np.interp(first_S, ends, before)
    shards_S = np.searchsorted(ends, end_S, "left") - np.searchsorted(ends, first_S, "right") + 1
    shards_S[first_S == end_S] = 0
    of_ranks = {"samples": end_S - first_S, "bytes": bytes_S, "shards": shards_S}
    sums_W = {name: per_S.reshape(ranks, -1).sum(1) for name, per_S in of_ranks.items()}
    return {name: [float(w.min()), float(w.mean()), float(w.max())] for name, w in sums_W.items()}


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {"write": write, "start": start, "balance": balance}


def call_in_new_process(function: str, **arguments: Any) -> dict[str, Any]:
    """Calls a function of this file in a new process; adds the process's seconds, start included, as `process_s`.

    A new process inherits ru_maxrss from the one that started it, so this process must stay small.
    """
    began = time.perf_counter()
    result = run_json([__file__, "--call", json.dumps([function, arguments])])
    return {**result, "process_s": time.perf_counter() - began}


def main() -> int:
    """Runs the measurements and prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=positive_number, default=1e9)
    parser.add_argument("--shards", type=positive_int, default=100_000)
    parser.add_argument("--ranks", type=positive_int, default=4096)
    parser.add_argument("--streams", type=positive_int, default=12_288)
    parser.add_argument("--global-batch", type=positive_int, default=49_152)
    parser.add_argument("--step", type=non_negative_int, default=1_000_000)
    parser.add_argument(
        "--repeat", type=positive_int, default=3, help="starts per step; the least seconds, the most MB"
    )
    parser.add_argument("--call", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.call:
        name, arguments = json.loads(given.call)
        print(json.dumps(FUNCTIONS[name](**arguments)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="simulate_stream_") as folder:
        data = call_in_new_process("write", folder=folder, samples=int(given.samples), shards=given.shards)
        run = {name: getattr(given, name) for name in ("streams", "global_batch", "ranks")}
        for step in (0, given.step):
            starts = [
                call_in_new_process("start", folder=folder, **run, step=step) for _ in range(given.repeat)
            ]
            best = min(starts, key=lambda row: row["seconds"])
            rows.append({**best, "peak_mb": max(row["peak_mb"] for row in starts)})
        spread = call_in_new_process("balance", folder=folder, **run, epoch=0)
    del data["process_s"], spread["process_s"]
    print(
        f"{data['samples']:,} samples in {given.shards:,} shards of {data['smallest_shard']:,} to "
        f"{data['largest_shard']:,}, a manifest of {data['manifest_mb']:.1f} MB, {given.ranks:,} ranks\n"
    )
    print(
        f"{'one rank starts at step':>24} {'seconds':>8} = {'read':>5} + {'plan':>5} + {'place':>5}", end=""
    )
    print(f" {'process, s':>11} {'bare, MB':>9} {'added, MB':>10} {'peak, MB':>9}")
    for row in rows:
        print(
            f"{row['step']:24,} {row['seconds']:8.2f} = {row['read_s']:5.2f} + {row['plan_s']:5.2f}", end=""
        )
        print(f" + {row['place_s']:5.2f} {row['process_s']:11.2f} {row['bare_mb']:9.0f}", end="")
        print(f" {row['peak_mb'] - row['bare_mb']:10.0f} {row['peak_mb']:9.0f}")
    print("aim: 1 s and 150 MB, the same at every step\n")
    print(f"{'a rank, in one epoch':>24} {'least':>18} {'mean':>18} {'most':>18} {'most/mean':>10}")
    for name, (least, mean, most) in spread.items():
        print(f"{name:>24} {least:18,.0f} {mean:18,.1f} {most:18,.0f} {most / mean:10.4f}")
    facts = {**vars(given), **data, "starts": rows, "balance": spread}
    save_results(given, {name: fact for name, fact in facts.items() if name not in ("json", "call")})
    return 0


if __name__ == "__main__":
    run_main(main)
