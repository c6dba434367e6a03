"""The output of ranks in a Slurm job: rank 0 writes to the job's main log, the others to logs/rank<r>.out of the run.

Each rank also writes its last error to the main log, with its rank and host.
"""

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from uniemox_dist.distributed.world import World
from uniemox_dist.runs.folder import RunFolder


class MainLog:
    """The job's main log, for a rank whose own output goes elsewhere."""

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self._who = ""

    def redirect_output(self, folder: RunFolder, world: World, env: Mapping[str, str] = os.environ) -> None:
        """Redirects standard output and error of a rank other than 0 to its own file, those of libraries and helper
        processes included. Does nothing outside a Slurm job step, or if the folder does not exist yet."""
        if world.is_main or self.stream is not None or "SLURM_STEP_ID" not in env:
            return
        try:
            path = folder.logs / f"rank{world.rank}.out"
            own = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError:  # keep the present output
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        # Not inheritable: helper processes that live on would keep srun waiting for the end of its output.
        self.stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
        self._who = f"rank {world.rank} on {socket.gethostname()}: "
        for number in (1, 2):
            os.dup2(own, number)
        os.close(own)
        sys.excepthook = self._uncaught

    def print_lines(self, text: str) -> None:
        """Writes lines to the main log, each with rank and host; does nothing if this rank's output goes there."""
        if self.stream is None:
            return
        with suppress(OSError, ValueError):
            self.stream.write("".join(f"{self._who}{line}\n" for line in text.splitlines()))
            self.stream.flush()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        self.print_lines("".join(traceback.format_exception(kind, error, trace)))


main_log = MainLog()
"""The main log of this process."""
