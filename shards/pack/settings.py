"""What a user asks of a pack: the settings that decide its bytes."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from shards.pack.prepare import Filters
from shards.pack.recordable import text
from shards.pack.reencode import Shrink
from uniemox_dist.core.errors import UserError

CHECKS = ("decode", "header")


@dataclass(frozen=True)
class PackSettings:
    """Stands in the manifest's provenance, so that a data set tells how it was made."""

    source: str
    layout: str = "table"
    persons: str = "nanodet"
    shard_mb: float = 256.0
    shard_samples: int = 10_000
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    captions: str | None = None
    """Templates: None (given captions pass unchanged), "shipped", or a YAML file."""
    check: str = "decode"
    """"decode" goes through every picture's data, "header" trusts its header."""
    shrink: Shrink = field(default_factory=Shrink)
    filters: Filters = field(default_factory=Filters)
    keep_labels: tuple[str, ...] = ()
    """Labels that are packed; none: all."""

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be meant."""
        if not self.source:
            raise UserError('SOURCE="": is empty; name a table, a folder or tars, such as . for this folder')
        if not 0 < self.shard_mb * 1e6 < math.inf:  # NaN is no number of MB either
            raise UserError(f"--shard-size={self.shard_mb}: give a positive number of MB")
        if self.check not in CHECKS:
            raise UserError(f"--check={self.check}: not known; valid are {', '.join(CHECKS)}")
        if not 1 <= self.shrink.quality <= 100:
            raise UserError(f"--quality={self.shrink.quality}: give 1 to 100")
        if self.filters.aspect is not None and not 1 <= self.filters.aspect < math.inf:
            raise UserError(
                f"--keep-aspect={self.filters.aspect}: longer over shorter side is 1 or more, and finite"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; what is no Unicode, such as bytes of a file name, stands as escapes."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return text(value) if isinstance(value, str) else value


def checked_licence(licence: str | None) -> str | None:
    """A licence as manifests and model cards hold it: one line.

    Raises:
        UserError: for an empty one, one of several lines, and one that is longer than a name.
    """
    if licence is not None and not (licence.strip() and licence.isprintable() and len(licence) <= 200):
        raise UserError(
            f"--licence={licence[:60]!r}: give a name in one line, at most 200 characters, such as MIT or CC-BY-4.0"
        )
    return licence


def parse_part(part: str) -> tuple[int, int]:
    """`I/N` as (I, N) with I from 1 to N; 0/N is N/N, so that counting from 0 covers the same parts.

    Raises:
        UserError: for anything else.
    """
    first, _, second = part.partition("/")
    if (
        not (first.isdecimal() and second.isdecimal())
        or not 0 <= int(first) <= int(second)
        or int(second) < 1
    ):
        raise UserError(f"--part={part}: expected I/N with I from 1 to N, such as 3/8")
    return int(first) or int(second), int(second)
