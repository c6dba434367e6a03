"""Splits of a labelled set: how they are chosen, their labels, and errors."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from labelled_sets import SHARES, distribution_set, emotic_set, folder_set, heco_set, labels_set, packed

from shards.edit.merge import merge
from shards.edit.select import select
from shards.pack.pipeline import PackSettings, pack
from shards.sources.layouts.emotic import CATEGORIES
from uniemox_dist.cli.main import run
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.splits import Splits, make_train_sources, open_splits


def config(data: Path, *more: str) -> FinetuneRun:
    found = load_config("finetune", [f"data.path={data}", *more])
    assert isinstance(found, FinetuneRun)
    return found


def error_of(data: Path, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        open_splits(config(data, *more))
    text = str(caught.value)
    assert "\n" not in text
    return text


def keys(splits: Splits) -> tuple[set[str], set[str]]:
    return set(splits.train.keys), set(splits.val.keys)


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures of a, 10 of b, in train alone."""
    folder = tmp_path_factory.mktemp("unsplit")
    return packed(labels_set(folder / "source", {"train": {"a": 20, "b": 10}}), folder / "data")


def test_without_a_val_split_a_seeded_share_of_each_class_validates(unsplit: Path) -> None:
    splits = open_splits(config(unsplit, "finetune.val_ratio=0.2"))
    assert splits.val.targets_nC.sum(0).tolist() == [4, 2]
    assert splits.train.targets_nC.sum(0).tolist() == [16, 8]
    train, val = keys(splits)
    assert not train & val
    assert keys(open_splits(config(unsplit, "finetune.val_ratio=0.2"))) == (train, val)
    assert keys(open_splits(config(unsplit, "finetune.val_ratio=0.2", "run.seed=1")))[1] != val
    said = "\n".join(splits.remarks)
    assert "has no split val; 6 of its 30 training samples validate instead" in said
    assert "has no test split, so there are no results on unseen pictures" in said
    assert splits.test is None


def test_a_split_ratio_keeps_a_share_of_each_class_and_validates_with_the_same(unsplit: Path) -> None:
    whole, half = (
        open_splits(config(unsplit, "finetune.val_ratio=0.2", f"finetune.split_ratio={r}")) for r in (1, 0.5)
    )
    assert half.train.targets_nC.sum(0).tolist() == [8, 4]
    assert keys(half)[1] == keys(whole)[1]
    assert keys(half)[0] < keys(whole)[0]
    assert "leave no training picture of 'b'" in error_of(unsplit, "finetune.split_ratio=0.03")


def test_chosen_samples_are_read_with_their_own_targets(unsplit: Path) -> None:
    train = open_splits(config(unsplit)).train
    assert sum(train.counts) == train.samples == len(train.keys)
    at = 0
    for shard, count in enumerate(train.counts):
        for item in range(count):
            raw = train.read(shard, item)
            assert raw.key == train.keys[at]
            assert ["a", "b"][int(train.target(shard, item).argmax())] == raw.label
            assert train.records(shard, [item])[0]["label"] == raw.label
            at += 1


def test_labels_are_ordered_by_the_settings_the_data_set_or_the_alphabet(
    tmp_path: Path, unsplit: Path
) -> None:
    assert open_splits(config(unsplit)).labels == ("a", "b")
    assert open_splits(config(unsplit, "finetune.labels=[b, a]")).labels == ("b", "a")
    emo8 = packed(folder_set(tmp_path / "source", "emo8"), tmp_path / "emo8", preset="emo8")
    assert open_splits(config(emo8)).labels[:2] == ("amusement", "awe")
    assert open_splits(config(emo8)).remarks == []


def test_labels_that_do_not_match_one_class_and_no_labels_are_refused(tmp_path: Path, unsplit: Path) -> None:
    def data(name: str, **splits: dict[str, int]) -> Path:
        return packed(labels_set(tmp_path / "source" / name, splits), tmp_path / name)

    strange = data("strange", train={"a": 2, "b": 2}, test={"a": 1, "c": 1})
    assert error_of(strange).startswith(
        f"data.path={strange}/test: the label 'c' is not among those that the training split has (a, b); pack"
    )
    one = data("one", train={"a": 3}, test={"a": 1})
    assert "all pictures are labelled 'a': classification needs two or more classes" in error_of(one)
    assert "no picture has the label 'z' of finetune.labels" in error_of(unsplit, "finetune.labels=[a, b, z]")
    assert "is not among those that finetune.labels names (a, x)" in error_of(
        unsplit, "finetune.labels=[a, x]"
    )
    missing = data("missing", train={"a": 2, "b": 2}, val={"a": 1, "b": 1}, test={"a": 1})
    remark = f"data.path={missing}/test: no sample has the label b, so this split gives no result for it"
    assert open_splits(config(missing)).remarks == [remark]
    pictures = tmp_path / "source/one/train/a"
    table = tmp_path / "table.csv"
    table.write_text("path\n" + "".join(f"{p}\n" for p in sorted(pictures.iterdir())))
    pack(PackSettings(str(table), "table", persons="none"), tmp_path / "plain")
    assert "3 of 3 pictures have no label; pack from a source with labels" in error_of(tmp_path / "plain")
    assert "no such folder" in error_of(tmp_path / "nowhere")


def test_pictures_whose_largest_share_two_labels_have_are_named_with_what_to_do(tmp_path: Path) -> None:
    pictures = sorted(map(str, labels_set(tmp_path / "source", {"train": {"a": 4}}).rglob("*.jpg")))
    shares = [{"awe": 0.5, "joy": 0.5}, {"awe": 0.5, "joy": 0.5}, {"awe": 0.75, "joy": 0.25}, {"joy": 1}]
    rows = [
        json.dumps({"path": path, "distribution": found})
        for path, found in zip(pictures, shares, strict=True)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    pack(PackSettings(str(tmp_path / "t.jsonl"), "table", persons="none"), tmp_path / "data")
    assert error_of(tmp_path / "data") == (
        f"data.path={tmp_path}/data/train: 2 of 4 pictures have no label, but distributions whose largest share several"
        ' labels have; leave them out (uniemox shards select … --filter "label is not None"), or set '
        "finetune.target=distribution"
    )


def test_the_samples_of_emotic_are_persons_or_pictures(tmp_path: Path) -> None:
    data = packed(emotic_set(tmp_path / "source"), tmp_path / "data", layout="emotic")
    each = open_splits(config(data, "finetune.task=multi", "finetune.persons=true"))
    assert each.labels == CATEGORIES
    assert each.dimensions == ("valence", "arousal", "dominance")
    assert (each.train.samples, each.val.samples) == (24, 9)  # 16 and 6 pictures, half of them with two
    boxes = {person.box for i in range(24) for person in each.train.read(0, i).persons}
    assert len(boxes) == 2
    for i in range(24):
        raw, target_C = each.train.read(0, i), each.train.target(0, i)
        assert len(raw.persons) == 1
        wide = raw.persons[0].box[2] > 0.6
        assert target_C[20] == (not wide)
        assert target_C[21] == wide  # what the maker gave the second person
        assert target_C[:4].sum() == 1
    together = open_splits(config(data, "finetune.task=multi"))
    assert together.train.samples == 16
    pairs = together.train.targets_nC[:, 20] + together.train.targets_nC[:, 21]
    assert sorted(np.unique(pairs).tolist()) == [1, 2]
    none = open_splits(config(data, "finetune.task=multi", "finetune.dimension_weight=0"))
    assert none.dimensions == ()
    assert none.train.targets_nC.shape == (16, 26)
    assert "have no label" in error_of(data)
    # A validation split of persons leaves no picture's persons apart.
    alone = tmp_path / "alone"
    alone.symlink_to(data / "train")
    made = open_splits(
        config(alone, "finetune.task=multi", "finetune.persons=true", "finetune.val_ratio=0.4")
    )
    assert not keys(made)[0] & keys(made)[1]
    assert made.train.samples + made.val.samples == 24


def test_other_ranks_check_their_shards_of_each_split_without_reading_a_manifest(tmp_path: Path) -> None:
    labels = {"a": 3, "b": 3}
    data = packed(
        labels_set(tmp_path / "source", {"train": labels, "val": labels, "test": labels}), tmp_path / "data"
    )
    of = config(data)
    splits = pickle.loads(pickle.dumps(open_splits(of)))  # as rank 0 sends them
    for split in ("train", "val", "test"):
        (data / split / "manifest.json").unlink()
    sources = make_train_sources(of, splits, 1, 2)
    assert (sources.samples, splits.val.samples, splits.test.samples) == (6, 6, 6)
    [tar] = (data / "test").glob("*.tar")
    os.truncate(tar, 100)
    make_train_sources(of, splits, 1, 2)  # the only shard is rank 0's
    with pytest.raises(UserError, match=rf"^data.path={data}/test: shard {tar.name} has 100 bytes"):
        make_train_sources(of, splits, 0, 2)


# ---- distributions and dimensions of pictures

COUNTS = {"train": 30, "val": 6, "test": 6}


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of distributions, valence and arousal, with the range of valence in its manifest."""
    folder = tmp_path_factory.mktemp("shares")
    source = distribution_set(folder / "source", COUNTS)
    return packed(source, folder / "data", layout="table", dimension_ranges={"valence": (1.0, 9.0)})


LEARN_SHARES = "finetune.target=distribution"
VALUES = "finetune.dimensions=[valence, arousal]"
VALUES_ALONE = "finetune.target=dimensions"


def test_distributions_are_targets_beside_values_where_they_are_known(shares: Path) -> None:
    found = open_splits(config(shares, LEARN_SHARES, VALUES))
    assert found.labels == ("awe", "fear", "joy")
    assert (found.dimensions, found.ranges) == (("valence", "arousal"), ((1, 9), (1, 10)))
    targets = {tuple(round(float(x), 4) for x in row[:3]): row[3:] for row in found.train.targets_nC}
    assert sorted(targets) == sorted((awe, fear, joy) for joy, awe, fear in SHARES.values())
    values = found.train.targets_nC[:, 3:]
    assert np.isnan(values[:, 0]).sum() == 8  # of 30 pictures every fourth
    assert set(values[np.isfinite(values[:, 0]), 0].tolist()) == {3, 6, 9}
    assert set(values[:, 1].tolist()) == {3}
    said = "8 of 30 samples have no valence, and count neither in its loss nor in its measures"
    assert f"data.path={shares}/train: {said}" in found.remarks
    # As labels, the most likely ones.
    labels = open_splits(config(shares, VALUES))
    assert labels.labels == found.labels
    likely = np.eye(3)[found.train.targets_nC[:, :3].argmax(1)]
    assert np.array_equal(labels.train.targets_nC[:, :3], likely)
    assert open_splits(config(shares)).dimensions == ()
    ordered = open_splits(config(shares, LEARN_SHARES, "finetune.labels=[joy, awe, fear]"))
    assert {tuple(row.round(4).tolist()) for row in ordered.train.targets_nC} == {
        tuple(np.float32(row).round(4).tolist()) for row in SHARES.values()
    }


def test_a_validation_split_of_distributions_is_drawn_by_the_most_likely_label(tmp_path: Path) -> None:
    source = distribution_set(tmp_path / "source", {"train": 30})
    (source / "train.jsonl").rename(source / "all.jsonl")
    data = packed(source, tmp_path / "data", layout="table")
    found = open_splits(config(data, LEARN_SHARES, VALUES, "finetune.val_ratio=0.2"))
    assert (found.train.samples, found.val.samples) == (24, 6)
    likely = found.val.targets_nC[:, :3].argmax(1)
    assert np.bincount(likely).tolist() == [2, 2, 2]


def test_pictures_without_what_is_learned_and_values_beyond_their_range_are_one_line(
    tmp_path: Path, shares: Path, unsplit: Path
) -> None:
    assert error_of(unsplit, LEARN_SHARES) == (
        f"data.path={unsplit}/train: 30 of 30 pictures have no distribution; pack from a source with distributions, or "
        "set finetune.target=label"
    )
    some = distribution_set(tmp_path / "some", {"train": 6})
    rows = (some / "train.jsonl").read_text().splitlines()
    (some / "train.jsonl").write_text(
        "\n".join(['{"path": "train_000.jpg", "label": "joy"}', *rows[1:]]) + "\n"
    )
    partly = packed(some, tmp_path / "partly", layout="table")
    assert error_of(partly, LEARN_SHARES) == (
        f"data.path={partly}/train: 1 of 6 pictures have no distribution; `uniemox shards select --filter "
        "'distribution is not None'` drops them"
    )
    select(partly / "train", tmp_path / "kept", filter_text="distribution is not None")
    assert open_splits(config(tmp_path / "kept", LEARN_SHARES, "finetune.val_ratio=0.4")).val.samples == 2
    assert "no sample has a number as its dominance; leave it out of finetune.dimensions" in error_of(
        shares, "finetune.dimensions=[dominance]"
    )
    beyond = error_of(shares, VALUES, "finetune.dimension_ranges={valence: [1, 7]}")
    assert re.fullmatch(
        rf"data\.path={shares}/train: \w+ has valence 9, beyond 1 to 7; state the range of the data with "
        r"finetune\.dimension_ranges=\{valence: \[LOW, HIGH\]\}, or correct the value",
        beyond,
    )
    assert error_of(shares, LEARN_SHARES, "finetune.labels=[awe, fear]") == (
        f"data.path={shares}/train: the label 'joy' is not among those that finetune.labels names (awe, fear); add it "
        "there, or leave its pictures out (--keep-label)"
    )
    other = packed(
        distribution_set(tmp_path / "source", {"train": 6}),
        tmp_path / "other",
        layout="table",
        dimension_ranges={"valence": (0.0, 100.0)},
    )
    merge(tmp_path / "both", [shares / "train", other / "train"], same_key="rename")
    assert "its parts state different ranges of valence (1 to 9 and 0 to 100)" in error_of(
        tmp_path / "both", VALUES
    )
    chosen = open_splits(config(tmp_path / "both", VALUES, "finetune.dimension_ranges={valence: [0, 100]}"))
    assert chosen.ranges == ((0, 100), (1, 10))


def test_values_are_learned_alone_from_whatever_has_one(tmp_path: Path, shares: Path, unsplit: Path) -> None:
    found = open_splits(config(shares, VALUES_ALONE, "finetune.dimensions=[valence]"))
    assert (found.labels, found.dimensions, found.ranges) == ((), ("valence",), ((1, 9),))
    assert found.train.targets_nC.shape == (22, 1)  # of 30 pictures every fourth has none
    assert set(found.train.targets_nC[:, 0].tolist()) == {3, 6, 9}
    left_out = "8 of 30 pictures have no value of any dimension and are left out"
    assert f"data.path={shares}/train: {left_out}" in found.remarks
    both = open_splits(config(shares, VALUES_ALONE, VALUES))
    assert both.train.targets_nC.shape == (30, 2)
    assert np.isnan(both.train.targets_nC[:, 0]).sum() == 8
    assert not any("left out" in remark for remark in both.remarks)
    heco, data = heco_set(tmp_path / "source"), tmp_path / "data"
    assert run(["shards", "pack", str(heco), str(data), "--preset", "heco", "--persons", "source"]) == 0
    persons = open_splits(config(data, VALUES_ALONE, VALUES, "finetune.persons=true"))
    pictures = open_splits(config(data, VALUES_ALONE, VALUES))
    with_valence = open_splits(
        config(data, VALUES_ALONE, "finetune.dimensions=[valence]", "finetune.persons=true")
    )
    for splits, expected in ((persons, 32), (pictures, 24), (with_valence, 24)):
        readers = [reader for reader in (splits.train, splits.val, splits.test) if reader is not None]
        assert sum(reader.samples for reader in readers) == expected
    assert error_of(unsplit, VALUES_ALONE, VALUES) == (
        f"data.path={unsplit}/train: nothing has a number as its valence or arousal; pack from a source that states "
        "values, or set finetune.target=label"
    )


def test_a_validation_split_of_values_is_drawn_from_all(tmp_path: Path) -> None:
    source = distribution_set(tmp_path / "source", {"train": 30})
    (source / "train.jsonl").rename(source / "all.jsonl")
    data = packed(source, tmp_path / "data", layout="table")
    found = open_splits(
        config(data, VALUES_ALONE, VALUES, "finetune.val_ratio=0.2", "finetune.split_ratio=0.5")
    )
    assert (found.train.samples, found.val.samples) == (12, 6)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (("finetune.task=multi", LEARN_SHARES), "finetune.target=distribution: needs finetune.task=single"),
        (("finetune.task=multi", VALUES_ALONE), "finetune.target=dimensions: needs finetune.task=single"),
        ((VALUES_ALONE,), r"finetune.target=dimensions: .* name some, such as \[valence, arousal\]"),
        ((VALUES_ALONE, VALUES, "finetune.dimension_weight=0"), "a finetune.dimension_weight above 0"),
        (
            (VALUES_ALONE, VALUES, "finetune.labels=[a, b]"),
            r"learns no labels; leave out finetune.labels, or set it to \[\]",
        ),
        (("finetune.dimensions=[valence, valence]",), "finetune.dimensions: names one twice"),
        (
            ("finetune.dimension_ranges={valence: [9, 1]}",),
            r"finetune.dimension_ranges.valence: \[9, 1\] is no range",
        ),
        (("finetune.dimensions=[joy]",), "finetune.dimensions.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shares: Path, setting: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config(shares, *setting)


def test_the_values_of_persons_may_be_some_of_the_three(tmp_path: Path) -> None:
    data = packed(emotic_set(tmp_path / "source"), tmp_path / "data", layout="emotic")
    some = open_splits(
        config(data, "finetune.task=multi", "finetune.persons=true", "finetune.dimensions=[arousal]")
    )
    assert some.dimensions == ("arousal",)
    assert some.train.targets_nC.shape == (24, 27)
    assert set(some.train.targets_nC[:, 26].tolist()) == {5, 6}
    assert "beyond 1 to 4" in error_of(
        data, "finetune.task=multi", "finetune.dimension_ranges={arousal: [1, 4]}"
    )


def test_persons_with_labels_of_their_own_are_samples(tmp_path: Path) -> None:
    source, data = heco_set(tmp_path / "source"), tmp_path / "data"
    assert run(["shards", "pack", str(source), str(data), "--preset", "heco", "--persons", "source"]) == 0
    values = "finetune.dimensions=[valence, arousal]"
    each = open_splits(config(data, "finetune.persons=true", values))
    assert each.labels == ("Surprise", "Excitement", "Happiness", "Peace")
    assert each.ranges == ((1, 10), (1, 10))  # the preset's
    readers = [reader for reader in (each.train, each.val, each.test) if reader is not None]
    assert sum(reader.samples for reader in readers) == 32  # 24 pictures, 8 of them with two persons
    second_persons = 0
    for reader in readers:
        for shard, count in enumerate(reader.counts):
            for item in range(count):
                raw, target_C = reader.read(shard, item), reader.target(shard, item)
                [person] = raw.persons
                is_second = person.box[0] > 0.3
                second_persons += is_second
                assert target_C[:4].sum() == 1
                assert np.isnan(target_C[4]) == is_second
                assert target_C[5] == (6 if is_second else 5)
                if not is_second:
                    assert target_C[4] == 2 + 2 * int(target_C[:4].argmax())
    assert second_persons == 8
    # As pictures, four have no label, because their persons differ.
    said = error_of(data, values)
    assert "pictures have no label, but persons with different ones; set finetune.persons=true" in said
    same = tmp_path / "same"
    for split in ("train", "val", "test"):
        select(data / split, same / split, filter_text="label is not None")
    whole = open_splits(config(same, values))
    readers = [reader for reader in (whole.train, whole.val, whole.test) if reader is not None]
    assert sum(reader.samples for reader in readers) == 20
    arousal = np.concatenate([reader.targets_nC[:, 5] for reader in readers])
    assert sorted(np.unique(arousal).tolist()) == [5, 5.5]  # the mean of two persons
    assert np.isfinite(np.concatenate([reader.targets_nC[:, 4] for reader in readers])).all()
