"""The settings of a pack that determine its bytes, and their parsing."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shards.format.sample import DIMENSIONS
from shards.pack.prepare import Filters
from shards.pack.shrink import Shrink
from shards.sources.validate import escape_text
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets

MODES = ("keep", "mark", "drop")
"""What happens to near-copies."""
CHECKS = ("decode", "header")
_ADDED: dict[str, Any] = {
    "allow_outside": False,
    "picture": None,
    "near_duplicates": "keep",
    "pictures": None,
    "header": (),
    "delimiter": None,
    "dimension_ranges": {},
}
"""Settings that older manifests do not state, and their defaults."""


@dataclass(frozen=True)
class PackSettings:
    """The settings of a pack; they are part of the manifest's provenance."""

    source: str
    layout: str | None = "table"
    """None: that of the preset."""
    persons: str = "nanodet"
    shard_mb: float = 256.0
    shard_samples: int = 10_000
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    preset: str | None = None
    captions: str | None = None
    """Templates: None (captions of the source pass unchanged), "shipped", or a YAML file."""
    check: str = "decode"
    """"decode" reads all data of every picture, "header" trusts its header."""
    shrink: Shrink = field(default_factory=Shrink)
    filters: Filters = field(default_factory=Filters)
    keep_labels: tuple[str, ...] = ()
    """Labels that are packed; empty: all."""
    allow_outside: bool = False
    """True if paths in a table may lead out of its folder."""
    picture: str | None = None
    """Which picture of a sample with several is packed; None: the first one."""
    pictures: str | None = None
    """The folder below which the paths in a table are, relative to SOURCE; None: the table's own."""
    header: tuple[str, ...] = ()
    """The columns of tables without a header line."""
    delimiter: str | None = None
    """The delimiter of tables: one character, or `space`; None: found by extension and header."""
    near_duplicates: str = "keep"
    """`keep`, `mark` (in the attributes of the later one) or `drop`."""
    dimension_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value of valence, arousal and dominance, if they are stated."""

    def __post_init__(self) -> None:
        """Raises UserError for illegal values."""
        if not self.source:
            raise UserError('SOURCE="": is empty; give a table, a folder or tars, such as . for this folder')
        if not 0 < self.shard_mb * 1e6 < math.inf:  # false also for NaN
            raise UserError(f"--shard-size={self.shard_mb}: give a positive number of MB")
        if self.picture == "":
            raise UserError(
                "--picture=: is empty; give a part of a member's name, such as left for k.left.jpg"
            )
        if self.delimiter is not None and self.delimiter != "space" and len(self.delimiter) != 1:
            raise UserError(f"--delimiter={self.delimiter}: give one character, tab, or space")
        if self.check not in CHECKS:
            raise UserError(f"--check={self.check}: not known; valid are {', '.join(CHECKS)}")
        if self.near_duplicates not in MODES:
            raise UserError(
                f"--near-duplicates={self.near_duplicates}: not known; valid are {', '.join(MODES)}"
            )
        if not 1 <= self.shrink.quality <= 100:
            raise UserError(f"--quality={self.shrink.quality}: give 1 to 100")
        if self.filters.aspect is not None and not 1 <= self.filters.aspect < math.inf:
            raise UserError(
                f"--keep-aspect={self.filters.aspect}: give a finite number of 1 or more (longer over shorter side)"
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, without keys in URLs; text that is not Unicode, such as bytes of a file name, is
        escaped.

        Settings that were added after the first manifests are stated only if they are not the default.
        """
        values = {**asdict(self), "source": hide_secrets(self.source)}
        return {
            name: _plain(value)
            for name, value in values.items()
            if name not in _ADDED or value != _ADDED[name]
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return escape_text(value) if isinstance(value, str) else value


def check_licence(licence: str | None) -> str | None:
    """Returns a licence for manifests and model cards, which is one line.

    Raises:
        UserError: for an empty one, one of several lines, and one of more than 200 characters.
    """
    if licence is not None and not (licence.strip() and licence.isprintable() and len(licence) <= 200):
        raise UserError(
            f"--licence={licence[:60]!r}: give a name of one line and at most 200 characters, such as MIT or CC-BY-4.0"
        )
    return licence


def parse_part(part: str) -> tuple[int, int]:
    """Parses `I/N` to (I, N) with I from 1 to N. 0/N is N/N, so that arrays counted from 0 cover the same parts.

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


def parse_ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Parses values of `--dimension-range`, such as `valence=1:9`.

    Raises:
        UserError: for anything else.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, limits = text.partition("=")
        try:
            low, high = map(float, limits.split(":"))
        except ValueError:
            low, high = math.nan, math.nan
        if name not in DIMENSIONS or not -math.inf < low < high < math.inf:
            raise UserError(
                f"--dimension-range={text}: expected NAME=LOW:HIGH, such as valence=1:9; NAME is one of "
                f"{', '.join(DIMENSIONS)}"
            )
        ranges[name] = low, high
    return ranges


def parse_limits(option: str, text: str | None) -> tuple[int, int | None]:
    """Parses `MIN`, `MIN:MAX` or `:MAX` to (minimum, maximum); None for no upper limit.

    Raises:
        UserError: for anything else.
    """
    if text is None:
        return 0, None
    low, _, high = text.partition(":")
    if not all(part.isdecimal() for part in (low, high) if part) or not (low or high):
        raise UserError(f"{option}={text}: expected MIN or MIN:MAX in whole numbers, such as 128:4096")
    limits = int(low or 0), int(high) if high else None
    if limits[1] is not None and limits[1] < limits[0]:
        raise UserError(f"{option}={text}: the minimum is larger than the maximum; swap them")
    return limits
