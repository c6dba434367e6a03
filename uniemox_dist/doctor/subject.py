"""What is looked at: the run folder, the data and the sizes that a recipe names, or that options name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json
from uniemox_dist.data.sources import estimate_loader_bytes
from uniemox_dist.teacher.identity import CONFIG, find_local_folder

USUAL_WIDTH = 512
"""Width of the embeddings of many CLIPs: taken for sizes where a teacher's files do not say it."""
FP32 = 4
STATES = 3
"""Of each trained weight in a checkpoint: itself and Adam's two moments, all fp32."""


@dataclass(frozen=True)
class Subject:
    """What the checks are about."""

    run_folder: Path
    data: tuple[tuple[str, str], ...] = ()
    """Setting or option, and the folder or URL that it names."""
    config: Config | None = None
    """Of a recipe; None where options alone say what to look at."""

    @classmethod
    def of(cls, config: Config, run_folder: Path | None = None, data: Sequence[str] = ()) -> "Subject":
        """What a configuration names; options go before it."""
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
    """What a run takes, by its settings."""

    trained: int
    """Parameters of the student that are trained."""
    checkpoint_bytes: int
    """Of one complete checkpoint, over all ranks."""

    @property
    def gradient_bytes(self) -> int:
        """Gradients of one step as they are exchanged in bf16."""
        return 2 * self.trained

    def gpu_bytes(self, ranks: int, stage: int) -> int:
        """What a rank's GPU holds of weights, gradients and optimizer states at least; activations come on top."""
        replicated = 4 * self.trained  # bf16 weights and gradients
        return (replicated if stage < 3 else replicated // ranks) + STATES * FP32 * self.trained // ranks


def sizes_of(config: Config) -> Sizes:
    """Counts the parameters of a student that is built without memory. Needs torch and timm."""
    import torch

    from uniemox_dist.models.student import Student

    # Drawing weights that are never there must not move the generator that draws the real ones.
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
        return USUAL_WIDTH  # what is wrong with the teacher's files is for another check to say


def known_sizes(config: Config | None) -> Sizes | None:
    """`sizes_of`, or None without a recipe or where torch and timm are missing."""
    if config is None:
        return None
    try:
        return sizes_of(config)
    except ImportError:
        return None


@dataclass(frozen=True)
class LoaderNeeds:
    """What one rank's loader takes."""

    workers: int
    shared_bytes: int
    """Of views that the rank and its loader processes share; anonymous memory, not /dev/shm."""
    index_bytes: int
    """Of index rows in each loader process, at most."""
    handover_bytes: int
    """Of the views that pass through /dev/shm where no shared buffer is free: one micro-batch a loader process."""
    data_sets: int

    @classmethod
    def of(cls, config: Config, ranks: int) -> "LoaderNeeds":
        """By a run's settings."""
        shared, index = estimate_loader_bytes(config, ranks)
        views = config.batch.micro_batch * 2 * 3 * config.model.image_size**2
        return cls(
            config.data.workers, shared, index, config.data.workers * views, len(config.data.origins())
        )
