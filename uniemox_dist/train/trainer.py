"""What the loop needs of a run, whatever it learns: `PretrainTrainer` (pretrain.py) and `FinetuneTrainer`
(finetune/trainer.py) are its two kinds.
"""

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

Expect = Callable[[str], None]
"""Starts a named phase that may take long, and re-arms the watchdog."""


@dataclass(frozen=True)
class Startup:
    """What a run has before its parts are made."""

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
    """What was loaded from `model.init_from`; None in a resumed run, and without init_from."""
    fixed: dict[str, torch.Tensor]
    """The parameters that are not trained, in fp32: the engine may round or partition its own."""
    engine: Engine
    precision: str
    """fp32 or bf16."""
    flops: Flops
    """Of one sample."""
    peak_tflops: float | None
    """The device's peak, 10^12 operations per second; None where it is not known."""

    @abstractmethod
    def run_state(self, step: int) -> RunState:
        """What a checkpoint of `step` states about the run."""

    @abstractmethod
    def train_step(
        self, batches: Sequence[MicroBatch], step: int, lr: float, status: RankStatus, timer: ComputeTimer
    ) -> StepResult:
        """One update of the weights from the micro-batches of this rank; `step` steps were made before."""

    @abstractmethod
    def describe_teacher(self) -> str:
        """The teacher in a few words, for the log."""

    @property
    def teacher_source(self) -> str | None:
        """live or cache; None without a teacher."""
        return None

    @property
    def ema(self) -> Ema | None:
        """The moving average of the weights, where the run keeps one."""
        return None

    def load_checkpoint(self) -> int:
        """Loads the engine's state from the checkpoint that the run resumes; returns the steps made so far."""
        return load(self.engine, self.checkpoint) if self.checkpoint is not None else 0

    def validate(self, step: int, saves: CheckpointPolicy, expect: Expect) -> str | None:
        """Validates after `step` steps if that is due; returns why training ends here, if it does. Called again by an
        attempt that resumes at this step."""
        return None

    @abstractmethod
    def finish(self, step: int, expect: Expect) -> None:
        """Runs once the last step is saved, and again in an attempt that finds it saved."""

    @abstractmethod
    def show_samples(self, step: int, metrics: Metrics) -> None:
        """Writes what the model makes of a few held-out samples."""
