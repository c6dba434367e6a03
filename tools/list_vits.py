"""Writes the shapes of timm's vision transformers to uniemox_dist/config/vits.json, which is read without torch.

Run it when a new timm adds names:  python tools/list_vits.py
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from benchmark import Parser, run_main
from timm.layers import DiffAttention
from timm.models.vision_transformer import VisionTransformer

from uniemox_dist.core.files import write_text

OUT = Path(__file__).parent.parent / "uniemox_dist/config/vits.json"


def shapes(names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Returns the shapes of the installed timm's plain vision transformers by name: of all, or of the given `names`.

    A property that only few architectures have is included for those only.
    """
    found = {}
    if names is None:
        names = timm.list_models("*vit*", module="vision_transformer") + timm.list_models("deit*")
    for name in sorted(names):
        if name.startswith("test_"):
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                vit = timm.create_model(
                    name, num_classes=0, class_token=True, global_pool="token", weight_init="skip"
                )
            except TypeError:  # a family with other arguments
                continue
        blocks: Any = vit.blocks
        block = blocks[0]
        if type(vit) is not VisionTransformer or not hasattr(block, "attn"):
            continue
        found[name] = {
            "image_size": vit.patch_embed.img_size[0],
            "patch_size": vit.patch_embed.patch_size[0],
            "width": vit.embed_dim,
            "depth": len(vit.blocks),
            "heads": block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        }
        if vit.num_reg_tokens:
            found[name]["registers"] = vit.num_reg_tokens
        if block.mlp.fc2.in_features * 2 == block.mlp.fc1.out_features:
            found[name]["gated_mlp"] = True
        # Or a norm behind the MLP, which costs as much.
        if not isinstance(getattr(block, "ls2", None), torch.nn.Identity):
            found[name]["layer_scale"] = True
        if not hasattr(block, "ls2"):
            found[name]["post_norm"] = True
        if isinstance(block.attn, DiffAttention):
            found[name]["differential_attention"] = True
        if block.attn.qkv.bias is None:
            found[name]["no_qkv_bias"] = True
        if not isinstance(vit.norm_pre, torch.nn.Identity):
            found[name]["pre_norm"] = True
        if vit.patch_embed.proj.bias is None:
            found[name]["no_patch_bias"] = True
        if isinstance(vit.norm, torch.nn.Identity):
            found[name]["no_final_norm"] = True
        assert vit.pos_embed is not None  # its default
        rows = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
        if rows != 1:  # rows of the position table besides those of the patches
            found[name]["prefix_positions"] = rows
    return found


def main() -> None:
    """Writes the file."""
    Parser(__doc__).parse_args()
    lines = [f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes().items()]
    write_text(OUT, "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUT}: {len(lines)} names")


if __name__ == "__main__":
    run_main(main)
