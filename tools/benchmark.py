"""Shared parts of the benchmarks in this folder: options, timing in turn, fresh processes, tables and JSON files."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uniemox_dist.core.files import write_json


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Creates a parser that prints the script's docstring as it is, with the option `--json FILE`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser


def time_call(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_in_turn(
    ways: Mapping[str, Any],
    rounds: int,
    measure: Callable[[Any], float] = time_call,
) -> dict[str, list[float]]:
    """Measures several ways of doing the same work, one after the other in each round.

    Taking turns spreads slow phases of a shared machine over all ways.

    Args:
        measure: returns the seconds of one way; by default a way is a function without arguments.

    Returns:
        The seconds of every way, one number per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(measure(way))
    return seconds


def run_json(command: Sequence[str]) -> Any:
    """Runs a command in a fresh process and parses the last line of its output as JSON.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print(f"| {' | '.join(header)} |")
    print("|" + "---|" * len(header))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def save_results(options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes the results to the file of `--json`, if given."""
    if options.json is not None:
        write_json(options.json, results)
