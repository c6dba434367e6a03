"""Inputs of tests: the shipped table of pictures, a small CLIP, and the options of its views."""

import json
from pathlib import Path

DEMO = Path(__file__).parents[2] / "shards/demo/fluent_emoji.parquet"


def make_teacher(out: Path, *, size: int = 32, seed: int = 0, width: int = 64, embed: int = 32) -> Path:
    """A CLIP with random weights in open_clip's local-dir layout: what its numbers mean does not matter here."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    vision = {"image_size": size, "layers": 2, "width": width, "patch_size": 8, "head_width": 32}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": embed, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"size": [size, size], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    preprocess.update({"interpolation": "bicubic", "resize_mode": "squash"})
    out.mkdir(parents=True)
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**model_cfg)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    return out


def teach_options(teacher: Path, *, views: int = 3) -> list[str]:
    """Options of `uniemox teach` for a run by the demo's recipe with pictures of 32 pixels."""
    views_of_run = ["--views", str(views), "--image-size", "32", "--scene-scale", "0.4,1"]
    return ["--teacher", f"local-dir:{teacher}", *views_of_run, "--workers", "0"]
