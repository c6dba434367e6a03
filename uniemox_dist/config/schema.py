"""Every setting of a pretraining run: type, unit, default and one line of meaning.

A recipe resolves to a `Config`. Sections are frozen. A value that can be derived is not a setting.
"""

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from uniemox_dist.config.data_sections import BatchConfig, DataConfig, RunConfig, SourceConfig
from uniemox_dist.config.losses import LossConfig
from uniemox_dist.config.model_sections import ModelConfig, TeacherConfig
from uniemox_dist.config.sections import Section, Share, Weight

__all__ = [
    "BatchConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TeacherConfig",
    "ZeroConfig",
]


class OptimConfig(Section):
    """AdamW and its schedule."""

    blr: PositiveFloat = 1e-3
    """Base learning rate: peak_lr = blr * global_batch / 256."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: Weight = 0.05
    """Decoupled weight decay of matrices; biases, norms, tokens and the fusion weight have none."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up (or give warmup_epochs)."""
    warmup_epochs: Weight | None = None
    """Epochs of linear warm-up; without either, a tenth of the run."""
    min_lr: Weight = 0.0
    """Learning rate at the end of the half-cycle cosine."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Learning rate of an encoder layer relative to that of the next layer; other parameters have the full rate."""
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay, per step, of an exponential moving average of the encoder's weights; 0 keeps none."""
    clip_grad: Weight = 0.0
    """Largest norm of the gradients; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the student's passes; auto measures a matrix product in both and takes the faster."""
    max_skipped: PositiveInt = 20
    """Steps in a row with a non-finite loss that are skipped before the run ends."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """1 shards optimizer states, 2 also gradients, 3 also parameters; 0 does not shard (fp32 only, for debugging)."""


class ComputeConfig(Section):
    """How passes are computed; changes no result beyond rounding."""

    compile: bool | Literal["auto"] = False
    """Compile blocks, losses, the preparation of pixels and the live teacher with torch.compile. auto: on GPUs that
    have a compiler, otherwise off."""
    cuda_graphs: bool = False
    """With compile on a GPU: replay compiled passes as CUDA graphs, where ZeRO leaves weights and gradients in
    place."""
    checkpoint_blocks: bool = False
    """Keep only the inputs of blocks for the backward pass and recompute the rest: less memory, more time."""
    peak_tflops: PositiveFloat | None = None
    """The device's stated peak, 10^12 floating-point operations per second in the run's number format; known for
    common GPUs. Model FLOP utilisation is measured against it."""


class Config(Section):
    """All settings of a pretraining run."""

    run: RunConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    compute: ComputeConfig = ComputeConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's own configuration, merged last."""

    @model_validator(mode="after")
    def _deepspeed_keys_fit(self) -> "Config":
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key}: is derived from batch.*; set it there")
        for key in ("zero_optimization", "bf16"):
            value = self.deepspeed.get(key, {})
            if not isinstance(value, dict):
                raise ValueError(
                    f"deepspeed.{key}={value}: is a section; set its keys, as deepspeed.{key}.KEY=…"
                )
        if "stage" in self.deepspeed.get("zero_optimization", {}):
            raise ValueError("deepspeed.zero_optimization.stage: set zero.stage")
        clip = self.deepspeed.get("gradient_clipping", 0.0)
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < math.inf:
            raise ValueError(
                f"deepspeed.gradient_clipping={clip}: is not a norm; give a number from 0, or set optim.clip_grad"
            )
        check = self.deepspeed.get("bf16", {}).get("check_grad_overflow", False)
        if not isinstance(check, bool):
            raise ValueError(f"deepspeed.bf16.check_grad_overflow={check}: give true or false")
        return self

    @model_validator(mode="after")
    def _epochs_have_a_length(self) -> "Config":
        data = self.data
        if self.run.max_steps is None and data.sources and not (data.epoch_samples or data.by_repeats):
            raise ValueError(
                f"run.epochs={self.run.epochs:g} of a mix needs data.epoch_samples, or a repeat for each of "
                f"data.sources; or give run.max_steps"
            )
        return self

    @model_validator(mode="after")
    def _teacher_is_complete(self) -> "Config":
        if self.loss.needs_teacher and ":" not in self.teacher.name:
            missing = [k for k in ("weights", "mean", "std") if getattr(self.teacher, k) is None]
            if missing:
                raise ValueError(
                    f"teacher.name={self.teacher.name} is an open_clip model name and also needs "
                    + ", ".join(f"teacher.{k}" for k in missing)
                    + "; or give teacher.name=local-dir:PATH"
                )
        return self

    @model_validator(mode="after")
    def _a_step_outlasts_its_data(self) -> "Config":
        if self.run.step_timeout_s <= self.data.timeout_s:
            raise ValueError(
                f"run.step_timeout_s={self.run.step_timeout_s} must exceed data.timeout_s={self.data.timeout_s}, "
                f"during which a step may still get its samples"
            )
        return self

    @model_validator(mode="after")
    def _parts_exist(self) -> "Config":
        loss = self.loss
        if loss.person_reconstruction and not loss.reconstruction:
            raise ValueError(
                "loss.person_reconstruction needs loss.reconstruction, which is 0; give it a weight"
            )
        if self.teacher.source == "cache" and not loss.needs_teacher:
            raise ValueError(
                "teacher.source=cache: no loss needs a teacher; switch loss.relation or loss.similarity on"
            )
        if self.optim.precision == "bf16" and self.zero.stage == 0:
            raise ValueError("zero.stage=0 works in fp32 only; use zero.stage=1, or optim.precision=fp32")
        return self
