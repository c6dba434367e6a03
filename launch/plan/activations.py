"""Activation memory of a micro-batch in bytes: tensors kept for the backward pass, and temporary ones.

The count follows the operations of the modules. Each linear layer keeps its input; a norm its input and two numbers
per row; GELU its input; attention its queries, keys, values and output, and one number per row and head (fused kernels
keep no matrix of scores).
Symbols: B samples, T tokens, D width, H outputs of an MLP's first layer, s bytes of a number.
"""

from dataclasses import dataclass

from launch.plan.model import Tower
from uniemox_dist.config.encoder_names import find_peculiarities
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config, ModelConfig
from uniemox_dist.models.parameters import encoder_hidden


@dataclass(frozen=True)
class Stack:
    """Equal blocks, one after the other."""

    blocks: int
    kept: int
    """Bytes that one block keeps."""
    checkpointed: int
    """Bytes that one block keeps with compute.checkpoint_blocks: only its input."""
    moment: int
    """Further bytes during one block's backward pass: the gradients of the tensors that it kept."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    encoder: Stack
    decoder: Stack
    first: int
    """Kept before the encoder's blocks: visible patches, and a norm in some architectures."""
    between: int
    """The encoder's last norm and the projection."""
    last: int
    """The decoder's last norm, the prediction, pixels in fp32, and the fusion."""
    end: int
    """Temporary, while the loss is computed and the backward pass begins."""
    teacher: int
    """Temporary in the teacher's pass, which ends before the student's pass allocates its activations."""

    def kept(self, *, checkpointed: bool) -> int:
        """Bytes kept at the end of the forward pass; `checkpointed` means with checkpointed blocks."""
        return self.first + self.between + self.last + self._blocks(checkpointed)

    def peak(self, *, checkpointed: bool) -> int:
        """The peak in the student's passes."""
        stack = self.decoder if self.decoder.blocks else self.encoder
        block = stack.moment + (stack.kept if checkpointed else 0)
        return self.kept(checkpointed=checkpointed) + max(
            self.end, block - self.last if checkpointed else self.end
        )

    def _blocks(self, checkpointed: bool) -> int:
        stacks = (self.encoder, self.decoder)
        return sum(stack.blocks * (stack.checkpointed if checkpointed else stack.kept) for stack in stacks)


def count_activations(
    config: Config, tower: Tower, micro_batch: int, precision: str, *, gpu: bool
) -> Activations:
    """Counts the activations of a run's micro-batch."""
    s = 2 if precision == "bf16" else 4
    if isinstance(config, FinetuneRun):
        return _count_classifier_activations(config, micro_batch, s)
    model, loss = config.model, config.loss
    kind = find_peculiarities(model.name)
    B, D, F = micro_batch, model.width, model.decoder_width
    views = B * count_views(config)
    T, values = 1 + kind.get("registers", 0) + model.visible, model.patch_values
    encoder = _count_encoder_stack(model, views * T, s)
    first = views * model.visible * values * s + (views * T * (D * s + 8) if kind.get("pre_norm") else 0)
    # The last norm keeps its input. The projection's input is the norm's output without registers, a separate tensor.
    between = views * T * D * s * (1 if kind.get("no_final_norm") else 2) + views * T * 8
    decoder, last, end = Stack(0, 0, 0, 0), 0, 0
    if loss.needs_decoder:
        shown = 2 * B if loss.person_reconstruction else B
        masked = model.patches - model.visible
        tokens = shown * (1 + model.patches)
        decoder = _count_stack(
            model.decoder_depth, tokens, F, int(F * model.mlp_ratio), model.decoder_heads, s
        )
        pixels = shown * masked * values
        last = tokens * F * s + shown * masked * (F * s + 8) + pixels * 8
        # All patches, and the prediction in the number format of the passes (in fp32 the kept tensor is the same).
        end = views * model.patches * values * s + (pixels * s if s == 2 else 0)
    if loss.needs_teacher and tower.embedding_width is not None:
        last += B * (4 * F * s + 6 * tower.embedding_width * 4)
        if loss.needs_texts:
            texts = config.batch.global_batch if loss.relation_over == "global" else B
            # The texts are gathered in fp16, and used in fp32.
            last += 2 * 4 * B * texts + (2 + 4) * texts * tower.embedding_width
    return Activations(encoder, decoder, first, between, last, end, _count_teacher(config, tower, B, gpu=gpu))


def _count_classifier_activations(config: FinetuneRun, B: int, s: int) -> Activations:
    """Counts a classifier's activations. The encoder reads all patches, mixing happens in the loader, and drop path
    keeps one number per sample and block."""
    model, kind = config.model, find_peculiarities(config.model.name)
    views, D = B * count_views(config), model.width
    T = 1 + kind.get("registers", 0) + model.patches
    pixels = views * 3 * model.image_size**2 * s
    first = pixels + (views * T * (D * s + 8) if kind.get("pre_norm") else 0)
    # The last norm and the linear layer keep their inputs: the pooled features, or all tokens, of which one is used.
    rows = views if config.finetune.pooling == "mean" else views * T
    between = rows * D * s * (1 if kind.get("no_final_norm") else 2) + rows * 8
    # Pixels in fp32 before the conversion to the passes' number format.
    end = views * 3 * model.image_size**2 * 4
    return Activations(
        _count_encoder_stack(model, views * T, s), Stack(0, 0, 0, 0), first, between, 0, end, 0
    )


def count_views(config: Config) -> int:
    """Number of views of a sample that the encoder reads."""
    if isinstance(config, FinetuneRun):
        return 2 if config.finetune.persons else 1
    fuses = config.loss.needs_teacher and config.model.fusion != "none"
    return 2 if fuses or config.loss.person_reconstruction else 1


def _count_encoder_stack(model: ModelConfig, tokens: int, s: int) -> Stack:
    kind = find_peculiarities(model.name)
    return _count_stack(
        model.depth,
        tokens,
        model.width,
        encoder_hidden(model),
        model.heads,
        s,
        scaled=kind.get("layer_scale", False) and not kind.get("post_norm", False),
        differential=kind.get("differential_attention", False),
    )


def _count_stack(
    blocks: int,
    tokens: int,
    width: int,
    hidden: int,
    heads: int,
    s: int,
    *,
    scaled: bool = False,
    differential: bool = False,
) -> Stack:
    """Counts pre-norm blocks for a total of `tokens` tokens. A block keeps 8 widths per token (inputs and outputs of
    both norms, queries, keys, values, the attention's output), twice the hidden width, and the inputs of LayerScale. A
    gated MLP keeps as much: its first layer, the gate's activation and the product are also two hidden widths."""
    widths = 8 + (2 if scaled else 0) + (4 if differential else 0)
    rows = 4 * (2 * 2 + heads * (2 if differential else 1))
    kept = tokens * (s * (widths * width + 2 * hidden) + rows)
    return Stack(blocks, kept, tokens * width * s, tokens * s * (2 * hidden + 2 * width))


def teacher_bytes(config: Config, *, gpu: bool) -> int:
    """Bytes per number in the teacher's picture tower."""
    auto = "bf16" if gpu else "fp32"
    return 2 if (auto if config.teacher.precision == "auto" else config.teacher.precision) == "bf16" else 4


def _count_teacher(config: Config, tower: Tower, B: int, *, gpu: bool) -> int:
    """The temporary bytes of the teacher's tower, which keeps nothing without autograd: pixels in fp32 and in its own
    format, and the widest part of a block."""
    if not tower.parameters:
        return 0
    s = teacher_bytes(config, gpu=gpu)
    pixels = 3 * max(tower.image_size, config.model.image_size) ** 2
    return B * (pixels * (8 + s) + tower.tokens * s * (2 * tower.width + 2 * tower.hidden))


def count_view_bytes(config: Config, micro_batch: int) -> int:
    """Bytes on the device for the pixels (uint8) and, in pretraining, the orders of patches (int64) of two
    micro-batches: the next one is copied while one is computed."""
    order = 0 if isinstance(config, FinetuneRun) else 8 * config.model.patches
    return 2 * micro_batch * count_views(config) * (3 * config.model.image_size**2 + order)
