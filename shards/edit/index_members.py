"""`uniemox shards index --members`: writes an index of tars with any members, which stay unchanged."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.edit.index_tars import choose_tars, find_tars
from shards.format.entries import ShardEntry
from shards.format.index import index_path, rows_sha256
from shards.format.manifest import MANIFEST, MEMBERS, Manifest
from shards.format.members import sample_sha256, write_members
from shards.format.rejected import REJECTED, write_rejected
from shards.format.sample import MEMBERS_NAME, MEMBERS_VERSION
from shards.format.tar_headers import BadTar
from shards.format.tar_names import split_tars
from shards.format.tars import refuse_compressed
from shards.format.webdataset_samples import Grouped, TarPass, load_webdataset
from shards.pack.prepare import Rejected
from shards.pack.settings import check_licence
from shards.pool import Progress, map_in_order
from shards.remote_folder import open_remote_folder, open_scratch
from shards.storage import (
    Place,
    describe_error,
    file_sizes,
    is_local,
    is_storage_error,
    open_seekable,
    parse_place,
)
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import (
    convert_read_errors,
    convert_write_errors,
    describe_missing_folder,
    hide_secrets,
    publish_dir,
    sha256_file,
)

TRIES, WAIT_S = 3, 5.0
"""How often a remote tar is read if that fails, and the pause before the second time; it doubles."""


@dataclass(frozen=True)
class Tars:
    """The tars of one folder that are to be indexed, and where their index goes."""

    folder: Place
    names: list[str]
    out: Place
    out_field: str
    """The argument or option that names `out`."""


def find_members(text: str, index: Place | None) -> Tars:
    """The tars that DIR names (a folder, a URL, or a pattern of tars), sorted, and the folder of their index.

    Raises:
        UserError: if a tar is missing or compressed, there is none, or the index has no place or one that is in use.
    """
    folder_text, chosen = split_tars(text, "DIR")
    folder, source = parse_place(folder_text, "DIR"), f"DIR={hide_secrets(text)}"
    if index is None and not is_local(folder):
        raise UserError(f"{source}: is remote; add --index FOLDER, a place for the index")
    if chosen is None:
        names = [path.name for path in find_tars(folder)] if is_local(folder) else _list(folder, source)
    elif is_local(folder) and not folder.is_dir():
        raise UserError(f"{source}: {folder}: {describe_missing_folder(folder)}; correct the pattern")
    else:
        names = choose_tars(sorted(chosen), source, "names no tars")
        sizes = file_sizes(folder, names)
        missing = next((name for name, size in zip(names, sizes) if size is None), None)
        if missing is not None:
            raise UserError(f"{source}: {missing} is missing; correct the pattern")
    tars = Tars(folder, names, index or folder / MEMBERS, "DIR" if index is None else "--index")
    _check_free(tars)
    return tars


def index_members(
    text: str,
    *,
    index: Place | None = None,
    workers: int = 0,
    licence: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Writes the index of the tars that `text` names into `index` or DIR/members: a manifest, index/ and
    rejected.parquet, all or none of them. Returns the manifest and the members that were left out.

    Raises:
        UserError: as `find_members`; or if a tar is incomplete, there is no sample, webdataset is not installed, or
            the folder cannot be written.
        Fault: if a store does not answer any more, or a worker is killed.
    """
    check_licence(licence)
    load_webdataset()
    tars = find_members(text, index)
    rejected: list[Rejected] = []
    entries: list[ShardEntry] = []
    with _open_unfinished(tars) as made:
        jobs = [(tars.folder, name, made) for name in tars.names]
        for entry, left_out in map_in_order(_index_tar, jobs, workers=workers, progress=progress):
            entries.append(entry)
            rejected += left_out
        reasons = Counter(refused.reason for refused in rejected)
        provenance: dict[str, Any] = {
            "grouped_by": f"webdataset {version('webdataset')}",
            "left_out": dict(sorted(reasons.items())),
        }
        if licence is not None:
            provenance["licence"] = licence
        manifest = Manifest(tuple(entries), provenance, MEMBERS_VERSION, MEMBERS_NAME)
        if not manifest.samples:
            first = f"; the first: {rejected[0].source}: {rejected[0].detail}" if rejected else ""
            raise UserError(
                f"DIR={hide_secrets(text)}: no sample in {len(tars.names)} tars; members need names such as "
                f"0001.jpg{first}"
            )
        write_rejected(made, [asdict(refused) for refused in rejected])
        manifest.write(made)
    return manifest, rejected


# ---- places


def _list(folder: Place, source: str) -> list[str]:
    """The names of the tars in a remote folder."""
    remote: Any = folder
    fix = "give a pattern such as folder/{000000..000012}.tar"
    try:
        found = remote.fs.ls(remote.path, detail=True)
    except FileNotFoundError:
        raise UserError(f"{source}: no such folder; correct the address, or {fix}") from None
    except Exception as error:
        if not is_storage_error(error) and not isinstance(error, NotImplementedError):
            raise
        raise UserError(f"{source}: cannot be listed ({describe_error(error)}); {fix}") from None
    names = sorted(entry["name"].rpartition("/")[2] for entry in found if entry["type"] != "directory")
    return choose_tars(names, source, f"has no .tar files; {fix}, or")


def _check_free(tars: Tars) -> None:
    """Raises UserError if the folder of the index has files."""
    out = tars.out
    fix = "delete that folder to index the tars again, or name another one with --index"
    where = f"{tars.out_field}={hide_secrets(out if tars.out_field == '--index' else tars.folder)}"
    if not is_local(out):
        if open_remote_folder(out, tars.out_field).read(MANIFEST) is not None:
            raise UserError(f"{where}: has a {MANIFEST} already; {fix}")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"{where}: {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        what = f"has an index already: {out}" if (out / MANIFEST).exists() else f"{out} is not empty"
        raise UserError(f"{where}: {what}; {fix}")


@contextmanager
def _open_unfinished(tars: Tars) -> Iterator[Path]:
    """Yields a folder for the files of the index, which becomes `tars.out` on success. Always deletes it otherwise."""
    if not is_local(tars.out):
        store = open_remote_folder(tars.out, tars.out_field)
        store.check_access(".members.access")
        with open_scratch() as scratch:
            yield scratch
            files = sorted(path.relative_to(scratch) for path in (scratch / "index").iterdir())
            for name in (*files, Path(REJECTED), Path(MANIFEST)):  # the manifest last: it names the others
                store.upload(scratch / name, str(name))
        return
    out = tars.out
    made = out.parent / f".{out.name}.tmp"
    fix = (
        "add --index FOLDER, a place that can be written"
        if tars.out_field == "DIR"
        else "give another folder"
    )
    with convert_write_errors(f"{tars.out_field}={out}", fix):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        try:
            yield made
            publish_dir(made, out)
        finally:
            shutil.rmtree(made, ignore_errors=True)


# ---- one tar


def _index_tar(folder: Place, name: str, made: Path) -> tuple[ShardEntry, list[Rejected]]:
    """Writes the index of one tar into `made`. Returns its manifest entry, and the members that were left out."""
    tar = folder / name
    if is_local(tar):
        with convert_read_errors(f"DIR={tar}", "copy it again or remove it"):
            found = _read_tar(tar)
    else:
        found = _read_remote(tar)
    index = index_path(made, name)
    write_members(index, found.rows)
    hashes = sha256_file(index), rows_sha256(found.rows)
    return ShardEntry(name, len(found.rows), found.size, found.sha256, *hashes), found.rejected


@dataclass(frozen=True)
class _Read:
    """The content of a tar."""

    rows: list[dict[str, Any]]
    rejected: list[Rejected]
    size: int
    sha256: str


def _read_remote(tar: Place) -> _Read:
    """Reads a remote tar, again if that fails.

    Raises:
        Fault: if it keeps failing.
    """
    wait_s = WAIT_S
    for left in reversed(range(TRIES)):
        try:
            return _read_tar(tar)
        except UserError:
            raise
        except Exception as error:
            if not is_storage_error(error):
                raise
            if not left:
                raise Fault(
                    f"DIR={hide_secrets(str(tar))}: cannot be read ({describe_error(error)}); start again when the "
                    "store answers"
                ) from None
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError


def _read_tar(tar: Place) -> _Read:
    rejected: list[Rejected] = []

    def refuse(member: str, reason: str, detail: str) -> None:
        rejected.append(Rejected(f"{tar.name}/{member}" if member else tar.name, reason, detail))

    with open_seekable(tar) as raw:
        refuse_compressed(raw, tar, "DIR")
        found = TarPass(raw, refuse)
        try:
            rows = [_row(sample) for sample in found]
        except BadTar as error:
            raise UserError(
                f"DIR={hide_secrets(str(tar))}: not a complete tar ({error}); copy it again or remove it"
            ) from None
    return _Read(rows, rejected, found.size, found.sha256)


def _row(sample: Grouped) -> dict[str, Any]:
    return {
        "key": sample.key,
        "members": [
            {"name": name, "offset": content.offset, "length": len(content.data)}
            for name, content in sample.members.items()
        ],
        "sha256": sample_sha256((name, content.data) for name, content in sample.members.items()),
    }
