"""The inputs of the doctor: the run folder, the data and the sizes that a recipe or options state."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json
from uniemox_dist.data.sources import estimate_loader_bytes
from uniemox_dist.teacher.identity import CONFIG, find_local_folder

USUAL_WIDTH = 512
"""Embedding width of many CLIPs; used for sizes if a teacher's files do not state it."""
FP32 = 4
STATES = 3
"""Bytes of each trained weight in a checkpoint: the weight and Adam's two moments, all fp32."""


@dataclass(frozen=True)
class Subject:
    """The inputs of all checks."""

    run_folder: Path
    data: tuple[tuple[str, str], ...] = ()
    """Pairs of a setting or option and the folder or URL that it names."""
    config: Config | None = None
    """The recipe; None without one."""

    @classmethod
    def from_config(
        cls, config: Config, run_folder: Path | None = None, data: Sequence[str] = ()
    ) -> "Subject":
        """Takes the inputs from a configuration; options override it."""
        origins = config.data.origins()
        fields = (
            ["data.path"] if config.data.path else [f"data.sources.{i}.path" for i in range(len(origins))]
        )
        named = [(field, origin.path) for field, origin in zip(fields, origins)]
        if config.data.eval_path:
            named.append(("data.eval_path", config.data.eval_path))
        if data:
            named = [("--data", path) for path in data]
        return cls(run_folder or Path(config.run.dir) / config.run.name, tuple(named), config)


@dataclass(frozen=True)
class Sizes:
    """Sizes derived from a run's settings."""

    trained: int
    """Trained parameters of the student."""
    checkpoint_bytes: int
    """Size of one complete checkpoint, over all ranks."""

    @property
    def gradient_bytes(self) -> int:
        """Gradients of one step, exchanged in bf16."""
        return 2 * self.trained

    def gpu_bytes(self, ranks: int, stage: int) -> int:
        """Bytes of weights, gradients and optimizer states on a rank's GPU; activations are not counted."""
        replicated = 4 * self.trained  # bf16 weights and gradients
        return (replicated if stage < 3 else replicated // ranks) + STATES * FP32 * self.trained // ranks


def count_sizes(config: Config) -> Sizes:
    """Counts the parameters of a student built without memory. Needs torch and timm."""
    import torch

    from uniemox_dist.models.student import Student

    # Drawing the weights of this student must not advance the generator of the real ones.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        student = Student(config.model, config.loss, _embedding_width(config))
    named = list(student.named_parameters())
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    fixed = sum(p.numel() for _, p in named if not p.requires_grad)
    averaged = sum(p.numel() for name, p in named if p.requires_grad and name.startswith("encoder."))
    numbers = STATES * trained + fixed + (averaged if config.optim.ema_decay else 0)
    return Sizes(trained, FP32 * numbers)


def _embedding_width(config: Config) -> int | None:
    if not config.loss.needs_teacher:
        return None
    try:
        folder = find_local_folder(config.teacher)
        return USUAL_WIDTH if folder is None else int(read_json(folder / CONFIG)["model_cfg"]["embed_dim"])
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return USUAL_WIDTH  # another check reports problems of the teacher's files


def count_sizes_if_known(config: Config | None) -> Sizes | None:
    """Like `count_sizes`; None without a recipe, or without torch and timm."""
    if config is None:
        return None
    try:
        return count_sizes(config)
    except ImportError:
        return None


@dataclass(frozen=True)
class LoaderNeeds:
    """Memory of one rank's loader."""

    workers: int
    shared_bytes: int
    """Bytes of views that the rank and its loader processes share: anonymous memory, not /dev/shm."""
    index_bytes: int
    """Largest number of bytes of index rows in each loader process."""
    handover_bytes: int
    """Bytes of views that pass through /dev/shm if no shared buffer is free: one micro-batch per loader process."""
    data_sets: int

    @classmethod
    def from_config(cls, config: Config, ranks: int) -> "LoaderNeeds":
        """Computes the memory from a run's settings."""
        shared, index = estimate_loader_bytes(config, ranks)
        views = config.batch.micro_batch * 2 * 3 * config.model.image_size**2
        return cls(
            config.data.workers, shared, index, config.data.workers * views, len(config.data.origins())
        )
