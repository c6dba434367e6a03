"""Which files of a checkpoint are opened, and how many bytes are read."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniemox_dist.checkpoints.folders import Checkpoint, read_checkpoint
from uniemox_dist.checkpoints.format import (
    FragmentReader,
    own_files,
    owner,
    part_files,
    write_part,
)
from uniemox_dist.checkpoints.fragment_index import (
    FragmentIndex,
    build_index,
    fragment_key,
    list_cuts,
    part_name,
)
from uniemox_dist.core.errors import UserError

SHAPES = {"encoder.a": [24, 31], "encoder.b": [7], "decoder.c": [640], "fusion.d": []}
KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def flat_cut(ranks: int) -> list[dict[str, tuple[int, int]]]:
    """Stages 1 and 2: the parameters, one after the other, in equal partitions: [start, end) by rank and name."""
    total = sum(math.prod(shape) for shape in SHAPES.values())
    share = -(-total // (2 * ranks)) * 2
    cuts: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    offset = 0
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        for rank, cut in enumerate(cuts):
            a, b = max(offset, rank * share), min(offset + size, (rank + 1) * share)
            if a < b:
                cut[name] = a - offset, b - offset
        offset += size
    return cuts


def even_cut(ranks: int) -> list[dict[str, tuple[int, int]]]:
    """Stages 0 and 3: each parameter in equal shards."""
    cuts: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        share = -(-size // ranks)
        for rank, cut in enumerate(cuts):
            if rank * share < size:
                cut[name] = rank * share, min(size, (rank + 1) * share)
    return cuts


CUTS = {"flat": flat_cut, "even": even_cut}


def lengths(cut: dict[str, tuple[int, int]]) -> dict[str, int]:
    kinds = {name: (*KINDS, "ema") if name.startswith("encoder.") else KINDS for name in SHAPES}
    return {fragment_key(name, a, kind): b - a for name, (a, b) in cut.items() for kind in kinds[name]}


def number(name: str, kind: str) -> torch.Tensor:
    """The stored numbers of a parameter, all different."""
    size = math.prod(SHAPES[name])
    first = 1000 * list(SHAPES).index(name) + 10_000 * (*KINDS, "ema").index(kind)
    return torch.arange(first, first + size, dtype=torch.float32)


def write(folder: Path, cuts: list[dict[str, tuple[int, int]]], *, index: bool = True) -> Checkpoint:
    folder = folder / "step_00000001"
    folder.mkdir(parents=True)
    files = {}
    for rank, cut in enumerate(cuts):
        tensors = {}
        for key in lengths(cut):
            name, start, kind = key.rsplit("@", 2)
            tensors[key] = number(name, kind)[int(start) : cut[name][1]]
        size, sha256 = write_part(folder / part_name(rank), tensors)
        files[part_name(rank)] = {"bytes": size, "sha256": sha256}
    info: dict[str, Any] = {"format": "uniemox-checkpoint", "format_version": 1, "step": 1, "files": files}
    info["parameters"] = SHAPES
    if index:
        info["fragments"] = build_index([list_cuts(lengths(cut)) for cut in cuts])
    (folder / "complete.json").write_text(json.dumps(info))
    checkpoint = read_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


class Reads:
    """Counts files that are opened and bytes that are read by positioned reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.bytes = 0
        opened, read = os.open, os.preadv

        def count_open(path: Any, *arguments: Any, **named: Any) -> int:
            self.opened.append(Path(path).name)
            return opened(path, *arguments, **named)

        def count_read(file: int, buffers: Any, offset: int) -> int:
            done = read(file, buffers, offset)
            self.bytes += done
            return done

        monkeypatch.setattr(os, "open", count_open)
        monkeypatch.setattr(os, "preadv", count_read)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("before", "after"), [(64, 64), (64, 12), (8, 64), (1, 3), (16, 1)])
def test_a_reader_opens_the_files_that_overlap_and_reads_their_headers_and_its_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, before: int, after: int
) -> None:
    saved, wanted = CUTS[cut](before), CUTS[cut](after)
    checkpoint = write(tmp_path, saved)
    headers = {
        name: 8 + int.from_bytes((checkpoint.folder / name).read_bytes()[:8], "little")
        for name in part_files(checkpoint)
    }
    whole = 0
    for own in wanted:
        reads = Reads(monkeypatch)
        reader = FragmentReader(checkpoint)
        assert reads.opened == []
        needed = 0
        for key, length in lengths(own).items():
            name, start, kind = key.rsplit("@", 2)
            found = reader.read(name, kind, int(start), length)
            assert torch.equal(found, number(name, kind)[int(start) : int(start) + length])
            needed += 4 * length
        overlapping = {
            part_name(rank)
            for rank, there in enumerate(saved)
            for name, (a, b) in own.items()
            if name in there and max(a, there[name][0]) < min(b, there[name][1])
        }
        assert sorted(reads.opened) == sorted(overlapping)  # each once
        assert reads.bytes == needed + sum(headers[name] for name in overlapping)
        whole += needed
        monkeypatch.undo()
    numbers = sum(math.prod(s) * (4 if n.startswith("encoder.") else 3) for n, s in SHAPES.items())
    assert whole == 4 * numbers  # together once


@pytest.mark.parametrize("cut", CUTS)
def test_without_an_index_or_with_a_wrong_one_all_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    checkpoint = write(tmp_path, CUTS[cut](5), index=False)
    wrong = build_index([list_cuts(lengths(c)) for c in CUTS[cut](4)])
    wrong["fusion.d"] = {"fp32": "7:0+1*1"}
    for info in (checkpoint.info, {**checkpoint.info, "fragments": wrong}):
        reads = Reads(monkeypatch)
        reader = FragmentReader(Checkpoint(checkpoint.folder, info))
        assert sorted(reads.opened) == part_files(checkpoint)
        monkeypatch.undo()
        assert reader.has_ema
        for name, shape in SHAPES.items():
            assert torch.equal(reader.parameter(name), number(name, "fp32").view(shape))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "complete.json: the entry fragments names part_00007.safetensors, which is not in files" in line


def test_an_index_that_disagrees_with_a_file_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, flat_cut(3))
    other = build_index([list_cuts(lengths(cut)) for cut in even_cut(3)])
    reader = FragmentReader(Checkpoint(checkpoint.folder, {**checkpoint.info, "fragments": other}))
    with pytest.raises(UserError, match=r"part_0000\d\.safetensors: holds 0 numbers of decoder.c@0@fp32"):
        reader.parameter("decoder.c")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: f.pop("encoder.a"), "lacks encoder.a"),
        (lambda f: f["encoder.b"].update({"fp32": "0:0+6*1"}), "covers 6 of 7 numbers of encoder.b"),
        (lambda f: f["encoder.b"].update({"fp32": "0:0+3*1 1:4+3*1"}), "not cover encoder.b exactly once"),
        (lambda f: f["encoder.b"].update({"fp32": "0:0+5*1 1:4+3*1"}), "not cover encoder.b exactly once"),
        (lambda f: f["encoder.b"].update({"fp32": "0:0+7"}), "invalid run"),
        (lambda f: f["encoder.b"].update({"fp32": "0:0+0*7"}), "invalid run"),
        (lambda f: f["encoder.b"].update({"fp32": 5}), "is invalid"),
        (lambda f: f.update({"new": {"fp32": "0:0+7*1"}}), "is invalid"),
    ],
)
def test_an_invalid_index_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    info = write(tmp_path, even_cut(2)).info
    assert FragmentIndex.parse(info) is not None
    change(info["fragments"])
    with pytest.raises(ValueError, match=problem):
        FragmentIndex.parse(info)


@pytest.mark.parametrize("cut", CUTS)
def test_the_index_has_few_runs_for_any_number_of_ranks(cut: str) -> None:
    for ranks in (8, 64, 512, 4096):
        runs = build_index([list_cuts(lengths(c)) for c in CUTS[cut](ranks)])
        assert max(len(text.split()) for kinds in runs.values() for text in kinds.values()) <= 3


@given(st.integers(1, 40), st.integers(1, 40))
def test_each_file_has_one_owner_and_ranks_own_alike(parts: int, ranks: int) -> None:
    files = {part_name(i): {} for i in range(parts)} | {"fixed.safetensors": {}}
    checkpoint = Checkpoint(Path("nowhere"), {"files": files})
    owned = [own_files(checkpoint, rank, ranks) for rank in range(ranks)]
    assert sorted(name for own in owned for name in own) == sorted(files)
    assert owned[0][0] == "fixed.safetensors"
    counts = [len([name for name in own if name.startswith("part")]) for own in owned]
    assert max(counts) <= -(-parts // ranks)
    if parts == ranks:
        assert owned[1:] == [[part_name(rank)] for rank in range(1, ranks)]
    assert all(part_name(i) in owned[owner(i, parts, ranks)] for i in range(parts))
