"""Every setting of a pretraining run: type, unit, default and one line of meaning.

`Config` is what a recipe resolves to. Sections are frozen; a value that can be derived is not a setting.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from uniemox_dist.config.vits import fill_in

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Amount = Annotated[float, Field(gt=0.0, le=1e6)]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class RunConfig(Section):
    """Where a run lives and how long it goes."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is dir/name."""
    dir: str = "runs"
    """Folder that holds run folders."""
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
    trace: bool = False
    """Write every sample's key and checksums of its views and masks to trace/rank<r>.jsonl."""
    pictures_every: PositiveInt = 500
    """Steps between looks at held-out pictures: reconstructions and nearest texts (samples/ and TensorBoard)."""
    timeout_s: PositiveInt = 1800
    """Seconds that a collective operation waits for the other ranks."""

    @model_validator(mode="after")
    def _one_length(self) -> "RunConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"give one of run.max_steps={self.max_steps} and run.epochs={self.epochs}")
        return self


class SourceConfig(Section):
    """One data set of a mix."""

    path: str
    """Folder with manifest.json."""
    weight: Amount | None = None
    """Share of the slots, relative to the other sources; 1 where neither this nor repeat is given."""
    repeat: Amount | None = None
    """How often each sample is seen in an epoch of the mix (or give weight); for all sources or for none."""

    @model_validator(mode="after")
    def _one_share(self) -> "SourceConfig":
        if self.weight is not None and self.repeat is not None:
            raise ValueError(f"give either weight={self.weight} or repeat={self.repeat}")
        return self


class DataConfig(Section):
    """What is read, and how a picture becomes two views."""

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
    timeout_s: PositiveInt = 300
    """Seconds that a step waits for a micro-batch; then the run ends and names the loader process and its sample."""
    retry_s: float = Field(default=60.0, ge=0.0)
    """Seconds for which a read that fails is tried again, before the run ends."""
    cache_dir: str | None = None
    """Folder on the node's own disk for whole shards, shared by all ranks of a node; for remote or slow sources."""
    cache_gb: PositiveFloat = 100.0
    """Largest size of cache_dir, in units of 10^9 bytes; what was not used for longest makes room."""
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
    """What stands behind transparent pixels; random is one colour per slot."""
    colour_jitter: Share = 0.0
    """Brightness, contrast and saturation of each view are multiplied by 1 - this … 1 + this."""

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
        """Whether the mix states how often each sample is seen in an epoch, rather than shares."""
        return any(source.repeat is not None for source in self.sources)

    def origins(self) -> tuple[SourceConfig, ...]:
        """The mix as a list, also when it is one folder."""
        return self.sources or (SourceConfig(path=str(self.path)),)


class BatchConfig(Section):
    """How many samples a step takes, and how they may be divided among ranks."""

    global_batch: PositiveInt = 768
    """Samples of one optimizer step, over all ranks."""
    micro_batch: PositiveInt = 32
    """Samples of one forward pass of one rank."""
    streams: PositiveInt = 96
    """Streams that the data is dealt into, fixed for the run; every number of ranks must divide it."""

    @model_validator(mode="after")
    def _streams_divide(self) -> "BatchConfig":
        if self.global_batch % self.streams:
            near = max(1, round(self.global_batch / self.streams)) * self.streams
            raise ValueError(
                f"batch.global_batch={self.global_batch} is not a multiple of "
                f"batch.streams={self.streams}; try {near}"
            )
        return self


class ModelConfig(Section):
    """The student: encoder, decoder, fusion and the masks that it sees."""

    name: str | None = None
    """A timm vision transformer, or vit_tiny, vit_small, vit_base, vit_large, vit_huge: states width, depth, heads and
    mlp_ratio, and patch_size and image_size too unless they are given."""
    init_from: str | None = None
    """Weights to start from: a file in MAE's or timm's layout, a release, or a run's checkpoint. Not read on resume."""
    positions: Literal["fixed", "learned"] = "fixed"
    """Positions of the encoder: fixed 2-D sine-cosine (or those of init_from), or trained from there."""
    image_size: PositiveInt = 224
    """Side of both views, pixels."""
    patch_size: PositiveInt = 16
    """Side of a patch, pixels."""
    width: PositiveInt = 768
    """Encoder width D."""
    depth: PositiveInt = 12
    """Encoder blocks."""
    heads: PositiveInt = 12
    """Encoder attention heads."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the blocks' MLPs over their width."""
    decoder_width: PositiveInt = 512
    """Decoder and fusion width F."""
    decoder_depth: PositiveInt = 8
    """Decoder blocks."""
    decoder_heads: PositiveInt = 16
    """Decoder attention heads."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest probability that a block of the encoder is skipped for a sample; grows linearly with depth from 0."""
    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Fraction of patches removed from each view."""
    mask: Literal["random", "block", "person"] = "random"
    """Which patches are removed: any, rectangles, or (in the scene) a share of them on the person."""
    mask_person_share: Share = 0.5
    """With mask=person: share of the removed patches that lie on the person, as far as there are so many."""
    fusion: Literal["prior", "multi_head", "attention", "gated_mlp", "none"] = "prior"
    """How scene and person are joined: the psychological prior, one of the released code's other ways, or the scene
    alone (no person branch)."""
    fusion_heads: PositiveInt = 8
    """Heads of the fusions multi_head, attention and gated_mlp."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Pixel mean of the student's input, 0..1 (ImageNet's)."""
    std: Rgb = (0.229, 0.224, 0.225)
    """Pixel standard deviation of the student's input, 0..1 (ImageNet's)."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return fill_in(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.image_size % self.patch_size:
            down = max(1, self.image_size // self.patch_size) * self.patch_size
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of "
                f"model.patch_size={self.patch_size}; try {down} or {down + self.patch_size}"
            )
        for width, heads, name in (
            (self.width, self.heads, ""),
            (self.decoder_width, self.decoder_heads, "decoder_"),
        ):
            if width % heads or width % 4:
                raise ValueError(
                    f"model.{name}width={width} must be a multiple of 4 and of model.{name}heads={heads}"
                )
        if self.fusion in ("multi_head", "attention", "gated_mlp") and self.decoder_width % self.fusion_heads:
            raise ValueError(
                f"model.fusion_heads={self.fusion_heads} does not divide model.decoder_width={self.decoder_width}"
            )
        if not 0 < self.visible < self.patches:
            raise ValueError(
                f"model.mask_ratio={self.mask_ratio} leaves {self.visible} of {self.patches} patches visible"
            )
        return self

    @property
    def patches(self) -> int:
        """Number of patches N of a view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """Number of visible patches V of a view."""
        return int(self.patches * (1 - self.mask_ratio) + 0.5)


class TeacherConfig(Section):
    """The frozen CLIP whose picture-text similarities are learned."""

    name: str = "ViT-B-16-quickgelu"
    """`local-dir:PATH`, `shipped:demo`, or an open_clip model name together with weights, mean and std."""
    weights: str | None = None
    """File of weights for an open_clip model name."""
    mean: Rgb | None = None
    """Pixel mean of the teacher's input; required with weights, otherwise read from the local-dir."""
    std: Rgb | None = None
    """Pixel standard deviation of the teacher's input; as mean."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the picture tower; auto is bf16 on a GPU and fp32 elsewhere."""
    text_batch: PositiveInt = 256
    """Captions embedded at once when the text cache is built."""
    source: Literal["live", "cache"] = "live"
    """Run the picture tower in every step, or replay views and embeddings that `uniemox teach --views` stored."""
    compile: bool = False
    """Compile the picture tower with torch.compile."""


class LossConfig(Section):
    """Weights of the three losses; a loss of weight 0 is not computed and its modules are not built."""

    relation: Weight = 1.0
    """Weight of L1, relation distillation over paired and unpaired texts."""
    similarity: Weight = 1.0
    """Weight of L2, similarity distillation."""
    reconstruction: Weight = 1.0
    """Weight of L3, masked reconstruction."""
    norm_pix: bool = False
    """Standardise each target patch of L3 by its own mean and variance."""
    relation_form: Literal["cosine", "kl"] = "cosine"
    """The paper's cosine between rows of similarities, or a KL between their softmaxes."""
    relation_over: Literal["global", "local"] = "global"
    """Texts that L1 compares with: those of the step's global batch, or of the rank's own micro-batch alone."""
    person_reconstruction: bool = False
    """Reconstruct the person view too; L3 is then the mean over both views."""
    schedule: dict[Literal["relation", "similarity", "reconstruction"], tuple[tuple[Share, Weight], ...]] = (
        Field(default_factory=dict)
    )
    """For a loss, points (share of the run, factor): its weight is multiplied by a line through them."""

    @model_validator(mode="after")
    def _some_loss(self) -> "LossConfig":
        if not (self.relation or self.similarity or self.reconstruction):
            raise ValueError(
                "loss.relation, loss.similarity and loss.reconstruction are all 0; switch at least one on"
            )
        for name, points in self.schedule.items():
            shares = [share for share, _ in points]
            if not points or shares != sorted(set(shares)):
                raise ValueError(
                    f"loss.schedule.{name}={points}: needs points with growing shares of the run"
                )
            if not getattr(self, name):
                raise ValueError(
                    f"loss.schedule.{name}: loss.{name}=0 is off for the whole run; give it a weight"
                )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with the teacher."""
        return bool(self.relation or self.similarity)


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
    """Learning rate of an encoder layer over that of the next one; all that is not encoder has the full rate."""
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
    """1 shards optimizer states, 2 also gradients, 3 also parameters; 0 shards nothing (fp32 only, for debugging)."""


class ComputeConfig(Section):
    """How passes are computed; changes no result beyond rounding."""

    compile: bool = False
    """Compile the student's blocks with torch.compile."""
    checkpoint_blocks: bool = False
    """Keep only the inputs of blocks for the backward pass and compute the rest again: less memory, more time."""
    peak_tflops: PositiveFloat | None = None
    """The device's stated peak, 10^12 floating-point operations per second in the run's number format; known for
    common GPUs. Model FLOP utilisation is measured against it."""


class Config(Section):
    """A whole pretraining run."""

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
