"""`uniemox launch local`: a command on this machine, checked and frozen like one that is submitted."""

import shlex
import sys

from launch.dispatch import PARALLEL, Frozen, Request, Submitted
from launch.plan.ranks import largest_legal
from launch.restarts import exit_after_stop, run_with_restarts
from launch.submission import record
from uniemox_dist.config.load import dump_yaml
from uniemox_dist.distributed.local_launcher import Signals, run_attempt
from uniemox_dist.runs.folder import RunFolder


class Local:
    """Runs on this machine, as on one node of the cluster."""

    queued = False

    def __init__(self, signals: Signals) -> None:
        self._signals = signals  # those that this process receives from before the freezing on

    def adapt(self, request: Request) -> Request:
        """Returns the request unchanged."""
        return request

    def ranks(self, frozen: Frozen) -> int:
        """Number of processes to start."""
        prepared = frozen.prepared
        cluster = prepared.request.cluster
        if prepared.configs:
            return largest_legal(prepared.configs[0], 1, cluster.ranks)[1]
        return cluster.ranks if prepared.command[0] in PARALLEL else 1

    def render_script(self, frozen: Frozen) -> str:
        """The resolved configuration, or the command line."""
        prepared = frozen.prepared
        ranks = self.ranks(frozen)
        prepared.remarks.append(f"{ranks} {'rank' if ranks == 1 else 'ranks'} on this machine")
        if prepared.configs:
            return dump_yaml(prepared.configs[0])
        return f"uniemox {shlex.join(prepared.command)}\n"

    def start(self, frozen: Frozen) -> Submitted:
        """Records the submission; `Submitted.wait` runs it."""
        if frozen.prepared.configs:  # fails if another process trains there
            folder = RunFolder(frozen.prepared.runs[0])
            folder.lock()
            folder.unlock()
        record(frozen.folder, [], **{**frozen.facts(), "nodes": "1", "ranks_per_node": self.ranks(frozen)})
        return Submitted(frozen, frozen.prepared.remarks, wait=lambda: self._run(frozen))

    def _run(self, frozen: Frozen) -> int:
        # Python runs the folder as a program, so its modules precede the working directory and installed packages.
        command = [sys.executable, str(frozen.code), *frozen.words]
        prepared, ranks = frozen.prepared, self.ranks(frozen)
        gpus = prepared.request.cluster.gpus_per_node > 0
        if not prepared.configs:
            return run_attempt(command, ranks, self._signals, gpus=gpus).code
        folder = RunFolder(prepared.runs[0])
        if self._signals.received:
            return exit_after_stop(folder, self._signals)
        return run_with_restarts(
            lambda: command,
            ranks,
            folder,
            self._signals,
            max_restarts=prepared.configs[0].run.max_restarts,
            gpus=gpus,
        )
