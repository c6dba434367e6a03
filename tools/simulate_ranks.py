"""Counts what the ranks of a large job read, keep and send, one rank at a time; prints tables.

A checkpoint of W ranks is fabricated: real headers, index and hashes; its numbers are zeros in sparse files. Every
rank of the job then chooses and hashes it by the project's own code. The first, the middle and the last rank also make
the real engine, load the checkpoint, save one, open a data set and gather the texts of a step, in a process each, in
torch's fake process group. "Before" is computed: every rank opened every part and read all fp32 weights, received the
outcome of every rank's save, and received texts in fp32.

    python tools/simulate_ranks.py [--ranks 8,64,512,4096] [--stage 1] [--json FILE]
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark import make_parser, print_markdown, run_json, run_main, save_results
from options import add_settings, positive_int, positive_ints

from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config

RANK = str(Path(__file__).with_name("simulated_rank.py"))
WIDTH = 512
"""Width of the teacher's space."""


def configure(overrides: Sequence[str], ranks: int, stage: int) -> Config:
    """The recipe for ViT-B/16 with overrides, for so many ranks.

    Raises:
        UserError: if they are no valid configuration.
    """
    batch = [f"batch.streams={ranks}", f"batch.global_batch={ranks}", "batch.micro_batch=1"]
    other = ["data.path=nowhere", f"zero.stage={stage}", "optim.ema_decay=0.999", "optim.precision=fp32"]
    return load_config("uniemox_vit_b16", [*other, *batch, *overrides])


def call(function: str, **arguments: Any) -> Any:
    """Calls a function of simulated_rank.py in a new process."""
    return run_json([RANK, json.dumps([function, arguments])])


def sample(ranks: int) -> list[int]:
    """The ranks that are played in full."""
    return sorted({0, ranks // 2, ranks - 1})


def measure(ranks: int, stage: int, texts: int, data: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The facts about a job of so many ranks."""
    with tempfile.TemporaryDirectory(prefix="simulate_ranks_") as folder:
        size = {"ranks": ranks, "stage": stage, "overrides": overrides}
        checkpoint = call("fabricate", folder=folder, **size)
        chosen = call("choose", folder=folder, ranks=ranks)
        played = [
            call("resume_and_save", folder=folder, rank=rank, texts=texts, **size) for rank in sample(ranks)
        ]
    opened = [
        call("open_data", folder=data, rank=rank, ranks=ranks, overrides=overrides) for rank in sample(ranks)
    ]
    return {
        "ranks": ranks,
        "stage": stage,
        "texts": texts,
        "checkpoint": checkpoint,
        "chosen": chosen,
        "played": played,
        "data": opened,
    }


def resume_for_real(ranks: int, stage: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Resumes in so many real ranks on this machine."""
    with tempfile.TemporaryDirectory(prefix="simulate_ranks_") as folder:
        size = {"folder": folder, "ranks": ranks, "stage": stage, "overrides": overrides}
        return {"checkpoint": call("fabricate", **size), **call("resume_in_ranks", **size)}


def show_real(found: dict[str, Any]) -> None:
    """Prints what real ranks read, and how long they took."""
    ranks = found["ranks"]
    read = sum(one["read_bytes"] for one in ranks)
    rows = [
        (
            f"{max(one['parts'] for one in ranks)}",
            f"{read / 1e9:.2f} GB",
            f"{read / found['checkpoint']['bytes']:.2f}",
            f"{found['checkpoint']['bytes'] / len(ranks) / found['hashed_bytes_per_s']:.2f} s",
            *(
                f"{max(one[name] for one in ranks):.2f} s"
                for name in ("choosing_s", "choosing_cpu_s", "loading_s", "loading_cpu_s")
            ),
        )
    ]
    header = (
        "part files a rank opens",
        "bytes the job reads",
        "of the checkpoint",
        "reckoned for reading and hashing",
        "measured",
        "of it processor",
        "loading and gathering",
        "of it processor",
    )
    rate = f"one thread reads and hashes {found['hashed_bytes_per_s'] / 1e9:.2f} GB/s of processor time"
    show(f"Resuming in {len(ranks)} real ranks on this machine, where {rate}", header, rows)


def total(counts: dict[str, int]) -> int:
    """Bytes of all exchanges."""
    return sum(counts.values())


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with a title."""
    print(f"\n{title}\n")
    print_markdown(header, rows)


def print_tables(found: Sequence[dict[str, Any]]) -> None:
    """Prints what was found, one row for each number of ranks."""

    def rows(row: Callable[[dict[str, Any]], Sequence[str]]) -> list[Sequence[str]]:
        return [(f"{one['ranks']:,}", *row(one)) for one in found]

    def most(one: dict[str, Any], part: str, what: str) -> int:
        return max(played[part][what] for played in one["played"])

    def resume(one: dict[str, Any]) -> Sequence[str]:
        ranks, whole = one["ranks"], one["checkpoint"]["bytes"]
        read = one["chosen"]["read_bytes"] + ranks * most(one, "loading", "read_bytes")
        before = ranks * 4 * one["checkpoint"]["weights"]
        return (
            f"{one['chosen']['most_parts'] + most(one, 'loading', 'parts')}",
            f"{ranks:,}",
            f"{one['chosen']['parts']:,}",
            f"{ranks**2:,}",
            f"{read / 1e9:.2f} GB",
            f"{read / whole:.2f}",
            f"{before / 1e9:.1f} GB",
        )

    header: Sequence[str] = (
        "ranks",
        "part files a rank opens",
        "before",
        "the job",
        "before",
        "bytes the job reads",
        "of the checkpoint",
        "before",
    )
    show("Resuming", header, rows(resume))

    def commit(one: dict[str, Any]) -> Sequence[str]:
        first, *others = [played["commit"] for played in one["played"]]
        return (
            f"{max(total(other['sent']) for other in others or [first]):,} B",
            f"{total(first['received']) / 1e3:.1f} kB",
            f"{max(total(other['received']) for other in others or [first]) / 1e3:.1f} kB",
            f"{total(first['received']) / 1e3:.1f} kB",
        )

    header = ("ranks", "a rank sends", "rank 0 receives", "another rank receives", "before")
    show("Completing a save", header, rows(commit))

    def manifest(one: dict[str, Any]) -> Sequence[str]:
        first, *others = one["data"]
        last = (others or [first])[-1]
        return (
            f"{first['read_bytes'] / 1e6:.1f} MB",
            f"{one['ranks'] * first['read_bytes'] / 1e6:,.1f} MB",
            f"{max((o['manifests'] for o in others), default=0)}",
            f"{total(last['received']) / 1e6:.1f} MB",
            f"{first['cpu_s']:.2f} s",
            f"{last['cpu_s']:.2f} s",
        )

    header = (
        "ranks",
        "rank 0, and so the job, reads",
        "before: the job",
        "files another rank opens",
        "it receives",
        "processor time of rank 0",
        "of another",
    )
    show("Opening the data", header, rows(manifest))

    def texts(one: dict[str, Any]) -> Sequence[str]:
        received = max(total(played["texts"]["received"]) for played in one["played"])
        before = 4 * WIDTH * one["texts"] * (one["ranks"] - 1) // one["ranks"]
        return f"{received / 1e6:.1f} MB", f"{before / 1e6:.1f} MB"

    header = ("ranks", "a rank receives", "before")
    show(f"Texts of a step of {found[0]['texts']:,} samples, width {WIDTH}", header, rows(texts))


def main() -> None:
    """Measures, and prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ranks", type=positive_ints, default="8,64,512,4096", help="numbers of ranks, separated by commas"
    )
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument(
        "--node", type=positive_int, default=8, help="real ranks that open the data on this node"
    )
    parser.add_argument(
        "--real", type=positive_int, metavar="RANKS", help="only resume, in real ranks on this machine"
    )
    parser.add_argument("--shards", type=positive_int, default=100_000)
    parser.add_argument("--samples", type=positive_int, default=1_000_000_000)
    parser.add_argument(
        "--texts", type=positive_int, default=65_536, help="global batch whose captions are gathered"
    )
    add_settings(parser)
    given = parser.parse_args()
    for ranks in [given.real] if given.real else given.ranks:
        configure(given.set, ranks, given.stage)  # finds mistakes in --set before the work
    if given.real:
        real = resume_for_real(given.real, given.stage, given.set)
        show_real(real)
        save_results(given, real)
        return
    with tempfile.TemporaryDirectory(prefix="simulate_ranks_data_") as data:
        made = call("make_data", folder=data, samples=given.samples, shards=given.shards)
        node = call("open_on_node", folder=data, ranks=given.node)
        found = [measure(ranks, given.stage, given.texts, data, given.set) for ranks in given.ranks]
    first = found[0]["checkpoint"]
    print(
        f"{first['weights']:,} trained numbers, ZeRO-{given.stage}, a checkpoint of {first['bytes'] / 1e9:.2f} GB; "
        f"{made['samples']:,} samples in {given.shards:,} shards, a manifest of {made['manifest_mb']:.1f} MB"
    )
    print_tables(found)
    titles = {
        "private": "for the manifest, without what is shared",
        "plan": "for the plan",
        "objects": "before: the entries as objects",
    }
    most = {title: max(one[name] for one in node["memory"]) for name, title in titles.items()}
    table = found[0]["data"][0]["sent"].get("broadcast", 0)
    show(
        f"Memory of a rank for the manifest and the plan: the most of {given.node} real ranks on one node, which share "
        f"{table / 1e6:.1f} MB",
        list(most),
        [[f"{value / 1e6:.1f} MB" for value in most.values()]],
    )
    about = {"torch": version("torch"), "python": platform.python_version(), "time": round(time.time())}
    save_results(given, {**about, "data": made, "node": node, "jobs": found})


if __name__ == "__main__":
    run_main(main)
