"""The preprocessing of pictures for a released encoder, in the forms of uniemox.json and timm's config.json."""

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
    """The entries of timm's `pretrained_cfg` that a release sets. timm rejects unknown keys."""
    return {
        "input_size": [3, model.image_size, model.image_size],
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": "bicubic",
        # The whole picture is resized to a square, as in this project's evaluation.
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "num_classes": num_classes,
        # Clears the values of timm's own weights, with which this configuration starts.
        "tag": "",
        "license": None,
    }
