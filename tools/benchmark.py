"""Shared parts of the benchmarks in this folder: timing in turn, fresh processes, tables, JSON files, and errors of
users as one line with exit code 2. options.py has the types of options."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from options import local_path

from uniemox_dist.core.errors import EXIT_USER, UserError
from uniemox_dist.core.files import check_output, describe_missing_folder, write_json


class Parser(argparse.ArgumentParser):
    """Prints the script's docstring as it is, and an error as one line; checks the file of `--json` before the work."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        path = getattr(options, "json", None)
        try:
            check_output(path, "--json")
        except UserError as error:
            self.error(str(error))
        if path is not None and not path.absolute().parent.is_dir():
            reason = describe_missing_folder(path.absolute().parent)
            self.error(
                f"--json={path}: {path.absolute().parent}: {reason}; give a file in an existing folder"
            )
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"{self.prog}: error: {message}\n")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Creates a parser with the option `--json FILE`."""
    parser = Parser(description)
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the results to FILE")
    return parser


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script and ends the process: with exit code 2 and one line for a mistake of the user, also if it was
    found and printed by a process of `run_json`. SIGTERM ends it like an exception, so temporary folders are removed.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(EXIT_USER)
    except subprocess.CalledProcessError as error:
        if error.returncode == EXIT_USER:
            sys.exit(EXIT_USER)
        raise


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
