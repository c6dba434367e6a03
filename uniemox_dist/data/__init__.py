"""Turns shards into micro-batches: the plan of samples, readers, views and the loader.

`ElasticShards` is for any training loop; see docs/elastic.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniemox_dist.data.elastic import ElasticShards
    from uniemox_dist.data.reader import DamagedSample
    from uniemox_dist.data.stream import Source

__all__ = ["DamagedSample", "ElasticShards", "Source"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because most users of this package need neither.
    if name == "ElasticShards":
        from uniemox_dist.data.elastic import ElasticShards

        return ElasticShards
    if name == "Source":
        from uniemox_dist.data.stream import Source

        return Source
    if name == "DamagedSample":
        from uniemox_dist.data.reader import DamagedSample

        return DamagedSample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
