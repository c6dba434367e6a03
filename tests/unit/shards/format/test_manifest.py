"""The manifest: the identity it states, and every way in which one can be unusable."""

import hashlib
import json
import pickle
import re
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import shards
from shards.detect.types import Person
from shards.format.entries import ShardEntry, TableBuilder
from shards.format.index import OPTIONAL, REFUSED, SCHEMA
from shards.format.manifest import Manifest, combined_identity, find_manifest_folders, read_manifest
from shards.format.sample import Sample, parse_record
from shards.pack.pipeline import PackSettings
from uniemox_dist.core.errors import UserError

FIRST = ShardEntry("000000.tar", 3, 10240, "aa" * 32, "bb" * 32, "cc" * 32)
SECOND = ShardEntry("000001.tar", 2, 20480, "dd" * 32, "ee" * 32, "ff" * 32)
MANIFEST = Manifest((FIRST, SECOND), {"settings": {"seed": 0}})


@pytest.mark.parametrize("version", [1, 2])
def test_the_identity_is_the_hash_that_the_format_states(version: int, tmp_path: Path) -> None:
    first = '["000000.tar",3,10240,"' + "aa" * 32 + '","' + "cc" * 32 + '"]'
    second = '["000001.tar",2,20480,"' + "dd" * 32 + '","' + "ff" * 32 + '"]'
    text = f'{{"format_version":{version},"shards":[' + first + "," + second + "]}"
    manifest = replace(MANIFEST, format_version=version)
    assert manifest.identity == hashlib.sha256(text.encode()).hexdigest()
    manifest.write(tmp_path)
    found = read_manifest(tmp_path)
    assert (found.format_version, found.identity) == (version, manifest.identity)


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2000])
def test_the_identity_of_any_number_of_shards_is_that_of_one_text(count: int) -> None:
    entries = [replace(FIRST, name=f"{i:06d}é.tar", samples=i) for i in range(count)]
    shards = [[e.name, e.samples, e.bytes, e.sha256, e.rows_sha256] for e in entries]
    text = json.dumps(
        {"format_version": 2, "shards": shards}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert Manifest(tuple(entries), {}).identity == hashlib.sha256(text.encode()).hexdigest()


def test_a_table_of_shards_gives_the_entries_in_every_way_that_a_tuple_does() -> None:
    entries = tuple(
        replace(FIRST, name=f"{i}{'é' * (i % 3)}.tar", samples=i, sha256=f"{i:064x}") for i in range(2050)
    )
    table = TableBuilder(entries).build()
    assert tuple(table) == entries
    assert (table[0], table[1000], table[-1]) == (entries[0], entries[1000], entries[-1])
    assert (table[3:7], table[5::512], table[::-1]) == (entries[3:7], entries[5::512], entries[::-1])
    assert list(table.samples) == [entry.samples for entry in entries]
    assert list(table.bytes) == [entry.bytes for entry in entries]
    assert table == entries
    assert pickle.loads(pickle.dumps(table)) == table
    assert table != entries[:-1]
    assert table != (*entries[:-1], FIRST)
    with pytest.raises(IndexError):
        table[2050]
    assert tuple(TableBuilder().build()) == ()


def test_reading_needs_little_more_memory_than_the_text_and_the_entries(tmp_path: Path) -> None:
    entries = [
        replace(FIRST, name=f"{i:06d}.tar", sha256=f"{i:064x}", index_sha256=f"{i:064x}") for i in range(5000)
    ]
    Manifest(tuple(entries), {}).write(tmp_path)
    tracemalloc.start()
    manifest = read_manifest(tmp_path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.shards == tuple(entries)
    assert kept < 0.5 * (tmp_path / "manifest.json").stat().st_size
    assert most < kept + 2.3 * (tmp_path / "manifest.json").stat().st_size


@pytest.mark.parametrize(
    "change",
    [{"name": "x.tar"}, {"samples": 4}, {"bytes": 10241}, {"sha256": "00" * 32}, {"rows_sha256": "00" * 32}],
)
def test_the_identity_changes_with_each_part_of_a_shard(change: dict[str, Any]) -> None:
    assert Manifest((replace(FIRST, **change), SECOND), {}).identity != MANIFEST.identity


def test_the_identity_changes_with_the_order_of_shards() -> None:
    assert Manifest((SECOND, FIRST), {}).identity != MANIFEST.identity


def test_the_identity_ignores_provenance_and_the_bytes_of_index_files() -> None:
    assert (
        Manifest((replace(FIRST, index_sha256="00" * 32), SECOND), {"other": 1}).identity == MANIFEST.identity
    )


def test_one_source_keeps_its_identity_and_a_mix_has_one_by_order() -> None:
    assert combined_identity(["a"]) == "a"
    assert combined_identity(["a", "b"]) == hashlib.sha256(b'["a","b"]').hexdigest()
    assert combined_identity(["b", "a"]) != combined_identity(["a", "b"])


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"000000.tar": 3, "000001.tar": 2}
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert list(record) == [
        "format",
        "format_version",
        "identity",
        "samples",
        "bytes",
        "shards",
        "provenance",
    ]
    assert (record["format"], record["format_version"]) == ("uniemox-shards", 2)
    assert (record["samples"], record["bytes"]) == (5, 30720)
    assert record["shards"][0] == asdict(FIRST)


def edit(folder: Path, **changes: Any) -> None:
    MANIFEST.write(folder)
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, **changes}))


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    edit(tmp_path, shards=[{**asdict(FIRST), "samples": 4}, asdict(SECOND)])
    with pytest.raises(UserError, match="was edited: identity"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("entry", [1, "000000.tar", [], {}, {**asdict(FIRST), "more": 1}])
def test_an_entry_that_is_not_a_shard_is_refused(tmp_path: Path, entry: Any) -> None:
    edit(tmp_path, shards=[asdict(FIRST), entry])
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest .* is not a shard"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"name": "../000000.tar"},
        {"name": "000000"},
        {"samples": "3"},
        {"samples": True},
        {"samples": -1},
        {"bytes": 1.5},
        {"bytes": 10**400},
        {"bytes": float("nan")},
        {"sha256": None},
        {"rows_sha256": "00"},
    ],
)
def test_a_shard_with_a_value_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    edit(tmp_path, shards=[{**asdict(FIRST), **changes}, asdict(SECOND)])
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"provenance": None},
        {"provenance": "x"},
        {"provenance": {"x": float("nan")}},
        {"provenance": {"x": [float("inf")]}},
        {"format_version": "1"},
        {"shards": None},
        {"shards": [asdict(FIRST), asdict(FIRST)]},
    ],
)
def test_a_field_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest"):
        read_manifest(tmp_path)


HOSTILE_NAMES = [
    "a\nb.tar",
    "a\x1b[2Jb.tar",
    "a\0b.tar",
    "a\x85b.tar",
    "a\u2028b.tar",
    "a\u202eb.tar",
    "a\ud800b.tar",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_name_with_control_characters_is_refused(tmp_path: Path, name: str) -> None:
    edit(tmp_path, shards=[asdict(FIRST), {**asdict(SECOND), "name": name}])
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert "(shards[1].name=" in str(caught.value)
    assert "is not a file name that ends with .tar, without / and control characters)" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shards": {}}, "shards={} is not a list"),
        ({"shards": ""}, 'shards="" is not a list'),
        ({"shards": None}, "shards=null is not a list"),
        (
            {"shards": [asdict(FIRST), "x" * 1000]},
            f'shards[1] is not a shard: "{"x" * 79} … is not an object',
        ),
        ({"shards": [{"name": "000000.tar"}]}, "shards[0] is not a shard: it lacks samples"),
        (
            {"shards": [{**asdict(FIRST), "more": 1}]},
            'shards[0] is not a shard: it has the unknown field "more"',
        ),
        (
            {"shards": [asdict(FIRST), {**asdict(SECOND), "samples": "3"}]},
            'shards[1].samples="3" is not a whole number of at least 0 and below 2^63',
        ),
        (
            {"shards": [{**asdict(FIRST), "sha256": None}]},
            "shards[0].sha256=null is not 64 hexadecimal digits",
        ),
        ({"shards": [asdict(FIRST), asdict(FIRST)]}, 'the shard "000000.tar" is listed twice'),
        (
            {"shards": [{**asdict(s), "samples": 1 << 62} for s in (FIRST, SECOND)]},
            f"the samples of all shards are {1 << 63}, more than 2^53",
        ),
        (
            {"shards": [{**asdict(FIRST), "bytes": (1 << 53) + 1}]},
            f"the bytes of all shards are {(1 << 53) + 1}, more than 2^53",
        ),
        ({"provenance": [1]}, "provenance=[1] is not an object"),
        ({"provenance": asdict(FIRST)}, "it has shards outside of the list shards, such as in provenance"),
        ({"format_version": True}, "format_version=true is not a whole number"),
    ],
)
def test_an_error_names_the_entry_and_the_field(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/manifest.json: not a readable manifest ({reason}); pack again or restore it"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"format": "' + b"\xff" * 100_000, "it is not UTF-8 text: byte 12 is 0xff"),
        (b"[" * 100_000, "its JSON is nested too deeply"),
        (b"5", "it is not a JSON object"),
        (b'{"x": ' + b"1" * 10_000 + b".0e999}", "1" * 80 + " … is not a number"),
    ],
    ids=["bytes", "nested", "number", "infinite"],
)
def test_errors_about_hostile_bytes_are_short(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert f"not a readable manifest ({reason}); pack again" in str(caught.value)


def test_texts_of_a_foreign_manifest_are_shortened(tmp_path: Path) -> None:
    for changes in ({"format": "\x1b" + "x" * 10_000}, {"identity": "\x1b\n" + "x" * 10_000}):
        edit(tmp_path, **changes)
        with pytest.raises(UserError) as caught:
            read_manifest(tmp_path)
        assert len(str(caught.value)) < len(str(tmp_path)) + 250
        assert str(caught.value).isprintable()


def test_numbers_that_only_look_finite_are_refused(tmp_path: Path) -> None:
    edit(tmp_path, provenance={"x": "HUGE"})
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"HUGE"', "1e999"))
    with pytest.raises(UserError, match="1e999 is not a number"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("field", ["samples", "bytes"])
def test_an_edited_sum_is_refused(tmp_path: Path, field: str) -> None:
    edit(tmp_path, **{field: 7})
    with pytest.raises(UserError, match=f"was edited: {field} 7 does not match its shards"):
        read_manifest(tmp_path)


def test_a_manifest_and_its_sizes_are_written_both_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MANIFEST.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, value: Any) -> None:
        if "shards" in value:
            raise OSError(28, "No space left on device")
        path.write_text(json.dumps(value))

    monkeypatch.setattr("shards.format.manifest.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        Manifest((FIRST,), {}).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("changes", [{"format_version": 3}, {"format": "other"}])
def test_a_newer_or_foreign_format_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    edit(tmp_path, **changes)
    with pytest.raises(
        UserError, match=r"is not readable by this version \(it reads uniemox-shards up to 2\)"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "uniemox-shards", "format_version": "1"}', "\ufeff{}"]
)
def test_a_file_that_is_not_a_manifest_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest"):
        read_manifest(tmp_path)


def test_a_manifest_without_samples_is_refused(tmp_path: Path) -> None:
    Manifest((), {}).write(tmp_path)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path, "data.path")
    assert str(caught.value) == f"data.path={tmp_path}: has no samples; pack a source with pictures"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path / "no", "data.path")
    assert (
        str(caught.value) == f"data.path={tmp_path}/no: no such folder; build it with `uniemox shards pack`"
    )


def test_the_folder_above_splits_names_them(tmp_path: Path) -> None:
    for split in ("train", "test"):
        MANIFEST.write(tmp_path / split)
    with pytest.raises(UserError, match=r"has no manifest\.json; name one of its splits: test, train"):
        read_manifest(tmp_path)
    assert find_manifest_folders(tmp_path) == [tmp_path / "test", tmp_path / "train"]
    assert find_manifest_folders(tmp_path / "test") == [tmp_path / "test"]
    assert find_manifest_folders(tmp_path / "nowhere") == []


# ---- FORMAT.md, the contract

DOCUMENT = (Path(shards.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
SAMPLE, RECORD = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCUMENT, re.S))


def test_the_documented_manifest_has_the_documented_identity(tmp_path: Path) -> None:
    manifest = Manifest(tuple(ShardEntry(**entry) for entry in RECORD["shards"]), RECORD["provenance"])
    assert manifest.identity == RECORD["identity"]
    manifest.write(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == RECORD
    assert f"`{json.dumps({'000000.tar': 11})}`" in DOCUMENT
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"000000.tar": 11}


def test_the_code_writes_the_documented_sample() -> None:
    record = parse_record(SAMPLE)
    persons = tuple(Person.from_json(person) for person in record["persons"])
    fields = {**record, "captions": tuple(record["captions"]), "persons": persons}
    fields["distribution"] = fields.pop("label_distribution")
    assert Sample(key="k", image=b"", extension="webp", **fields).to_json() == SAMPLE


def test_the_documented_settings_are_those_of_a_pack() -> None:
    assert PackSettings("workers.parquet").to_json() == RECORD["provenance"]["settings"]


def test_the_document_names_every_column_of_the_index() -> None:
    table = DOCUMENT.split("## The index")[1].split("##")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == [
        *SCHEMA.names,
        *OPTIONAL.names,
        REFUSED.name,
    ]
