"""Floating-point operations of a sample, counted from the settings alone: no torch, no modules.

Matrix products, convolutions and attention count, a multiplication with its addition as two; what is done element by
element does not, as in `torch.utils.flop_counter`, against which a test holds these numbers.
Symbols: N patches, V visible and M masked ones, D encoder, F decoder and E embedding width, G texts of a step.
"""

from dataclasses import dataclass

from uniemox_dist.config.encoder_names import peculiar
from uniemox_dist.config.schema import Config, LossConfig, ModelConfig


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one sample, by part; 0 for what the settings switch off."""

    encoder: int
    """Both views, where the person view is read."""
    projection: int
    """From the encoder's width to the decoder's."""
    decoder: int
    """The scene, or both views with loss.person_reconstruction."""
    fusion: int
    relation: int
    """Similarities of γ and of Ω with all texts of the step."""
    teacher: int
    """The picture tower; 0 where its embeddings come from a cache."""
    again: int
    """What checkpointed blocks compute a second time in the backward pass; not part of the totals."""

    @property
    def student(self) -> int:
        """The forward pass of what is trained."""
        return self.encoder + self.projection + self.decoder + self.fusion + self.relation

    @property
    def forward(self) -> int:
        """One forward pass of student and teacher."""
        return self.student + self.teacher

    @property
    def training(self) -> int:
        """Useful FLOPs of a training step: 3 × student + teacher, whether or not something is computed again.

        The backward pass has two products for each of the forward pass (PaLM, Chowdhery et al. 2022, appendix B). That
        is 1 % too much for a small encoder, since pixels need no gradient, and less for others.
        """
        return 3 * self.student + self.teacher

    @property
    def executed(self) -> int:
        """FLOPs of a training step with compute.checkpoint_blocks."""
        return self.training + self.again

    def describe(self, peak_tflops: float | None) -> str:
        """One line of a log."""
        peak = f"; the device's peak is {peak_tflops:g} TFLOP/s" if peak_tflops else ""
        student, encoder, decoder = (n / 1e9 for n in (self.student, self.encoder, self.decoder))
        return (
            f"a sample costs {self.training / 1e9:.3g} GFLOPs: 3 x student {student:.3g} (encoder {encoder:.3g}, "
            f"decoder {decoder:.3g}) + teacher {self.teacher / 1e9:.3g}{peak}"
        )


def sample_flops(config: Config, embedding_width: int | None, teacher: int = 0) -> Flops:
    """FLOPs of one sample of a run.

    Args:
        embedding_width: E; None where no loss compares with a teacher.
        teacher: FLOPs of its picture tower for one picture (`towers.py`).
    """
    texts = config.batch.global_batch if config.loss.relation_over == "global" else config.batch.micro_batch
    live = config.loss.needs_teacher and config.teacher.source == "live"
    return student_flops(config.model, config.loss, embedding_width, texts, teacher if live else 0)


def student_flops(
    model: ModelConfig, loss: LossConfig, embedding_width: int | None, texts: int, teacher: int = 0
) -> Flops:
    """As `sample_flops`, from the sections that matter and the number G of texts."""
    fuses_person = loss.needs_teacher and model.fusion != "none"
    views = 2 if fuses_person or loss.person_reconstruction else 1
    names = peculiar(model.name)
    tokens = 1 + names.get("registers", 0) + model.visible
    block = block_flops(
        tokens,
        model.width,
        round(model.width * model.mlp_ratio),
        gated=names.get("gated_mlp", False),
        scaled=names.get("layer_scale", False),
        differential=names.get("differential_attention", False),
    )
    D, F = model.width, model.decoder_width
    patch_values = 3 * model.patch_size**2
    encoder = views * (2 * model.visible * patch_values * D + model.depth * block.forward)
    again = views * model.depth * block.again
    decoder = fusion = relation = 0
    if loss.needs_decoder:
        shown = 2 if loss.person_reconstruction else 1
        block = block_flops(1 + model.patches, F, int(F * model.mlp_ratio))
        masked = model.patches - model.visible
        decoder = shown * (model.decoder_depth * block.forward + 2 * masked * F * patch_values)
        again += shown * model.decoder_depth * block.again
    if loss.needs_teacher:
        assert embedding_width is not None
        fusion = _fusion(model) + 2 * F * embedding_width
        relation = 2 * 2 * texts * embedding_width if loss.needs_texts else 0
    projected = 1 + model.visible if loss.needs_decoder else 1
    projection = views * 2 * projected * D * F
    return Flops(encoder, projection, decoder, fusion, relation, teacher, again)


def classifier_flops(model: ModelConfig, views: int, outputs: int) -> Flops:
    """As `sample_flops`, of a classifier that sees all patches of one or two views."""
    names = peculiar(model.name)
    D, hidden = model.width, round(model.width * model.mlp_ratio)
    block = block_flops(
        1 + names.get("registers", 0) + model.patches,
        D,
        hidden,
        gated=names.get("gated_mlp", False),
        scaled=names.get("layer_scale", False),
        differential=names.get("differential_attention", False),
    )
    encoder = views * (2 * model.patches * 3 * model.patch_size**2 * D + model.depth * block.forward)
    return Flops(encoder, 2 * views * D * outputs, 0, 0, 0, 0, views * model.depth * block.again)


@dataclass(frozen=True)
class Block:
    """FLOPs of a transformer block for one sequence."""

    forward: int
    again: int
    """What checkpointing computes again in the backward pass."""


def block_flops(
    tokens: int,
    width: int,
    hidden: int,
    *,
    gated: bool = False,
    scaled: bool = False,
    differential: bool = False,
) -> Block:
    """A pre-norm block: attention with its projections, and an MLP.

    Args:
        hidden: outputs of the MLP's first layer; of a gated MLP half of them gate the other half.
        scaled: with LayerScale, whose gradient needs the MLP's output; without it, checkpointing stops before the
            MLP's second product.
        differential: attention is the difference of two, each with half of the width for queries and keys.
    """
    projections = 2 * tokens * width * 4 * width
    attention = 2 * tokens * tokens * width * (3 if differential else 2)
    second = 2 * tokens * (hidden // 2 if gated else hidden) * width
    forward = projections + attention + 2 * tokens * width * hidden + second
    return Block(forward, forward if scaled else forward - second)


def tower_flops(
    *, image_size: int, patch_size: int, width: int, layers: int, mlp_ratio: float, embedding_width: int
) -> int:
    """A CLIP vision transformer for one picture: class token, no masks, a projection of one token."""
    patches = (image_size // patch_size) ** 2
    block = block_flops(1 + patches, width, int(width * mlp_ratio))
    return 2 * patches * 3 * patch_size**2 * width + layers * block.forward + 2 * width * embedding_width


def _fusion(model: ModelConfig) -> int:
    """What joins the two class tokens, without the projection behind it."""
    F, H = model.decoder_width, model.fusion_heads
    products = {"attention": 2 * F * H, "gated_mlp": 2 * F * H * F + H * F * F + 2 * F * F}
    return 2 * products.get(model.fusion, 0)
