"""The tables of a SOURCE, and the splits that their names or a repository's card state."""

import re
from importlib import resources
from pathlib import Path

from shards.sources import SourceOptions
from shards.sources.dataset_card import read_card
from shards.sources.files import SPLITS, name_below
from shards.sources.tables import ARROW
from shards.storage import Place, match_pattern, parse_place
from uniemox_dist.core.errors import UserError

SHIPPED = {"shipped:fluent_emoji": "fluent_emoji.parquet"}
CSV = (".csv", ".tsv", ".psv", ".txt")
JSON_LINES = (".jsonl", ".ndjson")
_SHARD = re.compile(r"(?P<split>.+?)(-\d+-of-\d+)?(-[0-9a-f]{16})?")
"""The name of one of Hugging Face's tables, such as train-00000-of-00001-0d49c5d7b8ac2ba4."""
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.parquet$")
"""The end of such a name."""


def find_tables(source: str, options: SourceOptions) -> tuple[list[tuple[Place, str]], list[str | None]]:
    """The tables of a source with their names, and their splits: those of the card of a repository, or else those of
    their names."""
    is_path = source not in SHIPPED and match_pattern(source, "SOURCE") is None
    folder = parse_place(source, "SOURCE")
    if is_path and folder.is_dir() and (stated := read_card(folder, options)):
        return [(path, name_below(path, source)) for path, _ in stated], [split for _, split in stated]
    tables = locate_tables(source)
    return tables, _splits_of_names(source, [name for _, name in tables])


def locate_tables(source: str) -> list[tuple[Place, str]]:
    """The tables of a source, with their names."""
    if source in SHIPPED:
        return [(Path(str(resources.files("shards") / "demo" / SHIPPED[source])), SHIPPED[source])]
    found = match_pattern(source, "SOURCE")
    if found is None:
        root = parse_place(source, "SOURCE")
        found = [root] if root.is_file() else _tables_in(source, root) if root.is_dir() else []
    if not found:
        raise UserError(
            f"SOURCE={source}: no such table; give a .parquet or .csv file, a folder of .parquet files, or "
            f"{', '.join(SHIPPED)}; for a folder of pictures or tars add --layout folder or --layout wds"
        )
    return [(path, name_below(path, source)) for path in found]


def _tables_in(source: str, folder: Place) -> list[Place]:
    """The tables in a folder, or else in its folders of splits: Parquet tables, or the only other kind; or else those
    of a repository of Hugging Face."""
    for pattern in ("", "*/"):
        for kinds in ((".parquet",), (*JSON_LINES, *ARROW, *CSV[:2])):
            found = {kind: sorted(folder.glob(f"{pattern}*{kind}"), key=str) for kind in kinds}
            if pattern:
                found = {
                    kind: [path for path in paths if path.parent.name.lower() in SPLITS]
                    for kind, paths in found.items()
                }
            present = [kind for kind in kinds if found[kind]]
            if len(present) > 1:
                raise UserError(
                    f"SOURCE={source}: has tables of several kinds ({', '.join(present)}); give a pattern such as "
                    f"{source}/{pattern}*{present[0]}"
                )
            if present:
                return found[present[0]]
    return _hugging_face_tables(source, folder)


def _hugging_face_tables(source: str, folder: Place) -> list[Place]:
    """The Parquet tables in `data/`, or in the folder of the only configuration: `NAME/train-00000-of-00001.parquet` or
    `NAME/train/0000.parquet`."""
    if found := sorted(folder.glob("data/*.parquet"), key=str):
        return found
    numbered = [path for path in folder.glob("*/*.parquet") if _NUMBERED.search(path.name)]
    in_splits = [path for path in folder.glob("*/*/*.parquet") if path.parent.name.lower() in SPLITS]
    found = sorted(numbered or in_splits, key=str)
    names = sorted({name_below(path, source).split("/")[0] for path in found})
    if len(names) > 1:
        raise UserError(
            f"SOURCE={source}: has tables of several configurations ({', '.join(names)}); give one of these folders"
        )
    return found


def _splits_of_names(source: str, names: list[str]) -> list[str | None]:
    """The splits that the names of tables or their folders state. None if not all do, and for a table that is SOURCE
    itself. If all are numbered (`…-00000-of-00001.parquet`), other words beside a usual one are splits, too."""
    stated = [_split_of(name) for name in names]
    is_file = names == [source.rpartition("/")[2]]
    if any(stated) and all(map(_NUMBERED.search, names)):
        words = [_NUMBERED.sub("", name).rpartition("/")[2] for name in names]
        stated = [split or word for split, word in zip(stated, words)]
    return [None] * len(names) if is_file or None in stated else stated


def _split_of(name: str) -> str | None:
    *folders, file = name.split("/")
    match = _SHARD.fullmatch(file.rpartition(".")[0])
    candidates = [match["split"] if match else "", *folders[-1:]]
    return next((SPLITS[name.lower()] for name in candidates if name.lower() in SPLITS), None)
