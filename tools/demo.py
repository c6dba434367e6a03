"""Runs the whole chain on the shipped pictures: pack, pretrain, release, evaluate, report. Complete results are
reused.

Each step prints what it does and the command that a user would run, and runs that command.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("demo")
RUN, RELEASE, SHARDS = DEMO / "runs" / "demo", DEMO / "release", DEMO / "shards"


@dataclass(frozen=True)
class Step:
    """One step: its printed title, its command, and a function that checks whether its result is complete."""

    title: str
    command: list[str]
    is_complete: Callable[[], bool] = lambda: False
    outdated: Path | None = None
    """An outdated result, which is deleted before the step runs."""


def newer(target: Path, source: Path) -> bool:
    """Whether a file exists and is not older than another."""
    return target.exists() and source.exists() and target.stat().st_mtime >= source.stat().st_mtime


def newest_checkpoint() -> Path:
    """The complete.json of the run's newest complete checkpoint."""
    return max(RUN.glob("checkpoints/step_*/complete.json"), default=RUN / "none")


STEPS = [
    Step(
        "1/7  Pack 1,599 captioned pictures into tar shards, looking for persons in each (about 1 minute)",
        [
            "shards",
            "pack",
            "shipped:fluent_emoji",
            str(SHARDS),
            "--workers",
            "2",
            "--shard-samples",
            "256",
            "--licence",
            "MIT",
            "--resume",
        ],
    ),
    Step(
        "2/7  Pretrain a small ViT on two DeepSpeed ranks against a frozen CLIP, all three losses on (about 5 minutes)",
        ["pretrain", "demo", "--nproc", "2"],
    ),
    Step(
        "3/7  Release: consolidated weights that timm loads, with a model card and checksums",
        ["release", str(RUN), str(RELEASE)],
        lambda: newer(RELEASE / "SHA256SUMS", newest_checkpoint()),
        RELEASE,
    ),
    Step(
        "4/7  Evaluate on held-out pictures: student beside untrained, teacher and trivial baselines (about 1 minute)",
        ["evaluate", "protocol", str(RELEASE), str(SHARDS), "--json", str(RUN / "evaluation.json")],
        lambda: newer(RUN / "evaluation.json", newest_checkpoint()),
    ),
    Step(
        "5/7  Release again: the model card now has the evaluation",
        ["release", str(RUN), str(RELEASE)],
        lambda: newer(RELEASE / "SHA256SUMS", RUN / "evaluation.json"),
        RELEASE,
    ),
    Step(
        "6/7  Look at held-out pictures: a map, nearest neighbours, zero-shot answers, attention",
        ["evaluate", "gallery", str(RELEASE), str(SHARDS / "test"), "--out", str(RUN / "gallery.json")],
        lambda: newer(RUN / "gallery.json", newest_checkpoint()),
    ),
    Step(
        "7/7  Report: curves, reconstructions, the table and the pictures on one page",
        ["report", str(RUN)],
        lambda: (
            newer(RUN / "report.html", RUN / "evaluation.json")
            and newer(RUN / "report.html", RUN / "gallery.json")
        ),
    ),
]


def main() -> int:
    """Runs the steps that are not complete; returns the exit code of the first one that fails."""
    uniemox = Path(sys.executable).with_name("uniemox")
    began = time.monotonic()
    for step in STEPS:
        print(f"\n\033[1m{step.title}\033[0m\n  $ uniemox {' '.join(step.command)}", flush=True)
        if step.is_complete():
            print("  complete, kept", flush=True)
            continue
        if step.outdated is not None and step.outdated.exists():
            shutil.rmtree(step.outdated)
        code = subprocess.run([uniemox, *step.command], cwd=ROOT, check=False).returncode
        if code != 0:
            print(f"\nstopped: this step ended with exit code {code}; `make demo` continues from here")
            return code
    commands = Path(sys.executable).parent
    commands = commands.relative_to(ROOT) if commands.is_relative_to(ROOT) else commands
    print(
        f"""
Done in {(time.monotonic() - began) / 60:.1f} minutes. Look at
  {RUN / "report.html"}      the page: open it in a browser
  {RELEASE}/                   the release: timm.create_model("local-dir:{RELEASE}", pretrained=True, num_classes=0)
  {SHARDS}/train/              the shards: tar tf {SHARDS}/train/000000.tar
  {RUN / "tensorboard"}/      {commands}/tensorboard --logdir {RUN / "tensorboard"}
Try next (the commands lie in {commands}/)
  uniemox shards stats {SHARDS}
  uniemox predict {RELEASE} YOUR_PICTURES --labels joy,awe,anger,fear,sadness
  uniemox finetune finetune --nproc 2 data.path={SHARDS} model.init_from={RELEASE} run.dir={DEMO / "runs"} \\
    batch.global_batch=96 batch.micro_batch=48 data.workers=1
  uniemox pretrain demo --nproc 2 run.name=no_fusion model.fusion=none
  uniemox shards pack YOUR_PICTURES demo/yours --layout folder"""
    )
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
