"""The sections run, data and batch."""

import re
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from uniemox_dist.config.sections import Amount, Seconds, Section, Share
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import require_local


class RunConfig(Section):
    """Name, folder, length, saves, time-outs and restarts of a run."""

    name: str = "run"
    """Name of the run; its folder is dir/name."""
    dir: str = "runs"
    """Folder that contains run folders."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the order of samples, crops, masks and initial weights."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the whole run (or give epochs)."""
    epochs: PositiveFloat | None = None
    """Passes over the data; max_steps = ceil(epochs * samples / global_batch)."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    save_every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 3
    """Complete checkpoints kept; older ones are deleted."""
    keep_every: PositiveInt | None = None
    """Steps whose checkpoints are never deleted: the multiples of this."""
    trace: bool = False
    """Write every sample's key and checksums of its views and masks to trace/rank<r>.jsonl."""
    pictures_every: PositiveInt | None = 500
    """Steps between reconstructions and nearest texts of held-out pictures (samples/ and TensorBoard); null: none."""
    timeout_s: Seconds = 1800
    """Seconds that a collective operation waits for the other ranks."""
    step_timeout_s: Seconds = 900
    """Seconds that a step may take, without saves and pictures; then the rank writes its stacks and exits with 1."""
    start_timeout_s: Seconds = 3600
    """Seconds that the first step without compute.compile, and each phase of the start before it, may take."""
    compile_timeout_s: Seconds = 3600
    """Seconds that the first step with compute.compile may take; it waits for the compiler."""
    max_restarts: int = Field(default=2, ge=0)
    """Restarts in a row after faults without a new checkpoint, after which the launcher gives up."""
    preflight: bool = True
    """Check this node and the ranks for a few seconds before training (the short form of `uniemox doctor`)."""
    spike_factor: float = Field(default=3.0, gt=1.0)
    """A loss above this multiple of the median of the last 100 steps is an event."""
    straggler_factor: float = Field(default=1.5, gt=1.0)
    """A rank is reported if its own part of the steps (loading, teacher, forward pass) takes longer than this multiple
    of the ranks' median."""

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is None:
            raise ValueError(
                f"run.name={value!r}: letters, digits, dots, - and _, and first a letter or digit"
            )
        return value

    @field_validator("dir")
    @classmethod
    def _is_local(cls, value: str) -> str:
        return require_local(value, "run.dir")

    @model_validator(mode="after")
    def _one_length(self) -> "RunConfig":
        if (self.max_steps is None) == (self.epochs is None):
            fix = "" if self.max_steps is None else "; set the other one to null"
            raise ValueError(f"give one of run.max_steps={self.max_steps} and run.epochs={self.epochs}{fix}")
        return self


class SourceConfig(Section):
    """One data set of a mix."""

    path: str
    """Folder with manifest.json."""
    weight: Amount | None = None
    """Share of the slots, relative to the other sources; 1 if neither this nor repeat is given."""
    repeat: Amount | None = None
    """How often each sample occurs in an epoch of the mix (or give weight); for all sources or for none."""

    @model_validator(mode="after")
    def _one_share(self) -> "SourceConfig":
        if self.weight is not None and self.repeat is not None:
            raise ValueError(f"give either weight={self.weight} or repeat={self.repeat}")
        return self


class DataConfig(Section):
    """The data of a run, and how a picture becomes two views."""

    path: str | None = None
    """Folder with manifest.json (or give sources)."""
    sources: tuple[SourceConfig, ...] = ()
    """Several folders with weights (or give path)."""
    epoch_samples: PositiveInt | None = None
    """Samples that count as one epoch; needed for a mix by weights that is measured in epochs."""
    eval_path: str | None = None
    """Held-out shards: their first pictures are shown while training, reconstructed and with their nearest texts."""
    shuffle_window: PositiveInt = 512
    """Samples of one stream that are permuted together."""
    workers: int = Field(default=4, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches prepared ahead per loader process."""
    timeout_s: Seconds = 300
    """Seconds that a step waits for a micro-batch; then the run ends and names the loader process and its sample."""
    retry_s: float = Field(default=60.0, ge=0.0)
    """Seconds for which a read that fails is tried again, before the run ends."""
    cache_dir: str | None = None
    """Folder on the node's own disk for whole shards, shared by all ranks of a node; for remote or slow sources."""
    cache_gb: PositiveFloat = 100.0
    """Largest size of cache_dir in GB (10^9 bytes); the least recently used shards are deleted."""
    verify_hash: bool = True
    """Check each picture's SHA-256 as it is read."""
    max_bad_share: Share = 0.01
    """Largest share of pictures that may be replaced because they are damaged; above it the run ends."""
    strict: bool = False
    """End the run at the first damaged picture instead of replacing it."""
    scene_scale: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest area of the scene view's random crop, as a share of the picture. The crop's sides
    stay within 3:4, so that it may be smaller in a very wide or tall picture."""
    flip: bool = True
    """Mirror each view with probability one half."""
    person: Literal["largest", "most_confident", "random"] = "largest"
    """Which of several detected persons the person view shows."""
    person_margin: float = Field(default=0.15, ge=0.0, le=2.0)
    """How far the person's box grows on each side, as a share of its longer side."""
    background: Literal["white", "random"] = "white"
    """Colour behind transparent pixels; random is one colour per slot."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter that resizes the views of training, antialiased; bilinear is faster and a little softer."""
    colour_jitter: Share = 0.0
    """Brightness, contrast and saturation of each view are multiplied by 1 - this … 1 + this."""

    @field_validator("cache_dir")
    @classmethod
    def _is_local(cls, value: str | None) -> str | None:
        return None if value is None else require_local(value, "data.cache_dir")

    @model_validator(mode="after")
    def _one_origin(self) -> "DataConfig":
        if (self.path is None) == (not self.sources):
            raise ValueError("give either data.path (one folder) or data.sources (a list of path and weight)")
        if not 0 < self.scene_scale[0] <= self.scene_scale[1]:
            raise ValueError(f"data.scene_scale={self.scene_scale}: needs 0 < smallest <= largest <= 1")
        repeats = [source.repeat is not None for source in self.sources]
        if any(repeats) and not all(repeats):
            missing = repeats.index(False)
            raise ValueError(
                f"data.sources.{missing} has no repeat where others have one; give all one, or none"
            )
        if self.timeout_s <= self.retry_s:
            raise ValueError(
                f"data.timeout_s={self.timeout_s} must exceed data.retry_s={self.retry_s:g}, during which a read may "
                f"still succeed"
            )
        return self

    @property
    def by_repeats(self) -> bool:
        """Whether the sources of the mix have repeats, not weights."""
        return any(source.repeat is not None for source in self.sources)

    def origins(self) -> tuple[SourceConfig, ...]:
        """The sources as a list, with one entry for data.path."""
        return self.sources or (SourceConfig(path=str(self.path)),)


class BatchConfig(Section):
    """Samples of a step, and how they may be divided among ranks."""

    global_batch: PositiveInt = 768
    """Samples of one optimizer step over all ranks."""
    micro_batch: PositiveInt = 32
    """Samples of one forward pass of one rank."""
    streams: PositiveInt = 96
    """Number of streams that the data is divided into, fixed for the run; a multiple of every number of ranks."""

    @model_validator(mode="after")
    def _streams_divide(self) -> "BatchConfig":
        check_streams(self.global_batch, self.streams, 1)
        return self

    def grad_accum(self, world_size: int) -> int:
        """The number of micro-batches of one rank in a step.

        Raises:
            UserError: if ranks and micro-batch do not divide streams and global batch.
        """
        return count_micro_batches(self.global_batch, self.micro_batch, self.streams, world_size)


def check_streams(global_batch: int, streams: int, world_size: int, prefix: str = "batch.") -> None:
    """Checks that the streams divide the global batch, and the ranks the streams; `prefix` comes before the names of
    settings in the error.

    Raises:
        UserError: naming the nearest values that do.
    """
    if global_batch % streams:
        near = max(1, round(global_batch / streams)) * streams
        raise UserError(
            f"{prefix}global_batch={global_batch} is not a multiple of {prefix}streams={streams}; try {near}, or a "
            f"{prefix}streams that divides {global_batch}"
        )
    if streams % world_size:
        near = _nearest_divisor(streams, world_size, larger=True)
        raise UserError(
            f"{prefix}streams={streams} is not a multiple of the {world_size} ranks; use {near} ranks, or a "
            f"{prefix}streams and {prefix}global_batch that {world_size} divides"
        )


def count_micro_batches(
    global_batch: int, micro_batch: int, streams: int, world_size: int, prefix: str = "batch."
) -> int:
    """The number of micro-batches of one rank in a step; `prefix` comes before the names of settings in errors.

    Raises:
        UserError: as `check_streams`, and if micro-batch times ranks does not divide the global batch.
    """
    check_streams(global_batch, streams, world_size, prefix)
    accum, rest = divmod(global_batch, micro_batch * world_size)
    if rest or not accum:
        near = _nearest_divisor(global_batch // world_size, micro_batch, larger=False)
        raise UserError(
            f"{prefix}global_batch={global_batch} is not a multiple of micro_batch x world_size = "
            f"{micro_batch} x {world_size}; try {prefix}micro_batch={near}"
        )
    return accum


def _nearest_divisor(number: int, wanted: int, *, larger: bool) -> int:
    """The divisor of a number that is nearest to a wanted one; of two the larger or the smaller."""
    fits = [n for n in range(1, number + 1) if number % n == 0]
    return min(fits, key=lambda n: (abs(n - wanted), -n if larger else n))
