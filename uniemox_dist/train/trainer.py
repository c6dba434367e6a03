"""The interface between the loop and a run. `PretrainTrainer` (pretrain.py) and `FinetuneTrainer`
(finetune/trainer.py) implement it.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.run_state import RunState, load
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed.world import World
from uniemox_dist.models.flops import Flops
from uniemox_dist.models.init_from import InitReport
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.checkpoint_policy import CheckpointPolicy
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import Engine
from uniemox_dist.train.monitor.metrics import Metrics
from uniemox_dist.train.monitor.stragglers import ComputeTimer
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.step import RankStatus, StepResult

log = logging.getLogger("uniemox")
Expect = Callable[[str], None]
"""Starts a named phase that may take long, and re-arms the watchdog."""


@dataclass(frozen=True)
class Startup:
    """The state of a run before its parts are created."""

    world: World
    device: torch.device
    folder: RunFolder
    resume: str
    """auto, never, or the folder of a checkpoint or run."""
    expect: Expect


@dataclass(kw_only=True)
class Trainer(ABC):
    """The parts of a run. All methods are collective: every rank calls them at the same steps."""

    config: Config
    world: World
    device: torch.device
    folder: RunFolder
    hosts: list[str]
    """The host of every rank."""
    sources: Sources
    plan: Plan
    schedule: Schedule
    dataset: PlannedDataset
    checkpoint: Checkpoint | None
    """The checkpoint that the run resumes; None in a new run."""
    loaded: InitReport | None
    """The report about the weights of `model.init_from`; None in a resumed run, and without init_from."""
    fixed: dict[str, torch.Tensor]
    """The parameters that are not trained, in fp32, because the engine may round or partition its copies."""
    engine: Engine
    precision: str
    """fp32 or bf16."""
    flops: Flops
    """FLOPs of one sample."""
    peak_tflops: float | None
    """The device's peak, 10^12 operations per second; None if unknown."""

    @abstractmethod
    def run_state(self, step: int) -> RunState:
        """The content that a checkpoint of `step` records about the run."""

    @abstractmethod
    def train_step(
        self, batches: Sequence[MicroBatch], step: int, lr: float, status: RankStatus, timer: ComputeTimer
    ) -> StepResult:
        """Makes one update of the weights from the micro-batches of this rank, after `step` earlier steps."""

    @abstractmethod
    def describe_teacher(self) -> str:
        """The teacher in a few words, for the log."""

    @property
    def teacher_source(self) -> str | None:
        """live or cache; None without a teacher."""
        return None

    @property
    def ema(self) -> Ema | None:
        """The moving average of the weights, if the run keeps one."""
        return None

    def load_checkpoint(self) -> int:
        """Loads the state of the engine and of the moving average from the checkpoint that the run resumes; returns the
        number of steps made so far."""
        if self.checkpoint is None:
            return 0
        averaged = load(self.engine, self.checkpoint, self.ema.fragments() if self.ema else ())
        if self.ema is not None:
            self.ema.resume(loaded=averaged)
            if not averaged and self.world.is_main:
                log.warning(
                    "%s holds no moving average: it starts from the weights", self.checkpoint.folder.name
                )
        return self.checkpoint.step

    def validate(self, step: int, saves: CheckpointPolicy, expect: Expect) -> str | None:
        """Validates after `step` steps if a validation is due; returns the reason to end training, or None. An attempt
        that resumes at this step calls it again."""
        return None

    @abstractmethod
    def finish(self, step: int, expect: Expect) -> None:
        """Runs after the last step is saved, and again in an attempt that resumes there."""

    @abstractmethod
    def show_samples(self, step: int, metrics: Metrics) -> None:
        """Writes the model's results for a few held-out samples."""
