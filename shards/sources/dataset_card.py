"""The `data_files` in the card (README.md) of a repository of Hugging Face's `datasets`, which state its splits:

    ---
    configs:
    - config_name: default
      data_files:
      - split: train
        path: data/train-*          # or a list; `*`, `**`, `?` and [ranges]
      - split: test
        path: holdout/*.csv
    ---

`data_files` may also be a path or a list of paths, without splits. Of several configurations the one called `default`,
or with `default: true`, counts.
"""

from collections import Counter
from typing import Any

from shards.sources import SourceOptions
from shards.sources.files import read_side_file, split_name
from shards.sources.tables import ARROW
from shards.storage import Place
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted

CARD = "README.md"
CARD_BYTES = 1 << 20
TABLES = (".parquet", *ARROW, ".jsonl", ".ndjson", ".csv", ".tsv")
"""Extensions of tables."""


def read_card(folder: Place, options: SourceOptions) -> list[tuple[Place, str | None]]:
    """The tables of a repository and their splits, in the order of its card; empty if there is no card, or it names no
    tables that are there, or also other files. Notes a card that cannot be read, and splits whose tables are missing.
    """
    if not (folder / CARD).is_file():
        return []
    found: dict[Place, str | None] = {}
    missing = []
    try:
        for split, patterns in _data_files(folder):
            for pattern in patterns:
                paths = _match(folder, pattern)
                if any(path.suffix.lower() not in TABLES for path in paths):
                    return []
                missing += [] if paths else [pattern]
                found |= {path: split for path in paths if path not in found}
    except (UserError, ValueError) as error:
        options.findings.notes.append(f"{CARD} is not used: {error}")
        return []
    if found and missing:
        options.findings.notes.append(f"{CARD} names {', '.join(missing)[:200]}, which SOURCE does not have")
    if any(found.values()):
        counts = Counter(split or "no split" for split in found.values())
        stated = ", ".join(f"{split} ({counted(count, 'table')})" for split, count in counts.items())
        options.findings.notes.append(f"splits of {CARD}: {stated}")
    return list(found.items())


def _data_files(folder: Place) -> list[tuple[str | None, list[str]]]:
    """Splits and patterns of the configuration that counts."""
    lines = read_side_file(folder / CARD, CARD_BYTES).decode("utf-8-sig").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return []
    end = next(number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
    content = parse_yaml("\n".join(["", *lines[1:end]]), CARD)
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, list):
        return []
    configs = [config for config in configs if isinstance(config, dict) and "data_files" in config]
    named = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"]
    chosen = configs if len(configs) == 1 else named[:1]
    return [entry for config in chosen for entry in _entries(config["data_files"])]


def _entries(stated: Any) -> list[tuple[str | None, list[str]]]:
    """Splits and patterns of `data_files`, in all forms that `datasets` accepts."""
    entries: list[tuple[str | None, list[str]]] = []
    for entry in stated if isinstance(stated, list) else [stated]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, entry)
        stated_paths: list[Any] = paths if isinstance(paths, list) else [paths]
        patterns = [path for path in stated_paths if isinstance(path, str)]
        if len(patterns) < len(stated_paths):
            raise ValueError(f"data_files: {str(entry)[:80]!r} states no path")
        entries.append((split_name(split) if isinstance(split, str) else None, patterns))
    return entries


def _match(folder: Place, pattern: str) -> list[Place]:
    """The files of a pattern, sorted.

    Raises:
        ValueError: for a pattern that leads out of the folder.
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if ".." in parts or pattern.startswith("/") or ":" in pattern or not parts:
        raise ValueError(f"data_files: {pattern[:80]!r} does not lie below its folder")
    if parts[-1] == "**":
        parts.append("*")
    return sorted((path for path in folder.glob("/".join(parts)) if path.is_file()), key=str)
