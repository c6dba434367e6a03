"""Floating-point operations of a sample, computed from the settings without torch.

Matrix products, convolutions and attention count, a multiplication with its addition as two; element-wise operations do
not. `torch.utils.flop_counter` counts the same, and a test compares both.
Symbols: N patches, V visible and M masked ones, D encoder, F decoder and E embedding width, G texts of a step.
"""

from dataclasses import dataclass

from uniemox_dist.config.encoder_names import find_peculiarities
from uniemox_dist.config.schema import Config, LossConfig, ModelConfig
from uniemox_dist.models.parameters import encoder_hidden


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one sample by part; 0 for parts that are switched off."""

    encoder: int
    """The encoder on both views, or only on the scene if the student does not read the person view."""
    projection: int
    """The projection from the encoder's width to the decoder's."""
    decoder: int
    """The scene, or both views with loss.person_reconstruction."""
    fusion: int
    relation: int
    """Similarities of γ and of Ω with all texts of the step."""
    teacher: int
    """The image tower; 0 if its embeddings come from a cache."""
    again: int
    """Recomputation of checkpointed blocks in the backward pass; not part of the totals."""

    @property
    def student(self) -> int:
        """Forward pass of the student."""
        return self.encoder + self.projection + self.decoder + self.fusion + self.relation

    @property
    def forward(self) -> int:
        """Forward pass of student and teacher."""
        return self.student + self.teacher

    @property
    def training(self) -> int:
        """Useful FLOPs of a training step: 3 × student + teacher, without recomputation.

        The backward pass has two products for each product of the forward pass (PaLM, Chowdhery et al. 2022, appendix
        B). This is up to 1 % too much, because pixels need no gradient.
        """
        return 3 * self.student + self.teacher

    @property
    def executed(self) -> int:
        """FLOPs of a training step with compute.checkpoint_blocks, recomputation included."""
        return self.training + self.again

    def describe(self, peak_tflops: float | None) -> str:
        """Describes the FLOPs in one line for the log."""
        peak = f"; the device's peak is {peak_tflops:g} TFLOP/s" if peak_tflops else ""
        student, encoder, decoder = (n / 1e9 for n in (self.student, self.encoder, self.decoder))
        return (
            f"a sample costs {self.training / 1e9:.3g} GFLOPs: 3 x student {student:.3g} (encoder {encoder:.3g}, "
            f"decoder {decoder:.3g}) + teacher {self.teacher / 1e9:.3g}{peak}"
        )


def sample_flops(config: Config, embedding_width: int | None, teacher: int = 0) -> Flops:
    """Returns the FLOPs of one sample of a pretraining run.

    Args:
        embedding_width: E; None if no active loss needs a teacher.
        teacher: FLOPs of the teacher's image tower for one picture (`teacher/flops.py`).
    """
    texts = config.batch.global_batch if config.loss.relation_over == "global" else config.batch.micro_batch
    live = config.loss.needs_teacher and config.teacher.source == "live"
    return student_flops(config.model, config.loss, embedding_width, texts, teacher if live else 0)


def student_flops(
    model: ModelConfig, loss: LossConfig, embedding_width: int | None, texts: int, teacher: int = 0
) -> Flops:
    """Like `sample_flops`, from the relevant sections and the number G of texts."""
    fuses_person = loss.needs_teacher and model.fusion != "none"
    views = 2 if fuses_person or loss.person_reconstruction else 1
    D, F = model.width, model.decoder_width
    one_view = _encoder_flops(model, model.visible)
    encoder, again = views * one_view.forward, views * one_view.again
    decoder = fusion = relation = 0
    if loss.needs_decoder:
        decoded = 2 if loss.person_reconstruction else 1
        block = block_flops(1 + model.patches, F, int(F * model.mlp_ratio))
        masked = model.patches - model.visible
        decoder = decoded * (model.decoder_depth * block.forward + 2 * masked * F * model.patch_values)
        again += decoded * model.decoder_depth * block.again
    if loss.needs_teacher:
        assert embedding_width is not None
        fusion = _fusion(model) + 2 * F * embedding_width
        relation = 2 * 2 * texts * embedding_width if loss.needs_texts else 0
    projected = 1 + model.visible if loss.needs_decoder else 1
    projection = views * 2 * projected * D * F
    return Flops(encoder, projection, decoder, fusion, relation, teacher, again)


def classifier_flops(model: ModelConfig, views: int, outputs: int) -> Flops:
    """Returns the FLOPs of one sample of a classifier, which reads all patches of one or two views."""
    one_view = _encoder_flops(model, model.patches)
    head = 2 * views * model.width * outputs
    return Flops(views * one_view.forward, head, 0, 0, 0, 0, views * one_view.again)


def _encoder_flops(model: ModelConfig, patches: int) -> "Block":
    """Returns the FLOPs of the encoder for one view with the given number of patches, patch projection included."""
    kind = find_peculiarities(model.name)
    block = block_flops(
        1 + kind.get("registers", 0) + patches,
        model.width,
        encoder_hidden(model),
        gated=kind.get("gated_mlp", False),
        scaled=kind.get("layer_scale", False),
        differential=kind.get("differential_attention", False),
    )
    projection = 2 * patches * model.patch_values * model.width
    return Block(projection + model.depth * block.forward, model.depth * block.again)


@dataclass(frozen=True)
class Block:
    """FLOPs of one or more transformer blocks for one sequence."""

    forward: int
    again: int
    """FLOPs that checkpointing recomputes in the backward pass."""


def block_flops(
    tokens: int,
    width: int,
    hidden: int,
    *,
    gated: bool = False,
    scaled: bool = False,
    differential: bool = False,
) -> Block:
    """Returns the FLOPs of a pre-norm block: attention with its projections, and an MLP.

    Args:
        hidden: outputs of the MLP's first layer; in a gated MLP half of them gate the other half.
        scaled: with LayerScale, whose gradient needs the MLP's output. Without it, checkpointing does not recompute the
            MLP's second product.
        differential: attention is the difference of two attentions, each with half of the width for queries and keys.
    """
    projections = 2 * tokens * width * 4 * width
    attention = 2 * tokens * tokens * width * (3 if differential else 2)
    second = 2 * tokens * (hidden // 2 if gated else hidden) * width
    forward = projections + attention + 2 * tokens * width * hidden + second
    return Block(forward, forward if scaled else forward - second)


def tower_flops(
    *, image_size: int, patch_size: int, width: int, layers: int, mlp_ratio: float, embedding_width: int
) -> int:
    """Returns the FLOPs of a CLIP vision transformer for one picture: class token, no masks, one projected token."""
    patches = (image_size // patch_size) ** 2
    block = block_flops(1 + patches, width, int(width * mlp_ratio))
    return 2 * patches * 3 * patch_size**2 * width + layers * block.forward + 2 * width * embedding_width


def _fusion(model: ModelConfig) -> int:
    """Returns the FLOPs of joining the two class tokens, without the final projection."""
    F, H = model.decoder_width, model.fusion_heads
    products = {"attention": 2 * F * H, "gated_mlp": 2 * F * H * F + H * F * F + 2 * F * F}
    return 2 * products.get(model.fusion, 0)
