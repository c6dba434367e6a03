"""The splits of a labelled data set and the names of its classes. Torch-free.

Existing splits are used as they are. Without a val split, a seeded share of each class of train becomes val;
finetune.split_ratio keeps a seeded share of the rest. Both select pictures, so persons of one picture stay together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from shards.format.manifest import stated_ranges
from shards.sources.layouts.emotic import CATEGORIES
from shards.sources.presets import assign_shares, draw64, load_presets
from shards.storage import parse_place
from uniemox_dist.config.finetune import EMOTIC_RANGE, FinetuneConfig, FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.labels import LabelledReader, LabelledSample, read_labelled_samples
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Splits:
    """The data of a fine-tuning run."""

    labels: tuple[str, ...]
    """Names of the classes or categories, in the order of the outputs."""
    dimensions: tuple[str, ...]
    """Names of the estimated dimensions, which are the last outputs."""
    ranges: tuple[tuple[float, float], ...]
    """Lowest and highest value of each dimension."""
    train: LabelledReader
    val: LabelledReader
    test: LabelledReader | None
    remarks: list[str] = field(default_factory=list)
    """Remarks for the log, such as a class that is missing in the test split."""

    @property
    def shares_C(self) -> np.ndarray:
        """Share of the training samples that have each label."""
        shares: np.ndarray = self.train.targets_nC[:, : len(self.labels)].mean(0)
        return shares


def open_splits(config: FinetuneRun) -> Splits:
    """Opens DATA/train, val and test (data.path=DATA).

    Raises:
        UserError: if a data set is missing or damaged, a picture has no label, there is one class only, a split has
            labels that train lacks, no training sample has a learned dimension, or one is beyond its range.
    """
    settings = config.finetune
    readers = {name: _open_split(config, name) for name in SPLITS}
    train = readers["train"]
    assert train is not None
    found = {
        name: read_labelled_samples(r, settings, name, config) for name, r in readers.items() if r is not None
    }
    labels = _choose_labels(found["train"], settings, train, config)
    dimensions = settings.learned_dimensions
    ranges = _choose_ranges(dimensions, train, config)
    remarks: list[str] = []
    for name, samples in found.items():
        have = {label for sample in samples for label in sample.labels}
        where = f"data.path={config.data.path}/{name}"
        if strange := sorted(have - set(labels)):
            what, fix = (
                "the training split has",
                "pack the same labels into all splits (--preset, --keep-label)",
            )
            if settings.labels:
                what, fix = "finetune.labels names", "add it there, or leave its pictures out (--keep-label)"
            raise UserError(
                f"{where}: the label {strange[0]!r} is not among those that {what} ({', '.join(labels)}); {fix}"
            )
        if missing := [label for label in labels if label not in have]:
            if name == "train" and settings.task == "single":
                raise UserError(
                    f"{where}: no picture has the label {missing[0]!r} of finetune.labels; leave it out"
                )
            remarks.append(
                f"{where}: no sample has the label {', '.join(missing)}, so this split gives no result for it"
            )
        _check_ranges(samples, dimensions, ranges, where)
        remarks += _count_unknown(samples, settings, where, must_have=name == "train")
        if settings.target == "dimensions":
            remarks += _count_left_out(samples, readers[name], where)
    made = {
        name: _make_labelled_reader(readers[name], samples, labels, len(dimensions))
        for name, samples in found.items()
    }
    learned, val = made["train"], made.get("val")
    if val is None:
        learned, val = _split_val_from_train(learned, config, len(labels))
        remarks.append(
            f"data.path={config.data.path}: has no split val; {val.samples} of its {made['train'].samples} training "
            f"samples validate instead (finetune.val_ratio={settings.val_ratio:g}, drawn by run.seed={config.run.seed})"
        )
    if settings.split_ratio < 1:
        keep_n = _choose_share(learned, settings.split_ratio, config, "ratio", len(labels))
        learned = learned.select(keep_n)
        remarks.append(
            f"finetune.split_ratio={settings.split_ratio:g}: {learned.samples} of {len(keep_n)} training samples are "
            "used"
        )
    if settings.task == "single":
        left = learned.targets_nC[:, : len(labels)].any(0) if learned.samples else np.zeros(len(labels), bool)
        if not left.all():
            raise UserError(
                f"finetune.split_ratio={settings.split_ratio:g} and finetune.val_ratio={settings.val_ratio:g} leave "
                f"no training picture of {labels[int(np.argmin(left))]!r}; raise the first or lower the second"
            )
    if "test" not in made:
        remarks.append(
            f"data.path={config.data.path}: has no test split, so there are no results on unseen pictures"
        )
    return Splits(labels, dimensions, ranges, learned, val, made.get("test"), remarks)


def make_train_sources(config: FinetuneRun, splits: Splits, rank: int = 0, world_size: int = 1) -> Sources:
    """Makes the training split the source of a stream.

    Each rank checks the sizes of its part of the shards of all splits, because a node may lack files that rank 0 has.

    Raises:
        UserError: naming the first shard that is missing or truncated.
    """
    share = rank, world_size
    for reader in {
        reader.url: reader for reader in (splits.train, splits.val, splits.test) if reader
    }.values():
        reader.origin.retry(
            "the sizes of its shards",
            partial(ShardReader.from_folder, reader.url, "data.path", share=share, manifest=reader.manifest),
        )
    return Sources(config, rank=rank, world_size=world_size, readers=[splits.train])


def _open_split(config: FinetuneRun, split: str) -> ShardReader | None:
    """Opens a split; None if there is no val or test. A folder that is itself a data set is the training split."""
    root = parse_place(str(config.data.path), "data.path")
    whole = (root / "manifest.json").is_file()
    if split != "train" and (whole or not (root / split / "manifest.json").is_file()):
        return None
    folder = root if whole or not root.is_dir() else root / split
    reader = ShardReader.from_folder(folder, "data.path", verify_hash=config.data.verify_hash)
    reader.origin.retry_s = config.data.retry_s
    return reader


def _choose_labels(
    samples: list[LabelledSample], settings: FinetuneConfig, reader: ShardReader, config: FinetuneRun
) -> tuple[str, ...]:
    """Chooses classes in the order of the outputs: finetune.labels, the order of the preset, or sorted."""
    have = {label for sample in samples for label in sample.labels}
    if settings.labels or settings.target == "dimensions":
        return settings.labels
    if settings.task == "multi":
        return CATEGORIES if have <= set(CATEGORIES) else tuple(sorted(have))
    provenance = reader.manifest.provenance
    preset = provenance.get("settings", {}).get("preset")
    stated = load_presets().get(preset.lower()) if preset else None
    own = stated.labels if stated else tuple(provenance.get("labels") or ())
    if settings.target == "distribution" and stated:
        own = stated.distribution_labels or own
    if len(have) == 1:
        raise UserError(
            f"data.path={config.data.path}/train: all pictures are labelled {next(iter(have))!r}: classification "
            "needs two or more classes"
        )
    return tuple(name for name in own if name in have) if have <= set(own) else tuple(sorted(have))


def _choose_ranges(
    dimensions: Sequence[str], reader: ShardReader, config: FinetuneRun
) -> tuple[tuple[float, float], ...]:
    """Chooses the range of each dimension: that of the settings, of the data set, or EMOTIC's."""
    chosen = {str(name): limits for name, limits in config.finetune.dimension_ranges.items()}
    for name in dimensions:
        stated = stated_ranges(reader.manifest.provenance, name)
        if name not in chosen and len(stated) > 1:
            both = " and ".join(f"{low:g} to {high:g}" for low, high in stated[:2])
            raise UserError(
                f"data.path={config.data.path}/train: its parts state different ranges of {name} ({both}); train on "
                f"one of them, or set finetune.dimension_ranges={{{name}: [LOW, HIGH]}} if all values are on one scale"
            )
        if stated:
            chosen.setdefault(name, stated[0])
    return tuple(chosen.get(name, EMOTIC_RANGE) for name in dimensions)


def _check_ranges(
    samples: list[LabelledSample],
    dimensions: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    where: str,
) -> None:
    for sample in samples:
        for name, value, (low, high) in zip(dimensions, sample.values, ranges):
            if value < low or value > high:  # false for NaN
                raise UserError(
                    f"{where}: {sample.key} has {name} {value:g}, beyond {low:g} to {high:g}; state the range of "
                    f"the data with finetune.dimension_ranges={{{name}: [LOW, HIGH]}}, or correct the value"
                )


def _count_unknown(
    samples: list[LabelledSample], settings: FinetuneConfig, where: str, *, must_have: bool
) -> list[str]:
    """Remarks on samples that lack a dimension.

    Raises:
        UserError: if `must_have` and no sample has a dimension that the settings name.
    """
    remarks = []
    for number, name in enumerate(settings.learned_dimensions):
        unknown = sum(math.isnan(sample.values[number]) for sample in samples)
        if unknown == len(samples) and must_have and settings.dimensions is not None:
            raise UserError(
                f"{where}: no sample has a number as its {name}; leave it out of finetune.dimensions, or pack again "
                "from a source that states it"
            )
        if unknown and settings.task == "single":
            remarks.append(
                f"{where}: {unknown} of {len(samples)} samples have no {name}, and count neither in its loss nor in "
                "its measures"
            )
    return remarks


def _count_left_out(samples: list[LabelledSample], reader: ShardReader | None, where: str) -> list[str]:
    """A remark on pictures without any value, which are no samples."""
    assert reader is not None
    left_out = reader.samples - len({(sample.shard, sample.row) for sample in samples})
    if not left_out:
        return []
    return [
        f"{where}: {left_out} of {reader.samples} pictures have no value of any dimension and are left out"
    ]


def _make_labelled_reader(
    reader: ShardReader | None, samples: list[LabelledSample], labels: tuple[str, ...], dimensions: int
) -> LabelledReader:
    assert reader is not None
    place_of = {label: i for i, label in enumerate(labels)}
    items: list[list[tuple[int, int]]] = [[] for _ in reader.manifest.shards]
    targets: list[list[np.ndarray]] = [[] for _ in reader.manifest.shards]
    for sample in samples:
        target_C = np.zeros(len(labels) + dimensions, np.float32)
        target_C[[place_of[label] for label in sample.labels]] = sample.shares or 1
        if dimensions:
            target_C[len(labels) :] = sample.values
        items[sample.shard].append((sample.row, sample.person))
        targets[sample.shard].append(target_C)
    width = len(labels) + dimensions
    return LabelledReader(
        reader,
        [np.array(of_shard, np.int64).reshape(-1, 2) for of_shard in items],
        [np.array(of_shard, np.float32).reshape(-1, width) for of_shard in targets],
        [sample.key for sample in samples],
    )


def _split_val_from_train(
    reader: LabelledReader, config: FinetuneRun, labels: int
) -> tuple[LabelledReader, LabelledReader]:
    validates_n = _choose_share(reader, config.finetune.val_ratio, config, "val", labels)
    if not validates_n.any() or validates_n.all():
        raise UserError(
            f"finetune.val_ratio={config.finetune.val_ratio:g} of {reader.samples} training samples leaves one of both "
            "without any; give another ratio, or a split val"
        )
    return reader.select(~validates_n), reader.select(validates_n)


def _choose_share(
    reader: LabelledReader, ratio: float, config: FinetuneRun, purpose: str, labels: int
) -> np.ndarray:
    """Returns a mask of a share of each class's pictures, chosen by the seed and the pictures' keys. The class of a
    picture with a distribution is its most likely label, the first one of equals."""
    first = {key: i for i, key in reversed(list(enumerate(reader.keys)))}
    keys = list(first)
    strata = np.zeros(len(keys), np.int64)
    if config.finetune.task == "single" and labels:
        strata = reader.targets_nC[list(first.values()), :labels].argmax(1)
    draws = np.array([draw64(config.run.seed, f"{purpose}/{key}") for key in keys], np.uint64)
    chosen = assign_shares(strata, draws, {"chosen": ratio, "rest": 1 - ratio}) == 0
    wanted = {key for key, is_chosen in zip(keys, chosen) if is_chosen}
    return np.array([key in wanted for key in reader.keys])
