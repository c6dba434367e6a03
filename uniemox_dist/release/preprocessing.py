"""How a picture becomes the input of a released encoder, as uniemox.json and timm's config.json state it."""

from typing import Any

from uniemox_dist.config.schema import ModelConfig


def preprocessing_facts(model: ModelConfig) -> dict[str, Any]:
    """The entry `preprocessing` of uniemox.json."""
    return {
        "size": model.image_size,
        "resize": "the whole picture to a square, bicubic, antialiased",
        "background": "white behind transparent pixels",
        "mean": list(model.mean),
        "std": list(model.std),
    }


def timm_preprocessing(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The entries of timm's `pretrained_cfg` that we set. timm rejects keys that it does not know."""
    return {
        "input_size": [3, model.image_size, model.image_size],
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": "bicubic",
        # The whole picture, resized to a square, as in our own evaluation.
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "num_classes": num_classes,
        # Not those of timm's own weights, whose configuration this one starts from.
        "tag": "",
        "license": None,
    }
