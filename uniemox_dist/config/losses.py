"""The loss terms of pretraining and their settings.

To add a loss: a row in `LOSS_TERMS` and a weight in `LossConfig` here, and its function in `models/losses.py`.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from uniemox_dist.config.sections import Section, Share, Weight


@dataclass(frozen=True)
class LossTerm:
    """One term of the weighted sum that pretraining minimises."""

    name: str
    """Name of its weight in the section `loss`, and of its value in metrics.jsonl."""
    symbol: str
    unit: str
    """Unit of its value."""
    question: str
    """The question that its curve answers, for the report page."""
    colours: tuple[str, str]
    """Colour of its curve on a light and on a dark page."""
    teacher: bool = False
    """Compares the fused embedding γ with the teacher's embedding of the picture."""
    texts: bool = False
    """Compares with the teacher's embeddings of the captions."""
    decoder: bool = False
    """Compares the decoder's pixels with the picture."""

    @property
    def title(self) -> str:
        """`L1 relation`."""
        return f"{self.symbol} {self.name}"


LOSS_TERMS = (
    LossTerm(
        "relation",
        "L1",
        unit="1 − cosine",
        question="Do pictures relate to all captions as they do for the teacher?",
        colours=("#0c8069", "#43cdae"),
        teacher=True,
        texts=True,
    ),
    LossTerm(
        "similarity",
        "L2",
        unit="1 − cosine",
        question="How far is each picture from the teacher's embedding of it?",
        colours=("#b85c08", "#f0a558"),
        teacher=True,
    ),
    LossTerm(
        "reconstruction",
        "L3",
        unit="mean squared error",
        question="How far are the hidden patches from the truth?",
        colours=("#b02475", "#f084c0"),
        decoder=True,
    ),
)
LOSS_NAMES = tuple(term.name for term in LOSS_TERMS)


class LossConfig(Section):
    """Weights of the losses; a loss of weight 0 is not computed and its modules are not built."""

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
    """Texts that L1 compares with: those of the step's global batch, or only those of the rank's own micro-batch."""
    person_reconstruction: bool = False
    """Reconstruct the person view too; L3 is then the mean over both views."""
    schedule: dict[str, tuple[tuple[Share, Weight], ...]] = Field(default_factory=dict)
    """For each loss, points (share of the run, factor). Its weight is multiplied by the piecewise linear function
    through them."""

    @model_validator(mode="after")
    def _check_weights(self) -> "LossConfig":
        if not self.active:
            *first, last = (f"loss.{name}" for name in LOSS_NAMES)
            raise ValueError(f"{', '.join(first)} and {last} are all 0; switch at least one on")
        for name, points in self.schedule.items():
            if name not in LOSS_NAMES:
                raise ValueError(f"loss.schedule.{name}: there is no such loss; use {', '.join(LOSS_NAMES)}")
            shares = [share for share, _ in points]
            if not points or shares != sorted(set(shares)):
                raise ValueError(
                    f"loss.schedule.{name}={points}: needs points with growing shares of the run"
                )
            if not self.weights[name]:
                raise ValueError(
                    f"loss.schedule.{name}: loss.{name}=0 is off for the whole run; give it a weight"
                )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss by its name."""
        return {name: getattr(self, name) for name in LOSS_NAMES}

    @property
    def active(self) -> tuple[LossTerm, ...]:
        """The losses whose weight is not 0."""
        return tuple(term for term in LOSS_TERMS if getattr(self, term.name))

    @property
    def needs_teacher(self) -> bool:
        """True if a loss compares with the teacher's embeddings of pictures."""
        return any(term.teacher for term in self.active)

    @property
    def needs_texts(self) -> bool:
        """True if a loss compares with the teacher's embeddings of captions."""
        return any(term.texts for term in self.active)

    @property
    def needs_decoder(self) -> bool:
        """True if a loss compares pixels."""
        return any(term.decoder for term in self.active)
