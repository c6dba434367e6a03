"""Manifests of a job: read and checked by rank 0, and kept once on each node.

The manifest of 100,000 shards has 35 MB and takes a second to parse. The other ranks receive its table (12 MB), its
identity and its provenance.
"""

import ctypes
from collections.abc import Sequence
from mmap import mmap
from typing import cast

import torch

from shards.format.entries import ShardTable
from shards.format.manifest import Manifest, find_manifest, read_manifest
from uniemox_dist.core.errors import Fault
from uniemox_dist.core.files import is_remote
from uniemox_dist.data.origin import ShardOrigin
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.node_memory import share_on_nodes
from uniemox_dist.distributed.world import World


def read_shared_manifests(
    places: Sequence[tuple[str, str]], world: World, device: torch.device, *, retry_s: float = 0.0
) -> list[Manifest]:
    """Reads the manifests of several data sets, each a folder and the name of its setting. Collective.

    Rank 0 alone reads. The other ranks check that folders on their own node exist.

    Raises:
        UserError: as `read_manifest`, naming the hosts where a folder is missing.
        Fault: if a disk or server does not answer for `retry_s`.
    """
    origins = [ShardOrigin(folder, field) for folder, field in places]
    for origin in origins:
        origin.retry_s = retry_s

    def find() -> None:
        for origin in origins:
            if not is_remote(origin.url):
                origin.retry("its manifest", lambda origin=origin: find_manifest(origin.url, origin.field))  # type: ignore[misc]

    collectives.on_all(world, find)
    return [_read(origin, world, device) for origin in origins]


def _read(origin: ShardOrigin, world: World, device: torch.device) -> Manifest:
    tables: list[ShardTable] = []  # on rank 0

    def read() -> Manifest | str:
        try:
            manifest = origin.retry("its manifest", lambda: read_manifest(origin.url, origin.field))
        except Fault as error:
            return str(error)
        assert isinstance(manifest.shards, ShardTable)
        tables.append(manifest.shards)
        # Its identity and number of samples are computed already, and sent with it.
        found = Manifest((), manifest.provenance, manifest.format_version)
        found.__dict__.update(identity=manifest.identity, samples=manifest.samples)
        return found

    found: Manifest | str = collectives.on_main(world, read)
    if tables and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps several megabytes of what reading needed
    if isinstance(found, str):
        raise Fault(found)
    content = cast(mmap, tables[0].content.obj) if tables else None
    table = ShardTable(share_on_nodes(content, world, device))
    manifest = Manifest(table, found.provenance, found.format_version)
    manifest.__dict__.update(identity=found.identity, samples=found.samples)
    return manifest
