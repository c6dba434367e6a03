"""A small packed data set of real pictures and a small random CLIP, made once."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest


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


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "clip")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 20 held-out pictures of the shipped table, packed, with persons on some."""
    from shards.pack import PackSettings, pack

    folder = tmp_path_factory.mktemp("data")
    table = pq.read_table(Path(__file__).parents[2] / "shards/demo/fluent_emoji.parquet")
    train = table.filter([s == "train" for s in table["split"].to_pylist()])
    test = table.filter([s == "test" for s in table["split"].to_pylist()])
    import pyarrow as pa

    people = [i for i, label in enumerate(train["label"].to_pylist()) if label == "people-body"][:20]
    others = [i for i in range(0, train.num_rows, 20) if i not in people][:40]
    pq.write_table(
        pa.concat_tables([train.take(people + others), test.slice(0, 20)]), folder / "table.parquet"
    )
    settings = PackSettings(str(folder / "table.parquet"), "table", persons="nanodet", shard_samples=25)
    result = pack(settings, folder / "shards")
    assert dict(result.packed) == {"train": 60, "test": 20}
    assert result.with_person >= 3
    return folder / "shards"
