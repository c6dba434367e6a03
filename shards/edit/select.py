"""`uniemox shards select` and `split`: subsets of data sets, written into new tars. On request tars are linked instead,
and new indexes list the samples; readers without an index then see the others, too."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.detect.types import Person
from shards.edit.expressions import apply_filter
from shards.edit.links import link_file
from shards.edit.output import Note, Output, ignore, open_output
from shards.format.encode import Encoded, encode, is_current
from shards.format.entries import ShardEntry
from shards.format.index import check_tar, index_path, read_shard_rows, rows_sha256, write_index
from shards.format.manifest import Manifest, read_manifest
from shards.format.rejected import write_rejected
from shards.format.sample import PICTURE, Sample
from shards.format.writer import ShardWriter
from shards.pack.listing import SPLIT_NAME
from shards.sources import Record, Slice
from shards.sources.layouts.wds import read_tar
from shards.sources.presets import assign_shares, draw64
from shards.storage import Place, is_local, read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import convert_read_errors, convert_write_errors, sha256_bytes, sha256_file

COPY_BYTES, COPY_SAMPLES = 256_000_000, 10_000
"""Largest shard that is written: the defaults of `shards pack`."""
OVERLAP = "overlap"
"""The reason in rejected.parquet of samples that are near-copies of others."""
Chooser = Callable[[pa.Table], np.ndarray]
"""Maps the rows of an index to booleans: whether each belongs to the subset."""


def select(
    folder: Place,
    out: Place,
    *,
    labels: tuple[str, ...] = (),
    filter_text: str | None = None,
    without: Mapping[str, str] | None = None,
    link: bool = False,
    note: Note = ignore,
) -> Manifest:
    """Writes a new data set of the samples that have one of `labels` and match a filter, without those whose keys are
    in `without`; these are listed in rejected.parquet with the reason that it maps them to.

    With `link` the tars are links to those of `folder`. They hold all samples, and only the index knows the subset.
    `note` receives a line if the same command was interrupted, and this one continues it.

    Raises:
        UserError: if no sample matches, no sample has a label, the filter is illegal, a shard does not match the
            manifest, or `out` exists or cannot be written.
    """
    _check_links(folder, out, link)
    manifest = read_manifest(folder, "DIR")
    known = _labels(folder, manifest) if labels else {}
    for label in labels:
        if label not in known:
            some = ", ".join(sorted(map(str, known))[:12])
            raise UserError(f"--label={label}: no sample of {folder} has this label; its labels are {some}")

    def chosen(table: pa.Table) -> np.ndarray:
        keep_R = np.ones(table.num_rows, bool)
        if labels:
            keep_R &= np.array([label in labels for label in table["label"].to_pylist()], bool)
        if filter_text is not None:
            keep_R &= np.asarray(apply_filter(table, filter_text).to_numpy(zero_copy_only=False), bool)
        if without:
            keys = table["key"].to_pylist()
            dropped = [{"source": k, "reason": OVERLAP, "detail": without[k]} for k in keys if k in without]
            rejected.extend(dropped)
            keep_R &= np.array([key not in without for key in keys], bool)
        return keep_R

    rejected: list[dict[str, str]] = []
    why: dict[str, Any] = {"labels": list(labels), "filter": filter_text}
    if without is not None:
        why["without_overlap"] = len(without)
    settings = {"labels": list(labels), "filter": filter_text, "link": link}
    source = [_list_shards(manifest), without]
    opened = open_output(out, "select", settings, source, note)
    with convert_write_errors(f"OUT={out}"), opened as output:
        subset = _subset(folder, manifest, output, "", chosen, {"selected": why}, link)
        if subset is None:
            raise UserError(
                f"DIR={folder}: no sample matches {_describe(labels, filter_text)}; relax the conditions"
            )
        if without is not None:
            write_rejected(output.folder, rejected)
    return subset


def split(
    folder: Place,
    out: Place,
    shares: dict[str, float],
    *,
    seed: int = 0,
    link: bool = False,
    note: Note = ignore,
) -> dict[str, Manifest]:
    """Cuts a data set into splits under `out`, per label, in the order of draws from the seed and the keys. `note` is
    that of `select`.

    Raises:
        UserError: if a split would be empty, a shard does not match the manifest, or `out` exists or cannot be written.
    """
    _check_links(folder, out, link)
    manifest = read_manifest(folder, "DIR")
    codes: dict[str | None, int] = {}
    strata: list[int] = []
    draws: list[int] = []
    for entry in manifest.shards:
        table = read_shard_rows(folder, entry, ["key", "label"])
        strata += [codes.setdefault(label, len(codes)) for label in table["label"].to_pylist()]
        draws += [draw64(seed, key) for key in table["key"].to_pylist()]
    share_N = assign_shares(np.array(strata), np.array(draws, np.uint64), shares)
    made: dict[str, Manifest] = {}
    settings = {"shares": [list(share) for share in shares.items()], "seed": seed, "link": link}
    opened = open_output(out, "split", settings, _list_shards(manifest), note)
    with convert_write_errors(f"OUT={out}"), opened as output:
        for number, name in enumerate(shares):
            chosen = _in_turn(share_N == number, [entry.samples for entry in manifest.shards])
            why = {"split": {"shares": shares, "seed": seed, "name": name}}
            subset = _subset(folder, manifest, output, name, chosen, why, link)
            if subset is None:
                raise UserError(
                    f"--shares {name}={shares[name]}: no sample falls into this split; give it a larger share"
                )
            made[name] = subset
    return made


def _list_shards(manifest: Manifest) -> list[Any]:
    """What determines the bytes that are read from a data set, and those of the new manifests."""
    return [[asdict(entry) for entry in manifest.shards], manifest.provenance]


def _in_turn(keep_N: np.ndarray, samples: list[int]) -> Chooser:
    """A chooser that returns parts of a choice over all samples, shard after shard."""
    pieces = iter(np.split(keep_N, np.cumsum(samples)))
    return lambda _: next(pieces)


def parse_shares(text: str) -> dict[str, float]:
    """`train=80,val=10,test=10` as names and shares.

    Raises:
        UserError: for anything else.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in shares:
            raise UserError(f"--shares={text}: {name} occurs twice; give each split one share")
        try:
            shares[name] = float(value)
        except ValueError:
            shares[name] = 0.0
        if not SPLIT_NAME.fullmatch(name) or not 0 < shares[name] < float("inf"):
            raise UserError(f"--shares={text}: {part!r} is not NAME=SHARE; try train=80,val=10,test=10")
    if sum(shares.values()) == float("inf"):
        raise UserError(f"--shares={text}: the sum is too large; try train=80,val=10,test=10")
    return shares


def _check_links(folder: Place, out: Place, link: bool) -> None:
    """
    Raises:
        UserError: if links are requested where there are none.
    """
    for field, place in (("DIR", folder), ("OUT", out)):
        if link and not is_local(place):
            raise UserError(f"--link: {field}={place} is on a store, which has no links; leave --link out")


def _subset(
    folder: Place,
    manifest: Manifest,
    output: Output,
    name: str,
    chooser: Chooser,
    why: dict[str, Any],
    link: bool,
) -> Manifest | None:
    """Writes the chosen samples as a data set into folder `name` of an output; returns None if there are none."""
    target = output.folder / name
    if link:
        entries = [
            linked
            for entry in manifest.shards
            if (linked := _link_shard(folder, entry, target, chooser)) is not None
        ]
    else:
        entries = _copy_shards(folder, manifest, output, name, chooser)
    if not entries:
        return None
    subset = Manifest(tuple(entries), {**manifest.provenance, **why, "of": manifest.identity})
    subset.write(target)
    return subset


def _link_shard(folder: Place, entry: ShardEntry, target: Path, chooser: Chooser) -> ShardEntry | None:
    """Links one shard, with an index of the chosen samples; returns None if there are none."""
    check_tar(folder, entry, "DIR")
    table = read_shard_rows(folder, entry)
    keep_R = chooser(table)
    if not keep_R.any():
        return None
    link_file(folder / entry.name, target / entry.name)
    index = index_path(target, entry.name)
    if keep_R.all():
        link_file(index_path(folder, entry.name), index)
        return entry
    rows = table.filter(pa.array(keep_R)).to_pylist()
    write_index(index, rows)
    return replace(entry, samples=len(rows), index_sha256=sha256_file(index), rows_sha256=rows_sha256(rows))


def _copy_shards(
    folder: Place, manifest: Manifest, output: Output, name: str, chooser: Chooser
) -> list[ShardEntry]:
    """Writes the chosen samples of all shards into new tars."""
    done = output.complete.get(name, [])
    left_out = sum(entry.samples for entry in done)

    def finish(entry: ShardEntry) -> None:
        output.finish_shard(name, entry, sum(entry.samples for entry in writer.entries))

    writer = ShardWriter(
        output.folder / name,
        shard_bytes=COPY_BYTES,
        shard_samples=COPY_SAMPLES,
        closing=lambda: finish,
    )
    writer.entries += done
    try:
        for entry in manifest.shards:
            check_tar(folder, entry, "DIR")
            table = read_shard_rows(folder, entry)
            rows = table.filter(pa.array(chooser(table))).to_pylist()
            for sample in _read_samples(folder / entry.name, rows[left_out:]):
                writer.add_encoded(sample)
            left_out = max(0, left_out - len(rows))
        return writer.close()
    except BaseException:
        with suppress(OSError):
            writer.wait()  # otherwise its thread writes into a folder that is about to be deleted
        raise


def _read_samples(tar: Place, rows: list[dict[str, Any]]) -> Iterator[Encoded]:
    """The samples of some rows of a tar's index, as `shards pack` writes them. Those of other programs and of earlier
    versions are encoded again; their pictures stay as they are."""
    records: dict[int, Record] | None = None
    for row in rows:
        with convert_read_errors(f"DIR={tar}"):
            data = read_range(tar, row["sample_offset"], row["sample_length"])
            first = row["image_offset"] - row["sample_offset"]
            image = data[first : first + row["image_length"]] if first >= 0 else b""
            if len(image) < row["image_length"]:  # other programs may put a sample's members anywhere
                image = read_range(tar, row["image_offset"], row["image_length"])
        if sha256_bytes(image) != row["image_sha256"]:
            raise UserError(
                f"DIR={tar}: {row['key']}: the picture's bytes have changed since packing (SHA-256); remove bad "
                f"shards with `uniemox shards verify --quarantine`"
            )
        if is_current(row["key"], data):
            fields = {k: v for k, v in row.items() if not k.endswith(("_offset", "_length"))}
            yield Encoded(data, row["image_length"], fields)
            continue
        if records is None:
            records = {
                record.image.offset: record
                for _, record in read_tar(tar, "DIR")
                if isinstance(record.image, Slice)
            }
        yield encode(_make_sample(tar, row, image, records))


def _make_sample(tar: Place, row: dict[str, Any], image: bytes, records: dict[int, Record]) -> Sample:
    """The sample of a row of the index; most of its JSON is only in the tar."""
    record = records.get(row["image_offset"])
    if record is None:
        raise UserError(f"DIR={tar}: {row['key']}: the tar has no such sample; index it again")
    return Sample(
        key=row["key"],
        image=image,
        extension=PICTURE,
        width=row["width"],
        height=row["height"],
        source=record.name,
        captions=tuple(row["captions"]),
        label=row["label"],
        distribution=record.distribution,
        attributes=record.attributes,
        persons=tuple(
            Person(tuple(person["box"]), person["score"], json.loads(person["labels"]))
            for person in row["persons"]
        ),
        image_sha256=row["image_sha256"],
    )


def _labels(folder: Place, manifest: Manifest) -> set[str | None]:
    found: set[str | None] = set()
    for entry in manifest.shards:
        found.update(read_shard_rows(folder, entry, ["label"])["label"].unique().to_pylist())
    return found


def _describe(labels: tuple[str, ...], filter_text: str | None) -> str:
    parts = [f"--label {label}" for label in labels] + ([f"--filter {filter_text!r}"] if filter_text else [])
    return " and ".join(parts) or "no condition"
