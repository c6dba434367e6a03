"""Published emotion sets by name (`--preset`), and how splits are drawn for sets that have none."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import yaml

from shards.storage import parse_place
from uniemox_dist.core.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A published set. presets.yaml documents the fields."""

    labels: tuple[str, ...] = ()
    distribution_labels: tuple[str, ...] = ()
    inside: str | None = None
    split: dict[str, float] = field(default_factory=dict)
    divide: dict[str, dict[str, float]] = field(default_factory=dict)
    by_group: bool = False
    dimension_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def locate(self, source: str) -> str:
        """The folder that contains the pictures."""
        if self.inside and (parse_place(source, "SOURCE") / self.inside).is_dir():
            return str(parse_place(source, "SOURCE") / self.inside)
        return source


def load_presets() -> dict[str, Preset]:
    """All presets by name."""
    text = (resources.files("shards") / "sources" / "presets.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    lists = ("labels", "distribution_labels")
    for entry in entries.values():
        entry.update({name: tuple(entry[name]) for name in lists if name in entry})
    return {name: Preset(**entry) for name, entry in entries.items()}


def find_preset(name: str | None) -> Preset:
    """The preset with this name (in any case); an empty preset for None.

    Raises:
        UserError: for an unknown name.
    """
    if name is None:
        return Preset()
    known = load_presets()
    if name.lower() not in known:
        raise UserError(f"--preset={name}: not known; valid are {', '.join(known)}")
    return known[name.lower()]


class Labels:
    """A declared label set: finds the declared spelling of a label."""

    def __init__(self, declared: Sequence[str]) -> None:
        self.declared = tuple(declared)
        self._spelling = {label.casefold(): label for label in declared}

    def canonical(self, label: str | None) -> str | None:
        """The declared spelling of a label; the label itself if nothing is declared; None if it is not in the set."""
        if not self._spelling or label is None:
            return label
        return self._spelling.get(label.strip().casefold())


def draw64(seed: int, text: str) -> int:
    """64 pseudo-random bits from a seed and a name, the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def assign_shares(strata_N: np.ndarray, draws_N: np.ndarray, shares: dict[str, float]) -> np.ndarray:
    """Assigns each of N records to a share; returns N positions in `shares`.

    The records of a stratum are sorted by their draws and cut by the shares. Counts are rounded by the largest
    remainder method; of equal remainders the earlier share comes first.
    """
    chosen_N = np.empty(len(strata_N), np.int64)
    fractions = np.array(list(shares.values()), float) / sum(shares.values())
    order = np.lexsort((draws_N, strata_N))
    bounds = np.flatnonzero(np.diff(strata_N[order])) + 1
    for members in np.split(order, bounds):
        exact = fractions * len(members)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        lacking = np.argsort(-(exact - counts), kind="stable")[: len(members) - counts.sum()]
        counts[lacking] += 1
        chosen_N[members] = np.repeat(np.arange(len(shares)), counts)
    return chosen_N
