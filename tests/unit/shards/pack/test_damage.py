"""Damaged data sets: every command names the file in one line and writes no result."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.format.index import (
    index_path,
    read_all_rows,
    read_group,
    read_group_ends,
    read_index,
    rows_sha256,
    to_rows,
)
from shards.format.manifest import read_manifest
from shards.inspect.verify import quarantine, verify
from shards.pool import map_in_order
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, Fault, UserError

INDEX, TAR = "index/000001.parquet", "000001.tar"
MAKING = (
    ["select", "{data}", "{out}", "--filter", "side > 0", "--link"],
    ["select", "{data}", "{out}"],
    ["split", "{data}", "{out}", "--link"],
    ["split", "{data}", "{out}"],
)
DESCRIBING = (["stats", "{data}"], ["report", "{data}", "--out", "{out}"])


@pytest.fixture
def data(photo_shards: Path, tmp_path: Path) -> Path:
    """20 pictures in three shards, ours to damage."""
    return Path(shutil.copytree(photo_shards, tmp_path / "data"))


def fails(
    commands: tuple[list[str], ...], data: Path, capfd: pytest.CaptureFixture[str], *, names: str
) -> None:
    """Each command ends with 2 and one line that names a file, and writes nothing."""
    before = sorted(data.parent.rglob("*"))
    for command in commands:
        arguments = [text.format(data=data, out=data.parent / "out") for text in command]
        assert run(["shards", *arguments]) == EXIT_USER, command
        *warnings, line = capfd.readouterr().err.splitlines()
        assert len(warnings) == ("--link" in command)
        assert line.startswith("uniemox: error: ")
        assert names in line, line
        assert sorted(data.parent.rglob("*")) == before


def rewrite(path: Path, name: str, value: Any, kind: pa.DataType | None = None) -> None:
    """Gives a column of an index another value in all rows."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    column = pa.array([value] * table.num_rows, kind or table.schema.field(name).type)
    pq.write_table(table.set_column(at, name, column), path)


def person(score: float = 0.5, box: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)) -> list[dict[str, Any]]:
    return [{"box": box, "score": score, "labels": "{}"}]


# ---- indexes

BAD_COLUMNS: dict[str, tuple[str, Any, pa.DataType | None]] = {
    "type": ("sample_offset", "x", pa.string()),
    "null offset": ("image_offset", None, None),
    "negative offset": ("image_offset", -5, None),
    "negative length": ("image_length", -5, None),
    "null key": ("key", None, None),
    "null hash": ("image_sha256", None, None),
    "null caption": ("captions", ["a", None], None),
    "null person": ("persons", [None], None),
    "NaN score": ("persons", person(math.nan), None),
    "NaN box": ("persons", person(box=(0, math.nan, 1, 1)), None),
    "box outside": ("persons", person(box=(0, 0, 1, 2)), None),
    "box turned": ("persons", person(box=(0.5, 0, 0.1, 1)), None),
}


@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_values_that_no_index_has_are_refused_by_column(kind: str, data: Path) -> None:
    name, value, type_ = BAD_COLUMNS[kind]
    rewrite(data / INDEX, name, value, type_)
    for reading in (
        lambda: read_index(data / INDEX),
        lambda: read_index(data / INDEX, [name]),
        lambda: read_group(data / INDEX, 0, [name]),
    ):
        with pytest.raises(UserError, match=rf"{INDEX}: column {name} of the index"):
            reading()
    other = "label" if name == "key" else "key"
    assert read_index(data / INDEX, [other]).num_rows == 8
    [verdict] = [verdict for verdict in verify([data]) if verdict.problems]
    assert verdict.shard == TAR
    assert f"column {name} of the index" in verdict.problems[-1]


def test_rows_without_label_captions_and_persons_are_valid(data: Path) -> None:
    for name in ("label", "captions", "persons"):
        rewrite(data / INDEX, name, None)
    assert read_index(data / INDEX).num_rows == 8


def test_a_flipped_bit_anywhere_in_an_index_is_an_error_of_one_kind(data: Path) -> None:
    path, content = data / INDEX, (data / INDEX).read_bytes()
    draw = random.Random(0)
    problems = []
    for at in [*range(0, len(content), 23), *range(len(content) - 1500, len(content), 3)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            rows_sha256(to_rows(read_all_rows(path)))
            read_group_ends(path)
        except UserError as error:
            problems.append(str(error))
    assert len(problems) > 300  # in some places a bit changes nothing that anybody reads
    assert all(text.startswith(f"{path}: ") and len(text.splitlines()) == 1 for text in problems)


def footer(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 0xFF
    path.write_bytes(bytes(content))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


INDEX_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "footer": footer,
    "missing": os.remove,
    "folder": folder,
    "another shard's": lambda path: shutil.copy(path.with_name("000002.parquet"), path),
    "other rows": lambda path: rewrite(path, "label", "love"),
    "without a column": lambda path: pq.write_table(pq.read_table(path).drop_columns(["label"]), path),
}


@pytest.mark.parametrize("kind", INDEX_DAMAGE)
def test_nothing_is_made_of_a_damaged_index(kind: str, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    INDEX_DAMAGE[kind](data / INDEX)
    fails((*MAKING, *DESCRIBING), data, capfd, names=INDEX)
    [verdict] = [verdict for verdict in verify([data]) if verdict.problems]
    assert verdict.shard == TAR
    assert run(["shards", "verify", str(data), "--quarantine"]) == EXIT_USER
    assert run(["shards", "verify", str(data)]) == EXIT_DONE
    assert read_manifest(data).samples == 12


def test_a_manifest_that_counts_other_rows_than_its_index_is_not_used(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((data / "manifest.json").read_text())
    rows = to_rows(read_all_rows(data / INDEX))
    from shards.format.index import write_index
    from uniemox_dist.core.files import sha256_file

    write_index(data / INDEX, rows[:-1])
    record["shards"][1]["index_sha256"] = sha256_file(data / INDEX)  # which the identity does not cover
    (data / "manifest.json").write_text(json.dumps(record))
    fails(MAKING, data, capfd, names=f"{INDEX}: the index has 7 samples, but the manifest states 8")


# ---- tars


def test_nothing_is_made_of_a_tar_of_another_size(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.truncate(data / TAR, 5000)
    fails(MAKING, data, capfd, names=f"DIR={data}: {TAR} has 5000 bytes instead of")
    (data / TAR).unlink()
    fails(MAKING, data, capfd, names=f"DIR={data}: {TAR} is missing")


def test_copying_checks_every_picture(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = read_index(data / INDEX).to_pylist()[3]
    with open(data / TAR, "r+b") as file:
        file.seek(row["image_offset"] + 100)
        file.write(b"\0\0\0")
    says = f"DIR={data / TAR}: {row['key']}: the picture's bytes have changed since packing"
    fails(MAKING[1::2], data, capfd, names=says)
    fails(MAKING[3:], data, capfd, names=says)


# ---- the other files


@pytest.mark.parametrize("damage", ["bytes", "columns", "null"])
def test_an_invalid_list_of_refusals_is_named(
    damage: str, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = data / "rejected.parquet"
    if damage == "bytes":
        path.write_text("x")
    elif damage == "columns":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        pq.write_table(
            pa.table({name: pa.array([None], "string") for name in ("source", "reason", "detail")}), path
        )
    fails(DESCRIBING, data, capfd, names=f"{path}: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[]", "differs from the manifest"),
        ('{"000000.tar": 8, "000001.tar": 8, "000002.tar": 5}', "differs from the manifest"),
    ],
)
def test_wrong_sizes_are_reported_and_repaired_without_touching_a_shard(
    text: str | None, problem: str, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = read_manifest(data)
    (data / "sizes.json").unlink()
    if text is not None:
        (data / "sizes.json").write_text(text)
    check = ["shards", "verify", str(data), "--workers", "0"]
    assert run(check) == EXIT_USER
    out = capfd.readouterr().out
    assert f"{data}/sizes.json: {problem}\n" in out
    assert "3 shards, 20 samples: no bad shards" in out
    assert run([*check, "--quarantine"]) == EXIT_USER
    assert "rewrote sizes.json; 20 samples are left" in capfd.readouterr().out
    assert read_manifest(data) == before
    assert json.loads((data / "sizes.json").read_text()) == before.sizes
    assert run(check) == EXIT_DONE
    assert not (data / "quarantine").exists()


def test_a_second_quarantine_adds_to_the_first(data: Path) -> None:
    for name in ("000000.tar", "000002.tar"):
        os.truncate(data / name, 5000)
        quarantine(verify([data]))
    assert read_manifest(data).provenance["quarantined"] == ["000000.tar", "000002.tar"]
    assert sorted(path.name for path in (data / "quarantine").glob("*.tar")) == ["000000.tar", "000002.tar"]
    assert index_path(data / "quarantine", "000002.tar").is_file()


def test_a_killed_worker_is_a_one_line_fault_and_not_a_user_error() -> None:
    assert list(map_in_order(abs, [(1,), (-2,)], workers=0)) == [1, 2]
    with pytest.raises(Fault, match=r"a worker died .* start again with fewer --workers"):
        list(map_in_order(os._exit, [(9,)], workers=1))
