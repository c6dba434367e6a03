"""Data sets of version 1 of the format: pictures named after their format, and null, lists and objects in JSON."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards.format.encode import Encoded, _member
from shards.format.index import read_shard_rows
from shards.format.manifest import Manifest
from shards.format.writer import ShardWriter
from shards.pictures.formats import identify_format
from uniemox_dist.data.reader import ShardReader

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def rewrite_as_before(folder: Path, out: Path, version: int = 1) -> Path:
    """Writes a data set of version 1, byte for byte as the packer of then did, or of version 2 before it had
    distributions."""
    reader = ShardReader.from_folder(folder, "path")
    entries = []
    for shard, entry in enumerate(reader.manifest.shards):
        shutil.rmtree(out / "one", ignore_errors=True)
        writer = ShardWriter(out / "one", shard_bytes=1 << 40, shard_samples=1 << 40)
        for row, fields in enumerate(read_shard_rows(folder, entry).to_pylist()):
            raw, record = reader.read(shard, row), reader.record(shard, row)
            del record["label_distribution"]
            form = identify_format(raw.image)
            assert form is not None
            if version == 2:
                texts = {name: _text(record[name]) for name in ("attributes", "persons")}
                record |= {"label": raw.label or "", "captions": list(raw.captions) or [""], **texts}
            extension = "jpg" if version == 2 else EXTENSIONS[form.name]
            members = [
                (f"{raw.key}.{extension}", raw.image),
                (f"{raw.key}.json", _text(record).encode()),
                (f"{raw.key}.txt", (raw.captions[0] if raw.captions else "").encode()),
            ]
            data = b"".join(part for name, content in members for part in _member(name, content))
            fields = {k: v for k, v in fields.items() if not k.endswith(("_offset", "_length"))}
            writer.add_encoded(Encoded(data, len(raw.image), fields))
        [made] = writer.close()
        (out / "one/000000.tar").rename(out / entry.name)
        (out / "index").mkdir(exist_ok=True)
        (out / "one/index/000000.parquet").rename(out / f"index/{Path(entry.name).stem}.parquet")
        entries.append(replace(made, name=entry.name))
    shutil.rmtree(out / "one")
    Manifest(tuple(entries), reader.manifest.provenance, version).write(out)
    return out


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
