"""The pipeline of `uniemox shards pack`: list, prepare (check, detect persons, encode), write.

The bytes do not depend on the number of processes. A killed pack continues after its last complete shard: `partial.py`
keeps the shards, `journal.py` records them.
"""

import json
import shutil
from collections import ChainMap, Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shards.detect.registry import make_detector
from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import write_rejected
from shards.pack import remote as remote_pack
from shards.pack.append import Existing, is_append
from shards.pack.captions import load_captioner
from shards.pack.journal import Journal
from shards.pack.listing import Listing
from shards.pack.near_duplicates import load_twins
from shards.pack.opening import open_settings
from shards.pack.packer import Packer, PackResult
from shards.pack.partial import (
    PART,
    WORK,
    delete_partial,
    finish_publishing,
    is_taken,
    open_partial,
    publish,
    publish_into,
    read_plan,
)
from shards.pack.prepare import Preparation
from shards.pack.remote import RemoteJournal
from shards.pack.settings import PackSettings, check_licence
from shards.pack.workers import Workers
from shards.pool import Progress
from shards.remote_folder import RemoteFolder, open_remote_folder
from shards.sources import may_repeat_pictures, open_source
from shards.sources.download import is_web
from shards.sources.presets import is_file
from shards.storage import Place, is_local
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets, is_remote, write_json


def pack(
    settings: PackSettings,
    out: Place,
    *,
    workers: int = 0,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    licence: str | None = None,
    append: bool = False,
    retry_refused: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs a source, or one part of it, into `out` (or `out/<split>` if it has splits).

    Args:
        resume: continue an interrupted pack, and reuse a complete one with the same settings.
        part: (I, N) packs only part I of N.
        licence: the licence of the pictures; goes into the manifests and the cards of models trained on them.
        append: add the records to the finished data set at `out`, in new shards.
        retry_refused: read the pictures again that the finished data set at `out` refused as unreadable or damaged, and
            append those that can be packed. The source and settings must be the same as before.

    Raises:
        UserError: if `out` exists, the source does not have the layout or has no picture that can be packed, or the
        disk is full.
    """
    check_licence(licence)
    remote = (
        None
        if is_local(out)
        else open_remote_folder(out, again="continue with the same command and --resume")
    )
    if append and retry_refused:
        raise UserError("--append and --retry-refused: give only one of them")
    found = open_settings(settings)
    settings, preset = found.settings, found.preset
    existing = _open_existing(out, part, remote, resume) if append or retry_refused else None
    if existing is not None and retry_refused and not existing.refused_names():
        return _unchanged(existing)
    if existing is None and (is_taken(out) if remote is None else remote_pack.is_taken(remote)):
        return _reuse(settings, part, licence, out, resume, remote)
    detector = make_detector(settings.persons)  # a wrong name or missing runtime fails here, not in a worker
    captioner = load_captioner(settings.captions)
    opened = (
        open_partial(out, resume, appends=existing is not None)
        if remote is None
        else remote_pack.open_remote(remote, resume, appends=existing is not None)
    )
    with opened as partial, Workers(workers) as pool:
        work = partial / WORK
        work.mkdir(parents=True, exist_ok=True)
        options = replace(found.options, scratch=work)
        records = open_source(found.layout, found.place, options)
        ranges = ChainMap(
            settings.dimension_ranges, preset.dimension_ranges, options.findings.dimension_ranges
        )
        listing = Listing.read(
            records,
            work,
            ranges=ranges,
            seed=settings.seed,
            preset=preset,
            keep_labels=settings.keep_labels,
            several_rows=may_repeat_pictures(found.layout),
        )
        provenance: dict[str, Any] = {
            "settings": settings.to_json(),
            "captions": None if captioner is None else captioner.identity,
            "labels": list(preset.labels),
            "splits": {"made": preset.split or preset.divide, "seed": settings.seed}
            if listing.made_splits
            else None,
            "detector": detector.identity,
            "source_sha256": listing.digest,
        }
        if ranges:
            provenance["dimension_ranges"] = {name: list(limits) for name, limits in sorted(ranges.items())}
        if is_file(settings.preset):
            provenance["preset"] = preset.model_dump(mode="json", exclude_defaults=True)
        if settings.preset is not None:
            place = "" if found.place == settings.source else f" in {hide_secrets(found.place)}"
            options.findings.notes.insert(0, f"found{place}: {listing.describe()}")
            options.findings.notes += [listing.unknown_labels] if listing.unknown_labels else []
        preparation = Preparation(
            settings.persons,
            settings.check,
            settings.shrink,
            settings.filters,
            captioner,
            work,
            tuple(sorted(options.findings.roots)),
            (settings.source,) if is_remote(settings.source) and not is_web(settings.source) else (),
        )
        plan: dict[str, Any] = {**provenance, "part": part}
        retried: frozenset[int] | None = None
        if existing is not None:
            existing.check_splits(listing.used_splits)
            plan["appended_to"] = existing.identities
            if retry_refused:
                if not existing.has_only(settings.to_json(), listing.digest):
                    raise UserError(
                        f"--retry-refused: OUT={hide_secrets(out)} was not packed from this SOURCE with these settings "
                        "alone; give the same ones, or use --append"
                    )
                names = existing.refused_names()
                retried, existing = listing.find(names), existing.without(names)
                plan["retried"] = provenance["retried"] = True
                licence = licence or existing.licence
            elif resume and existing.contains(settings.to_json(), listing.digest):
                delete_partial(partial)
                return _unchanged(existing)
        if remote is None:
            journal: Journal | RemoteJournal = Journal(work, plan)
        else:
            journal = RemoteJournal(remote, partial, plan, existing)
        if existing is not None:
            existing.check_unchanged()
        packer = Packer(settings, partial, listing, part, journal, progress, existing, retried)
        packer.result.findings = options.findings
        if settings.near_duplicates != "keep":
            packer.twins = load_twins(
                packer.tasks(), work, preparation.roots, workers, json.loads(json.dumps(plan))
            )
        packer.run(preparation, pool)
        listing.spool.close()
        if licence is not None:
            provenance["licence"] = licence
        is_vain = packer.has_only_copies or (retry_refused and not packer.writers)
        if existing is not None and is_vain:
            if isinstance(journal, RemoteJournal):
                journal.discard()
            delete_partial(partial)
            return _unchanged(existing, packer.result)
        _finish(packer, partial, provenance, part, existing)
        if isinstance(journal, RemoteJournal):
            journal.publish()
        elif existing is not None:
            publish_into(partial, out)
        else:
            publish(partial, out)
    packer.result.folders = find_manifest_folders(out)
    return packer.result


def _open_existing(
    out: Place, part: tuple[int, int] | None, remote: RemoteFolder | None, resume: bool
) -> Existing:
    """The finished data set to which a pack is appended.

    Raises:
        UserError: if there is none, or it or the new pack is a part of a parallel pack.
    """
    if part is not None:
        raise UserError(
            "--append: is not possible with --part; pack the parts, merge them, then merge both data sets"
        )
    if resume and remote is None:
        finish_publishing(out)
    elif resume and remote is not None:
        remote_pack.finish_publishing(remote)
    plan = read_plan(out) if remote is None else remote_pack.read_plan(remote)
    if plan is not None and not is_append(plan):
        raise UserError(
            f"OUT={remote or out}: a pack into it was interrupted; finish it with --resume and without --append first"
        )
    if (out / PART).is_file():
        raise UserError(
            f"OUT={remote or out}: is a part of a parallel pack; join the parts with `shards merge` first"
        )
    return Existing.read(out)


def _unchanged(existing: Existing, refused: PackResult | None = None) -> PackResult:
    """The result if nothing was appended: all records are in the data set already."""
    result = refused or PackResult()
    result.packed = Counter({split: manifest.samples for split, manifest in existing.manifests.items()})
    result.reused, result.records = True, sum(result.packed.values())
    return result


def _reuse(
    settings: PackSettings,
    part: tuple[int, int] | None,
    licence: str | None,
    out: Place,
    resume: bool,
    remote: RemoteFolder | None,
) -> PackResult:
    """The result of a complete pack, if it was made with these settings."""
    if resume and remote is None:
        finish_publishing(out)
    folders = find_manifest_folders(out) if remote is not None or out.is_dir() else []
    if not (resume and (folders or (out / PART).is_file())):
        raise UserError(
            f"OUT={remote or out}: exists; give another folder, delete it, or use --resume to keep a complete pack"
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
    if remote is None:
        shutil.rmtree(out / WORK, ignore_errors=True)
    else:
        remote_pack.clear_leftovers(remote)
    packed = {
        folder.name if folder != out else "": manifest.samples for folder, manifest in manifests.items()
    }
    return PackResult(folders, sum(packed.values()), Counter(packed), reused=True)


def _read_part(out: Place) -> list[dict[str, Any]]:
    """The content of part.json, which describes a part even if it has no sample and so no manifest."""
    if not (out / PART).is_file():
        return []
    try:
        return [dict(json.loads((out / PART).read_bytes()))]
    except (ValueError, TypeError):
        raise UserError(f"OUT={out}: {PART} cannot be read; delete OUT and pack this part again") from None


def _finish(
    packer: Packer,
    partial: Path,
    provenance: dict[str, Any],
    part: tuple[int, int] | None,
    existing: Existing | None,
) -> None:
    """Writes manifests and the list of refused records."""
    result = packer.result
    if not packer.writers and part is None:
        first = result.rejected[0] if result.rejected else None
        because = f"; the first: {first.source}: {first.detail}" if first else ""
        raise UserError(
            f"SOURCE={packer.settings.source}: nothing to pack, "
            + (f"all {len(result.rejected)} records were refused{because}" if first else "it has no records")
        )
    reasons = Counter(rejected.reason for rejected in result.rejected)
    provenance |= {"records": result.records, "rejected": dict(sorted(reasons.items()))}
    if result.findings.not_pictures:
        provenance["not_pictures"] = dict(sorted(result.findings.not_pictures.items()))
    if result.converted:
        provenance["converted"] = dict(sorted(result.converted.items()))
    if part is not None:
        provenance["part"] = list(part)
        write_json(partial / PART, {**provenance, "packed": dict(result.packed)})
    rejected = [asdict(rejected) for rejected in result.rejected]
    entries = {name: tuple(writer.entries) for name, writer in packer.writers.items()}
    manifests = {name: Manifest(shards, provenance) for name, shards in entries.items()}
    if existing is not None:
        rejected = [*(existing.rejected or []), *rejected]
        manifests = existing.extended(entries, provenance)
    write_rejected(partial, rejected)
    for name, manifest in manifests.items():
        (partial / name).mkdir(exist_ok=True)
        manifest.write(partial / name)
