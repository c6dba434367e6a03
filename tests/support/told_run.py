"""A made-up run folder with every kind of event, lost steps, and pauses."""

import json
import math
from pathlib import Path
from typing import Any

from uniemox_dist.runs.folder import RunFolder

BEGAN = 1_795_492_800.0
HOSTS = ["node01", "node02"]
INTERVAL_S, STEPS_PER_LINE = 40.0, 20


def told_run(path: Path, *, lines_of_last_attempt: int = 60) -> RunFolder:
    """Writes the folder: four attempts of a run of 12,000 steps that saves every 500 and is not at its end.

    Attempts: 0-3,240 (a rank dies; the launcher restarts it from 3,000), 3,000-5,700 (stopped by SIGUSR2),
    from there on half as many ranks to 7,000 (killed without a word at 7,220), and from 7,000 on.
    """
    folder = RunFolder(path)
    folder.create()
    folder.config.write_text(
        "run: {name: told, max_steps: 12000, log_every: 20, save_every: 500, keep_last: 2, keep_every: 2500}\n"
        "batch: {global_batch: 1024, micro_batch: 64, streams: 64}\n"
        "data: {path: shards/train}\nmodel: {image_size: 224, patch_size: 16, width: 768, depth: 12}\n"
        "teacher: {name: 'local-dir:models/clip'}\nzero: {stage: 2}\n"
        "loss: {relation: 1.0, similarity: 1.0, reconstruction: 1.0}\n"
    )
    events: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    clock = BEGAN

    def event(kind: str, after_s: float = 0.0, /, **facts: Any) -> None:
        events.append({"time": round(clock + after_s, 3), "event": kind, **facts})

    def start(step: int, ranks: int, stage: int) -> None:
        versions = {"uniemox-dist": "0.1.0", "torch": "2.11.0", "deepspeed": "0.19.0"}
        about = {
            "precision": "bf16",
            "teacher": "live",
            "host": HOSTS[0],
            "hosts": HOSTS,
            "versions": versions,
        }
        event("start", step=step, ranks=ranks, zero_stage=stage, **about)

    def train(first: int, last: int) -> None:
        nonlocal clock
        for step in range(first + STEPS_PER_LINE, last + 1, STEPS_PER_LINE):
            clock += INTERVAL_S
            loss = round(1.2 + 2.3 * math.exp(-step / 2500) + 0.05 * math.sin(step / 37), 4)
            slots = step * 1024
            metrics.append(
                {"step": step, "epoch": slots / 1_200_000, "slots": slots, "loss": loss, "relation": loss / 4,
                 "similarity": loss / 4, "reconstruction": loss / 2, "lr": 1e-4, "grad_norm": 1.0 + loss,
                 "samples_per_s": 512.0, "tflops_per_s": 90.0, "mfu": 0.29, "data_wait_share": 0.01,
                 "time": clock}
            )  # fmt: skip
            if step % 500 == 0:
                removed = [f"step_{step - 1000:08d}"] if step > 1000 and (step - 1000) % 2500 else []
                event(
                    "save", 3.1, step=step, bytes=1_340_000_000, seconds=3.1, blocked_s=0.42, removed=removed
                )

    start(0, 16, 2)
    event("init", init_from="mae_vit_b.pth", layout="mae", loaded=150, missing=["fusion.weight"], unexpected=[],
          resampled={"encoder.pos_embed": "14x14 -> 16x16"})  # fmt: skip
    train(0, 1200)
    event("skip", step=1207, in_a_row=1, loss="nan", where="loss")
    event("skip", 2.0, step=1208, in_a_row=2, loss=2.31, where="gradients")
    event("fault", 3.0, step=1210, rank=3, damaged="slot 1239041: train-000012.tar 7f3a: not its SHA-256")
    train(1200, 2100)
    event("spike", step=2103, loss=9.4, median=2.2)
    event("straggler", 1.0, step=2110, rank=11, host="node02", seconds=3.1, median_s=1.9)
    train(2100, 2600)
    event("straggler", 1.0, step=2610, rank=11, host="node02", seconds=4.0, median_s=1.9)
    event("straggler", 1.0, step=2610, rank=2, host="node01", seconds=3.0, median_s=1.9)
    train(2600, 3240)
    event(
        "fault", 5.0, step=3247, rank=5, error="RuntimeError: CUDA error: an illegal memory access", ends=True
    )
    event("restart", 20.0, attempt=1, left=2, code=1, step=3000)
    clock += 75
    start(3000, 16, 2)
    event("resume", step=3000, checkpoint="step_00003000", ranks=16, zero_stage=2)
    train(3000, 4500)
    event("fault", 1.0, step=4500, error="tensorboard: Disk quota exceeded")
    train(4500, 5700)
    event("save", 8.0, step=5706, bytes=1_340_000_000, seconds=3.4, blocked_s=3.4, removed=[])
    event("signal", 8.1, step=5706, signal="SIGUSR2", saved=True)
    clock += 2400
    start(5706, 8, 1)
    event("resume", step=5706, checkpoint="step_00005706", ranks=16, zero_stage=2)
    event("convert", step=5706, from_ranks=16, from_zero_stage=2, ranks=8, zero_stage=1)
    train(5700, 7220)
    clock += 900
    start(7000, 8, 1)
    event("resume", step=7000, checkpoint="step_00007000", ranks=8, zero_stage=1)
    train(7000, 7000 + STEPS_PER_LINE * lines_of_last_attempt)
    folder.events.write_text("".join(json.dumps(e) + "\n" for e in events))
    folder.metrics.write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def last_time(folder: RunFolder) -> float:
    """The time of the newest line of metrics."""
    return float(json.loads(folder.metrics.read_text().splitlines()[-1])["time"])
