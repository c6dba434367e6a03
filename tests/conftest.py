"""Data that many tests share: real pictures, packed once per session. No test writes into these folders."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.pack import PackSettings, pack

DEMO = Path(__file__).parents[1] / "shards/demo/fluent_emoji.parquet"


@pytest.fixture(scope="session")
def emoji_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 72 training and 24 test pictures of the shipped table: WebP with alpha, 160 px."""
    table = pq.read_table(DEMO)
    rows = {"train": 72, "test": 24}
    parts = [table.filter(pa.compute.equal(table["split"], split))[:count] for split, count in rows.items()]
    path = tmp_path_factory.mktemp("tables") / "emoji.parquet"
    pq.write_table(pa.concat_tables(parts), path, row_group_size=40)
    return path


@pytest.fixture(scope="session")
def emoji_shards(emoji_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`emoji_table` packed: train/ (72 samples in 5 shards) and test/ (24 in 2), no persons."""
    out = tmp_path_factory.mktemp("emoji") / "shards"
    pack(PackSettings(str(emoji_table), "table", persons="none", shard_samples=16), out)
    return out


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 JPEG photographs of four sizes in label folders (people/, things/), every other one captioned."""
    from skimage import data

    root = tmp_path_factory.mktemp("photos")
    for label, names in {
        "people": ("astronaut", "camera"),
        "things": ("chelsea", "coffee", "rocket"),
    }.items():
        (root / label).mkdir()
        for name in names:
            photo = Image.fromarray(getattr(data, name)())
            for i, size in enumerate(((240, 180), (180, 240), (200, 200), (320, 120))):
                photo.resize(size).save(root / label / f"{name}-{i}.jpg", quality=90)
                if i % 2 == 0:
                    (root / label / f"{name}-{i}.txt").write_text(
                        f"{name}, squeezed to {size[0]} x {size[1]}\n"
                    )
    return root


@pytest.fixture(scope="session")
def photo_shards(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photo_folder` packed: one data set of 20 samples in 3 shards, no persons."""
    out = tmp_path_factory.mktemp("photo_shards") / "shards"
    pack(PackSettings(str(photo_folder), "folder", persons="none", shard_samples=8), out)
    return out
