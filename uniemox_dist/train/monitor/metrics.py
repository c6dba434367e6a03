"""The records of a run: metrics.jsonl, TensorBoard and one log line per interval; and the trace of its samples, which
shows whether two runs used the same samples, independent of their ranks."""

import json
import logging
import statistics
import time
import zlib
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from uniemox_dist.config.schema import Config
from uniemox_dist.core.formatting import duration
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.plan import Plan
from uniemox_dist.distributed.collectives import gather_numbers
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events.training import Straggler
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.monitor.stragglers import Stragglers
from uniemox_dist.train.monitor.tensorboard import TensorBoard
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.step import StepResult

log = logging.getLogger("uniemox")


class Metrics:
    """Times, losses and data reading of a run. Every rank adds its steps; rank 0 writes."""

    def __init__(
        self,
        folder: RunFolder,
        schedule: Schedule,
        plan: Plan,
        world: World,
        *,
        first_step: int,
        caches: bool = False,
        sample_flops: int = 0,
        peak_tflops: float | None = None,
        hosts: Sequence[str] = (),
        straggler_factor: float = 1.5,
    ) -> None:
        """`sample_flops`: useful FLOPs of training on one sample; `hosts`: the host of every rank."""
        self._stragglers = Stragglers(hosts or ["?"] * world.size, straggler_factor)
        self.tera_per_sample, self.peak_tflops = sample_flops / 1e12, peak_tflops
        self.folder, self.schedule, self.plan, self.world, self.caches = folder, schedule, plan, world, caches
        self.global_batch, self.writes = plan.global_batch, world.is_main
        self.skipped = self.damaged = self.samples = 0
        self._board = TensorBoard(folder.tensorboard, first_step) if self.writes else None
        self._start_interval()

    def _start_interval(self) -> None:
        self._since, self._steps, self._waited_s, self._read = time.perf_counter(), 0, 0.0, ReadCounts()
        self._own_s = 0.0

    def add(
        self, result: StepResult, batches: Sequence[MicroBatch], waited_s: float, own_s: float = 0.0
    ) -> None:
        """Adds a step: the seconds that this rank waited for its micro-batches, and the seconds of its computing."""
        self._steps += 1
        self._own_s += waited_s + own_s
        self._waited_s += waited_s
        self._read = sum((batch.counts for batch in batches), self._read)
        self.skipped += not result.applied
        self.damaged += result.damaged
        self.samples += result.samples

    def write(self, step: int, result: StepResult, lr: float) -> dict[str, Any]:
        """Ends an interval and writes its line, with the rates of the interval and the losses of its last step.
        Collective."""
        seconds = time.perf_counter() - self._since
        slots = step * self.global_batch
        samples_per_s = self._steps * self.global_batch / seconds
        line = {
            "step": step,
            "epoch": round(slots / self.schedule.epoch_samples, 4),
            "slots": slots,
            "loss": result.loss,
            **result.parts,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "samples_per_s": round(samples_per_s, 2),
            **self._compute_rates(samples_per_s),
            **self._data_rates(step, seconds),
            "source_samples": self.plan.source_samples(step),
            "skipped_steps": self.skipped,
            "damaged_samples": self.damaged,
            "host_memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
            "time": round(time.time(), 3),
        }
        if torch.cuda.is_available():
            line["device_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        if self.writes:
            self.folder.write_metric(line)
            if self._board is not None:
                self._board.add_scalars(step, line)
            left_s = (self.schedule.max_steps - step) * self.global_batch / samples_per_s
            log.info(
                "step %d/%d  epoch %.2f  loss %.4f%s  lr %.2e  %.1f samples/s  %s  data wait %.0f%%  %.1f GB  %s left",
                step,
                self.schedule.max_steps,
                line["epoch"],
                result.loss,
                _format_terms(result.parts),
                lr,
                samples_per_s,
                _format_flops(line),
                100 * line["data_wait_share"],
                line["host_memory_gb"],
                duration(left_s),
            )
        self._start_interval()
        return line

    def _compute_rates(self, samples_per_s: float) -> dict[str, float]:
        """Useful FLOPs of one rank, and model FLOP utilisation: their share of the device's peak."""
        tflops = self.tera_per_sample * samples_per_s / self.world.size
        found = {"tflops_per_s": float(f"{tflops:.4g}")}
        if self.peak_tflops:
            found["mfu"] = float(f"{tflops / self.peak_tflops:.4g}")
        return found

    def _data_rates(self, step: int, seconds: float) -> dict[str, Any]:
        """Data reading and computing times of all ranks in this interval; the slowest rank makes all others wait."""
        counts = self._read
        own = [
            self._waited_s / seconds,
            *map(float, (counts.bytes, counts.reads, counts.hits, counts.retries)),
            self._own_s,
        ]
        waits, read, reads, hits, retries, own_s = zip(*gather_numbers(own, self.world))
        if self.writes:
            for slow in self._stragglers.add(own_s, self._steps, seconds):
                self.folder.write(Straggler(step=step, **slow.facts()))
                log.warning("%s", slow)
        found = {
            "data_wait_share": round(sum(waits) / len(waits), 4),
            "data_wait_share_max": round(max(waits), 4),
            "bytes_read_per_rank": round(sum(read) / len(read)),
            "bytes_read_per_rank_max": round(max(read)),
            "read_retries": round(sum(retries)),
            "own_step_s": float(f"{statistics.median_low(own_s) / self._steps:.4g}"),
            "own_step_s_max": float(f"{max(own_s) / self._steps:.4g}"),
        }
        if self.caches:
            found["cache_hit_share"] = round(sum(hits) / max(1.0, sum(reads)), 4)
        return found

    def add_pictures(self, step: int, size: tuple[int, int], png: bytes, texts: str) -> None:
        """Writes a PNG of `size` (height, width) and a Markdown table of its nearest texts to TensorBoard."""
        if self._board is not None:
            self._board.add_pictures(step, size, png, texts)

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._board.close()


def _format_terms(parts: dict[str, float]) -> str:
    said = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
    return f" ({said})" if said else ""


def _format_flops(line: dict[str, Any]) -> str:
    share = f" ({100 * line['mfu']:.1f}% of peak)" if "mfu" in line else ""
    return f"{line['tflops_per_s']:.3g} TFLOP/s{share}"


class Trace:
    """Appends one line for each step of a rank to trace/rank<r>.jsonl: slots, keys, and checksums (CRC-32) of scene,
    person, caption vector and both masks of each sample. A step that was repeated after a restart has two lines."""

    def __init__(self, folder: RunFolder, rank: int, config: Config) -> None:
        self.model, self.seed = config.model, config.run.seed
        self.path = folder.path / "trace" / f"rank{rank}.jsonl"
        self.path.parent.mkdir(exist_ok=True)

    def write(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Appends the micro-batches of the update that made `step`."""
        slots: list[int] = []
        sums: list[list[int]] = []
        for batch in batches:
            slots += batch.slots_B.tolist()
            masks = [
                choose_patch_order(self.model, batch.slots_B, view, self.seed, on)[:, : self.model.visible]
                for view, on in ((SCENE_VIEW, batch.on_person_BN), (PERSON_VIEW, None))
            ]
            texts_BE = None if batch.texts_BE is None else batch.texts_BE.float()
            parts = [batch.scene_B3HW, batch.person_B3HW, texts_BE, *masks]
            sums += [
                [_checksum(part[i]) for part in parts if part is not None] for i in range(len(batch.slots_B))
            ]
        keys = [key for batch in batches for key in batch.keys]
        line = {"step": step, "slots": slots, "keys": keys, "sums": sums}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().cpu().numpy().tobytes())
