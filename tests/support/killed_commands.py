"""Commands that kill their own process at a chosen moment, as `kill -9` would; run them in a process of their own."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import shards.edit.select
import shards.remote_folder
from uniemox_dist.cli.main import run

SMALL = 7
"""Samples in a shard of `select` and `split`."""
CHANGES = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "truncate", "fsync")


def run_and_kill_at_change(number: int, arguments: list[str]) -> None:
    """Runs `uniemox ARGUMENTS`; is killed before the `number`-th change of the file system."""
    count = _Count(number)
    for name in CHANGES:
        setattr(os, name, count.wrap(getattr(os, name)))
    _run(arguments)


def run_and_kill_at_request(number: int, arguments: list[str]) -> None:
    """Runs `uniemox ARGUMENTS`; is killed before the `number`-th request to a store."""
    shards.remote_folder.RemoteFolder._do = _Count(number).wrap(shards.remote_folder.RemoteFolder._do)  # type: ignore[method-assign]
    _run(arguments)


def _run(arguments: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    shards.edit.select.COPY_SAMPLES = SMALL
    sys.exit(run(arguments))


class _Count:
    def __init__(self, last: int) -> None:
        self.left = last

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call
