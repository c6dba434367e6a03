"""Settings of the disturbed runs, the undisturbed reference runs, and functions that start and observe one run."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil

from chaos_faults import inputs
from chaos_faults.processes import Forked, Patch, start
from uniemox_dist.checkpoints.folders import Checkpoint, list_complete_checkpoints
from uniemox_dist.runs.folder import RunFolder, read_lines

RANKS = 2
STEPS, SAVE_EVERY = 24, 4
TIMEOUT_S = 180.0
LOOK_S = 0.002
SETTINGS = (
    f"run.max_steps={STEPS}",
    f"run.save_every={SAVE_EVERY}",
    "run.log_every=1",
    "run.pictures_every=null",
    "run.epochs=null",
    "run.trace=true",
    "run.preflight=false",
    "data.eval_path=null",
    "data.workers=0",
    "data.shuffle_window=8",
    "data.retry_s=0.5",
    "batch.global_batch=24",
    "batch.micro_batch=12",
    "batch.streams=12",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=1",
    "optim.precision=fp32",
    "model.image_size=32",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
)
MODELS = {
    "tiny": ("model.width=32", "model.depth=2", "model.heads=2"),
    # Its saves take long enough to be interrupted.
    "large": ("model.width=256", "model.depth=4", "model.heads=4"),
}


class Missed(Exception):
    """An expected event did not happen, or not in time."""


@dataclass
class Lab:
    """The inputs, reference runs and random numbers of one call of the tool."""

    root: Path
    seed: int = 0
    kills: int = 3
    mount: bool = True
    """Whether to mount small file systems, if this user's rights allow it."""
    _references: dict[str, "Run"] = field(default_factory=dict)

    def prepare(self) -> None:
        """Makes shards and teacher, each in a separate process."""
        for make in (
            lambda: inputs.make_shards(self.root / "data"),
            lambda: inputs.make_teacher(self.root / "clip"),
        ):
            if Forked(partial(_succeeds, make)).wait():
                raise Missed("the inputs could not be made")

    def dice(self, name: str) -> Random:
        """Random numbers for the moments of a fault; they do not depend on the other faults."""
        return Random(f"{self.seed} {name}")

    def run(self, name: str, *overrides: str, model: str = "tiny", data: Path | None = None) -> "Run":
        """Returns a run that has not begun. Runs its reference first, if necessary."""
        self.reference(model)
        return self._run(name, *overrides, model=model, data=data)

    def _run(self, name: str, *overrides: str, model: str, data: Path | None = None) -> "Run":
        where = [
            f"run.dir={self.root / 'runs'}",
            f"run.name=fault-{name}",
            f"data.path={data or self.root / 'data' / 'shards' / 'train'}",
            f"teacher.name=local-dir:{self.root / 'clip'}",
        ]
        return Run(self.root / "runs" / f"fault-{name}", [*SETTINGS, *MODELS[model], *where, *overrides])

    def reference(self, model: str = "tiny") -> "Run":
        """The undisturbed run with this model; it runs at the first call."""
        if model not in self._references:
            run = self._run(f"reference-{model}", "run.keep_last=100", model=model)
            code = run.start().finish()
            if code:
                raise Missed(f"the undisturbed run ended with {code}: {run.last_words()}")
            self._references[model] = run
        return self._references[model]


class Run:
    """A run that is started by the command line, once or several times."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self.path, self.overrides = path, list(overrides)
        self.folder = RunFolder(path)
        self.log = path.with_name(f"{path.name}.log")
        self.process: Forked | None = None
        self.heard: list[tuple[float, str]] = []
        """Lines that the launcher and the ranks printed, with the time at which each was read."""
        self._read = 0

    def start(self, *overrides: str, patch: Patch | None = None) -> "Run":
        """Starts `uniemox pretrain` with two ranks."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["pretrain", "demo", *self.overrides, *overrides, "--nproc", str(RANKS)]
        self.process = start(arguments, self.log, patch)
        return self

    def look(self) -> None:
        """Reads the lines printed since the last call."""
        if not self.log.is_file():
            return
        with open(self.log, "rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        if newline:
            self._read += len(whole) + 1
            self.heard += [(time.time(), line) for line in whole.decode(errors="replace").splitlines()]

    def wait_until(self, reached: Callable[[], Any], what: str) -> Any:
        """Waits until `reached` returns a true value while the run continues; returns that value."""
        assert self.process is not None
        end = time.monotonic() + TIMEOUT_S
        while not (found := reached()):
            self.look()
            if self.process.poll() is not None:
                raise Missed(f"the run ended ({self.process.returncode}) before {what}: {self.last_words()}")
            if time.monotonic() > end:
                self.kill()
                raise Missed(f"{what} did not happen in {TIMEOUT_S:.0f} s")
            time.sleep(LOOK_S)
        return found

    def wait_for_step(self, step: int) -> None:
        """Waits until rank 0 has completed a step, in this attempt or an earlier one."""
        path = self.path / "trace" / "rank0.jsonl"
        self.wait_until(lambda: path.is_file() and f'{{"step": {step},' in path.read_text(), f"step {step}")

    def wait_for_save(self, beyond: int) -> int:
        """Waits until a save of a step above `beyond` has begun; returns its step."""

        def looks() -> int | None:
            found = [int(path.name[6:14]) for path in self.folder.checkpoints.glob(".step_*.tmp")]
            return next((step for step in found if step > beyond), None)

        return int(self.wait_until(looks, f"a save after step {beyond}"))

    def finish(self) -> int:
        """Waits until the command ends; returns its exit code."""
        process = self.process
        assert process is not None
        end = time.monotonic() + TIMEOUT_S
        while process.poll() is None:
            self.look()
            if time.monotonic() > end:
                self.kill()
                raise Missed(f"it did not end in {TIMEOUT_S:.0f} s: {self.last_words()}")
            time.sleep(LOOK_S)
        self.look()
        assert process.returncode is not None
        return process.returncode

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks that run now, in rank order."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(children, key=lambda child: (child.create_time(), child.pid))

    def kill(self) -> None:
        """Kills the launcher and all ranks."""
        assert self.process is not None
        for process in (*self.ranks(), self.process):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def events(self, *kinds: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Events of these kinds (of all kinds by default) since a time."""
        found = read_lines(self.folder.events)
        return [e for e in found if (not kinds or e["event"] in kinds) and e["time"] >= since]

    def checkpoints(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first."""
        return list_complete_checkpoints(self.folder.checkpoints)

    def noticed(self, since: float) -> float | None:
        """Seconds from a time until the run or its launcher first reported a fault."""
        times = [e["time"] for e in self.events("fault", "skip", "signal", "restart", since=since - 0.001)]
        times += [when for when, line in self.heard if when >= since and line.startswith("uniemox: ")]
        return round(max(0.0, min(times) - since), 2) if times else None

    def says(self, text: str) -> bool:
        """Whether a printed line of the launcher or a rank contains a text."""
        return any(text in line for _, line in self.heard)

    def mark(self) -> None:
        """Records that a rank causes its fault now; only the first call counts."""
        if not self.moment_file.exists():
            self.moment_file.write_text(repr(time.time()))

    @property
    def moment_file(self) -> Path:
        """The file in which `mark` stores the time."""
        return self.path.with_name(f"{self.path.name}.moment")

    def moment(self) -> float:
        """The time at which a rank first caused its fault."""
        if not self.moment_file.exists():
            raise Missed("no rank came so far as to cause the fault")
        return float(self.moment_file.read_text())

    def last_words(self) -> str:
        """The last line that was printed."""
        self.look()
        return self.heard[-1][1] if self.heard else "(it said nothing)"


def _succeeds(make: Callable[[], object]) -> int:
    """Exit code of a process that makes something: 0 if it returns a true value."""
    return 0 if make() else 1
