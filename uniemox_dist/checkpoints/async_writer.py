"""Saves checkpoints while training continues: each rank copies its share of the state to host memory, and a thread
writes the copy. When all ranks have written, rank 0 completes the checkpoint and gives it its name.

There is at most one save at a time. Only the copy, two small exchanges among ranks and the last rename block the loop.
"""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    FIXED,
    FORMAT,
    FORMAT_VERSION,
    digest,
    list_complete_checkpoints,
    set_aside,
    step_folder,
)
from uniemox_dist.checkpoints.format import write_part
from uniemox_dist.checkpoints.fragment_index import (
    FRAGMENTS,
    build_index,
    fragment_key,
    list_cuts,
    part_name,
)
from uniemox_dist.checkpoints.retention import clear_unfinished, free_bytes, list_superfluous, prune
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.checkpoints.zero_state import Fragment, list_fragments, read_adam_step
from uniemox_dist.core.files import publish_dir, write_json
from uniemox_dist.core.formatting import size
from uniemox_dist.core.versions import versions
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.deepspeed_internals import read_shapes
from uniemox_dist.distributed.world import World

log = logging.getLogger("uniemox")
MARGIN_BYTES = 1 << 18
"""Space for headers and complete.json."""


class HasFragments(Protocol):
    """State saved beside the engine, such as an average of its weights."""

    def fragments(self) -> Iterator[Fragment]: ...


@dataclass
class _Save:
    """A save that has begun and is not complete."""

    state: RunState
    updates: float
    began: float
    blocked_s: float = 0.0
    outcome: dict[str, Any] = field(default_factory=dict)
    """The result of this rank's writer: files with bytes and hashes, or `error`."""


class AsyncWriter:
    """Writes checkpoints of a run while it trains; `start` and `commit` are collective."""

    def __init__(
        self,
        engine: Any,
        folder: Path,
        world: World,
        fixed: dict[str, Tensor],
        ema: HasFragments | None = None,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
    ) -> None:
        """`fixed` has the parameters that are not trained; rank 0 writes them. No other process may save into
        `folder`, the run's checkpoints/, because unfinished saves there are deleted. Collective."""
        self._engine, self._folder, self._world, self._fixed, self._ema = engine, folder, world, fixed, ema
        self._retention = Retention(folder, world, keep_last, keep_every)
        self._host: dict[str, Tensor] = {}
        self._index: dict[str, dict[str, str]] | None = None
        """The fragment index, on rank 0; the same for all saves of an engine. Empty on other ranks."""
        self._save: _Save | None = None
        self._writer: threading.Thread | None = None
        collectives.on_main(world, lambda: clear_unfinished(folder))

    @property
    def under_way(self) -> int | None:
        """The step that is being saved; None if there is no current save."""
        return self._save.state.step if self._save else None

    @property
    def written(self) -> bool:
        """True once this rank's writer has finished, successfully or not."""
        return self._writer is None or not self._writer.is_alive()

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank keeps for its copy, from the first save on."""
        return sum(tensor.nbytes for tensor in self._host.values())

    def start(self, state: RunState) -> dict[str, Any] | None:
        """Copies the state and starts the writers. Collective. Returns None, or `error` with the reason why it is not
        saved."""
        assert self._save is None, "one save at a time"
        began = time.perf_counter()
        tensors = {
            fragment_key(f.name, f.start, kind): tensor
            for f in chain(list_fragments(self._engine), self._ema.fragments() if self._ema else ())
            for kind, tensor in f.tensors.items()
        }
        if self._world.is_main:  # before the next collective, so before any rank writes
            clear_unfinished(self._folder)  # remains of saves on a disk that was read-only
        fixed = self._fixed.values() if self._world.is_main else ()
        own = sum(tensor.numel() * 4 for tensor in chain(tensors.values(), fixed)) + MARGIN_BYTES
        if (short := self._retention.check_space(own)) is not None:
            return {"error": short, "blocked_s": round(time.perf_counter() - began, 4)}
        self._copy(tensors)
        if self._index is None:
            cuts = list_cuts({key: tensor.numel() for key, tensor in tensors.items()})
            self._index = build_index(collectives.gather_on_main(cuts, self._world))
        self._save = _Save(state, read_adam_step(self._engine), began)
        self._writer = threading.Thread(
            target=self._write, args=(self._save,), name="checkpoint writer", daemon=True
        )
        self._writer.start()
        self._save.blocked_s = time.perf_counter() - began
        return None

    def commit(self) -> dict[str, Any]:
        """Waits for all writers and completes the current save. Collective. Returns facts for the event: step, bytes,
        seconds from begin to end, write_s of the slowest rank, blocked_s and removed checkpoints. If the save failed,
        returns `error` and deletes its files."""
        assert self._save is not None
        assert self._writer is not None
        began, save = time.perf_counter(), self._save
        self._writer.join()
        outcomes = collectives.gather_on_main(save.outcome, self._world)
        facts: dict[str, Any] = collectives.on_main(self._world, lambda: self._complete(save, outcomes))
        self._save = self._writer = None
        now = time.perf_counter()
        return {
            "step": save.state.step,
            **facts,
            "seconds": round(now - save.began, 4),
            "blocked_s": round(save.blocked_s + now - began, 4),
        }

    def close(self) -> None:
        """Waits until a running deletion ends."""
        self._retention.close()

    def _temporary(self, step: int) -> Path:
        return self._folder / f".{step_folder(step)}.tmp"

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        """Copies into one block of host memory, which is kept for later saves because allocating it takes longer than
        filling it."""
        cuda = any(tensor.is_cuda for tensor in tensors.values())
        if self._host.keys() != tensors.keys():
            whole = torch.empty(sum(tensor.numel() for tensor in tensors.values()))
            if cuda and whole.numel():
                # Pins the existing block, for copies at the bus's full rate; torch would round pinned memory up to a
                # power of two.
                torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)
            lengths = [tensor.numel() for tensor in tensors.values()]
            self._host = dict(zip(tensors, whole.split(lengths), strict=True))
        for name, tensor in tensors.items():
            self._host[name].copy_(tensor, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    def _write(self, save: _Save) -> None:
        """Runs in the writer thread of this rank; `commit` reports its errors."""
        temporary, files = self._temporary(save.state.step), save.outcome.setdefault("files", {})
        began = time.perf_counter()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            parts = {part_name(self._world.rank): self._host}
            if self._world.is_main:
                parts[FIXED] = self._fixed
            for name, tensors in parts.items():
                count, sha256 = write_part(temporary / name, tensors)
                files[name] = {"bytes": count, "sha256": sha256}
            save.outcome["write_s"] = round(time.perf_counter() - began, 3)
        except Exception as error:  # a thread's errors would be lost
            reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
            save.outcome["error"] = f"{temporary} (rank {self._world.rank}): {reason}"

    def _complete(self, save: _Save, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0: writes complete.json, renames the folder, deletes the checkpoints that are no longer kept."""
        state, files = save.state, {}
        temporary, final = self._temporary(state.step), self._folder / step_folder(state.step)
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        try:
            if not errors:
                files = {name: facts for outcome in outcomes for name, facts in outcome["files"].items()}
                info: dict[str, Any] = {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    "step": state.step,
                    "slots": state.slots,
                    "adam_step": save.updates,
                    "world_size": self._world.size,
                    "zero_stage": state.config.zero.stage,
                    "precision": state.precision,
                    "data_identity": state.data_identity,
                    "teacher": state.teacher,
                    "embedding_width": state.embedding_width,
                    "time": round(time.time(), 3),
                    "versions": versions(),
                    "parameters": read_shapes(self._engine),
                    FRAGMENTS: self._index,
                    "config": state.config.model_dump(mode="json"),
                    "files": files,
                }
                write_json(temporary / COMPLETE, {**info, "sha256": digest(info)})
                # Not a checkpoint, which the run would have resumed, so this run must not delete it.
                if final.exists():
                    set_aside(final)
                publish_dir(temporary, final)
        except OSError as error:
            errors.append(f"{final}: {error.strerror or error}")
        if errors:
            shutil.rmtree(temporary, ignore_errors=True)
            return {"error": errors[0]}
        return {
            "bytes": sum(facts["bytes"] for facts in files.values()),
            "write_s": max(outcome["write_s"] for outcome in outcomes),
            "removed": self._retention.prune(),
        }


class Retention:
    """Keeps the newest `keep_last` checkpoints of a run, and those whose step `keep_every` divides."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int | None) -> None:
        self._folder, self._world = folder, world
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pruner: threading.Thread | None = None

    def check_space(self, own: int) -> str | None:
        """Returns an error message if there is no space for `own` bytes of each rank, even after the next due
        checkpoints are deleted. Collective."""
        self.close()
        needed, free, rank = self._measure_space(own)
        if free < needed and free + collectives.on_main(self._world, self._prunable) >= needed:
            # One fewer, since the checkpoint about to be written counts.
            collectives.on_main(
                self._world, lambda: _pruned(self._folder, self._keep_last - 1, self._keep_every)
            )
            needed, free, rank = self._measure_space(own)
        if free >= needed:
            return None
        return (
            f"{self._folder}: a checkpoint needs {size(needed)} and rank {rank} has {size(free)} free "
            "there; free disk space, or keep fewer (run.keep_last, run.keep_every)"
        )

    def prune(self) -> list[str]:
        """Starts to delete the checkpoints that are no longer kept, in a thread; returns their names."""
        self.close()
        steps = [checkpoint.step for checkpoint in list_complete_checkpoints(self._folder)]
        doomed = list_superfluous(steps, self._keep_last, self._keep_every)
        if doomed:
            policy = (self._folder, self._keep_last, self._keep_every)
            self._pruner = threading.Thread(target=_pruned, args=policy, name="pruner", daemon=True)
            self._pruner.start()
        return [step_folder(step) for step in doomed]

    def close(self) -> None:
        """Waits until all running deletions end."""
        if self._pruner is not None:
            self._pruner.join()

    def _prunable(self) -> int:
        """Total size of the checkpoints that would be deleted if one fewer were kept."""
        sizes = {checkpoint.step: checkpoint.bytes for checkpoint in list_complete_checkpoints(self._folder)}
        return sum(sizes[step] for step in list_superfluous(sizes, self._keep_last - 1, self._keep_every))

    def _measure_space(self, own: int) -> tuple[float, float, int]:
        """Returns the bytes that the parts of all ranks need together, the smallest free space that any rank reports,
        and that rank. All ranks share the folder and its free space."""
        rows = collectives.gather_numbers([_free(self._folder), own], self._world)
        free, rank = min((row[0], rank) for rank, row in enumerate(rows))
        return sum(row[1] for row in rows), free, rank


def _pruned(folder: Path, keep_last: int, keep_every: int | None) -> None:
    try:
        prune(folder, keep_last, keep_every)
    except OSError as error:  # the next save checks the space
        log.warning("%s: old checkpoints could not be deleted: %s", folder, error.strerror or error)


def _free(folder: Path) -> float:
    """Bytes that a rank may still write; 0 if its disk does not answer."""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted
        return float(free_bytes(folder))
    except OSError:
        return 0.0
