"""`uniemox shards report`: one self-contained HTML page about a data set or its splits.

Labels, captions and names are untrusted text; the template escapes them.
"""

import base64
import io
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image, ImageDraw

from shards.format.index import read_shard_rows
from shards.format.sample import DIMENSIONS
from shards.inspect.charts import Histogram, histogram, value_histogram
from shards.inspect.emotions import list_person_labels
from shards.inspect.stats import Summary, group_rejected, summarise_folder
from shards.pictures.decode import decode_picture
from shards.pictures.formats import BadPicture
from shards.remote_folder import write_anywhere
from shards.storage import Place, read_range

LABELS_SHOWN = 24
MOST_PERSON_LABELS = 30
PICTURES_SHOWN = 12
"""Per label."""
THUMBNAIL_PX = 200
EXAMPLES = 5
SHARES_SHOWN = 3
"""The largest shares of a picture's distribution."""
CHARTS = (
    ("short", "Shorter side", "pixels", 1.0),
    ("long", "Longer side", "pixels", 1.0),
    ("aspect", "Aspect ratio", "longer over shorter side", 0.01),
    ("kilobytes", "Size of a picture", "kB, encoded", 1.0),
    ("caption", "Length of the caption", "characters, first caption", 1.0),
    ("persons", "Persons in a picture", "boxes", 1.0),
)


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet."""

    key: str
    uri: str | None
    """None for a picture that cannot be shown."""
    problem: str
    caption: str
    facts: list[str]
    """Its distribution, dimensions and persons."""


@dataclass(frozen=True)
class Sheet:
    """Pictures of one label."""

    label: str | None
    count: int
    tiles: list[Tile]


@dataclass(frozen=True)
class Account:
    """The records from which a page's samples were packed, as far as they are known."""

    records: int | None
    """Records of the whole pack that these samples belong to; None if unknown."""
    is_whole: bool
    """Whether the samples and the refused records listed beside them are all of these records."""
    refused: dict[str, tuple[int, list[dict[str, str]]]] | None
    """Reason -> (count, some examples). Without a list beside the samples: the counts of the whole pack, no
    examples."""
    is_listed: bool
    """Whether there is a list beside the samples."""
    quarantined: int
    """Shards that were quarantined later."""


def write_page(folder: Place, out: Place) -> None:
    """Writes a page about the data sets at or directly below a folder.

    Raises:
        UserError: if they cannot be read, or `out` cannot be written.
    """
    summaries = summarise_folder(folder)
    charts = [chart for item in CHARTS if (chart := _chart(item, summaries)) is not None]
    labels = sum((summary.labels for summary in summaries), start=type(summaries[0].labels)())
    shown = [label for label, _ in labels.most_common(LABELS_SHOWN)]
    provenance = summaries[0].manifest.provenance
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shards.inspect", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        name=folder.name or "data set",
        summaries=summaries,
        samples=sum(summary.manifest.samples for summary in summaries),
        bytes=sum(summary.manifest.bytes for summary in summaries),
        charts=charts,
        shares=_mean_shares(summaries),
        person_labels=_count_person_labels(summaries),
        value_charts=_value_charts(summaries),
        svg=Markup,
        labels=labels.most_common(LABELS_SHOWN),
        most=max(labels.values(), default=1),
        hidden=len(labels) - len(shown),
        sheets=_sheets(summaries, shown, labels),
        account=_account(folder, summaries),
        provenance=_flatten(provenance),
    )
    # File names may contain bytes that are not UTF-8.
    write_anywhere(out, page.encode("utf-8", "backslashreplace"), "--out")


def _account(folder: Place, summaries: list[Summary]) -> Account:
    """Relates these samples to the pack that they came from. The manifest of a split or a selection states the numbers
    of the whole pack, so these describe the samples only if they add up."""
    provenances = [summary.manifest.provenance for summary in summaries]
    first = provenances[0]
    of_one_pack = all(
        provenance.get(name) == first.get(name)
        for provenance in provenances
        for name in ("records", "source_sha256")
    )
    records = first.get("records") if of_one_pack else None
    records = records if isinstance(records, int) else None
    listed = group_rejected(folder)
    counted = sum(summary.manifest.samples for summary in summaries) + sum(map(len, (listed or {}).values()))
    refused: dict[str, tuple[int, list[dict[str, str]]]] | None = None
    if listed is not None:
        refused = {reason: (len(rows), rows[:EXAMPLES]) for reason, rows in listed.items()}
    elif records is not None and isinstance(stated := first.get("rejected"), dict):
        refused = {str(reason): (count, []) for reason, count in stated.items() if isinstance(count, int)}
    moved = [provenance.get("quarantined") for provenance in provenances]
    quarantined = sum(len(names) for names in moved if isinstance(names, list))
    return Account(records, records == counted, refused, listed is not None, quarantined)


def _chart(item: tuple[str, str, str, float], summaries: list[Summary]) -> Histogram | None:
    name, title, unit, scale = item
    return histogram(title, unit, [summary.tallies[name] for summary in summaries], scale)


def _mean_shares(summaries: list[Summary]) -> list[tuple[str, float, list[float]]]:
    """Label, its mean share over all distributions, and over those of each data set; the largest first."""
    samples = sum(summary.emotions.distributions for summary in summaries)
    totals = sum((summary.emotions.shares for summary in summaries), start=Counter[str]())
    of_each = [summary.emotions.mean_shares for summary in summaries]
    return [
        (label, total / samples, [means.get(label, 0.0) for means in of_each])
        for label, total in totals.most_common(LABELS_SHOWN)
    ]


def _count_person_labels(summaries: list[Summary]) -> list[tuple[str, int]]:
    counts = sum((summary.emotions.person_labels for summary in summaries), start=Counter[str]())
    return counts.most_common(MOST_PERSON_LABELS)


def _value_charts(summaries: list[Summary]) -> list[Histogram]:
    found = []
    for name in DIMENSIONS:
        of_pictures = [summary.emotions.values[name] for summary in summaries]
        of_persons = [summary.emotions.person_values[name] for summary in summaries]
        found += [
            value_histogram(name.capitalize(), "of pictures", of_pictures),
            value_histogram(name.capitalize(), "of persons", of_persons),
        ]
    return [chart for chart in found if chart is not None]


def _sheets(summaries: list[Summary], shown: list[str | None], labels: Any) -> list[Sheet]:
    """Pictures of each label, sampled uniformly from all shards in one pass; only the shown ones are kept in memory."""
    sampled: dict[str | None, list[tuple[Summary, str, dict[str, Any]]]] = {label: [] for label in shown}
    count: dict[str | None, int] = dict.fromkeys(shown, 0)
    draw = random.Random("contact sheets")
    for summary in summaries:
        for shard in summary.manifest.shards:
            table = read_shard_rows(summary.folder, shard)
            for row, label in enumerate(table["label"].to_pylist()):
                if label not in sampled:
                    continue
                count[label] += 1
                place = (
                    len(sampled[label]) if count[label] <= PICTURES_SHOWN else draw.randrange(count[label])
                )
                if place < PICTURES_SHOWN:  # reservoir sampling (Vitter 1985, algorithm R)
                    entry = (summary, shard.name, table.slice(row, 1).to_pylist()[0])
                    sampled[label][place : place + 1] = [entry]
    return [Sheet(label, labels[label], [_tile(*entry) for entry in sampled[label]]) for label in shown]


def _tile(summary: Summary, shard: str, row: dict[str, Any]) -> Tile:
    captions = row["captions"] or [""]
    persons = row["persons"] or []
    uri, problem = None, ""
    try:
        data = read_range(summary.folder / shard, row["image_offset"], row["image_length"])
        uri = _thumbnail(data, persons)
    except BadPicture as bad:
        problem = f"{bad.reason}: {bad.detail}"
    except OSError as error:
        problem = error.strerror or str(error)
    return Tile(row["key"], uri, problem, captions[0], [*_list_emotions(row), *_list_persons(persons)])


def _list_emotions(row: dict[str, Any]) -> list[str]:
    shares: dict[str, float] = json.loads(row.get("label_distribution") or "{}")
    largest = sorted((item for item in shares.items() if item[1]), key=lambda item: -item[1])[:SHARES_SHOWN]
    values = [f"{name} {row[name]:.3g}" for name in DIMENSIONS if row.get(name) is not None]
    texts = (", ".join(f"{label} {share:.2f}" for label, share in largest), ", ".join(values))
    return [text for text in texts if text]


def _list_persons(persons: list[dict[str, Any]]) -> list[str]:
    """The labels of annotated persons, or else the scores of detected ones."""
    own = [", ".join(list_person_labels(json.loads(person["labels"] or "{}"))) for person in persons]
    if any(own):
        return [f"person: {text}" for text in own if text]
    scores = ", ".join(f"{person['score']:.2f}" for person in persons)
    return [f"detector's score {scores}"] if any(person["score"] < 1 for person in persons) else []


def _thumbnail(data: bytes, persons: list[dict[str, Any]]) -> str:
    picture = Image.fromarray(decode_picture(data))
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for person in reversed(persons):
        x1, y1, x2, y2 = person["box"]
        w, h = picture.width - 1, picture.height - 1
        box = [round(x1 * w), round(y1 * h), round(x2 * w), round(y2 * h)]
        draw.rectangle(box, outline=(0, 0, 0), width=3)  # a dark edge makes the colour visible on any picture
        draw.rectangle(box, outline=(255, 214, 10), width=2)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _flatten(provenance: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as rows of a table: nested names with dots, without unset ones."""
    lines: list[tuple[str, str]] = []
    for name, value in provenance.items():
        if isinstance(value, dict):
            lines += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                lines += _flatten(item, f"{prefix}{name}.{number}.")
        elif value not in (None, [], ""):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append((f"{prefix}{name}", text if len(text) <= 200 else f"{text[:200]}…"))
    return lines
