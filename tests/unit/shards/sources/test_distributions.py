"""Distributions over labels, and valence, arousal and dominance of pictures, from sources to indexes."""

import io
import json
import math
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from old_shards import rewrite_as_before
from PIL import Image

from shards.edit.merge import merge
from shards.edit.select import select, split
from shards.format.index import OPTIONAL, SCHEMA, index_path, read_index, rows_sha256
from shards.format.manifest import find_manifest_folders, read_manifest, stated_ranges
from shards.format.rejected import read_rejected
from shards.inspect.stats import describe, describe_json
from shards.inspect.verify import verify
from shards.pack.packer import PackResult
from shards.pack.pipeline import PackSettings, pack
from shards.sources import Record, SourceOptions, open_source
from shards.sources.rows import join_rows
from shards.sources.validate import validate_record
from shards.sources.values import divide_votes, most_likely, parse_distribution
from tests.support.pictures import encoded
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import ShardReader

JOY = {"joy": 0.75, "awe": 0.25}


def table(folder: Path, rows: list[dict[str, Any]], name: str = "t.jsonl") -> Path:
    """A table with a picture for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes(encoded("PNG", Image.new("RGB", (24, 20), (40 * i, 90, 7))))
        row.update(path=f"{i}.png", key=f"k{i}")
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(source: Path, out: Path, **options: Any) -> PackResult:
    return pack(PackSettings(str(source), persons="none", **options), out)


def listed(source: Path, **columns: str) -> list[Record]:
    return list(open_source("table", str(source), SourceOptions(columns=columns)))


def index_rows(folder: Path) -> dict[str, dict[str, Any]]:
    tables = [read_index(index_path(folder, shard.name)) for shard in read_manifest(folder).shards]
    return {row["key"]: row for found in tables for row in found.to_pylist()}


# ---- reading values


def test_objects_and_texts_that_hold_them_are_distributions() -> None:
    assert parse_distribution({" joy": 1, "awe": None, "fear": "0.5"}) == {"joy": 1.0, "fear": 0.5}
    assert parse_distribution('{"joy": 0.75, "awe": 0.25}') == JOY
    for nothing in (None, "", " ", {}, "{}", {"joy": None}, float("nan")):
        assert parse_distribution(nothing) is None
    with pytest.raises(TypeError, match="holds a list, but an object of labels and their shares is expected"):
        parse_distribution([0.5, 0.5])
    with pytest.raises(ValueError, match="the share of 'joy': 'much' is not a number"):
        parse_distribution({"joy": "much"})
    with pytest.raises(
        ValueError, match="'normal' is not a JSON object of labels and their shares; rename the column"
    ):
        parse_distribution("normal")
    with pytest.raises(ValueError, match="Expecting"):
        parse_distribution('{"joy": }')
    assert math.isnan((parse_distribution({"joy": "nan"}) or {})["joy"])


def test_votes_become_shares_by_their_sum() -> None:
    assert divide_votes({"joy": 3.0, "awe": 1.0}) == JOY
    assert divide_votes({"joy": 75.0, "awe": 25.0}) == JOY
    for wrong in (
        {"joy": 0.0, "awe": 0.0},
        {"joy": 2.0, "awe": -1.0},
        {"joy": float("inf")},
        {"joy": 1.0, "awe": float("nan")},
    ):
        with pytest.raises(ValueError, match="no shares can be made of the votes joy"):
            divide_votes(wrong)


def test_the_most_likely_label_is_the_only_one_with_the_largest_share() -> None:
    assert most_likely(JOY) == "joy"
    assert most_likely({"joy": 0.4, "awe": 0.4, "fear": 0.2}) is None


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"joy": 0.5, "awe": 0.4}, "distribution: its shares sum to 0.9, not to 1; give counts and"),
        ({"joy": 75, "awe": 25}, "distribution: its shares sum to 100, not to 1"),
        ({"joy": 1.5, "awe": -0.5}, "distribution.awe: -0.5 is not a share; shares are finite and not negative"),
        ({"joy": float("nan")}, "distribution.joy: nan is not a share"),
        ({"joy": float("inf")}, "distribution.joy: inf is not a share"),
        ({"joy": True}, "distribution.joy: True is not a share"),
        ({"\ud800": 1.0}, "distribution"),
    ],
)  # fmt: skip
def test_shares_that_are_none_refuse_their_record(shares: dict[str, float], says: str) -> None:
    refused = validate_record(Record("a", b"x", distribution=shares)).refused
    assert refused is not None
    assert refused[0] == "annotation"
    assert refused[1].startswith(says)


def test_sums_within_a_thousandth_are_accepted_as_they_are() -> None:
    record = Record("a", b"x", distribution={"joy": 0.3333, "awe": 0.3333, "fear": 0.3333})
    assert validate_record(record) is record


def test_rows_of_a_picture_state_one_distribution() -> None:
    rows = [Record("a", "p"), Record("b", "p", distribution=JOY), Record("c", "p", distribution=JOY)]
    assert join_rows(rows).distribution == JOY
    other = join_rows([*rows, Record("d", "p", distribution={"joy": 1.0})])
    assert other.refused == ("conflict", "its rows b and d state different distributions")


# ---- tables


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_a_column_of_objects_is_a_distribution(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"distribution": JOY}, {"distribution": {"joy": 1.0, "awe": None}}]
    found = listed(table(tmp_path, rows, name))
    assert [record.distribution for record in found] == [JOY, {"joy": 1.0}]
    assert [record.attributes for record in found] == [{}, {}]


def test_columns_of_numbers_are_shares_or_votes(tmp_path: Path) -> None:
    path = table(tmp_path, [{"p_joy": 0.75, "awe": 0.25, "V": 5.5, "more": 1}], "t.csv")
    [record] = listed(path, distribution="joy:p_joy,awe", valence="V")
    assert record.distribution == JOY
    assert record.attributes == {"valence": 5.5, "more": 1}
    path = table(tmp_path, [{"joy": 3, "awe": 1}], "t.parquet")
    assert [record.distribution for record in listed(path, votes="joy,awe")] == [JOY]
    # Without --column they are attributes as all others.
    assert [record.attributes for record in listed(path)] == [{"joy": 3, "awe": 1}]


def test_a_missing_column_of_shares_is_named(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(
            UserError, match=r"--column votes=joy,fear: .* has no column 'fear'; its columns are"
        ):
            listed(table(tmp_path, [{"joy": 3, "awe": 1}], name), votes="joy,fear")
    with pytest.raises(UserError, match=r"no line of .* has the field 'fear'"):
        listed(table(tmp_path, [{"joy": 3, "awe": 1}]), votes="joy,fear")


def test_wrong_shares_refuse_their_row_of_a_table_and_no_other(tmp_path: Path) -> None:
    texts = {"0.75,0.25": None, "0.75,nan": "awe: nan is not a share", "1.5,-0.5": "awe: -0.5 is not a share"}
    texts |= {"3,1": "its shares sum to 4, not to 1", "0.75,": "its shares sum to 0.75, not to 1"}
    rows = [dict(zip(("joy", "awe"), text.split(","))) for text in texts]
    source = table(tmp_path / "source", rows, "t.csv")
    found = {row.source: (row.reason, row.detail) for row in packed(
        source, tmp_path / "out", columns={"distribution": "joy,awe"}
    ).rejected}  # fmt: skip
    for i, says in enumerate(texts.values()):
        assert (f"k{i}" in found) == (says is not None)
        assert says is None or (found[f"k{i}"][0] == "annotation" and says in found[f"k{i}"][1])
    votes = packed(source, tmp_path / "votes", columns={"votes": "joy,awe"})
    assert sorted(row.source for row in votes.rejected) == ["k1", "k2"]
    assert json.loads(index_rows(tmp_path / "votes")["k3"]["label_distribution"]) == JOY


def test_a_value_that_is_no_number_refuses_its_row(tmp_path: Path) -> None:
    path = table(tmp_path, [{"V": "high"}, {"V": 2}, {"V": None}])
    found = listed(path, valence="V")
    assert found[0].refused == ("annotation", "the column 'V': 'high' is not a number")
    assert [record.attributes for record in found[1:]] == [{"valence": 2.0}, {}]


# ---- packing


def test_a_pack_keeps_distributions_and_values_in_tars_and_indexes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"distribution": JOY, "valence": 7.5, "arousal": 3},
        {"distribution": {"joy": 0.5, "awe": 0.5}, "valence": "high"},
        {"label": "fear", "distribution": JOY},
        {"label": "fear"},
        {"distribution": {"joy": 3, "awe": 1}},
    ]
    result = packed(table(tmp_path / "source", rows), tmp_path / "out")
    [refused] = result.rejected
    assert (refused.source, refused.reason) == ("k4", "annotation")
    assert "sum to 4" in refused.detail
    found = index_rows(tmp_path / "out")
    assert {key: row["label"] for key, row in found.items()} == {
        "k0": "joy",
        "k1": None,
        "k2": "fear",
        "k3": "fear",
    }
    shares = {key: row["label_distribution"] for key, row in found.items()}
    assert shares == {
        "k0": '{"awe":0.25,"joy":0.75}',
        "k1": '{"awe":0.5,"joy":0.5}',
        "k2": '{"awe":0.25,"joy":0.75}',
        "k3": None,
    }
    values = {key: (row["valence"], row["arousal"]) for key, row in found.items()}
    assert values == {"k0": (7.5, 3.0), "k1": (None, None), "k2": (None, None), "k3": (None, None)}
    assert "dominance" not in found["k0"]
    reader = ShardReader.from_folder(tmp_path / "out", "data.path")
    records = {record["source"]: record for record in reader.records(0, range(4))}
    assert records["k0"]["label_distribution"] == JOY
    assert records["k3"]["label_distribution"] is None
    assert records["k1"]["attributes"] == {"valence": "high"}


def test_labels_of_distributions_are_declared_by_the_preset(tmp_path: Path) -> None:
    six: dict[str, float] = dict.fromkeys(("anger", "disgust", "fear", "joy", "sadness"), 0.1)
    rows: list[dict[str, Any]] = [
        {"distribution": {**six, "Surprise": 0.4, "Neutral": 0.1}},
        {"distribution": {**six, "neutral": 0.5}},
        {"distribution": {**six, "awe": 0.5}},
        {"label": "awe"},
        {"distribution": {"joy": 0.5, "Joy": 0.5}},
    ]
    result = packed(table(tmp_path / "source", rows), tmp_path / "out", preset="emotion6")
    refused = {found.source: (found.reason, found.detail) for found in result.rejected}
    declared = "anger, disgust, fear, joy, sadness, surprise"
    assert refused == {
        "k2": (
            "label",
            "labels of its distribution (anger, disgust, fear, joy, sadness, awe) are not all different ones of "
            f"{declared}, neutral",
        ),
        "k3": ("label", f"label 'awe' is not one of {declared}"),
        "k4": (
            "label",
            f"labels of its distribution (joy, Joy) are not all different ones of {declared}, neutral",
        ),
    }
    found: dict[str, dict[str, Any]] = {}
    for folder in find_manifest_folders(tmp_path / "out"):
        found |= index_rows(folder)
    assert {key: row["label"] for key, row in found.items()} == {"k0": "surprise", "k1": None}
    assert json.loads(found["k0"]["label_distribution"]) == {**six, "surprise": 0.4, "neutral": 0.1}


def test_a_selection_and_a_second_pack_keep_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"distribution": JOY, "valence": i} for i in range(4)] + [{"label": "joy"}]
    packed(table(tmp_path / "source", rows), tmp_path / "one")
    before = index_rows(tmp_path / "one")
    for link in (False, True):
        manifest = select(tmp_path / "one", tmp_path / f"some{link}", filter_text="valence >= 2", link=link)
        some = index_rows(tmp_path / f"some{link}")
        assert sorted(some) == ["k2", "k3"]
        assert {key: row["label_distribution"] for key, row in some.items()} == dict.fromkeys(
            some, '{"awe":0.25,"joy":0.75}'
        )
        index = read_index(index_path(tmp_path / f"some{link}", manifest.shards[0].name))
        assert rows_sha256(index.to_pylist()) == manifest.shards[0].rows_sha256
    packed(tmp_path / "one", tmp_path / "two", layout="wds")
    again = index_rows(tmp_path / "two")
    names = ("label", *OPTIONAL.names)
    for key, row in again.items():
        assert {name: row.get(name) for name in names} == {name: before[key].get(name) for name in names}


def test_an_index_without_such_samples_has_no_such_columns(tmp_path: Path) -> None:
    packed(table(tmp_path / "source", [{"label": "joy"}]), tmp_path / "out")
    [row] = index_rows(tmp_path / "out").values()
    assert list(row) == SCHEMA.names
    path = index_path(tmp_path / "out", "000000.tar")
    assert read_index(path, ["key", "valence"]).to_pylist() == [{"key": "k0", "valence": None}]


def test_a_copy_with_another_distribution_is_a_conflict(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"distribution": JOY}, {"distribution": {"joy": 0.8, "awe": 0.2}}]
    source = table(tmp_path / "source", rows)
    (tmp_path / "source/1.png").write_bytes((tmp_path / "source/0.png").read_bytes())
    [refused] = packed(source, tmp_path / "out").rejected
    assert refused.reason == "conflict"
    assert refused.detail.endswith(", which has another distribution")


# ---- ranges of dimensions


def test_values_beyond_a_stated_range_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person = {"box": [0, 0, 0.5, 0.5], "labels": {"arousal": 10}}
    rows: list[dict[str, Any]] = [
        {"valence": 1, "arousal": 9},
        {"valence": 0.5},
        {"arousal": 9, "valence": "high"},
        {"persons": [person]},
        {"dominance": 100},
    ]
    source = table(tmp_path / "source", rows)
    command = ["shards", "pack", str(source), str(tmp_path / "out"), "--persons", "source"]
    assert run([*command, "--dimension-range", "valence=1:9", "--dimension-range", "arousal=1:9"]) == 0
    refused = {row["source"]: row["detail"] for row in read_rejected(tmp_path / "out") or ()}
    assert refused == {
        "k1": "valence: 0.5 is beyond 1 to 9",
        "k3": "persons.0.arousal: 10 is beyond 1 to 9",
    }
    provenance = read_manifest(tmp_path / "out").provenance
    assert provenance["dimension_ranges"] == {"arousal": [1, 9], "valence": [1, 9]}
    # A second pack of the shards keeps the ranges.
    packed(tmp_path / "out", tmp_path / "two", layout="wds")
    assert read_manifest(tmp_path / "two").provenance["dimension_ranges"] == provenance["dimension_ranges"]
    # Ranges that a layout finds count for its own records.
    manifest = tmp_path / "out/manifest.json"
    stated = json.loads(manifest.read_text())
    stated["provenance"]["dimension_ranges"]["valence"] = [2, 9]
    manifest.write_text(json.dumps(stated))
    assert [
        found.detail for found in packed(tmp_path / "out", tmp_path / "three", layout="wds").rejected
    ] == ["valence: 1 is beyond 2 to 9"]
    for text in ("valence", "valence=1", "valence=9:1", "valence=1:inf", "joy=1:9", "valence=a:b"):
        assert run([*command, "--dimension-range", text]) == 2
        assert (
            f"--dimension-range={text}: expected NAME=LOW:HIGH, such as valence=1:9"
            in capsys.readouterr().err
        )


def test_sets_of_different_ranges_are_not_packed_as_one(tmp_path: Path) -> None:
    for name, high in (("a", 9.0), ("b", 7.0)):
        source = table(tmp_path / "source" / name, [{"valence": 2}])
        packed(source, tmp_path / "both" / name, dimension_ranges={"valence": (1.0, high)})
    with pytest.raises(
        UserError, match=r"the range of its valence is 1 to 7, but others have 1 to 9; pack them one"
    ):
        packed(tmp_path / "both", tmp_path / "one", layout="wds")


def test_ranges_of_all_parts_of_a_data_set_are_found() -> None:
    one, other = {"dimension_ranges": {"valence": [1, 9]}}, {"dimension_ranges": {"valence": [0, 100]}}
    assert stated_ranges({}, "valence") == []
    assert stated_ranges({**one, "appended": [one, {}]}, "valence") == [(1, 9)]
    merged = {"merged": [{"provenance": one}, {"provenance": other}, {"provenance": {}}]}
    assert stated_ranges(merged, "valence") == [(1, 9), (0, 100)]
    assert stated_ranges(merged, "arousal") == []


# ---- other commands


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Four samples with distributions, three of them with a valence, and one with neither."""
    rows: list[dict[str, Any]] = [{"distribution": JOY, "valence": i or None} for i in range(4)]
    source = table(tmp_path / "several", [*rows, {"label": "joy"}])
    packed(source, tmp_path / "out", shard_samples=2)
    return tmp_path / "out"


def test_statistics_pages_and_the_summary_of_a_pack_describe_them(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [found] = describe_json(several)["data_sets"]
    assert (found["distributions"], found["mean_shares"]) == (4, JOY)
    assert found["dimensions"] == {"valence": {"samples": 3, "least": 1, "mean": 2, "most": 3}}
    text = "\n".join(describe(several))
    assert (
        "  distributions: 4; mean shares joy 0.750, awe 0.250\n  valence: 3 samples, 1 to 3 (mean 2.000)"
        in text
    )
    assert run(["shards", "report", str(several), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    shares = page[page.index("<h2>Distributions</h2>") : page.index("<h2>Valence, arousal, dominance</h2>")]
    assert re.findall(r'<span>(\w+)</span>|width: ([\d.]+)%|class="n">([\d.]+)<', shares) == [
        ("joy", "", ""),
        ("", "100.0", ""),
        ("", "", "0.750"),
        ("awe", "", ""),
        ("", "33.333", ""),
        ("", "", "0.250"),
    ]
    assert "<span>of pictures, median 2</span>" in page
    row = ["out", "valence", "3", "1", "2.000", "3"]
    assert row in [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in page.splitlines()]
    assert page.count("<small>joy 0.75, awe 0.25</small>") == 4
    assert "<small>valence 3</small>" in page
    plain = table(tmp_path / "plain", [{"label": "joy"}])
    assert run(["shards", "pack", str(plain), str(tmp_path / "without"), "--persons", "none"]) == 0
    assert "distribution" not in capsys.readouterr().out
    assert "Distributions" not in "\n".join(describe(tmp_path / "without"))
    command = [
        "shards",
        "pack",
        str(tmp_path / "several/t.jsonl"),
        str(tmp_path / "again"),
        "--persons",
        "none",
    ]
    assert run(command) == 0
    assert "of the samples 4 have a distribution, 3 have valence\n" in capsys.readouterr().out


def test_merging_splitting_appending_and_verifying_keep_them(several: Path, tmp_path: Path) -> None:
    before = index_rows(several)
    packed(table(tmp_path / "more", [{"label": "fear", "arousal": 2}] * 7, "m.jsonl"), tmp_path / "other")
    merge(tmp_path / "merged", [several, tmp_path / "other"], same_key="rename")
    split(several, tmp_path / "split", {"a": 1, "b": 1})
    more = table(tmp_path / "appended", [{"distribution": {"fear": 1}, "valence": 9}] * 6)
    lines = more.read_text().splitlines()
    more.write_text(lines[5].replace("k5", "new") + "\n")  # the others are copies
    pack(PackSettings(str(more), persons="none"), several, append=True)
    parts = {"split/a": index_rows(tmp_path / "split/a"), "split/b": index_rows(tmp_path / "split/b")}
    whole = {**index_rows(tmp_path / "merged"), **parts["split/a"], **parts["split/b"]}
    for found in (
        index_rows(tmp_path / "merged"),
        {**parts["split/a"], **parts["split/b"]},
        index_rows(several),
    ):
        assert before.keys() <= found.keys() <= whole.keys() | {"new"}
        for key, row in before.items():
            assert {n: found[key].get(n) for n in OPTIONAL.names} == {n: row.get(n) for n in OPTIONAL.names}
    new = index_rows(several)["new"]
    assert (new["label"], new["label_distribution"], new["valence"]) == ("fear", '{"fear":1.0}', 9)
    for folder in (several, tmp_path / "merged", tmp_path / "split/a"):
        assert [problem for verdict in verify([folder]) for problem in verdict.problems] == []


def test_tars_of_extracted_and_foreign_samples_state_them_too(several: Path, tmp_path: Path) -> None:
    for tar in sorted(several.glob("*.tar")):
        with tarfile.open(tar) as file:
            file.extractall(tmp_path / "files", filter="data")
    found = list(open_source("folder", str(tmp_path / "files"), SourceOptions()))
    assert [record.distribution for record in found] == [JOY, JOY, JOY, JOY, None]
    fields = {"p": {"joy": 3, "awe": 1}, "joy": 3, "awe": 1, "V": 2, "distribution": "normal"}
    with tarfile.open(tmp_path / "foreign.tar", "w") as file:
        for name, data in (("a.png", encoded("PNG")), ("a.json", json.dumps(fields).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    for votes in ("p", "joy,awe"):
        options = SourceOptions(columns={"votes": votes, "valence": "V"})
        [record] = open_source("wds", str(tmp_path / "foreign.tar"), options)
        assert (record.distribution, record.attributes["valence"]) == (JOY, 2.0)
        assert record.attributes["distribution"] == "normal"
    with pytest.raises(UserError, match=r"--column votes=x,y: no sample has such a field"):
        list(open_source("wds", str(tmp_path / "foreign.tar"), SourceOptions(columns={"votes": "x,y"})))


def test_shards_of_version_2_without_the_field_are_read_and_selecting_adds_it(
    emoji_shards: Path, tmp_path: Path
) -> None:
    before = rewrite_as_before(emoji_shards / "test", tmp_path / "before", version=2)
    assert [problem for verdict in verify([before]) for problem in verdict.problems] == []
    old, today = (ShardReader.from_folder(folder, "x") for folder in (before, emoji_shards / "test"))
    for shard, count in enumerate(old.counts):
        assert old.records(shard, range(count)) == today.records(shard, range(count))
        with tarfile.open(before / old.manifest.shards[shard].name) as tar:
            assert all(b"label_distribution" not in (tar.extractfile(m) or io.BytesIO()).read() for m in tar)
    for name, folder in (("a", before), ("b", emoji_shards / "test")):
        select(folder, tmp_path / name)
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()
