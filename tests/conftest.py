"""Data that many tests share, made once per session: real pictures, packed, and a small CLIP.

No test writes into these folders.
"""

import fcntl
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import DEMO, make_teacher, teach_options
from PIL import Image

from shards.pack.pipeline import PackSettings, pack


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A run in the tests' own process blocks signals for its helpers, which what later tests start would inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared:
    """`shared(name, make)`: a folder that `make` fills once for all test processes of this session.

    The first process that asks makes it; the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, done = base / f"shared-{name}", base / f"shared-{name}.done"
        with open(base / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def emoji_table(shared: Shared) -> Path:
    """The first 72 training and 24 test pictures of the shipped table: WebP with alpha, 160 px."""

    def make(folder: Path) -> None:
        table = pq.read_table(DEMO)
        rows = {"train": 72, "test": 24}
        parts = [table.filter(pa.compute.equal(table["split"], split))[:n] for split, n in rows.items()]
        pq.write_table(pa.concat_tables(parts), folder / "emoji.parquet", row_group_size=40)

    return shared("tables", make) / "emoji.parquet"


@pytest.fixture(scope="session")
def emoji_shards(emoji_table: Path, shared: Shared) -> Path:
    """`emoji_table` packed: train/ (72 samples in 5 shards) and test/ (24 in 2), no persons."""
    settings = PackSettings(str(emoji_table), "table", persons="none", shard_samples=16)
    return shared("emoji", lambda folder: pack(settings, folder / "shards")) / "shards"


@pytest.fixture(scope="session")
def photo_folder(shared: Shared) -> Path:
    """20 JPEG photographs of four sizes in label folders (people/, things/), every other one captioned."""
    return shared("photos", _write_photos)


def _write_photos(root: Path) -> None:
    from skimage import data

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


@pytest.fixture(scope="session")
def photo_shards(photo_folder: Path, shared: Shared) -> Path:
    """`photo_folder` packed: one data set of 20 samples in 3 shards, no persons."""
    settings = PackSettings(str(photo_folder), "folder", persons="none", shard_samples=8)
    return shared("photo-shards", lambda folder: pack(settings, folder / "shards")) / "shards"


@pytest.fixture(scope="session")
def tiny_teacher(shared: Shared) -> Path:
    """A CLIP with random weights, for pictures of 32 pixels."""
    return shared("teacher", lambda folder: make_teacher(folder / "clip")) / "clip"


@pytest.fixture(scope="session")
def tiny_data(shared: Shared) -> Path:
    """60 training and 20 held-out pictures of the shipped table, packed, with persons on some."""
    return shared("data", _pack_tiny_data) / "shards"


def _pack_tiny_data(folder: Path) -> None:
    table = pq.read_table(DEMO)
    train = table.filter([s == "train" for s in table["split"].to_pylist()])
    test = table.filter([s == "test" for s in table["split"].to_pylist()])
    people = [i for i, label in enumerate(train["label"].to_pylist()) if label == "people-body"][:20]
    others = [i for i in range(0, train.num_rows, 20) if i not in people][:40]
    pq.write_table(
        pa.concat_tables([train.take(people + others), test.slice(0, 20)]), folder / "table.parquet"
    )
    settings = PackSettings(str(folder / "table.parquet"), "table", persons="nanodet", shard_samples=25)
    result = pack(settings, folder / "shards")
    assert dict(result.packed) == {"train": 60, "test": 20}
    assert result.with_person >= 3


@pytest.fixture(scope="session")
def taught_data(tiny_data: Path, tiny_teacher: Path, shared: Shared) -> Path:
    """A copy of `tiny_data`'s train/, with `tiny_teacher`'s captions and 3 views of 32 pixels a picture."""
    from uniemox_dist.cli.main import run

    def make(folder: Path) -> None:
        shutil.copytree(tiny_data / "train", folder / "train")
        assert run(["teach", str(folder / "train"), *teach_options(tiny_teacher)]) == 0

    return shared("taught", make) / "train"
