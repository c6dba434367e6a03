"""Names, shapes and order of the parameters of students and classifiers, computed from the settings without torch.

A test compares the lists with real modules, exactly. Symbols: N patches, D encoder, F decoder and E embedding width.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from uniemox_dist.config.encoder_names import find_peculiarities
from uniemox_dist.config.schema import LossConfig, ModelConfig

ENCODER = "encoder."
NO_DECAY = (
    "cls_token",
    "reg_token",
    "mask_token",
    "pos_embed",
    "scene_weights",
    "person_weights",
)
"""Parameters without weight decay despite two or more dimensions: tokens, positions, view weights of a fusion."""
FIRST = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")
"""Parts of an encoder before its first block; they form layer 0."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a module."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def numbers(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def layer_number(name: str, depth: int) -> int:
    """Returns the layer of a student's parameter, 0 to depth + 1 (as in BEiT, Bao et al. 2022).

    Everything before the encoder's blocks is layer 0, block i is layer i + 1, and the encoder's last norm and all other
    modules are layer depth + 1.
    """
    if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(block.group(1)) + 1
    part = name.removeprefix(ENCODER).partition(".")[0]
    return 0 if name.startswith(ENCODER) and part in FIRST else depth + 1


def optimizer_group(name: str, dimensions: int, depth: int, layer_decay: float) -> tuple[float, bool]:
    """Returns a trained parameter's optimizer group: its learning rate factor, and whether it has weight decay.

    The factor is layer_decay^(depth + 1 - layer). Only matrices have weight decay.
    """
    matrix = dimensions >= 2 and name.rpartition(".")[2] not in NO_DECAY
    return layer_decay ** (depth + 1 - layer_number(name, depth)), matrix


def student_parameters(
    model: ModelConfig, loss: LossConfig, embedding_width: int | None
) -> tuple[Parameter, ...]:
    """Lists all parameters of a student in the order of its modules. `embedding_width` is E; None without a teacher."""
    found = [Parameter(ENCODER + p.name, p.shape, p.trained) for p in encoder_parameters(model)]
    found += _linear("to_decoder", model.width, model.decoder_width)
    if loss.needs_teacher:
        assert embedding_width is not None
        found += _fusion(model, embedding_width)
    if loss.needs_decoder:
        found += _decoder(model)
    return tuple(found)


def classifier_parameters(
    model: ModelConfig, outputs: int, *, persons: bool = False, pooling: str = "mean"
) -> tuple[Parameter, ...]:
    """Lists all parameters of a classifier in the order of its modules."""
    found = [Parameter(ENCODER + p.name, p.shape, p.trained) for p in encoder_parameters(model)]
    if pooling == "mean":  # timm moves the last norm after the pooling
        found = [replace(p, name=re.sub(r"^encoder\.norm\.", "encoder.fc_norm.", p.name)) for p in found]
    return (*found, *_linear("head", model.width * (2 if persons else 1), outputs))


def encoder_parameters(model: ModelConfig) -> Iterator[Parameter]:
    """Yields the parameters of the encoder, without the prefix `encoder.`."""
    kind, D, p = find_peculiarities(model.name), model.width, model.patch_size
    yield Parameter("cls_token", (1, 1, D))
    if registers := kind.get("registers", 0):
        yield Parameter("reg_token", (1, registers, D))
    rows = kind.get("prefix_positions", 1) + model.patches
    yield Parameter("pos_embed", (1, rows, D), model.positions == "learned")
    yield Parameter("patch_embed.proj.weight", (D, 3, p, p))
    if not kind.get("no_patch_bias"):
        yield Parameter("patch_embed.proj.bias", (D,))
    if kind.get("pre_norm"):
        yield from _norm("norm_pre", D)
    for number in range(model.depth):
        yield from _encoder_block(f"blocks.{number}", model)
    if not kind.get("no_final_norm"):
        yield from _norm("norm", D)


def _encoder_block(name: str, model: ModelConfig) -> Iterator[Parameter]:
    kind, D = find_peculiarities(model.name), model.width
    hidden = encoder_hidden(model)
    norms = [list(_norm(f"{name}.norm{i}", D)) for i in (1, 2)]
    scales: list[list[Parameter]] = [[], []]
    after = kind.get("post_norm", False)
    if kind.get("layer_scale") and not after:
        scales = [[Parameter(f"{name}.ls{i}.gamma", (D,))] for i in (1, 2)]
    attention = []
    head = D // model.heads
    if kind.get("differential_attention"):
        attention += [
            Parameter(f"{name}.attn.lambda_{which}", (head // 2,)) for which in ("q1", "k1", "q2", "k2")
        ]
    attention += _linear(f"{name}.attn.qkv", D, 3 * D, bias=not kind.get("no_qkv_bias"))
    attention += _linear(f"{name}.attn.proj", D, D)
    if kind.get("differential_attention"):
        attention.append(Parameter(f"{name}.attn.sub_norm.weight", (head,)))
    mlp = _mlp(f"{name}.mlp", D, hidden, hidden // 2 if kind.get("gated_mlp") else hidden)
    for norm, part, scale in zip(norms, (attention, mlp), scales):
        yield from (*part, *norm) if after else (*norm, *part, *scale)


def encoder_hidden(model: ModelConfig) -> int:
    """Returns the outputs of the first layer of an encoder block's MLP."""
    wide = model.width * model.mlp_ratio
    return round(wide) if model.name is not None else int(wide)


def _fusion(model: ModelConfig, embedding_width: int) -> list[Parameter]:
    F, H = model.decoder_width, model.fusion_heads
    own: list[Parameter] = []
    more: list[Parameter] = []
    if model.fusion in ("prior", "none"):
        own = [Parameter("weight", (F,))]
    elif model.fusion == "multi_head":
        own = [Parameter(f"{view}_weights", (H, F)) for view in ("scene", "person")]
    elif model.fusion == "attention":
        more = [p for view in ("scene", "person") for p in _linear(f"{view}_score", F, H)]
    else:
        more = [p for view in ("scene", "person") for p in _linear(f"{view}_attention", F, H * F)]
        more += [*_linear("mlp.0", H * F, F), *_linear("mlp.2", F, F), *_linear("gate", F, F)]
    found = [*own, *_norm("norm", F), *_linear("projection", F, embedding_width), *more]
    return [Parameter(f"fusion.{p.name}", p.shape) for p in found]


def _decoder(model: ModelConfig) -> list[Parameter]:
    F = model.decoder_width
    hidden = int(F * model.mlp_ratio)
    found = [Parameter("mask_token", (1, 1, F)), Parameter("pos_embed", (1, 1 + model.patches, F), False)]
    for number in range(model.decoder_depth):
        name = f"blocks.{number}"
        found += [*_norm(f"{name}.norm1", F), *_linear(f"{name}.attn.qkv", F, 3 * F)]
        found += [*_linear(f"{name}.attn.proj", F, F), *_norm(f"{name}.norm2", F)]
        found += _mlp(f"{name}.mlp", F, hidden, hidden)
    found += [*_norm("norm", F), *_linear("prediction", F, model.patch_values)]
    return [Parameter(f"decoder.{p.name}", p.shape, p.trained) for p in found]


def _norm(name: str, width: int) -> Iterator[Parameter]:
    yield from (Parameter(f"{name}.weight", (width,)), Parameter(f"{name}.bias", (width,)))


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (outputs, inputs))
    return [weight, Parameter(f"{name}.bias", (outputs,))] if bias else [weight]


def _mlp(name: str, width: int, hidden: int, inner: int) -> list[Parameter]:
    return [*_linear(f"{name}.fc1", width, hidden), *_linear(f"{name}.fc2", inner, width)]
