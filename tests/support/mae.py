"""A second implementation of MAE (He et al. 2022) in plain torch, on a state dict of its official checkpoints.

Shape legend: B pictures, N patches, V kept patches, T tokens, D encoder width, F decoder width, p patch size.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; `side` is that of its grid of patches."""

    patch: int = 8
    side: int = 4
    width: int = 32
    depth: int = 2
    heads: int = 4
    decoder_width: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 2


def save(path: Path, shape: Shape, *, decoder: bool = True) -> State:
    """Random weights, saved as MAE's authors save theirs; returns the state dict."""
    random = torch.Generator().manual_seed(2)
    N, D, W = shape.side**2, shape.width, shape.decoder_width
    pixels = 3 * shape.patch**2

    def some(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=random)

    def linear(name: str, rows: int, columns: int) -> State:
        return {
            f"{name}.weight": some(rows, columns, scale=columns**-0.5),
            f"{name}.bias": some(rows, scale=0.2),
        }

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + some(width, scale=0.2), f"{name}.bias": some(width, scale=0.2)}

    def blocks(name: str, depth: int, width: int) -> State:
        made: State = {}
        for i in range(depth):
            block = f"{name}.{i}"
            made |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            made |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
            made |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(
                f"{block}.mlp.fc2", width, 4 * width
            )
        return made

    state = {"cls_token": some(1, 1, D), "pos_embed": some(1, 1 + N, D)}
    projection = some(D, 3, shape.patch, shape.patch, scale=pixels**-0.5)
    state |= {"patch_embed.proj.weight": projection, "patch_embed.proj.bias": some(D, scale=0.2)}
    state |= blocks("blocks", shape.depth, D) | norm("norm", D)
    if decoder:
        state |= {"mask_token": some(1, 1, W), "decoder_pos_embed": some(1, 1 + N, W)}
        state |= linear("decoder_embed", W, D) | blocks("decoder_blocks", shape.decoder_depth, W)
        state |= norm("decoder_norm", W) | linear("decoder_pred", pixels, W)
    command_line = argparse.Namespace(lr=1.5e-4, blr=None, data_path="imagenet", betas=(0.9, 0.95))
    torch.save({"model": state, "epoch": 799, "args": command_line}, path)
    return state


def encode(state: State, shape: Shape, images_B3HW: Tensor, keep_BV: Tensor) -> Tensor:
    """Normalised pictures and the numbers of kept patches to tokens B×(1+V)×D, class token first."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images_B3HW, weight, bias, stride=shape.patch).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"][:, 1:]
    x = torch.stack([sample[kept] for sample, kept in zip(x, keep_BV)])
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = _blocks(state, "blocks", shape.depth, shape.heads, torch.cat([cls, x], dim=1))
    return _norm(state, "norm", x)


def decode(state: State, shape: Shape, tokens_BTD: Tensor, keep_BV: Tensor) -> Tensor:
    """Tokens to the pixels of all patches B×N×(p·p·3), each in the order row, column, channel."""
    x = _linear(state, "decoder_embed", tokens_BTD)
    whole = state["mask_token"].expand(len(x), shape.side**2, -1).clone()
    for sample, kept, tokens in zip(whole, keep_BV, x):
        sample[kept] = tokens[1:]
    x = torch.cat([x[:, :1], whole], dim=1) + state["decoder_pos_embed"]
    x = _blocks(state, "decoder_blocks", shape.decoder_depth, shape.decoder_heads, x)
    return _linear(state, "decoder_pred", _norm(state, "decoder_norm", x))[:, 1:]


def unpatchify(patches_BNP: Tensor, shape: Shape) -> Tensor:
    """Its patches as pictures B×3×H×W."""
    B, h, p = len(patches_BNP), shape.side, shape.patch
    grid = patches_BNP.reshape(B, h, h, p, p, 3)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(B, 3, h * p, h * p)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def _blocks(state: State, name: str, depth: int, heads: int, x: Tensor) -> Tensor:
    for i in range(depth):
        block = f"{name}.{i}"
        B, T, D = x.shape
        qkv = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x))
        q, k, v = qkv.reshape(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(D // heads)).softmax(-1)
        x = x + _linear(state, f"{block}.attn.proj", (attention @ v).transpose(1, 2).reshape(B, T, D))
        hidden = _linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + _linear(state, f"{block}.mlp.fc2", hidden)
    return x
