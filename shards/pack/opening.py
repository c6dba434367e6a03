"""Opens the source of a pack: its preset, the published set below SOURCE, and the options of its layout."""

from dataclasses import dataclass, replace

from shards.pack.settings import PackSettings
from shards.sources import SourceOptions, check_options
from shards.sources.dataset_card import read_card
from shards.sources.files import SPLITS
from shards.sources.find_set import find_set, match_inside
from shards.sources.preset_schema import Preset, Table
from shards.sources.presets import find_preset
from shards.storage import parse_place
from uniemox_dist.core.errors import UserError


@dataclass(frozen=True)
class OpenedSource:
    """A source that was found, before it is read."""

    settings: PackSettings
    """Those of the pack, with the layout."""
    layout: str
    preset: Preset
    place: str
    """What the layout reads: SOURCE, or a folder of the published set below it."""
    options: SourceOptions


def open_settings(settings: PackSettings) -> OpenedSource:
    """Finds the source of a pack.

    Raises:
        UserError: for an unknown or wrong preset, a set that is not there, and options without effect.
    """
    preset = find_preset(settings.preset)
    options = SourceOptions(
        settings.columns, settings.persons == "source", settings.allow_outside, picture=settings.picture
    )
    if settings.preset is None:
        layout = "table" if settings.layout is None else settings.layout
        if settings.header or settings.delimiter is not None:
            rules = Table(header=settings.header, delimiter=settings.delimiter)
            options = replace(options, table=rules)
            if settings.columns:
                raise UserError("--column: leave it out, and give the columns our names with --columns")
        check_options(layout, replace(options, pictures=settings.pictures))
        if settings.pictures is not None:
            options = replace(options, pictures=_picture_folder(settings))
        return OpenedSource(replace(settings, layout=layout), layout, preset, settings.source, options)
    if settings.header or settings.delimiter is not None:
        raise UserError("--columns and --delimiter: a preset states them; leave one of both out")
    found = find_set(preset, settings.preset, settings.source, settings.layout, settings.pictures)
    form, layout = found.form, found.form.layout
    place = found.pictures if layout == "folder" else found.root
    if layout == "table" and not found.tables:
        matched = next((paths for pattern in form.find if (paths := match_inside(found.root, pattern))), [])
        place = matched[0].parent if matched else found.root
        place = place.parent if place.name.lower() in SPLITS and place != found.root else place
        place = found.root if read_card(found.root, SourceOptions()) else place
    if found.tables and settings.columns:
        raise UserError(f"--column: --preset {settings.preset} states its columns; leave it out")
    with_tables = replace(options, tables=found.tables, form=form)
    if found.tables and layout == "table":
        with_tables = replace(with_tables, pictures=str(found.pictures))
    if options.source_persons and found.lacks:
        raise UserError(
            f"--persons=source: SOURCE={settings.source} lacks {' and '.join(found.lacks)}, so that --preset "
            f"{settings.preset} finds label folders only; copy it there, or give --persons nanodet or none"
        )
    check_options(layout, options)
    here = settings.source if found.root == parse_place(settings.source, "SOURCE") else str(found.root)
    place_text = here if place == found.root else str(place)
    options.findings.notes += found.notes
    return OpenedSource(replace(settings, layout=layout), layout, preset, place_text, with_tables)


def _picture_folder(settings: PackSettings) -> str:
    """The folder that --pictures names, relative to SOURCE or to the folder of the table."""
    source = parse_place(settings.source, "SOURCE")
    top = source if source.is_dir() else source.parent
    folder = top / str(settings.pictures)
    if not folder.is_dir():
        raise UserError(
            f"--pictures={settings.pictures}: {folder} is no folder; give one relative to {top}, or a whole path"
        )
    return str(folder)
