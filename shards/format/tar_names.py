"""Names of tars: braces as webdataset's users write them, and the folder and names that a text stands for."""

import os
import re

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets

MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*?(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


def split_tars(text: str, field: str) -> tuple[str, list[str] | None]:
    """The folder that a text names, and the names of tars in it: None for a folder or a URL of one, one for a tar, and
    several for a pattern such as `folder/{000..012}.tar`.

    Raises:
        UserError: if a pattern names tars of several folders, one tar twice, or a file that is no tar.
    """
    found = [text] if os.path.exists(text) else expand_braces(text, f"{field}={hide_secrets(text)}")
    if found == [text] and (os.path.isdir(text) or not text.endswith(".tar")):
        return text, None
    pairs = [path.rpartition("/") for path in found]
    wrong = next((path for path in found if not path.endswith(".tar")), None)
    if wrong is not None:
        raise UserError(
            f"{field}={hide_secrets(text)}: {hide_secrets(wrong)} is not called .tar; give a folder, or a pattern such "
            "as folder/{000..012}.tar"
        )
    folders = list(dict.fromkeys(f"{folder}{slash}" for folder, slash, _ in pairs))
    if len(folders) > 1:
        raise UserError(
            f"{field}={hide_secrets(text)}: names tars in {len(folders)} folders, such as {hide_secrets(folders[0])} "
            f"and {hide_secrets(folders[1])}; give one folder at a time"
        )
    names = [name for _, _, name in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{field}={hide_secrets(text)}: {twice} is listed twice; list each tar once")
    return folders[0].rstrip("/") or ("/" if folders[0] else "."), names


def expand_braces(text: str, source: str) -> list[str]:
    """The texts that braces stand for, as in a shell: `{00..12}`, `{00..12..3}` and `{a,b}`. `source` is the argument
    with its value in error lines.

    Raises:
        UserError: if there are more than a million.
    """
    done, pending = [], [text]
    while pending:
        first = pending.pop()
        if (braces := _BRACES.search(first)) is None:
            done.append(first)
            continue
        values = _values(braces[1])
        if len(values) + len(pending) + len(done) > MOST_NAMES:
            raise UserError(f"{source}: stands for more than {MOST_NAMES:,} names; give a pattern with *")
        pending += [first[: braces.start()] + value + first[braces.end() :] for value in reversed(values)]
    return done


def _values(text: str) -> list[str]:
    if (limits := _RANGE.fullmatch(text)) is None:
        return text.split(",")
    low, high, step = int(limits[1]), int(limits[2]), int(limits[3] or 1) or 1
    if abs(high - low) // step > MOST_NAMES:
        return [""] * (MOST_NAMES + 1)
    is_padded = any(text.startswith("0") and len(text) > 1 for text in (limits[1], limits[2]))
    width = max(len(limits[1]), len(limits[2])) if is_padded else 0
    numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]
