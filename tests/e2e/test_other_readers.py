"""Shards that this project packed, as other programs read them: webdataset, open_clip with two webdatasets, and
Hugging Face `datasets`.

open_clip's training reader needs webdataset 0.2.86 (with 1.0 it ends in a KeyError). That version is installed into a
folder of the tests' own, from which a process of its own imports first.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from shards.format.manifest import read_manifest
from shards.format.sample import parse_record
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.data.reader import RawSample, ShardReader

OLD = "webdataset==0.2.86"
IMAGE_SIZE = 32


@pytest.fixture(scope="session")
def data_sets(
    emoji_shards: Path, photo_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """72 WebP pictures with alpha and a caption each in 5 shards; 20 JPEGs in 3, half of them without a caption; and 40
    pictures of five formats in 5 shards, of which most lack a caption, label, person or attribute."""
    mixed = _pack_mixed(tmp_path_factory.mktemp("mixed"))
    return {"emoji": emoji_shards / "train", "photos": photo_shards, "mixed": mixed}


def _pack_mixed(folder: Path) -> Path:
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    rows: list[dict[str, Any]] = []
    for number in range(40):
        buffer = io.BytesIO()
        kind = ("JPEG", "PNG", "WEBP", "GIF", "BMP")[number % 5]
        photo.crop((number, 0, number + 48, 40)).save(buffer, kind)
        row: dict[str, Any] = {"key": f"k{number:02d}", "image": buffer.getvalue()}
        row["captions"] = [f"caption {number}", "second"] if number % 3 == 0 else []
        row["label"] = "joy" if number % 4 == 0 else None
        row["persons"] = json.dumps([{"box": [0, 0, 0.5, 1], "score": 0.5}]) if number % 6 == 0 else "[]"
        row["mood"] = number if number % 7 == 0 else None
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    result = pack(
        PackSettings(str(folder / "t.parquet"), "table", persons="source", shard_samples=8), folder / "out"
    )
    assert (result.packed, result.with_person) == ({"": 40}, 7)
    return folder / "out"


@pytest.fixture(params=["emoji", "photos", "mixed"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def packed(name: str, data_sets: dict[str, Path]) -> Path:
    return data_sets[name]


def stored(folder: Path) -> list[tuple[RawSample, dict[str, Any]]]:
    """Every sample and its JSON in the order of the index, by the project's own reader."""
    reader = ShardReader.from_folder(folder, "path")
    return [
        (reader.read(shard, row), reader.record(shard, row))
        for shard, entry in enumerate(reader.manifest.shards)
        for row in range(entry.samples)
    ]


def urls(folder: Path) -> list[str]:
    return [str(folder / shard.name) for shard in read_manifest(folder).shards]


def caption(raw: RawSample) -> str:
    return raw.captions[0] if raw.captions else ""


# ---- webdataset


def test_webdataset_yields_every_sample_once_in_index_order_with_its_bytes(packed: Path) -> None:
    dataset = wds.WebDataset(urls(packed), shardshuffle=False).decode()
    found = list(dataset.to_tuple("jpg", "json", "txt", "__key__"))
    expected = stored(packed)
    assert len(found) == len(expected) == read_manifest(packed).samples
    for (image, record, text, key), (raw, own) in zip(found, expected):
        assert (image, parse_record(record), text, key) == (raw.image, own, caption(raw), raw.key)
        assert hashlib.sha256(image).hexdigest() == record["image_sha256"]


def test_webdataset_decodes_every_picture(packed: Path) -> None:
    dataset = wds.WebDataset(urls(packed), shardshuffle=False).decode("pil")
    found = list(dataset.to_tuple("jpg", "json"))
    assert len(found) == read_manifest(packed).samples
    for (picture, record), (raw, _) in zip(found, stored(packed)):
        assert picture.size == (record["width"], record["height"])
        assert picture.tobytes() == Image.open(io.BytesIO(raw.image)).convert("RGB").tobytes()


def test_nodes_and_loader_processes_of_webdataset_share_the_shards(
    emoji_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = emoji_shards / "train"
    names = [shard.name for shard in read_manifest(folder).shards]
    expected = {raw.key: (raw.image, own, caption(raw)) for raw, own in stored(folder)}
    keys: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for node in range(2):
        monkeypatch.setenv("RANK", str(node))
        dataset = wds.WebDataset(
            urls(folder),
            shardshuffle=False,
            nodesplitter=wds.split_by_node,
            workersplitter=wds.split_by_worker,
        )
        samples = dataset.decode().to_tuple("jpg", "json", "txt", "__key__", "__url__")
        for image, record, text, key, url in DataLoader(samples, batch_size=None, num_workers=2):
            assert (image, parse_record(record), text) == expected[key]
            assert names.index(Path(url).name) % 2 == node
            keys.append(key)
    assert sorted(keys) == sorted(expected)


# ---- open_clip

READ = f"""
import hashlib, json, sys
import open_clip, webdataset
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args

digest = lambda tensor: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
results = []
for job in json.loads(sys.argv[1]):
    args = parse_args(job["args"])
    args.rank, args.world_size, args.distributed = 0, 1, False  # as open_clip_train.main sets them
    transform = image_transform({IMAGE_SIZE}, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(args, transform, is_train=args.train_data is not None, tokenizer=tokenizer)
    epochs = []
    for epoch in range(job["epochs"]):
        data.set_epoch(epoch)
        batches = [(images, texts) for images, texts in data.dataloader]
        epochs.append({{
            "shapes": [[list(images.shape), list(texts.shape)] for images, texts in batches],
            "pairs": [[digest(i), digest(t)] for images, texts in batches for i, t in zip(images, texts)],
        }})
    stated = [data.dataloader.num_samples, data.dataloader.num_batches]
    results.append({{"stated": stated, "epochs": epochs}})
print(json.dumps([webdataset.__version__, results]))
"""

Pair = tuple[str, str]
Results = dict[str, list[dict[str, Any]]]
"""What open_clip made of each job, by data set."""


def read_by_open_clip(first_on_path: Path, jobs: dict[str, list[dict[str, Any]]]) -> tuple[str, Results]:
    """Runs open_clip's reader for the jobs (command line, epochs) of each data set; also webdataset's version."""
    # open_clip_train imports pandas for its CSV reader, and does not require it.
    (first_on_path / "pandas.py").touch()
    result = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([job for some in jobs.values() for job in some])],
        env={**os.environ, "PYTHONPATH": str(first_on_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    version, found = json.loads(result.stdout.splitlines()[-1])
    results = iter(found)
    return version, {name: [next(results) for _ in some] for name, some in jobs.items()}


def pairs(result: dict[str, Any], epoch: int = 0) -> list[Pair]:
    return [(image, text) for image, text in result["epochs"][epoch]["pairs"]]


def expected_pairs(folder: Path) -> list[Pair]:
    """open_clip's expected result for each sample, in index order: hashes of its tensors of picture and caption."""
    import open_clip
    from open_clip.transform import image_transform

    transform, tokenizer = image_transform(IMAGE_SIZE, is_train=False), open_clip.get_tokenizer("ViT-B-32")
    return [
        (
            hashlib.sha256(transform(Image.open(io.BytesIO(raw.image)).convert("RGB")).numpy()).hexdigest(),
            hashlib.sha256(tokenizer(caption(raw))[0].numpy()).hexdigest(),
        )
        for raw, _ in stored(folder)
    ]


def pattern(folder: Path) -> str:
    """The shards as open_clip's users write them."""
    names = [Path(url).stem for url in urls(folder)]
    return f"{folder}/{{{names[0]}..{names[-1]}}}.tar"


def training(folder: Path, batch_size: int, *more: str, epochs: int = 1) -> dict[str, Any]:
    args = ["--train-data", pattern(folder), "--batch-size", str(batch_size), "--workers", "1", *more]
    return {"args": args, "epochs": epochs}


def evaluation(folder: Path, batch_size: int) -> dict[str, Any]:
    args = ["--val-data", pattern(folder), "--batch-size", str(batch_size), "--workers", "1"]
    return {"args": args, "epochs": 1}


@pytest.fixture(scope="session")
def by_old(data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """open_clip with webdataset 0.2.86: training with batches that divide the data set, with ones that do not, with
    shards drawn with replacement; evaluation."""
    folder = tmp_path_factory.mktemp("old_webdataset")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), OLD]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        pytest.fail(f"{OLD} could not be installed; is a package index reachable? {result.stderr[-1000:]}")
    jobs = {
        name: [
            training(packed, 4, epochs=2),
            training(packed, 7),
            training(packed, 4, "--dataset-resampled"),
            evaluation(packed, 7),
        ]
        for name, packed in data_sets.items()
    }
    version, results = read_by_open_clip(folder, jobs)
    assert version == "0.2.86"
    return results


@pytest.fixture(scope="session")
def by_new(data_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """open_clip's evaluation with the webdataset of this environment."""
    jobs = {name: [evaluation(packed, 7)] for name, packed in data_sets.items()}
    version, results = read_by_open_clip(tmp_path_factory.mktemp("new_webdataset"), jobs)
    assert version == wds.__version__ >= "1.0"
    return results


def stated_samples(packed: Path) -> int:
    return sum(json.loads((packed / "sizes.json").read_text()).values())


def test_an_epoch_of_open_clips_training_sees_every_picture_with_its_caption(
    name: str, packed: Path, by_old: Results
) -> None:
    samples, expected, result = stated_samples(packed), expected_pairs(packed), by_old[name][0]
    assert samples == len(expected)
    assert result["stated"] == [samples, samples // 4]
    for epoch in result["epochs"]:
        assert epoch["shapes"] == [[[4, 3, IMAGE_SIZE, IMAGE_SIZE], [4, 77]]] * (samples // 4)
    # 4 divides both data sets, so that an epoch is one pass: everything once, in an order of the epoch's own.
    first, second = pairs(result, 0), pairs(result, 1)
    assert Counter(first) == Counter(second) == Counter(expected)
    assert first != second
    assert expected not in (first, second)


def test_open_clips_training_drops_the_rest_of_a_pass_and_fills_up_from_the_next_one(
    name: str, packed: Path, by_old: Results
) -> None:
    samples, result = stated_samples(packed), by_old[name][1]
    batches, rest = -(-samples // 7), samples % 7
    assert rest > 0
    assert result["stated"] == [batches * 7, batches]
    # Its batches are full: of the first pass all but `rest` samples, then one batch of a second pass.
    found, expected = pairs(result), Counter(expected_pairs(packed))
    assert len(found) == batches * 7
    assert Counter(found[: samples - rest]) <= expected
    assert Counter(found[samples - rest :]) <= expected


def test_open_clips_training_with_resampled_shards_yields_samples_of_the_data_set(
    name: str, packed: Path, by_old: Results
) -> None:
    # Shards are drawn with replacement: their number is fixed, but a sample may not occur.
    found = pairs(by_old[name][2])
    assert len(found) == stated_samples(packed)
    assert set(found) <= set(expected_pairs(packed))


def test_open_clips_evaluation_reads_everything_in_index_order_with_either_webdataset(
    name: str, packed: Path, by_old: Results, by_new: Results
) -> None:
    samples, expected = stated_samples(packed), expected_pairs(packed)
    for result in (by_old[name][3], by_new[name][0]):
        assert pairs(result) == expected
        sizes = [images[0] for images, _ in result["epochs"][0]["shapes"]]
        assert sizes == [7] * (samples // 7) + [samples % 7]  # the last batch is a part of one


# ---- Hugging Face datasets

LOAD = """
import hashlib, json, sys
import datasets
datasets.disable_progress_bars()
found = {}
for name, files, cache in json.loads(sys.argv[1]):
    for streaming in (False, True):
        loaded = datasets.load_dataset(
            "webdataset", data_files={"train": files}, split="train", streaming=streaming, cache_dir=cache
        )
        features = {k: str(v) for k, v in (loaded.features or {}).items()}
        raw = loaded.cast_column("jpg", datasets.Image(decode=False)) if loaded.features else loaded
        rows = []
        for pixels, row in zip(loaded, raw):
            jpg = row["jpg"]
            digest = hashlib.sha256(jpg["bytes"]).hexdigest() if isinstance(jpg, dict) else None
            rows.append([row["__key__"], digest, list(pixels["jpg"].size), row["json"], row["txt"]])
        found[f"{name} {streaming}"] = {"features": features, "rows": rows}
print(json.dumps(found))
"""
NEEDS = ("datasets", "dill", "multiprocess", "xxhash", "pandas")
"""`datasets`, and what it needs beyond the packages of this environment."""


@pytest.mark.slow
def test_hugging_face_datasets_reads_every_sample_streaming_and_not(
    data_sets: dict[str, Path], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "hf"),
    ]
    installed = subprocess.run([*command, *NEEDS], capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"datasets could not be installed: {installed.stderr[-300:]}")
    jobs = [(name, urls(packed), str(tmp_path / name)) for name, packed in data_sets.items()]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(jobs)],
        env={**os.environ, **offline, "PYTHONPATH": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for name, packed in data_sets.items():
        expected = [
            [raw.key, raw.image_sha256, [raw.width, raw.height], own, caption(raw)]
            for raw, own in stored(packed)
        ]
        for streaming in (False, True):
            rows = found[f"{name} {streaming}"]["rows"]
            assert [[*row[:3], parse_record(row[3]), row[4]] for row in rows] == expected
    types = found["mixed False"]["features"]
    assert types["jpg"].startswith("Image")
    assert types["json"] == found["photos False"]["features"]["json"]
    assert "null" not in types["json"]
