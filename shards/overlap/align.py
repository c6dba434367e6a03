"""Compares the pixels of two pictures that may be copies of each other: aligns them, then measures what is left.

Pictures are compared at `SIDE` x `SIDE` pixels, whatever their shape. A copy may be cropped, bordered, squashed or
mirrored, so an axis-aligned scale and shift is searched that maps one picture onto the other, together with a gain and
a bias of brightness. The search is Gauss-Newton on a pyramid (Lucas and Kanade 1981; Baker and Matthews 2004).

Shapes: S the side, P the pixels in the overlap.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 64
LEAST_SIDE = 32
"""The side at which pictures with fewer than SIDE pixels are compared."""
LEVELS = (16, 32, 64)
STEPS = 6
"""Gauss-Newton steps on each level."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
Frame = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of a picture's width and height."""
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Alignment:
    """How the second picture lies on the first, and what differs there."""

    frame: Frame
    """The first picture's part that the second one shows; may reach outside 0…1."""
    correlation: float
    """Of the brightness in the overlap, -1 to 1."""
    detail: float
    """Correlation of the fine detail: brightness minus its local mean."""
    residual: float
    """The largest local difference of colours, in grey levels, after gain and bias."""
    contrast: float
    """Standard deviation of the fine detail of the plainer picture, in grey levels."""
    gain: float
    """Contrast of the second picture relative to the first."""
    first: float
    """Share of the first picture's frame inside the overlap."""
    second: float
    """Share of the second picture's frame inside the overlap."""


def make_thumbnail(rgb_HW3: np.ndarray) -> np.ndarray:
    """A picture squashed to SIDE x SIDE x 3, uint8."""
    return np.asarray(Image.fromarray(rgb_HW3).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def shrink_thumbnail(rgb_SS3: np.ndarray, side: int) -> np.ndarray:
    """A thumbnail at a smaller side, float32."""
    n = len(rgb_SS3) // side
    return np.asarray(rgb_SS3.reshape(side, n, side, n, -1).astype(np.float32).mean((1, 3)))


def align(
    first_SS3: np.ndarray,
    second_SS3: np.ndarray,
    start: tuple[Frame, Frame] = (WHOLE, WHOLE),
    limits: tuple[Frame, Frame] = (WHOLE, WHOLE),
) -> Alignment | None:
    """Aligns two thumbnails. The search starts with one picture's frame on the other's; pixels outside the limits
    (borders) are ignored. None if no overlap is found."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = start
    # x_first = scale * x_second + shift
    sx, sy = (ax2 - ax1) / (bx2 - bx1), (ay2 - ay1) / (by2 - by1)
    map_4 = np.array([sx, ax1 - sx * bx1, sy, ay1 - sy * by1], np.float64)
    first_SS, second_SS = first_SS3 @ LUMA, second_SS3 @ LUMA
    for side in LEVELS:
        if side > len(first_SS):
            break
        a, b = _shrink(first_SS, side), _shrink(second_SS, side)
        for _ in range(STEPS):
            step = _gauss_newton(a, b, map_4, limits)
            if step is None:
                return None
            map_4 += step
            if np.abs(step).max() < 0.02 / side:
                break
    return _measure(first_SS3, second_SS3, map_4, limits)


def _shrink(values_SS: np.ndarray, side: int) -> np.ndarray:
    n = values_SS.shape[0] // side
    return np.asarray(values_SS.reshape(side, n, side, n).mean((1, 3)))


def _axis(
    side: int, scale: float, shift: float, low: float, high: float, low2: float, high2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: the pixels of the second picture inside both frames, and their positions in the first."""
    centre_S = (np.arange(side) + 0.5) / side
    mapped_S = scale * centre_S + shift
    half = 0.5 / side
    inside = (centre_S > low2 + half / 2) & (centre_S < high2 - half / 2)
    inside &= (mapped_S > low + half / 2) & (mapped_S < high - half / 2)
    chosen = np.flatnonzero(inside)
    return chosen, np.clip(mapped_S[chosen] * side - 0.5, 0, side - 1)


def _overlap(side: int, map_4: np.ndarray, frames: tuple[Frame, Frame]) -> tuple[np.ndarray, ...]:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = frames
    columns, xs = _axis(side, map_4[0], map_4[1], ax1, ax2, bx1, bx2)
    rows, ys = _axis(side, map_4[2], map_4[3], ay1, ay2, by1, by2)
    return columns, xs, rows, ys


def _sample(values: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Bilinear samples at all combinations of columns xs and rows ys; further axes are kept."""
    last = values.shape[0] - 1
    x0, y0 = np.minimum(xs.astype(int), last - 1), np.minimum(ys.astype(int), last - 1)
    fx, fy = (xs - x0).astype(np.float32), (ys - y0).astype(np.float32)
    tail = (1,) * (values.ndim - 2)
    fx, fy = fx.reshape(1, -1, *tail), fy.reshape(-1, 1, *tail)
    rows = values[y0] * (1 - fy) + values[y0 + 1] * fy
    return np.asarray(rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx)


def _gauss_newton(
    a_SS: np.ndarray, b_SS: np.ndarray, map_4: np.ndarray, frames: tuple[Frame, Frame]
) -> np.ndarray | None:
    """One step of the map towards the smallest squared difference, gain and bias free."""
    side = a_SS.shape[0]
    columns, xs, rows, ys = _overlap(side, map_4, frames)
    if len(columns) < side // 3 or len(rows) < side // 3:
        return None
    warped = _sample(a_SS, xs, ys)
    target = b_SS[np.ix_(rows, columns)]
    dx = _sample(np.gradient(a_SS, axis=1), xs, ys) * side
    dy = _sample(np.gradient(a_SS, axis=0), xs, ys) * side
    x = np.broadcast_to((columns + 0.5) / side, warped.shape)
    y = np.broadcast_to(((rows + 0.5) / side)[:, None], warped.shape)
    design = (
        np.stack([dx * x, dx, dy * y, dy, warped, np.ones_like(warped)]).reshape(6, -1).astype(np.float64)
    )
    wanted = target.ravel().astype(np.float64)
    normal = design @ design.T
    normal[np.arange(4), np.arange(4)] += 1e-3 * normal[np.arange(4), np.arange(4)] + 1e-6
    normal[4, 4] += 1e-6
    try:
        found = np.linalg.solve(normal, design @ wanted)
    except np.linalg.LinAlgError:
        return None
    gain = found[4]
    if gain < 0.2:  # the contrast is not that of a copy here
        return None
    return np.asarray(np.clip(found[:4] / gain, -0.08, 0.08))


def _measure(
    first_SS3: np.ndarray, second_SS3: np.ndarray, map_4: np.ndarray, frames: tuple[Frame, Frame]
) -> Alignment | None:
    side = len(first_SS3)
    columns, xs, rows, ys = _overlap(side, map_4, frames)
    if len(columns) < side // 3 or len(rows) < side // 3:
        return None
    a, b = _sample(first_SS3, xs, ys), second_SS3[np.ix_(rows, columns)]
    grey_a, grey_b = a @ LUMA, b @ LUMA
    if _is_grey(a) or _is_grey(b):
        a, b = grey_a[..., None], grey_b[..., None]
    gain, bias = _fit(a, b)
    fine_a, fine_b = grey_a - _blur(grey_a), grey_b - _blur(grey_b)
    difference = np.abs(_blur(gain * a + bias - b)).max(axis=-1)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = frames
    area = len(columns) * len(rows) / side**2
    sx, tx, sy, ty = map_4.tolist()
    return Alignment(
        frame=(tx, ty, sx + tx, sy + ty),
        correlation=_correlate(grey_a, grey_b),
        detail=_correlate(fine_a, fine_b),
        residual=float(difference.max()) / max(1.0, gain),
        contrast=float(min(fine_a.std(), fine_b.std())),
        gain=gain,
        first=area * sx * sy / ((ax2 - ax1) * (ay2 - ay1)),
        second=area / ((bx2 - bx1) * (by2 - by1)),
    )


def _fit(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Gain and bias of all colours together."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    variance = float(((x - x.mean()) ** 2).mean())
    gain = float(((x - x.mean()) * (y - y.mean())).mean()) / variance if variance > 1e-9 else 1.0
    return gain, float(y.mean() - gain * x.mean())


def _is_grey(values: np.ndarray) -> bool:
    return float((values.max(axis=-1) - values.min(axis=-1)).mean()) < 3.0


def _blur(values: np.ndarray) -> np.ndarray:
    """The mean of 5 x 5 pixels, fewer at the edges."""
    for axis in (0, 1):
        n = values.shape[axis]
        total = np.insert(np.cumsum(values, axis=axis, dtype=np.float64), 0, 0.0, axis=axis)
        low, high = np.maximum(np.arange(n) - 2, 0), np.minimum(np.arange(n) + 3, n)
        width = (high - low).reshape(
            (-1, *(1,) * (values.ndim - 1)) if axis == 0 else (1, -1, *(1,) * (values.ndim - 2))
        )
        values = (np.take(total, high, axis) - np.take(total, low, axis)) / width
    return values


def _correlate(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 1e-9 else 0.0
