"""Subsets and splits of data sets, and the conditions that choose."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shards.edit.expressions import apply_filter
from shards.edit.select import parse_shares, select, split
from shards.format.index import SCHEMA, index_path, read_index
from shards.format.manifest import read_manifest
from shards.inspect.verify import verify
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader

PERSON = {"box": [0.1, 0.1, 0.5, 0.9], "score": 0.9, "labels": "{}"}
ROWS: list[dict[str, Any]] = [
    {
        "key": "a",
        "width": 640,
        "height": 480,
        "label": "joy",
        "captions": ["a dog", "x"],
        "persons": [PERSON],
    },
    {"key": "b", "width": 100, "height": 300, "label": "fear", "captions": [], "persons": []},
    {
        "key": "c",
        "width": 256,
        "height": 256,
        "label": None,
        "captions": ["A cat"],
        "persons": [PERSON, PERSON],
    },
]
TABLE = pa.Table.from_pylist(
    [
        {"sample_offset": 0, "image_length": 1000 * i, "image_sha256": "0", **row}
        for i, row in enumerate(ROWS)
    ],
    SCHEMA,
)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("side >= 256", "ac"),
        ("100 < side < 300", "c"),
        ("aspect > 2", "b"),
        ("width == 640 or height == 300", "ab"),
        ("not persons > 0", "b"),
        ("persons >= 1 and captions == 1", "c"),
        ("label == 'joy'", "a"),
        ("label != 'joy'", "b"),
        ("label is None", "c"),
        ("label is not None and bytes >= 1000", "b"),
        ("label in ['joy', 'fear']", "ab"),
        ("label not in ('joy',)", "b"),
        ("width in [640, 256]", "ac"),
        ("'dog' in caption", "a"),
        ("'dog' not in caption", "bc"),
        ("caption == ''", "b"),
        ("key > 'a'", "bc"),
        ("width > -1", "abc"),
    ],
)
def test_conditions_select_the_expected_rows(text: str, keys: str) -> None:
    mask = apply_filter(TABLE, text).to_pylist()
    assert "".join(row["key"] for row, holds in zip(ROWS, mask) if holds) == keys


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("widht > 3", "widht: unknown name; did you mean width?"),
        ("side >", "cannot be read"),
        ("side", "'side' is not a condition"),
        ("width == 'x'", "cannot compare a text with a number"),
        ("1 < 2", "one side must be a column"),
        ("label in 'joy'", "`in` takes a list"),
        ("label in ['joy', 3]", "must contain texts only"),
        ("label is 'joy'", "use `is` with None only"),
        ("__import__('os').system('x') == 0", "neither a column nor"),
        ("'x' in width", "width is a number"),
        ("", "cannot be read"),
    ],
)
def test_wrong_conditions_are_named_in_the_error(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_filter(TABLE, text)
    assert says in str(caught.value)
    assert str(caught.value).startswith("--filter ")


def pictures(folder: Path) -> dict[str, bytes]:
    reader = ShardReader.from_folder(folder, "data.path")
    samples = [reader.read(s, r) for s, e in enumerate(reader.manifest.shards) for r in range(e.samples)]
    return {sample.key: sample.image for sample in samples}


def labels(folder: Path) -> list[str]:
    shards = read_manifest(folder).shards
    return [x for e in shards for x in read_index(index_path(folder, e.name), ["label"])["label"].to_pylist()]


@pytest.mark.parametrize("link", [False, True])
def test_a_selection_has_the_pictures_of_its_label_in_new_or_linked_tars(
    link: bool, photo_shards: Path, tmp_path: Path
) -> None:
    subset = select(photo_shards, tmp_path / "out", labels=("people",), link=link)
    assert labels(tmp_path / "out") == ["people"] * 8
    everything = pictures(photo_shards)
    assert pictures(tmp_path / "out").items() <= everything.items()
    assert subset.identity == read_manifest(tmp_path / "out").identity != read_manifest(photo_shards).identity
    assert all(not verdict.problems for verdict in verify([tmp_path / "out"]))
    tars = sorted((tmp_path / "out").glob("*.tar"))
    inodes = {path.stat().st_ino for path in photo_shards.glob("*.tar")}
    assert all((tar.stat().st_ino in inodes) == link for tar in tars)
    if not link:
        with tarfile.open(fileobj=io.BytesIO(tars[0].read_bytes())) as tar:
            assert len(tar.getnames()) == 24


def test_a_selection_of_everything_has_the_same_identity(photo_shards: Path, tmp_path: Path) -> None:
    identity = read_manifest(photo_shards).identity
    assert select(photo_shards, tmp_path / "out", link=True).identity == identity


def test_a_selection_by_condition_reads_from_a_selection(photo_shards: Path, tmp_path: Path) -> None:
    select(photo_shards, tmp_path / "a", labels=("things",))
    subset = select(tmp_path / "a", tmp_path / "b", filter_text="captions > 0 and side > 150")
    assert subset.samples == 6
    assert set(labels(tmp_path / "b")) == {"things"}
    assert subset.provenance["selected"] == {"labels": [], "filter": "captions > 0 and side > 150"}


def test_splits_share_every_label_and_no_picture(photo_shards: Path, tmp_path: Path) -> None:
    shares = parse_shares("train=50,val=25,test=25")
    made = split(photo_shards, tmp_path / "out", shares, seed=3)
    assert {name: manifest.samples for name, manifest in made.items()} == {"train": 10, "val": 5, "test": 5}
    parts = [pictures(tmp_path / "out" / name) for name in shares]
    assert sum(len(part) for part in parts) == len({**parts[0], **parts[1], **parts[2]}) == 20
    assert [labels(tmp_path / "out" / name).count("people") for name in shares] == [4, 2, 2]
    again = split(photo_shards, tmp_path / "again", shares, seed=3)
    other = split(photo_shards, tmp_path / "other", shares, seed=4)
    assert again["val"].identity == made["val"].identity != other["val"].identity


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["select", "{data}", "{out}", "--label", "love"],
            "--label=love: no sample of {data} has this label; its labels are",
        ),
        (
            ["select", "{data}", "{out}", "--filter", "side > 9999"],
            "no sample matches --filter 'side > 9999'",
        ),
        (["select", "{data}", "{data}"], "OUT={data}: exists"),
        (["select", "{out}", "{out}2"], "DIR={out}: no such folder"),
        (["split", "{data}", "{out}", "--shares", "train"], "--shares=train: 'train' is not NAME=SHARE"),
        (
            ["split", "{data}", "{out}", "--shares", "a=100,b=1"],
            "--shares b=1.0: no sample falls into this split",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(
    arguments: list[str], says: str, photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"data": photo_shards, "out": tmp_path / "out"}
    assert run(["shards", *(text.format(**places) for text in arguments)]) == EXIT_USER
    assert says.format(**places) in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_commands_print_their_results(
    photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "select", str(photo_shards), str(tmp_path / "a"), "--label", "people"]) == EXIT_DONE
    assert f"{tmp_path}/a: 8 samples in 1 shards, identity" in capfd.readouterr().out
    assert run(["shards", "split", str(photo_shards), str(tmp_path / "b")]) == EXIT_DONE
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"{tmp_path}/b/{n}" for n in ("train: 16 samples", "val: 2 samples", "test: 2 samples")
    ]


def keys_of_tars(folder: Path) -> set[str]:
    """The keys that a reader without an index finds."""
    found: set[str] = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {name.split(".")[0] for name in tar.getnames()}
    return found


def test_plain_readers_see_only_the_samples_of_a_selection_or_split(
    photo_shards: Path, tmp_path: Path
) -> None:
    split(photo_shards, tmp_path / "out", {"train": 60, "test": 40})
    found = [keys_of_tars(tmp_path / "out" / name) for name in ("train", "test")]
    assert found == [set(pictures(tmp_path / "out" / name)) for name in ("train", "test")]
    assert [len(keys) for keys in found] == [12, 8]
    assert not found[0] & found[1]


def test_linking_warns_and_a_pack_of_linked_tars_reads_their_index(
    photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    linked = tmp_path / "linked"
    for command in ("select", "split"):
        arguments = ["shards", command, str(photo_shards), str(tmp_path / command)]
        assert run([*arguments, "--link", "--copy"]) == EXIT_USER
        assert "--link and --copy: exclude each other" in capfd.readouterr().err
        assert run([*arguments, "--copy"]) == EXIT_DONE
        assert capfd.readouterr().err == ""
    assert (
        run(["shards", "select", str(photo_shards), str(linked), "--label", "people", "--link"]) == EXIT_DONE
    )
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: linked tars hold all samples of DIR, those of other splits too; ")
    assert keys_of_tars(linked) == keys_of_tars(photo_shards)
    result = pack(PackSettings(str(linked), "wds", persons="none"), tmp_path / "small")
    assert result.packed == {"": 8}
    assert pictures(tmp_path / "small") == pictures(linked)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a=1,a=1", "a occurs twice; give each split one share"),
        ("a=1e308,b=1e308", "the sum is too large"),
        ("a=nan", "'a=nan' is not NAME=SHARE"),
        ("a=inf", "'a=inf' is not NAME=SHARE"),
        ("a=0,b=1", "'a=0' is not NAME=SHARE"),
    ],
)
def test_shares_that_cannot_be_given_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_shares(text)
    assert str(caught.value).startswith(f"--shares={text}: {says}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["shards", "verify", "x", "--workers", "-1"],
            "Invalid value for '--workers': -1 is not in the range",
        ),
        (["shards", "verify", "x", "--bogus"], "No such option"),
        (["shards", "verify"], "Missing argument 'DIR'"),
        (["shards", "bogus"], "No such command 'bogus'"),
        (["shards", "index", "x", "--check", "all"], "Invalid value for '--check': 'all' is not one of"),
    ],
)
def test_an_invalid_command_line_is_one_line_that_names_the_help(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == EXIT_USER
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"uniemox: error: {says}")
    assert line.endswith("--help`.")
