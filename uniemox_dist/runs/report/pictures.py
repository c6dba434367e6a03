"""The sheets of reconstructions of a run, as data that a page holds."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

EARLIER_SHOWN = 8
"""Earlier pictures that are seen without unfolding, spread evenly over the run."""
SMALL_PIXELS, SMALL_BYTES = 800, 200_000
"""Earlier pictures of more bytes are embedded in this width: the page must still open on a phone."""


def pictures(samples: Path) -> dict[str, Any]:
    """The newest reconstruction as it is, the earlier ones small: some to see, the others to unfold."""
    newest: dict[str, Any] | None = None
    earlier, broken = [], []
    for path in sorted(samples.glob("*.png"), reverse=True):
        try:
            with Image.open(path) as picture:
                picture.load()
                uri = _embed(path, picture, whole=newest is None)
                found = {"uri": uri, "title": _title(path), "width": picture.width, "height": picture.height}
        except (OSError, SyntaxError):  # Pillow's words for a file that is being written just now
            broken.append(path.name)
            continue
        if newest is None:
            newest = found
        else:
            earlier.append(found)
    stride = max(1.0, (len(earlier) - 1) / (EARLIER_SHOWN - 1))
    spread = {round(i * stride) for i in range(EARLIER_SHOWN)}
    seen = [found for i, found in enumerate(earlier) if i in spread]
    others = [found for i, found in enumerate(earlier) if i not in spread]
    return {"newest": newest, "seen": seen, "others": others, "broken": broken}


def _embed(path: Path, picture: Image.Image, *, whole: bool) -> str:
    raw, kind = path.read_bytes(), "png"
    if not whole and len(raw) > SMALL_BYTES:
        small = picture.convert("RGB")
        small.thumbnail((SMALL_PIXELS, 10 * SMALL_PIXELS))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        raw, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def _title(path: Path) -> str:
    digits = path.stem.removeprefix("step_")
    return f"step {int(digits):,}" if digits.isdigit() else path.stem
