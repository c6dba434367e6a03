"""Records that a shard cannot contain are refused one by one, for every layout."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards.pack.pipeline
from shards.detect.types import Person
from shards.format.encode import encode
from shards.format.index import index_path, read_index
from shards.format.sample import Sample
from shards.pack.pipeline import PackSettings, pack
from shards.sources import Cell, Record, Slice
from shards.sources.validate import MAX_DEPTH, escape_text, validate_record
from uniemox_dist.core.files import canonical_json

HALF = "\ud83d"
BOX = (0.0, 0.0, 1.0, 1.0)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def labelled(labels: Any) -> tuple[Person, ...]:
    return (Person(BOX, 1.0), Person(BOX, 1.0, labels))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "caption": ({"captions": ("good", f"a{HALF}")}, "captions.1: '\\ud83d' at character 1 is not Unicode"),
    "caption type": ({"captions": (5,)}, "captions.0: int, but a text is expected"),
    "captions type": ({"captions": "abc"}, "captions: str, but a list is expected"),
    "label": ({"label": HALF}, "label: '\\ud83d' at character 0 is not Unicode"),
    "label type": ({"label": ["joy"]}, "label: list, but a text is expected"),
    "split type": ({"split": 3}, "split: int, but a text is expected"),
    "group": ({"group": {}}, "group: dict, but a text is expected"),
    "image": ({"image": None}, "image: NoneType, but a picture or its place is expected"),
    "attributes type": ({"attributes": [1]}, "attributes: list, but an object is expected"),
    "attribute": (
        {"attributes": {"a": {"b": [0, HALF]}}},
        "attributes.a.b.1: '\\ud83d' at character 0 is no",
    ),
    "attribute name": ({"attributes": {HALF: 1}}, "attributes.\\ud83d: '\\ud83d' at character 0"),
    "attribute key": ({"attributes": {"a": {3: 1}}}, "attributes.a.3: int, but a text is expected"),
    "nan": ({"attributes": {"x": float("nan")}}, "attributes.x: nan is not a number in JSON"),
    "infinity": ({"attributes": {"x": -1e999}}, "attributes.x: -inf is not a number in JSON"),
    "digits": ({"attributes": {"x": 10**5000}}, "attributes.x: a whole number of more than 3,000 digits"),
    "depth": ({"attributes": {"x": nested(100_000)}}, f": nested deeper than {MAX_DEPTH} levels"),
    "bytes": ({"attributes": {"x": b"a"}}, "attributes.x: bytes is not a JSON value"),
    "person": ({"persons": ({"box": [0, 0, 1, 1]},)}, "persons.0: dict, but a person is expected"),
    "person label": ({"persons": labelled({"v": float("nan")})}, "persons.1.labels.v: nan is not a number"),
    "person labels": ({"persons": labelled({"v": HALF})}, "persons.1.labels.v: '\\ud83d' at character 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_is_refused_with_its_field(case: str) -> None:
    fields, says = BAD[case]
    record = validate_record(Record(**{"name": "n", "image": "x.jpg", **fields}))
    assert record.refused is not None
    assert record.refused[0] == "annotation"
    assert says in record.refused[1]
    assert len(record.refused[1]) <= 300
    canonical_json([record.name, record.label, record.split, record.refused])
    assert (record.captions, record.attributes, record.persons) == ((), {}, None)


def test_a_name_keeps_all_characters_that_can_be_written() -> None:
    record = validate_record(Record(f"ä/{HALF}", "x.jpg", label="joy", split="train"))
    assert record == Record(
        "ä/\\ud83d",
        b"",
        label="joy",
        split="train",
        refused=("annotation", "name: '\\ud83d' at character 2 is not Unicode"),
    )


def test_a_record_that_was_refused_keeps_its_reason() -> None:
    record = validate_record(
        Record(HALF, Cell("t", "c", 0, 1), label=HALF, refused=("label", f"label {HALF}"))
    )
    assert record == Record("\\ud83d", Cell("t", "c", 0, 1), refused=("label", "label \\ud83d"))


def test_writable_values_pass_unchanged() -> None:
    attributes = {"a": nested(MAX_DEPTH - 1), "b": [1.5, None, True, "ü😀", {"c": 10**30}], "d": (1, 2)}
    record = Record(
        "ü",
        Slice("a.tar", 0, 1),
        captions=("😀",),
        attributes=attributes,
        persons=labelled({"mood": "calm"}),
        refused=None,
    )
    assert validate_record(record) is record
    assert validate_record(Record("a", "\udcff.jpg")).refused is None  # a file's name may be any bytes


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), json_values, max_size=3), st.text(), st.lists(st.text(), max_size=2)
)
def test_values_that_pass_can_be_encoded(attributes: dict[str, Any], name: str, captions: list[str]) -> None:
    record = validate_record(Record(name, "x", captions=tuple(captions), attributes=attributes, label=name))
    sample = Sample(
        "key",
        b"",
        "jpg",
        1,
        1,
        record.name,
        record.captions,
        record.label,
        record.attributes,
        persons=(Person(BOX, 1.0, record.attributes),),
    )
    encode(sample)
    canonical_json([record.name, record.refused])


def test_a_text_keeps_all_that_is_unicode() -> None:
    assert escape_text("a\udcff/ä😀") == "a\\udcff/ä😀"


def test_one_bad_record_of_any_kind_never_ends_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> Iterator[Record]:
        for i, (fields, _) in enumerate(BAD.values()):
            yield Record(**{"name": f"bad{i}", "image": jpeg(i), "split": "train", **fields})
            yield Record(f"good{i}", jpeg(100 + i), split="train", attributes={"i": i})
        yield Record(f"bad{HALF}", b"", split="no/folder")

    def jpeg(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (number, number, 255 - number)).save(buffer, "JPEG")
        return buffer.getvalue()

    monkeypatch.setattr(shards.pack.pipeline, "open_source", lambda *_: read())
    result = pack(PackSettings("anything", "table", persons="none", captions="shipped"), tmp_path / "out")
    assert (result.records, result.packed) == (2 * len(BAD) + 1, {"train": len(BAD)})
    refused = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["source"] for row in refused} == {f"bad{i}" for i in range(len(BAD))} | {"bad\\ud83d"}
    assert {row["reason"] for row in refused} == {"annotation"}
    rows = read_index(index_path(tmp_path / "out/train", "000000.tar")).to_pylist()
    assert sorted(row["key"] for row in rows) == sorted(f"good{i}" for i in range(len(BAD)))
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["provenance"]["rejected"] == {"annotation": len(BAD) + 1}
