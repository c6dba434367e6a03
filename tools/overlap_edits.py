"""The changes that make a near-copy of a picture, for bench_overlap.py. All random choices follow from the picture's
name, so that every run measures the same copies."""

import io
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

Edit = Callable[[Image.Image, random.Random], Image.Image]


def encode(picture: Image.Image, form: str = "JPEG", quality: int = 90) -> bytes:
    """An encoded picture."""
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=quality)
    return buffer.getvalue()


def _decoded(picture: Image.Image, form: str, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encode(picture, form, quality)), formats=[form]).convert("RGB")


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    size = [max(8, round(side * scale)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _cropped(picture: Image.Image, share: float, draw: random.Random) -> Image.Image:
    """Removes `share` of the width and of the height, divided at random between both sides."""
    lost = [round(side * share) for side in picture.size]
    left, top = (draw.randint(0, pixels) for pixels in lost)
    return picture.crop((left, top, left + picture.width - lost[0], top + picture.height - lost[1]))


def _bordered(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Adds a frame of one colour, 3 to 12 % of the shorter side wide."""
    colour = draw.choice([(255, 255, 255), (0, 0, 0), (128, 128, 128), (30, 60, 140)])
    return ImageOps.expand(picture, max(2, round(min(picture.size) * draw.uniform(0.03, 0.12))), colour)


def _captioned(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Adds a bar with one or two lines of text above or below, 10 to 25 % of the picture's height."""
    high = max(14, round(picture.height * draw.uniform(0.1, 0.25)))
    paper, ink = draw.choice([((255, 255, 255), (0, 0, 0)), ((0, 0, 0), (255, 255, 255))])
    bar = Image.new("RGB", (picture.width, high), paper)
    lines = draw.choice([1, 2])
    size = max(6.0, high / lines * 0.6)
    words = ["when", "you", "see", "the", "picture", "again", "MONDAY", "mood", "nobody:", "me"]
    for line in range(lines):
        text = " ".join(draw.choices(words, k=6))
        font = ImageFont.load_default(size)
        ImageDraw.Draw(bar).text((4, line * high / lines + 1), text, fill=ink, font=font)
    out = Image.new("RGB", (picture.width, picture.height + high))
    above = draw.random() < 0.5
    out.paste(bar, (0, 0 if above else picture.height))
    out.paste(picture, (0, high if above else 0))
    return out


EDITS: dict[str, Edit] = {
    "resize 0.25": lambda p, _: _resized(p, 0.25),
    "resize 0.5": lambda p, _: _resized(p, 0.5),
    "resize 2": lambda p, _: _resized(p, 2),
    "square 224": lambda p, _: p.resize((224, 224), Image.Resampling.BICUBIC),
    "JPEG 30": lambda p, _: _decoded(p, "JPEG", 30),
    "JPEG 60": lambda p, _: _decoded(p, "JPEG", 60),
    "JPEG 95": lambda p, _: _decoded(p, "JPEG", 95),
    "WebP 60": lambda p, _: _decoded(p, "WEBP", 60),
    "crop 2 %": lambda p, d: _cropped(p, 0.02, d),
    "crop 5 %": lambda p, d: _cropped(p, 0.05, d),
    "crop 10 %": lambda p, d: _cropped(p, 0.1, d),
    "mirror": lambda p, _: ImageOps.mirror(p),
    "border": _bordered,
    "caption bar": _captioned,
    "grey": lambda p, _: p.convert("L").convert("RGB"),
    "brightness 0.7": lambda p, _: ImageEnhance.Brightness(p).enhance(0.7),
    "brightness 1.3": lambda p, _: ImageEnhance.Brightness(p).enhance(1.3),
    "crop 5 % + resize 0.5 + JPEG 50": lambda p, d: _decoded(_resized(_cropped(p, 0.05, d), 0.5), "JPEG", 50),
    "mirror + crop 10 % + JPEG 60": lambda p, d: _decoded(_cropped(ImageOps.mirror(p), 0.1, d), "JPEG", 60),
    "border + resize 0.5 + grey": lambda p, d: _resized(_bordered(p, d), 0.5).convert("L").convert("RGB"),
    "caption bar + mirror + JPEG 60": lambda p, d: _decoded(_captioned(ImageOps.mirror(p), d), "JPEG", 60),
}
"""Name -> edit. A picture is RGB, and the copy is encoded as JPEG 90 unless the edit itself encodes."""


def apply(name: str, picture: Image.Image, seed: str) -> Image.Image:
    """One edit of a picture; the same name and seed give the same copy."""
    return EDITS[name](picture, random.Random(f"{seed}/{name}"))
