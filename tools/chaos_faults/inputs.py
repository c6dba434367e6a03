"""The inputs of the disturbed runs: 600 pictures of the shipped table in 50 small shards, and a tiny teacher."""

import json
from pathlib import Path

SAMPLES, SHARD_SAMPLES = 600, 12
TABLE = Path(__file__).parents[2] / "shards/demo/fluent_emoji.parquet"


def make_shards(folder: Path) -> Path:
    """Packs the first pictures of the shipped table without a person detector; returns the folder of train/."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shards.pack.pipeline import PackSettings, pack

    folder.mkdir(parents=True)
    table = pq.read_table(TABLE)
    rows = table.filter(pa.compute.equal(table["split"], "train")).slice(0, SAMPLES)
    pq.write_table(rows, folder / "table.parquet")
    settings = PackSettings(
        str(folder / "table.parquet"), "table", persons="none", shard_samples=SHARD_SAMPLES
    )
    pack(settings, folder / "shards")
    return folder / "shards" / "train"


def make_teacher(folder: Path) -> Path:
    """Writes a CLIP for 32-pixel pictures with random weights, in open_clip's local-dir layout."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    preprocess.update({"interpolation": "bicubic", "resize_mode": "squash"})
    folder.mkdir(parents=True)
    described = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(described, encoding="utf-8")
    torch.manual_seed(0)
    weights = {name: tensor.half().contiguous() for name, tensor in CLIP(**model).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
