"""The pipeline source -> check -> persons -> writer, over any number of processes with the same bytes.

A pack that was killed goes on behind its last whole shard: `partial` says where they lie, `journal` which they are.
"""

import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.detect.registry import make_detector
from shards.format.manifest import Manifest, manifest_folders, read_manifest
from shards.pack.captions import load_captioner
from shards.pack.journal import Journal
from shards.pack.listing import Listing
from shards.pack.partial import PART, WORK, go_on_moving, growing, is_taken, publish
from shards.pack.prepare import Preparation
from shards.pack.settings import PackSettings, checked_licence
from shards.pack.walk import PackResult, Progress, Walk
from shards.pack.workers import Workers
from shards.sources import SourceOptions, open_source
from shards.sources.presets import find_preset
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path, read_json, write_json

REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def pack(
    settings: PackSettings,
    out: Path,
    *,
    workers: int = 0,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    licence: str | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Packs a source, or one part of it, into `out` (or `out/<split>` where there are splits).

    Args:
        licence: what may be done with the pictures; for the manifests, and the cards of models trained on them.

    Raises:
        UserError: `out` exists, the source is not of its layout or holds nothing that can be packed, or there is
            no room to write.
    """
    checked_licence(licence)
    if is_taken(out):
        return _reuse(settings, part, licence, out, resume)
    detector = make_detector(settings.persons)  # a wrong name or missing runtime ends here, not in a worker
    captioner = load_captioner(settings.captions)
    preset = find_preset(settings.preset)
    with growing(out, resume) as partial, Workers(workers) as pool:
        work = partial / WORK
        options = SourceOptions(settings.columns, settings.persons == "source")
        records = open_source(settings.layout, preset.locate(settings.source), options)
        listing = Listing.of(
            records, work, seed=settings.seed, preset=preset, keep_labels=settings.keep_labels
        )
        provenance = {
            "settings": settings.to_json(),
            "captions": None if captioner is None else captioner.identity,
            "labels": list(preset.labels),
            "splits": {"made": preset.split or preset.divide, "seed": settings.seed}
            if listing.made_splits
            else None,
            "detector": detector.identity,
            "source_sha256": listing.digest,
        }
        preparation = Preparation(
            settings.persons, settings.check, settings.shrink, settings.filters, captioner, work
        )
        journal = Journal(work, {**provenance, "part": part})
        walk = Walk(settings, partial, listing, part, journal, progress)
        walk.go(preparation, pool)
        listing.spool.close()
        if licence is not None:
            provenance["licence"] = licence
        _finish(walk, partial, provenance, part)
        publish(partial, out)
    walk.result.folders = manifest_folders(out)
    return walk.result


def _reuse(
    settings: PackSettings, part: tuple[int, int] | None, licence: str | None, out: Path, resume: bool
) -> PackResult:
    """A pack that is complete, if it was made with these settings."""
    if resume:
        go_on_moving(out)
    folders = manifest_folders(out) if out.is_dir() else []
    if not (resume and (folders or (out / PART).is_file())):
        raise UserError(
            f"OUT={out}: exists; give another folder, delete it, or use --resume to keep a complete pack"
        )
    manifests = {folder: read_manifest(folder, "OUT") for folder in folders}
    for stated in [*(manifest.provenance for manifest in manifests.values()), *_note(out)]:
        same_part = (stated.get("part") or None) == (part and list(part))
        if stated.get("settings") != settings.to_json() or not same_part:
            raise UserError(f"OUT={out}: was packed with other settings; give another folder or delete it")
        if licence is not None and stated.get("licence") != licence:
            raise UserError(
                f"OUT={out}: was packed with --licence={stated.get('licence') or ''}; give the same, or delete it"
            )
    shutil.rmtree(out / WORK, ignore_errors=True)
    packed = {
        folder.name if folder != out else "": manifest.samples for folder, manifest in manifests.items()
    }
    return PackResult(folders, sum(packed.values()), Counter(packed), reused=True)


def _note(out: Path) -> list[dict[str, Any]]:
    """What a part says of itself: one without any sample has no manifest that would."""
    if not (out / PART).is_file():
        return []
    try:
        return [dict(read_json(out / PART))]
    except (ValueError, TypeError):
        raise UserError(f"OUT={out}: {PART} cannot be read; delete OUT and pack this part again") from None


def _finish(walk: Walk, partial: Path, provenance: dict[str, Any], part: tuple[int, int] | None) -> None:
    """Writes manifests and the list of what was refused."""
    result = walk.result
    if not walk.writers and part is None:
        first = result.rejected[0] if result.rejected else None
        because = f"; the first: {first.source}: {first.detail}" if first else ""
        raise UserError(
            f"SOURCE={walk.settings.source}: nothing to pack, {len(result.rejected)} records refused{because}"
        )
    reasons = Counter(rejected.reason for rejected in result.rejected)
    provenance |= {"records": result.records, "rejected": dict(sorted(reasons.items()))}
    if part is not None:
        provenance["part"] = list(part)
        write_json(partial / PART, {**provenance, "packed": dict(result.packed)})
    write_rejected(partial, [asdict(rejected) for rejected in result.rejected])
    for name, writer in walk.writers.items():
        Manifest(tuple(writer.entries), provenance).write(partial / name)


def write_rejected(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rejected.parquet."""
    with atomic_path(folder / "rejected.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=REJECTED), temporary)
