"""`uniemox embed`: writes a table of vectors, with key, embedding, and the reason if a picture cannot be read.

    OUT.parquet            key text | embedding fixed-size list of float32, null after a failure | error text or null
    .OUT.parquet.parts/    while the table is written: one part per minute, each complete or absent

A killed command continues after its last complete part; the table is the same as without the kill.
Shape legend: B pictures, D width of the vectors.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from uniemox_dist import __version__
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    atomic_path,
    canonical_json,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)
from uniemox_dist.data.loader import view_settings
from uniemox_dist.inference.inputs import Batch, Pictures, load_batches, none_readable
from uniemox_dist.release.embedder import UniEmoX
from uniemox_dist.release.format import SUMS
from uniemox_dist.release.load import load_uniemox

SPACES = ("encoder", "fused")
SETTINGS = "settings.json"
PART_S = 60.0
"""Seconds between parts, which is the most work that a kill can lose."""
GROUP_ROWS = 4096
METADATA = b"uniemox"


@dataclass(frozen=True)
class Embedded:
    """The result of `embed`."""

    rows: int
    failed: int
    reasons: tuple[tuple[str, str], ...]
    """Name and reason of the first failures."""


def embed(
    source: str,
    out: Path,
    release: Path,
    *,
    space: str = "encoder",
    layout: str | None = None,
    batch: int = 64,
    workers: int = 0,
    device: str = "cpu",
    part_s: float = PART_S,
) -> Embedded:
    """Writes the table.

    Args:
        space: `encoder` (class tokens, not normalised) or `fused` (unit rows in the teacher's space).
        part_s: seconds between parts.

    Raises:
        UserError: if OUT exists, or was started with other settings; if input, release or space do not exist; if none
            of the pictures can be read.
    """
    if out.exists():
        raise UserError(f"OUT={out}: exists; give another file or delete it")
    pictures = Pictures(source, layout)
    model = load_uniemox(release, verify=True, device=device)
    if space == "fused" and not model.has_space:
        raise UserError(
            f"--space=fused: {release} was trained without a teacher and has no such space; use --space encoder"
        )
    width = model.facts["embedding_width"] if space == "fused" else model.student.model.width
    about = {
        "release": str(model.facts["run"]),
        "release_sha256": sha256_file(release / SUMS),
        "step": model.facts["step"],
        "space": space,
        "width": width,
        "teacher": (model.facts["teacher"] or {}).get("weights_sha256") if space == "fused" else None,
        "pictures": len(pictures),
        "input_sha256": sha256_bytes(canonical_json(pictures.identity)),
        "uniemox_dist": __version__,
    }
    new_folders = [folder for folder in out.absolute().parents if not folder.exists()]
    parts = out.with_name(f".{out.name}.parts")
    done = _open_parts(parts, about)
    settings = view_settings(Config.model_validate(model.facts["config"]))
    schema = make_schema(width, about)
    todo = load_batches(pictures, settings, batch=batch, workers=workers, first=min(done, len(pictures)))
    with tqdm(total=len(pictures), initial=done, desc="embedding", unit=" pictures", disable=None) as bar:
        rows: list[pa.RecordBatch] = []
        written = time.monotonic()
        for some in todo:
            rows.append(_rows(model, some, space, schema))
            bar.update(len(some.names))
            last = some.first + len(some.names)
            if time.monotonic() - written >= part_s or last == len(pictures):
                with atomic_path(parts / f"{last:012d}.parquet") as temporary:
                    pq.write_table(pa.Table.from_batches(rows, schema), temporary)
                rows, written = [], time.monotonic()
    try:
        return _join(parts, out, schema, source)
    except UserError:  # nothing is left of a refused command
        for folder in new_folders:
            with suppress(OSError):
                folder.rmdir()
        raise


def make_schema(width: int, about: dict[str, Any]) -> pa.Schema:
    """Columns of the table; its metadata hold the settings as JSON."""
    columns = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(pa.float32(), width)),
        pa.field("error", pa.string()),
    ]
    return pa.schema(columns, metadata={METADATA: json.dumps(about)})


def compute_vectors(model: UniEmoX, some: Batch, space: str) -> np.ndarray:
    """The vectors of one batch, B×D."""
    scene = some.scene_B3HW.to(model.device)
    if space == "encoder":
        found = model.encode(scene)
    else:
        alone = torch.equal(some.person_B3HW, some.scene_B3HW)  # without persons one pass is enough
        found = model.embed_views(scene, scene if alone else some.person_B3HW.to(model.device))
    rows: np.ndarray = found.float().cpu().numpy()
    return rows


def _rows(model: UniEmoX, some: Batch, space: str, schema: pa.Schema) -> pa.RecordBatch:
    found = compute_vectors(model, some, space)
    failed = np.array([error is not None for error in some.errors])
    flat = pa.array(found.reshape(-1), pa.float32())
    embedding = pa.FixedSizeListArray.from_arrays(flat, found.shape[1], mask=pa.array(failed))
    return pa.record_batch(
        [pa.array(some.names), embedding, pa.array(some.errors, pa.string())], schema=schema
    )


def _open_parts(parts: Path, settings: dict[str, Any]) -> int:
    """Makes the folder of parts, or opens that of a killed command. Returns how many rows it has."""
    if not (parts / SETTINGS).is_file():
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_json(parts / SETTINGS, settings)
        return 0
    there = read_json(parts / SETTINGS)
    if there != settings:
        changed = sorted(key for key in {*settings, *there} if there.get(key) != settings.get(key))
        raise UserError(
            f"OUT: {parts} was started with another {' and '.join(changed)}; give the same settings, or delete "
            "that folder"
        )
    return max((int(path.stem) for path in _complete(parts)), default=0)


def _complete(parts: Path) -> list[Path]:
    return sorted(path for path in parts.glob("*.parquet") if path.stem.isdigit())


def _join(parts: Path, out: Path, schema: pa.Schema, source: str) -> Embedded:
    rows = failed = 0
    reasons: list[tuple[str, str]] = []
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in _groups(parts, schema):
            writer.write_table(table)
            bad = table.filter(table["error"].is_valid())
            rows, failed = rows + len(table), failed + len(bad)
            reasons += list(zip(bad["key"].to_pylist(), bad["error"].to_pylist()))[: 5 - len(reasons)]
        if failed == rows:
            shutil.rmtree(parts)
            raise none_readable(f"INPUT={source}", rows, reasons)
    shutil.rmtree(parts)
    return Embedded(rows, failed, tuple(reasons))


def _groups(parts: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields all rows in groups of one size, independent of the parts."""
    rest = schema.empty_table()
    for path in _complete(parts):
        rest = pa.concat_tables([rest, pq.read_table(path)])
        while len(rest) >= GROUP_ROWS:
            yield rest.slice(0, GROUP_ROWS)
            rest = rest.slice(GROUP_ROWS)
    if len(rest):
        yield rest.combine_chunks()
