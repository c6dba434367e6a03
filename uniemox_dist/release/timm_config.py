"""What timm is told of pictures and heads, in the config.json of all that we release."""

from typing import Any

from uniemox_dist.config.schema import ModelConfig


def statistics(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The entries of timm's `pretrained_cfg` that are ours; it tolerates no key that it does not know."""
    return {
        "input_size": [3, model.image_size, model.image_size],
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": "bicubic",
        # The whole picture, squashed to a square: how our own evaluation looks at pictures.
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "num_classes": num_classes,
        # Not those of timm's own weights, whose configuration this one starts from.
        "tag": "",
        "license": None,
    }
