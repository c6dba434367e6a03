"""Finds a published set below SOURCE: which of its forms is there, and where its pictures and tables are.

SOURCE may be the published folder, a folder above it, or one that was doubled by unpacking twice (`Set/Set/images`). A
folder below it, such as that of the pictures, is refused if the set's tables are above, because they would be left out.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from shards.sources.files import SPLITS, is_clutter
from shards.sources.preset_schema import Form, FoundTable, Preset
from shards.sources.presets import Labels
from shards.storage import Place, list_folders, parse_place
from uniemox_dist.core.errors import UserError

LEVELS = 3
"""Levels of folders below SOURCE in which a set is searched."""
LEVELS_ABOVE = 2
"""Levels of folders above SOURCE in which the set's tables are searched."""
MOST_FOLDERS = 2000
"""Folders that are searched at most."""


@dataclass(frozen=True)
class FoundSet:
    """A form of a set, and its places."""

    form: Form
    root: Place
    """The set's folder."""
    pictures: Place
    """The folder of its pictures."""
    tables: tuple[FoundTable, ...] = ()
    notes: tuple[str, ...] = ()
    """What the set lacks, for the summary."""
    lacks: tuple[str, ...] = ()
    """What identifies the forms that go before this one, and is not there."""


def find_set(
    preset: Preset, name: str, source: str, layout: str | None, pictures: str | None = None
) -> FoundSet:
    """Finds a set.

    Args:
        name: the preset's name, for errors.
        layout: the layout that the user gave; forms in other layouts are left out then.
        pictures: the user's folder of pictures, relative to SOURCE.

    Raises:
        UserError: if the set is not there, in two places, or lacks a table or its pictures.
    """
    forms = [form for form in preset.forms if layout in (None, form.layout)]
    if layout is not None and not forms:
        forms = [Form.model_validate({"layout": layout})]
    top = parse_place(source, "SOURCE")
    if (found := _of_table(forms, top, name, pictures)) is not None:
        return found
    if not top.is_dir():
        plain = (form for form in forms if form.layout == "table" and not form.tables)
        return FoundSet(next(plain, forms[0]), top, top)  # a table, or else the layout reports what is wrong
    labels = Labels(preset.labels, preset.synonyms)
    above = find_above(top, forms) if pictures is None else None
    lacks: list[str] = []
    for form in forms:
        roots = find_roots(top, form, labels)
        if len(roots) > 1:
            without = f" and lacks {' or '.join(lacks)}" if lacks else ""
            raise UserError(
                f"SOURCE={source}: has {len(roots)} folders that look like --preset {name} "
                f"({', '.join(map(str, roots[:4]))}){without}; give one of them{', or add it' if lacks else ''}"
            )
        if roots:
            if above is not None and above.has_more_than(rank(roots[0], forms.index(form), form)):
                raise above.refusal(source, name, "; --pictures . packs this folder alone")
            return _after(lacks, locate(form, roots[0], name, top, pictures))
        lacks += form.find[:1]
    if above is not None:
        raise above.refusal(source, name)
    named = [form for form in forms if form.find]
    if len(named) == len(forms):
        wanted = " or ".join(dict.fromkeys(" or ".join(form.find) for form in named))
        held = ", ".join(sorted(entry.name for entry in top.glob("*"))[:8]) or "nothing"
        raise UserError(
            f"SOURCE={source}: --preset {name} needs {wanted}, which is not in it or up to {LEVELS} levels below; "
            f"it holds {held}"
        )
    form = next(form for form in forms if not form.find)
    return _after(lacks, locate(form, top, name, top, pictures))


def _after(lacks: Sequence[str], found: FoundSet) -> FoundSet:
    """A form of label folders that nothing identifies, and what identifies the forms before it."""
    if not lacks or found.form.layout != "folder" or found.form.find:
        return found
    note = f"read as label folders, because SOURCE lacks {' and '.join(lacks)}"
    return replace(found, lacks=tuple(lacks), notes=(note, *found.notes))


@dataclass(frozen=True)
class Above:
    """A folder above SOURCE that is the set's."""

    root: Place
    table: str
    """What SOURCE lacks: a table, or a file or folder that identifies the set."""
    rank: tuple[int, int, int]

    def has_more_than(self, own: tuple[int, int, int]) -> bool:
        """Whether the set has more facts above than what was found in SOURCE."""
        return self.rank < own

    def refusal(self, source: str, name: str, otherwise: str = "") -> UserError:
        root = self.root if Path(source).is_absolute() else os.path.relpath(self.root)
        return UserError(
            f"SOURCE={source}: is a part of --preset {name}, whose {self.table} is in {root}; give SOURCE={root}"
            f"{otherwise}"
        )


def find_above(top: Place, forms: Sequence[Form]) -> Above | None:
    """The nearest folder above SOURCE that holds a form's tables, or what identifies it, if SOURCE belongs to it; None
    for SOURCE in a store."""
    if not isinstance(top, Path):
        return None
    here = Path(os.path.abspath(top))
    for root in [*here.parents][:LEVELS_ABOVE]:
        for number, form in enumerate(forms):
            try:
                found = _facts(root, form)
                if found and _belongs(here, root, form):
                    table = found[0].relative_to(root).as_posix()
                    return Above(root, table, rank(root, number, form))
            except OSError:  # a folder that may not be read
                continue
    return None


def _facts(root: Place, form: Form) -> list[Place]:
    """The tables of a form in a folder, or else what identifies it; none for tables that have their own pictures."""
    tables = [path for table in form.tables for file in table.files for path in match_inside(root, file)]
    if form.layout == "table" and not form.tables:
        return []
    if form.find and not any(match_inside(root, pattern) for pattern in form.find):
        return []
    return tables or [path for pattern in form.find for path in match_inside(root, pattern)]


def _belongs(here: Path, root: Path, form: Form) -> bool:
    """Whether a folder below `root` is that of a form's pictures or tables, or below or above one of these."""
    pictures = [path for pattern in form.pictures for path in match_inside(root, pattern) if path != root]
    if not pictures:
        return True  # the pictures may be anywhere in `root`
    tables = [
        path.parent for table in form.tables for file in table.files for path in match_inside(root, file)
    ]
    return any(
        here.is_relative_to(path) or path.is_relative_to(here)
        for path in (*pictures, *tables)
        if path != root
    )


def rank(root: Place, number: int, form: Form) -> tuple[int, int, int]:
    """Orders the forms that may be in SOURCE and above it by what they state; the lowest states most: the number of the
    form in its preset, the tables that it lacks, and the place of its picture folder among the alternatives."""
    lacks = sum(not any(match_inside(root, file) for file in table.files) for table in form.tables)
    places = [place for place, pattern in enumerate(form.pictures) if match_inside(root, pattern)]
    return number, lacks, min(places, default=len(form.pictures))


def _of_table(forms: Sequence[Form], file: Place, name: str, pictures: str | None) -> FoundSet | None:
    """The set of which SOURCE itself is a table; of a set of tables only this one is read."""
    if not isinstance(file, Path) or not file.is_file():
        return None
    file = file.absolute()
    problem: UserError | None = None
    for root in reversed([*file.parents][:LEVELS]):
        for form in forms:
            patterns = (pattern for table in form.tables for pattern in table.files)
            if any(file in match_inside(root, pattern) for pattern in patterns):
                try:
                    found = locate(form, root, name, root, pictures, file)
                except UserError as error:
                    problem = error  # a folder further below may have what this one lacks
                    continue
                if form.layout == "folder":
                    return found
                return replace(found, tables=tuple(table for table in found.tables if table.path == file))
    if problem is not None:
        raise problem
    return None


def locate(
    form: Form, root: Place, name: str, top: Place, pictures: str | None, given: Place | None = None
) -> FoundSet:
    """The places of a form whose folder was found. `given` is the table that the user chose among alternatives."""
    folder = root
    if pictures is not None and form.layout not in ("folder", "table"):
        raise UserError(f"--pictures: --layout {form.layout} finds its pictures itself; leave it out")
    if pictures is not None:
        folder = top / pictures
        if not folder.is_dir():
            raise UserError(
                f"--pictures={pictures}: {folder} is no folder; give one relative to {top}, or a whole path"
            )
    elif form.pictures:
        places = [path for inner in form.pictures for path in match_inside(root, inner)]
        if places:
            folder = places[0]
            while (folder / folder.name).is_dir():  # doubled by unpacking twice
                folder = folder / folder.name
        elif form.layout == "table":
            raise UserError(
                f"SOURCE={root}: has no folder {' or '.join(form.pictures)} with the pictures of --preset {name}; "
                "put it there, or give --pictures DIR"
            )
    tables: list[FoundTable] = []
    lacks = []
    for table in form.tables:
        alternatives = [paths for file in table.files if (paths := match_inside(root, file))]
        first = alternatives[0] if alternatives else []
        paths = next((paths for paths in alternatives if given in paths), first)
        if not paths and not table.optional:
            raise UserError(
                f"SOURCE={root}: lacks {' or '.join(table.files)}, a table of --preset {name}; copy it there"
            )
        if not paths:
            lacks.append(table.files[0])
        beside = next((found for file in table.beside if (found := match_inside(root, file))), [])
        if table.beside and not beside:
            raise UserError(
                f"SOURCE={root}: lacks {' or '.join(table.beside)}, whose rows belong to those of {paths[0].name}"
            )
        tables += [FoundTable(path, table, beside[0] if beside else None) for path in paths]
    notes = (f"without {', '.join(lacks)}, which SOURCE does not have",) if lacks else ()
    return FoundSet(form, root, folder, tuple(tables), notes)


def find_roots(top: Place, form: Form, labels: Labels) -> list[Place]:
    """The folders that may be the set's, all on the first level where there is one."""
    of_tables = [file for table in form.tables if not table.optional for file in table.files]
    patterns = form.find or (of_tables if form.layout == "table" else ())
    for level in levels(top):
        if patterns:
            found = [place for place in level if any(match_inside(place, pattern) for pattern in patterns)]
        else:
            found = [place for place in level if has_labels(place, form, labels)]
        if found:
            return found
    return []


def search(top: Place, patterns: Sequence[str]) -> list[Place]:
    """What the patterns name in the first level of folders that has any of it."""
    for level in levels(top):
        if found := [
            path for place in level for pattern in patterns for path in match_inside(place, pattern)
        ]:
            return found
    return []


def levels(top: Place) -> Iterator[list[Place]]:
    """A folder, the folders in it, the folders in these, and so on."""
    level, seen = [top], 0
    for _ in range(LEVELS + 1):
        yield level
        level = [folder for place in level for folder in folders_in(place)]
        seen += len(level)
        if seen > MOST_FOLDERS:
            return


def has_labels(place: Place, form: Form, labels: Labels) -> bool:
    """Whether a folder holds label folders, in folders of splits or of pictures or itself."""
    if form.layout != "folder" or not labels.declared:
        return False
    folders = folders_in(place)
    inner = [found for name in form.pictures for found in match_inside(place, name)]
    inner += [folder for folder in folders if folder.name.lower() in SPLITS]
    return any(labels.knows(folder.name) for folder in folders) or any(
        labels.knows(folder.name) for place in inner for folder in folders_in(place)
    )


def folders_in(place: Place) -> list[Place]:
    """The folders in a folder that may belong to a set, sorted."""
    return [folder for folder in list_folders(place) if not is_clutter(folder.name)]


def match_inside(root: Place, pattern: str) -> list[Place]:
    """What a path below a folder names, in any case and with `*` in its parts, sorted."""
    found = [root]
    for part in filter(lambda part: part not in ("", "."), pattern.split("/")):
        found = [inner for place in found for inner in _match_part(place, part)]
    return found


def _match_part(place: Place, part: str) -> Iterator[Place]:
    if not has_magic(part) and ((place / part).is_dir() or (place / part).is_file()):
        yield place / part
        return
    if place.is_dir():
        wanted = part.casefold()
        yield from sorted(
            (
                entry
                for entry in place.glob("*")
                if fnmatchcase(entry.name.casefold(), wanted) and not is_clutter(entry.name)
            ),
            key=str,
        )
