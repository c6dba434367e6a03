"""Compares the elastic stream with other libraries that read shards for training: what they promise and cost.

Every library reads the same samples (the number of a sample, a label that is the same in a whole tar, and random bytes)
in fresh processes, two ranks with two loader processes each where ranks matter. Columns:

- exactly once: samples missing and repeated in two epochs of two ranks, and whether the ranks have equally many
  batches, without which data-parallel training hangs or drops samples;
- same ranks, other ranks: the same after a stop in mid-epoch, resumed on the two ranks or on one; "no state" if the
  library has none, "refused" if it refuses;
- same batches: share of global batches that hold the same samples on two ranks as on one;
- labels: how much more often two samples of a batch have the same label than in a perfect shuffle (1 is as there,
  less is more even);
- start: seconds to the first batch of --shards tars (symbolic links), and memory of the rank and its loader process;
- samples per second of CPU time of one rank with one loader process; no library but this one checks hashes.

Needs torchdata, datasets and mosaicml-streaming; a library that is not installed is left out.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from benchmark import make_parser, print_markdown, run_main, save_results
from options import positive_int, positive_number
from stream_peers import PEERS, make_mds

from shards.edit.index_members import index_members
from shards.format.entries import ShardEntry
from shards.format.manifest import MEMBERS, Manifest, read_manifest
from shards.format.sample import MEMBERS_NAME

TARS, SAMPLES, BATCH = 21, 48, 8
"""Tars of the small data set, samples of each, and samples of a micro-batch of one of two ranks."""
OURS = "this stream"
WORKER = str(Path(__file__).with_name("stream_peers.py"))


def write_tars(folder: Path, tars: int, samples: int, size: int) -> None:
    """Writes tars, of which each has one label, and their index."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for tar in range(tars):
        with webdataset.TarWriter(str(folder / f"{tar:06}.tar")) as writer:
            for row in range(samples):
                key = f"{tar * samples + row:08}"
                writer.write({"__key__": key, "bin": random.bytes(size), "cls": str(tar)})
    index_members(str(folder))


def run_ranks(job: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Runs a job on some ranks at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(world):
        own = {**job, "rank": rank, "world": world}
        for name in ("load", "save"):
            if own.get(name):
                own[name] = f"{own[name]}.{rank}"
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, WORKER, json.dumps(own)]
        running.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    found = [process.communicate(timeout=600) for process in running]
    if failed := [error for process, (_, error) in zip(running, found) if process.returncode]:
        raise RuntimeError(failed[0].strip().splitlines()[-1])
    return [json.loads(out.splitlines()[-1]) for out, _ in found]


def read_samples(ranks: list[dict[str, Any]]) -> Counter[int]:
    """How often each sample was read."""
    return Counter(number for rank in ranks for batch in rank["read"] for number, _ in batch)


def describe(seen: Counter[int], times: int) -> str:
    """Samples missing and repeated, where each should come `times` times."""
    missing = sum(max(0, times - seen[number]) for number in range(TARS * SAMPLES))
    repeated = sum(max(0, count - times) for count in seen.values())
    return "yes" if not missing + repeated else f"{missing} missing, {repeated} repeated"


def describe_ends(ranks: list[dict[str, Any]]) -> str:
    """Whether ranks that train together would end together."""
    counts = [len(rank["read"]) for rank in ranks]
    return "" if len(set(counts)) == 1 else f", but ranks have {' and '.join(map(str, counts))} batches"


def resume(job: dict[str, Any], folder: Path, world: int) -> str:
    """Stops two ranks in mid-epoch, and goes on with `world` ranks."""
    state = str(folder / "state")
    before = run_ranks({**job, "stop": 30, "save": state}, 2)
    if not all(rank["saved"] for rank in before):
        return "no state"
    for rank in range(2, world):
        Path(f"{state}.{rank}").write_bytes(Path(f"{state}.0").read_bytes())
    try:
        after = run_ranks({**job, "micro_batch": 2 * BATCH // world, "load": state}, world)
    except RuntimeError:
        return "refused"
    return describe(read_samples(before) + read_samples(after), 2)


def measure_labels(ranks: list[dict[str, Any]]) -> float:
    """Pairs of a global batch with the same label, relative to a perfect shuffle."""
    same = pairs = 0
    for batches in zip(*(rank["read"] for rank in ranks)):
        labels = Counter(label for batch in batches for _, label in batch)
        n = sum(labels.values())
        same += sum(count * (count - 1) for count in labels.values())
        pairs += n * (n - 1)
    return same / pairs / ((SAMPLES - 1) / (TARS * SAMPLES - 1))


def link_shards(source: Path, folder: Path, count: int) -> None:
    """Makes a data set of `count` tars and their index of symbolic links to those of a small one."""
    manifest = read_manifest(source / MEMBERS, format=MEMBERS_NAME)
    index = folder / MEMBERS / "index"
    index.mkdir(parents=True)
    entries = []
    for number in range(count):
        entry = manifest.shards[number % len(manifest.shards)]
        name = f"{number:06}"
        (folder / f"{name}.tar").symlink_to(source / entry.name)
        of = source / MEMBERS / "index" / f"{entry.name.removesuffix('.tar')}.parquet"
        (index / f"{name}.parquet").symlink_to(of)
        entries.append(
            ShardEntry(
                f"{name}.tar", entry.samples, entry.bytes, entry.sha256, entry.index_sha256, entry.rows_sha256
            )
        )
    Manifest(tuple(entries), {}, 1, format=MEMBERS_NAME).write(folder / MEMBERS)


def link_mds(source: Path, folder: Path, count: int) -> None:
    """The same for MosaicML's shards."""
    folder.mkdir()
    record = json.loads((source / "index.json").read_text())
    shards = []
    for number in range(count):
        shard = json.loads(json.dumps(record["shards"][number % len(record["shards"])]))
        name = f"shard.{number:06}.mds"
        (folder / name).symlink_to(source / shard["raw_data"]["basename"])
        shard["raw_data"]["basename"] = name
        shards.append(shard)
    (folder / "index.json").write_text(json.dumps({**record, "shards": shards}))


def measure(peer: str, folder: Path, options: Any) -> dict[str, Any]:
    """All columns of one library."""
    job = {"peer": peer, "folder": str(folder / "small"), "micro_batch": BATCH, "workers": 2, "epochs": 2}
    two = run_ranks(job, 2)
    one = run_ranks({**job, "micro_batch": 2 * BATCH}, 1)
    pairs = [
        (sorted(number for batch in parts for number, _ in batch), sorted(number for number, _ in whole))
        for *parts, whole in zip(*(rank["read"] for rank in two), one[0]["read"])
    ]
    found = {
        "once": describe(read_samples(two), 2) + describe_ends(two),
        "same_ranks": resume(job, folder, 2),
        "other_ranks": resume(job, folder, 1),
        "same_batches": sum(a == b for a, b in pairs) / len(pairs),
        "labels": measure_labels(two),
    }
    long = {**job, "folder": str(folder / "large"), "workers": 1, "epochs": 1000, "micro_batch": 32}
    [rate] = run_ranks({**long, "seconds": options.seconds, "hashes": False}, 1)
    found["rate"] = rate["rate"]
    if peer == OURS:
        [rate] = run_ranks({**long, "seconds": options.seconds}, 1)
        found["rate_with_hashes"] = rate["rate"]
    many = {**job, "folder": str(folder / "many"), "workers": 1, "micro_batch": 32, "stop": 1}
    try:
        [start] = run_ranks(many, 1)
        found |= {"start_s": start["first_s"], "memory": start["rss"]}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{peer}: {options.shards} tars: {error}", file=sys.stderr)
        found |= {"start_s": None, "memory": None}
    return found


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--shards", type=positive_int, default=100_000, help="tars of the column start")
    parser.add_argument("--seconds", type=positive_number, default=5.0, help="seconds of each rate")
    parser.add_argument("--size", type=positive_int, default=50_000, help="bytes of a sample of the rates")
    options = parser.parse_args()
    peers = []
    for name, (module, _) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: is not installed; left out", file=sys.stderr)
        else:
            peers.append(name)
    results = {}
    with tempfile.TemporaryDirectory(prefix="stream_peers-") as scratch:
        folder = Path(scratch)
        write_tars(folder / "small", TARS, SAMPLES, 100)
        write_tars(folder / "large", 20, 1000, options.size)
        link_shards(folder / "small", folder / "many", options.shards)
        if "mosaicml-streaming" in peers:
            for name in ("small", "large"):
                make_mds(folder / name, folder / f"{name}-mds")
            link_mds(folder / "small-mds", folder / "many-mds", options.shards)
        for peer in peers:
            results[peer] = measure(peer, folder, options)
            print(f"{peer}: {results[peer]}", file=sys.stderr)
    print_markdown(
        ("library", "exactly once", "resumed on the same ranks", "on other ranks", "same batches", "labels",
         "samples per CPU second", f"start, {options.shards} tars", "memory"),
        [
            (
                peer,
                row["once"],
                row["same_ranks"],
                row["other_ranks"],
                f"{100 * row['same_batches']:.0f} %",
                f"{row['labels']:.2f}",
                f"{row['rate']:.0f}"
                + (f" ({row['rate_with_hashes']:.0f} with hashes)" if "rate_with_hashes" in row else ""),
                "failed" if row["start_s"] is None else f"{row['start_s']:.1f} s",
                "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f} MB",
            )
            for peer, row in results.items()
        ],
    )  # fmt: skip
    save_results(options, results)
    return 0


if __name__ == "__main__":
    run_main(main)
