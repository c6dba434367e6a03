"""Measures training on this machine's GPU within a time limit, and writes one JSON and one page.

    tools/gpu_check.sh OUT [--minutes 8] [--only PART …] [--tiny]

OUT gets gpu_check.json, gpu_check.md and gpu_check.log (the output of the parts). The JSON and the page are written
again whenever a part has found something, so an interrupted check leaves what it has. Each part is a command of its own
with a time limit; a part that fails or takes too long is recorded, and the others still run. docs/benchmarks/gpu.md
describes the parts, the aims and the files.

Exit code 0 if all parts ended well, 1 if one did not, 2 for a wrong command line. Whether aims are reached does not
matter for it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from benchmark import Parser, run_main
from gpu_page import make_page
from gpu_parts import PARTS, ROOT, Form, Part, environment

from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, UserError
from uniemox_dist.core.files import format_os_error, require_local, write_json, write_text
from uniemox_dist.core.versions import versions

MINUTES, TINY_MINUTES = 8.0, 30.0
"""Time limits of the whole check."""
TINY_LIMIT_S = 300.0
"""Time limit of each part of a tiny check, on a machine of any speed."""
LEAST_S = 5.0
"""A part does not start with less time than this."""
POLL_S, GRACE_S = 1.0, 8.0
"""Seconds between two looks at a running part, and those that it gets to end after it was asked to."""
TAIL = 15
"""Lines of a part's output that are kept in the results if it does not end well."""
NEEDED = (
    "torch",
    "torchvision",
    "deepspeed",
    "open_clip",
    "timm",
    "simplejpeg",
    "pyarrow",
    "pytest",
    "xdist",
)
"""Modules without which no part would run."""
MACHINE = """
import json, torch
there = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "gpu": there and there.name, "gpu_bytes": there and there.total_memory,
    "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
}))
"""


class Interrupted(Exception):
    """The check was asked to stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit code.

    Raises:
        UserError: if the command line is wrong, or there is no GPU.
    """
    options = parse(arguments)
    check_modules()
    machine = describe_machine(tiny=options.tiny)
    out = make_out(options.out)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        form = Form(Path(scratch), options.tiny, machine["cores"])
        return Check(form, machine, out, options.minutes, options.only).run()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: if it is wrong.
    """
    names = [part.name for part in PARTS]
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--minutes", type=float, help="time limit (8; with --tiny 30)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"only these parts: {', '.join(names)}")
    parser.add_argument("--tiny", action="store_true", help="the same parts with a tiny model on CPUs")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in names:
            raise UserError(f"--only {name}: no such part; the parts are {', '.join(names)}")
    options.only = options.only or names
    require_local(options.out, "OUT")
    if options.out.is_file():
        raise UserError(f"OUT={options.out}: is a file; give a folder")
    if options.minutes is None:
        options.minutes = TINY_MINUTES if options.tiny else MINUTES
    if not 0 < options.minutes <= 24 * 60:
        raise UserError(f"--minutes {options.minutes:g}: give more than 0 and at most 1440")
    return options


def check_modules() -> None:
    """Raises UserError if modules are missing that the parts need."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{sys.executable} has no {', '.join(missing)}; install the package's extras train and dev, or set PYTHON"
        )


def describe_machine(*, tiny: bool) -> dict[str, Any]:
    """Describes this machine. A process of its own asks the GPU, because a CUDA context takes memory.

    Raises:
        UserError: if there is no GPU, and the check is not a tiny one.
    """
    asked = subprocess.run([sys.executable, "-c", MACHINE], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    if found["gpu"] is None and not tiny:
        raise UserError(
            "no GPU here (torch.cuda.is_available() is false); --tiny runs the parts with a tiny model on CPUs"
        )
    cores = len(os.sched_getaffinity(0))
    return {**found, "cores": cores, "python": sys.version.split()[0], "versions": versions()}


def make_out(out: Path) -> Path:
    """Makes the folder of the results.

    Raises:
        UserError: if it cannot be made or written, or has results already.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "gpu_check.json").exists():
            raise UserError(f"OUT={out}: has the results of an earlier check; give another folder")
        (out / "gpu_check.log").write_bytes(b"")
    except OSError as error:
        raise UserError(f"OUT={out}: {format_os_error(error)}; give a folder that can be written") from None
    return out


@dataclass
class Check:
    """Runs parts one after the other, and keeps their results on disk."""

    form: Form
    machine: dict[str, Any]
    out: Path
    minutes: float
    names: Sequence[str]
    parts: Sequence[Part] = PARTS

    def run(self) -> int:
        """Runs the parts; returns the exit code."""
        self._began = time.monotonic()
        self.found: dict[str, Any] = {
            "format": 1,
            "command": sys.argv,
            "tiny": self.form.tiny,
            "minutes": self.minutes,
            "began": time.time(),
            "seconds": 0.0,
            "machine": self.machine,
            "parts": [
                {
                    "name": part.name,
                    "title": part.title,
                    "state": "not run",
                    "reason": "the check ended before it",
                }
                for part in self.parts
            ],
        }
        self._write()
        try:
            for part, row in zip(self.parts, self.found["parts"]):
                if part.name not in self.names:
                    row["reason"] = "left out by --only"
                else:
                    self._run_part(part, row)
                self._write()
        except Interrupted:
            print("gpu_check: interrupted; the results until now are kept", file=sys.stderr)
            self._write()
            return EXIT_FAULT
        asked = [row for row in self.found["parts"] if row["name"] in self.names]
        print(f"\n{self.out / 'gpu_check.md'}, {self.out / 'gpu_check.json'}")
        return EXIT_DONE if all(row["state"] == "done" for row in asked) else EXIT_FAULT

    def _run_part(self, part: Part, row: dict[str, Any]) -> None:
        left = 60 * self.minutes - (time.monotonic() - self._began)
        wanted = TINY_LIMIT_S if self.form.tiny else part.limit_s * self.minutes / MINUTES
        limit_s = min(wanted, left)
        if left < min(LEAST_S, wanted / 2):
            row["reason"] = "no time was left"
            return
        results = {row["name"]: row.get("result", {}) for row in self.found["parts"]}
        command = part.command(self.form, limit_s, results)
        if not command:
            row |= {"state": "done", "reason": "nothing was left to do", "result": {}}
            return
        del row["reason"]
        row |= {"state": "running", "limit_s": round(limit_s, 1), "command": command}
        self._write()
        print(f"{part.name}: {part.title}, at most {limit_s:.0f} s", flush=True)
        began = time.monotonic()
        with open(self.out / "gpu_check.log", "ab") as log:
            log.write(f"\n==== {part.name}\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(self.form, part),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            row["state"] = self._wait(process, part, row, start, began + limit_s)
        except BaseException:
            row |= {"state": "interrupted", "reason": "the check was asked to stop"}
            raise
        finally:
            end_group(process)
            row["seconds"] = round(time.monotonic() - began, 1)
            output = self._output(start)
            row["result"] = part.read(self.form, part.name, output)
            if row["state"] != "done":
                row["tail"] = output.splitlines()[-TAIL:]
        if row["state"] == "timed out":
            row["reason"] = f"took longer than {limit_s:.0f} s"
        elif row["state"] == "failed":
            last = next((line for line in reversed(row["tail"]) if line.strip()), "no output")
            row["reason"] = f"exit code {process.returncode}: {last.strip()}"[:300]
        print(f"{part.name}: {row['state']} after {row['seconds']:.0f} s", flush=True)

    def _wait(
        self, process: subprocess.Popen[bytes], part: Part, row: dict[str, Any], start: int, end: float
    ) -> str:
        """Waits for a part and writes what it has found; returns its state."""
        while True:
            try:
                code = process.wait(max(0.0, min(POLL_S, end - time.monotonic())))
                return "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return "timed out"
            found = part.read(self.form, part.name, self._output(start))
            if found != row.get("result"):
                row["result"] = found
                self._write()

    def _output(self, start: int) -> str:
        with open(self.out / "gpu_check.log", "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _write(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self._began, 1)
        write_json(self.out / "gpu_check.json", self.found)
        write_text(self.out / "gpu_check.md", make_page(self.found))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and all that it started: asks first, so that a run can close its files, then kills."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        if process.returncode is not None and number == signal.SIGTERM:
            time.sleep(0.2)  # children of a process that has ended get the same chance


def _interrupt(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Interrupted


if __name__ == "__main__":
    run_main(main)
