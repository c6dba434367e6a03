"""Settings of a fine-tuning run: those of pretraining except its losses, and those of the classifier."""

import math
from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from uniemox_dist.config.losses import LossConfig
from uniemox_dist.config.model_sections import TeacherConfig
from uniemox_dist.config.schema import Config
from uniemox_dist.config.sections import Section, Share, Weight

Dimension = Literal["valence", "arousal", "dominance"]
Target = Literal["label", "distribution", "dimensions"]
EMOTIC_RANGE = (1.0, 10.0)
"""Range of a dimension that neither the settings nor the data set state."""
CLASSIFIER = "uniemox-classifier"
"""The format that uniemox.json of a fine-tuned classifier states. Its folder is one of timm's with that file added."""
DISTRIBUTION_TITLES = {
    "kl_divergence": ("KL divergence", "lower"),
    "chebyshev": ("Chebyshev distance", "lower"),
    "clark": ("Clark distance", "lower"),
    "canberra": ("Canberra metric", "lower"),
    "cosine": ("cosine", "higher"),
    "intersection": ("intersection", "higher"),
    "accuracy": ("accuracy of the most likely label", "higher"),
}
"""Title of each measure with target=distribution, and whether lower or higher is better."""


class FinetuneConfig(Section):
    """The task, augmentation, validation and early end of a fine-tuning run."""

    task: Literal["single", "multi"] = "single"
    """single: one label per picture. multi: EMOTIC's task, any number of categories, with valence, arousal and
    dominance."""
    target: Target = "label"
    """What is learned with task=single. label: the picture's label, by cross-entropy. distribution: the shares of all
    labels, by the Kullback-Leibler divergence; every picture needs a distribution. dimensions: only
    finetune.dimensions, by the squared error, without labels."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of the outputs. Empty: those of the training split, in the data set's own
    order if it has one, otherwise sorted."""
    persons: bool = False
    """Use the person's crop beside the scene: one encoder reads both, and their features are concatenated. With
    task=multi each annotated person is one sample, and with task=single each person that has a label of its own (with
    target=dimensions a value), as HECO's have; without persons the sample is the picture."""
    pooling: Literal["mean", "token"] = "mean"
    """Feature of a view: the mean of its patch tokens followed by a new norm, or the class token."""
    split_ratio: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the training pictures of each class that are used for training."""
    val_ratio: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training pictures of each class that are used for validation if the data have no split val."""
    mixup: Weight = 0.8
    """Alpha of mixup (Zhang et al. 2018); 0 switches it off."""
    cutmix: Weight = 1.0
    """Alpha of CutMix (Yun et al. 2019); 0 switches it off. If mixup is on too, each pair of pictures gets one of the
    two."""
    mix_share: Share = 1.0
    """Share of the pairs that are mixed."""
    smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Label smoothing with task=single: share of a target, label or distribution, that is spread evenly over all
    classes."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's configuration string of RandAugment; null switches it off."""
    erasing: Share = 0.25
    """Probability that a rectangle of a view is replaced by noise."""
    category_weights: Literal["inverse_log", "none"] = "inverse_log"
    """With task=multi: weigh each category by 1 / ln(1.2 + its share of the samples), as EMOTIC's authors do."""
    dimensions: tuple[Dimension, ...] | None = None
    """Emotion dimensions that are learned beside the labels: of the pictures, or of the persons with task=multi. null:
    all three with task=multi, and none with task=single."""
    dimension_weight: Weight = 1.0
    """Weight of the loss of the dimensions, relative to that of the labels; 0 switches them off."""
    dimension_ranges: dict[Dimension, tuple[float, float]] = Field(default_factory=dict)
    """Lowest and highest value of dimensions, as {valence: [1, 9]}; a sample with a value beyond is an error. A
    dimension that is not named has the range that the data set states, or else 1 to 10, EMOTIC's."""
    validate_epochs: PositiveFloat = 1.0
    """Epochs between two validations."""
    patience: PositiveInt | None = None
    """Validations in a row without a better result after which the run ends; null: never before its last step."""
    eval_batch: PositiveInt = 64
    """Samples of one forward pass of one rank in validation and test."""

    @model_validator(mode="after")
    def _labels_are_names(self) -> "FinetuneConfig":
        if len(set(self.labels)) != len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise ValueError(f"finetune.labels: {twice!r} is given twice; keep one")
        if len(self.labels) == 1:
            raise ValueError(
                f"finetune.labels: {self.labels[0]!r} is the only label; a classifier needs two or more"
            )
        return self

    @model_validator(mode="after")
    def _dimensions_and_target_fit(self) -> "FinetuneConfig":
        if self.task == "multi" and self.target != "label":
            raise ValueError(
                f"finetune.target={self.target}: needs finetune.task=single; task=multi learns categories"
            )
        if self.target == "dimensions" and not self.learned_dimensions:
            raise ValueError(
                "finetune.target=dimensions: learns finetune.dimensions alone; name some, such as [valence, arousal], "
                "with a finetune.dimension_weight above 0"
            )
        if self.target == "dimensions" and self.labels:
            raise ValueError(
                "finetune.target=dimensions: learns no labels; leave out finetune.labels, or set it to []"
            )
        if self.dimensions is not None and len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError("finetune.dimensions: names one twice; keep one")
        for name, (low, high) in self.dimension_ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"finetune.dimension_ranges.{name}: [{low:g}, {high:g}] is no range; give the lowest and the "
                    "highest value, such as [1, 9]"
                )
        return self

    @property
    def learned_dimensions(self) -> tuple[Dimension, ...]:
        """Dimensions that are learned."""
        if not self.dimension_weight:
            return ()
        if self.dimensions is not None:
            return self.dimensions
        return get_args(Dimension) if self.task == "multi" else ()

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix mixes pairs of pictures."""
        return bool(self.mix_share and (self.mixup or self.cutmix))


class FinetuneRun(Config):
    """A whole fine-tuning run."""

    teacher: TeacherConfig = Field(default=TeacherConfig(), exclude=True)
    """Not used in fine-tuning."""
    loss: LossConfig = Field(default=LossConfig(relation=0.0, similarity=0.0), exclude=True)
    """Not used in fine-tuning."""
    finetune: FinetuneConfig = FinetuneConfig()

    def select_training(self) -> "FinetuneRun":
        """Returns this run with the training split as its data, for code that reads shards and does not know
        splits."""
        path = str(self.data.path).rstrip("/") + "/train"
        return self.model_copy(update={"data": self.data.model_copy(update={"path": path})})

    @model_validator(mode="before")
    @classmethod
    def _none_of_pretraining(cls, values: Any) -> Any:
        given = [name for name in ("teacher", "loss") if isinstance(values, dict) and name in values]
        if given:
            raise ValueError(f"{given[0]}.*: fine-tuning has no such section; remove it")
        return values

    @model_validator(mode="after")
    def _one_data_set(self) -> "FinetuneRun":
        if self.data.path is None or self.data.epoch_samples is not None or self.data.eval_path is not None:
            raise ValueError(
                "data.path: give one folder with the splits train, val and test, and neither data.sources, "
                "data.epoch_samples nor data.eval_path"
            )
        return self

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> "FinetuneRun":
        batch = self.batch
        if self.finetune.mixes and (batch.micro_batch % 2 or batch.streams % 2):
            raise ValueError(
                f"finetune.mixup and finetune.cutmix mix neighbouring slots: batch.micro_batch={batch.micro_batch} and "
                f"batch.streams={batch.streams} must be even; change them, or set finetune.mixup=0 finetune.cutmix=0"
            )
        if self.optim.ema_decay:
            raise ValueError(
                "optim.ema_decay: fine-tuning keeps the best weights and no average; leave it out"
            )
        return self
