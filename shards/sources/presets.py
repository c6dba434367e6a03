"""Published emotion sets by name or as a user's file (`--preset`), and how splits are drawn for sets that have none."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from shards.sources.preset_schema import Form, Preset
from uniemox_dist.config.sections import explain_errors
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import format_os_error

FILES = (".yaml", ".yml")
"""Extensions by which `--preset` is a file."""


@lru_cache(maxsize=1)
def load_presets() -> dict[str, Preset]:
    """All shipped presets by name."""
    text = (resources.files("shards") / "sources" / "presets.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = parse_yaml(text, "presets.yaml")
    return {name: make_preset(entry, f"presets.yaml: {name}") for name, entry in entries.items()}


def find_preset(name: str | None) -> Preset:
    """The shipped preset with this name (in any case), or the one in a user's file; an empty preset for None.

    Raises:
        UserError: for an unknown name, and for a file that is unreadable or wrong, with one line per mistake.
    """
    if name is None:
        return Preset()
    if name.lower().endswith(FILES):
        return read_preset(name)
    known = load_presets()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--preset={name}: not known; {meant}valid are {', '.join(known)}, and files that end with .yaml"
        )
    return known[name.lower()]


def is_file(name: str | None) -> bool:
    """Whether `--preset` is a user's file."""
    return name is not None and name.lower().endswith(FILES)


def read_preset(path: str) -> Preset:
    """The preset in a user's file.

    Raises:
        UserError: if it is unreadable or wrong, with one line per mistake.
    """
    where = f"--preset={path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = format_os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"{where}: cannot be read ({reason}); give a YAML file, or a name") from None
    return make_preset(parse_yaml(text, where), where)


def make_preset(entry: Any, where: str) -> Preset:
    """A preset of its YAML values. Fields of a form that are not inside of `forms` hold for all forms."""
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(f"{where}: holds no fields; give `labels:` and what else presets.yaml shows")
    known = (*Preset.model_fields, *Form.model_fields)
    lines = []
    for name in entry:
        if name not in known:
            near = _nearest_keys(str(name), known)
            meant = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{name}: unknown key; {meant}")
    shared = {name: value for name, value in entry.items() if name in Form.model_fields}
    values = {name: value for name, value in entry.items() if name in Preset.model_fields}
    forms = values.pop("forms", [{}])
    if isinstance(forms, list):
        forms = [{**shared, **form} if isinstance(form, Mapping) else form for form in forms]
    try:
        preset = Preset.model_validate({**values, "forms": forms})
    except ValidationError as error:
        prefix = "" if "forms" in entry else "forms.0."
        lines += [line.replace(prefix, "") for line in explain_errors(error, Preset)]
    if lines:
        raise UserError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines)))
    return preset


def _nearest_keys(name: str, known: Sequence[str]) -> list[str]:
    """The keys that are spelled most like a name; two if both are equally near."""
    near = difflib.get_close_matches(name, known, 2, 0.5)
    scores = [difflib.SequenceMatcher(None, key, name).ratio() for key in near]
    return [key for key, score in zip(near, scores) if score == scores[0]]


class Labels:
    """A declared label set: finds the declared spelling of a label."""

    def __init__(self, declared: Sequence[str], synonyms: Mapping[str, str] | None = None) -> None:
        """
        Args:
            synonyms: other spellings -> declared labels.
        """
        self.declared = tuple(declared)
        self._spelling = {label.casefold(): label for label in declared}
        for spelling, label in (synonyms or {}).items():
            if label.casefold() in self._spelling:
                self._spelling.setdefault(spelling.casefold(), self._spelling[label.casefold()])

    def canonical(self, label: str | None) -> str | None:
        """The declared spelling of a label; the label itself if nothing is declared; None if it is not in the set."""
        if not self._spelling or label is None:
            return label
        return self._spelling.get(label.strip().casefold())

    def knows(self, label: str) -> bool:
        """Whether a name is a declared label or one of its spellings."""
        return label.strip().casefold() in self._spelling

    def nearest(self, label: str) -> str | None:
        """The declared label that is spelled most like another one; None if none is similar."""
        near = difflib.get_close_matches(label.strip().casefold(), self._spelling, 1)
        return self._spelling[near[0]] if near else None


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
