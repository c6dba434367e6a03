"""The pipeline of `uniemox shards pack`: list, prepare (check, detect persons, encode), write.

The bytes do not depend on the number of processes. A killed pack continues after its last complete shard: `partial.py`
keeps the shards, `journal.py` records them.
"""

import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.detect.registry import make_detector
from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import write_rejected
from shards.pack.captions import load_captioner
from shards.pack.journal import Journal
from shards.pack.listing import Listing
from shards.pack.packer import Packer, PackResult
from shards.pack.partial import PART, WORK, finish_publishing, is_taken, open_partial, publish
from shards.pack.prepare import Preparation
from shards.pack.settings import PackSettings, check_licence
from shards.pack.workers import Workers
from shards.pool import Progress
from shards.sources import SourceOptions, check_options, open_source
from shards.sources.presets import find_preset
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json, write_json


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
    """Packs a source, or one part of it, into `out` (or `out/<split>` if it has splits).

    Args:
        resume: continue an interrupted pack, and reuse a complete one with the same settings.
        part: (I, N) packs only part I of N.
        licence: the licence of the pictures; goes into the manifests and the cards of models trained on them.

    Raises:
        UserError: if `out` exists, the source does not have the layout or has no picture that can be packed, or the
        disk is full.
    """
    check_licence(licence)
    if is_taken(out):
        return _reuse(settings, part, licence, out, resume)
    options = SourceOptions(settings.columns, settings.persons == "source")
    check_options(settings.layout, options)
    detector = make_detector(settings.persons)  # a wrong name or missing runtime fails here, not in a worker
    captioner = load_captioner(settings.captions)
    preset = find_preset(settings.preset)
    with open_partial(out, resume) as partial, Workers(workers) as pool:
        work = partial / WORK
        records = open_source(settings.layout, preset.locate(settings.source), options)
        listing = Listing.read(
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
        packer = Packer(settings, partial, listing, part, journal, progress)
        packer.run(preparation, pool)
        listing.spool.close()
        if licence is not None:
            provenance["licence"] = licence
        _finish(packer, partial, provenance, part)
        publish(partial, out)
    packer.result.folders = find_manifest_folders(out)
    return packer.result


def _reuse(
    settings: PackSettings, part: tuple[int, int] | None, licence: str | None, out: Path, resume: bool
) -> PackResult:
    """The result of a complete pack, if it was made with these settings."""
    if resume:
        finish_publishing(out)
    folders = find_manifest_folders(out) if out.is_dir() else []
    if not (resume and (folders or (out / PART).is_file())):
        raise UserError(
            f"OUT={out}: exists; give another folder, delete it, or use --resume to keep a complete pack"
        )
    manifests = {folder: read_manifest(folder, "OUT") for folder in folders}
    for stated in [*(manifest.provenance for manifest in manifests.values()), *_read_part(out)]:
        same_part = (stated.get("part") or None) == (part and list(part))
        if stated.get("settings") != settings.to_json() or not same_part:
            raise UserError(f"OUT={out}: was packed with other settings; give another folder, or delete it")
        if licence is not None and stated.get("licence") != licence:
            raise UserError(
                f"OUT={out}: was packed with --licence={stated.get('licence') or ''}; give the same, or delete OUT"
            )
    shutil.rmtree(out / WORK, ignore_errors=True)
    packed = {
        folder.name if folder != out else "": manifest.samples for folder, manifest in manifests.items()
    }
    return PackResult(folders, sum(packed.values()), Counter(packed), reused=True)


def _read_part(out: Path) -> list[dict[str, Any]]:
    """The content of part.json, which describes a part even if it has no sample and so no manifest."""
    if not (out / PART).is_file():
        return []
    try:
        return [dict(read_json(out / PART))]
    except (ValueError, TypeError):
        raise UserError(f"OUT={out}: {PART} cannot be read; delete OUT and pack this part again") from None


def _finish(packer: Packer, partial: Path, provenance: dict[str, Any], part: tuple[int, int] | None) -> None:
    """Writes manifests and the list of refused records."""
    result = packer.result
    if not packer.writers and part is None:
        first = result.rejected[0] if result.rejected else None
        because = f"; the first: {first.source}: {first.detail}" if first else ""
        raise UserError(
            f"SOURCE={packer.settings.source}: nothing to pack, all {len(result.rejected)} records "
            f"were refused{because}"
        )
    reasons = Counter(rejected.reason for rejected in result.rejected)
    provenance |= {"records": result.records, "rejected": dict(sorted(reasons.items()))}
    if part is not None:
        provenance["part"] = list(part)
        write_json(partial / PART, {**provenance, "packed": dict(result.packed)})
    write_rejected(partial, [asdict(rejected) for rejected in result.rejected])
    for name, writer in packer.writers.items():
        Manifest(tuple(writer.entries), provenance).write(partial / name)
