"""Draws the samples shown during training as one picture: views, and their texts below."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from uniemox_dist.config.schema import Config
from uniemox_dist.train.samples.pictures import Look, Nearest
from uniemox_dist.train.samples.selection import Shown

TILE = 224
"""Side of a view on the sheet, in pixels."""
GAP, MARGIN, GUTTER = 6, 28, 18
CARD = 3 * TILE + 2 * GAP
COLUMNS = 2
TEXT, SMALL, LINE = 19, 17, 25
INK, MUTED, OWN, BOX = (24, 30, 44), (98, 107, 124), (10, 112, 70), (214, 60, 40)
MOST_LINES = 2
"""Largest number of lines of a caption; longer captions are cut."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """A piece of text and its position on a card."""

    x: int
    y: int
    text: str
    colour: Colour = INK
    bold: bool = False
    size: int = TEXT


def draw(seen: Look, shown: Shown, title: str, *, boxes: bool = False) -> np.ndarray:
    """Draws all samples, uint8 H×W×3.

    Args:
        title: one line above them.
        boxes: outline the persons in masked scenes.
    """
    cards = [_card(seen, shown, i, boxes=boxes) for i in range(len(shown.keys))]
    lines = [cards[i : i + COLUMNS] for i in range(0, len(cards), COLUMNS)]
    heights = [max(card.height for card in line) for line in lines]
    top = MARGIN + 2 * LINE
    width = MARGIN * 2 + COLUMNS * CARD + (COLUMNS - 1) * MARGIN
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN * len(heights)), (255, 255, 255))
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN - 6), title, MUTED, _font(TEXT, bold=False))
    for line, height in zip(lines, heights):
        for i, card in enumerate(line):
            sheet.paste(card, (MARGIN + i * (CARD + MARGIN), top))
        top += height + MARGIN
    return np.asarray(sheet)


def make_title(config: Config, record: dict[str, Any]) -> str:
    """The line above a sheet: its step, and the columns."""
    model, parts = config.model, [f"Step {record['step']:,}"]
    if config.loss.needs_decoder:
        below = ", person view below" if config.loss.person_reconstruction else ""
        parts.append(f"picture, masked ({model.mask}, {100 * model.mask_ratio:.0f} %), reconstruction{below}")
    if record["texts"]:
        parts.append(f"nearest of {record['texts']} captions, and the rank of the own caption")
    return "  ·  ".join(parts)


def _card(seen: Look, shown: Shown, number: int, *, boxes: bool) -> Image.Image:
    """Draws one sample: its views, its caption, and the nearest texts of student and teacher."""
    tiles = len(seen.lines) * (TILE + GAP)
    runs, height = _texts(seen, shown.captions[number], number, tiles + 6)
    card = Image.new("RGB", (CARD, height), (255, 255, 255))
    for line, views_BC3HW in enumerate(seen.lines):
        for column, view_3HW in enumerate(views_BC3HW[number]):
            tile = _tile(view_3HW)
            box = shown.boxes[number]
            if boxes and line == 0 and column == 1 and box is not None:
                corners = [edge * (TILE - 1) for edge in box]
                ImageDraw.Draw(tile).rectangle(corners, outline=BOX, width=2)
            card.paste(tile, (column * (TILE + GAP), line * (TILE + GAP)))
    pen = ImageDraw.Draw(card)
    for run in runs:
        pen.text((run.x, run.y), run.text, run.colour, _font(run.size, bold=run.bold))
    return card


def _texts(seen: Look, caption: str, number: int, y: int) -> tuple[list[Run], int]:
    """The pieces of text below a card's views, and the height where they end."""
    runs: list[Run] = []
    error = seen.errors[number]
    for line in wrap(caption or "no caption", CARD, bold=True):
        runs.append(Run(0, y, line, INK if caption else MUTED, bold=True))
        y += LINE
    if error is not None:
        runs.append(Run(0, y, f"masked error {error:.4f}", MUTED, size=SMALL))
        y += LINE
    sides = [("student", seen.student), ("teacher", seen.teacher)]
    there = [(name, found[number]) for name, found in sides if found is not None]
    ends = [y]
    width = (CARD - GUTTER) // 2 if len(there) == 2 else CARD
    for i, (name, found) in enumerate(there):
        own, end = _nearest(name, found, caption, i * (width + GUTTER), y + 4, width)
        runs += own
        ends.append(end)
    return runs, max(ends) + 8


def _nearest(name: str, found: Nearest, caption: str, x: int, y: int, width: int) -> tuple[list[Run], int]:
    """A column of nearest texts, and the height where it ends; the sample's own caption is green."""
    own = "" if found.own is None else f" (own at {found.own[1]})"
    runs = [Run(x, y, f"Nearest to {name}{own}", MUTED, size=SMALL)]
    y += LINE
    if not found.texts:
        runs.append(Run(x, y, "not finite", MUTED))
        y += LINE
    indent = 52
    for text, cosine in found.texts:
        colour = OWN if text == caption else INK
        runs.append(Run(x, y, f"{cosine:.2f}".replace("-", "−"), MUTED))
        for line in wrap(text, width - indent):
            runs.append(Run(x + indent, y, line, colour))
            y += LINE
    return runs, y


def _tile(view_3HW: torch.Tensor) -> Image.Image:
    pixels = (view_3HW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    return picture if picture.width == TILE else picture.resize((TILE, TILE), Image.Resampling.BICUBIC)


def wrap(text: str, width: int, *, bold: bool = False) -> list[str]:
    """Splits a text into at most two lines of at most `width` pixels; cuts what does not fit, and breaks long words."""
    font = _font(TEXT, bold=bold)
    lines: list[str] = []
    rest = text
    while rest and len(lines) < MOST_LINES:
        last = len(lines) == MOST_LINES - 1
        count = _fitting(font, rest, width)
        if count < len(rest) and last:
            count = _fitting(font, rest, width - int(font.getlength("…")))
            lines.append(rest[:count].rstrip() + "…")
            break
        if count < len(rest):
            count = rest.rfind(" ", 0, count + 1) if " " in rest[: count + 1] else count
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return lines


def _fitting(font: ImageFont.FreeTypeFont, text: str, width: int) -> int:
    """The number of characters that fit, at least one."""
    low, high = 1, min(len(text), width)  # no character is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


@lru_cache
def _font(size: int, *, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib  # only rank 0 draws, and not in its first step

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)
