"""Signals in the first seconds of `uniemox pretrain`, before any step, and before any rank."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import uniemox_dist.train
from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION
from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.config import load
from uniemox_dist.core.files import write_json
from uniemox_dist.core.signals import LAUNCHER_PID, STOP_SIGNALS
from uniemox_dist.runs.folder import RunFolder, read_lines

RANKS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", LAUNCHER_PID)


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "mine")
    folder.create()
    return folder


def command(run: RunFolder, *more: str) -> list[str]:
    return ["pretrain", "demo", f"run.dir={run.path.parent}", f"run.name={run.path.name}", *more]


def signalled_load_config(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = load.load_config

    def load_config(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(load, "load_config", load_config)


def never(*_: object, **__: object) -> int:
    raise AssertionError("continues after the signal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
@pytest.mark.parametrize("at", ["configuration", "check"])
def test_the_launcher_ends_at_once(
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    at: str,
    saved: bool,
    code: int,
    number: signal.Signals,
) -> None:
    if saved:
        write_json(
            run.checkpoints / "step_00000009" / "complete.json",
            {"format": FORMAT, "format_version": FORMAT_VERSION, "step": 9, "files": {}},
        )
    monkeypatch.setattr("launch.restarts.run_with_restarts", never)
    if at == "configuration":
        signalled_load_config(monkeypatch, number)
        monkeypatch.setattr("uniemox_dist.cli.pretrain._check", never)
    else:
        monkeypatch.setattr("uniemox_dist.cli.pretrain._check", lambda *_: os.kill(os.getpid(), number))
    assert uniemox(command(run, "--nproc", "2")) == code
    says = (
        "stopped; run the same command again to continue from step 9"
        if saved
        else "stopped before the first checkpoint"
    )
    assert capfd.readouterr().err == f"uniemox: {says}\n"
    [event] = read_lines(run.events)
    assert (event["event"], event["signal"], event["saved"]) == ("signal", number.name, saved)


def test_a_signal_before_the_imports_reaches_the_rank(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    module = ModuleType("pretrain")

    def pretrain(*_: object, stop: Any, **__: object) -> int:
        told.append(stop.received)
        return 75

    module.pretrain = pretrain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uniemox_dist.train.pretrain", module)
    monkeypatch.setattr(uniemox_dist.train, "pretrain", module, raising=False)
    monkeypatch.setattr("uniemox_dist.distributed.collectives.close", lambda: None)
    signalled_load_config(monkeypatch, signal.SIGUSR2)
    assert uniemox(command(run)) == 75
    assert told == ["SIGUSR2"]
