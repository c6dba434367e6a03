"""The entries of complete.json, and the checks of their types and values. All readers share these checks: a start, the
commands that list and verify checkpoints, and `uniemox release`. Torch-free.
"""

import re
from collections.abc import Callable
from typing import Any

from uniemox_dist.core.formatting import cut, is_number, short

COMPLETE = "complete.json"
SECTIONS = ("run", "data", "batch", "model")
"""Sections that the entry `config` has in every version."""
_FILE_NAME = re.compile(r"\w[\w.-]{0,254}", re.ASCII)
_SHOWN = 80
"""Characters of a wrong value that an error line shows."""


def find_wrong_entry(info: dict[str, Any]) -> str | None:
    """The reason why an entry has a value that no save writes, or None. Other entries may be missing, but not `step`
    and `files`."""
    for key, (is_right, expected) in _ENTRIES.items():
        if (key in info or key in ("step", "files")) and not is_right(info.get(key)):
            return f"has {key}={_show(info.get(key))} instead of {expected}"
    for name, facts in info["files"].items():
        if not _FILE_NAME.fullmatch(name):
            return f"has the file name {cut(repr(name), _SHOWN)} in files; a file lies beside {COMPLETE}"
        if not isinstance(facts, dict):
            return f"has files.{name}={_show(facts)} instead of an object"
        for key, (is_right, expected) in _FACTS.items():
            if not is_right(facts.get(key)):
                return f"has files.{name}.{key}={_show(facts.get(key))} instead of {expected}"
    for name, shape in info.get("parameters", {}).items():
        if not isinstance(shape, list) or not all(map(_is_count, shape)):
            value = _show(shape)
            return f"has parameters.{cut(name, _SHOWN)}={value} instead of a list of whole numbers"
    return _find_wrong_section(info.get("config", {}))


def find_missing_entry(info: dict[str, Any]) -> str | None:
    """The reason why the entries, of which none is wrong, do not suffice to resume or release; None if they do."""
    if lacking := [key for key in _ENTRIES if key not in info]:
        return f"lacks {lacking[0]}"
    if lacking := [section for section in SECTIONS if section not in info["config"]]:
        return f"lacks config.{lacking[0]}"
    return None


def _find_wrong_section(config: dict[str, Any]) -> str | None:
    for name, section in config.items():
        if not isinstance(section, dict):
            return f"has config.{cut(name, _SHOWN)}={_show(section)} instead of an object"
    sources = config.get("data", {}).get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return f"has config.data.sources={_show(sources)} instead of a list of objects"
    for source in sources:
        for key in ("weight", "repeat"):
            if source.get(key) is not None and not is_number(source[key]):
                return f"has {key}={_show(source[key])} in config.data.sources instead of a number"
    return None


def _show(value: object) -> str:
    return cut(short(value), _SHOWN)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_teacher(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    views = value.get("views", [])
    return isinstance(views, list) and all(isinstance(view, str) for view in views)


_COUNT = (_is_count, "a whole number of at least 0")
_TEXT = (lambda value: isinstance(value, str), "a text")
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": _COUNT,
    "slots": _COUNT,
    "adam_step": (lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "world_size": (lambda value: _is_count(value) and value > 0, "a whole number of at least 1"),
    "zero_stage": (lambda value: _is_count(value) and value <= 3, "0, 1, 2 or 3"),
    "precision": _TEXT,
    "data_identity": _TEXT,
    "teacher": (_is_teacher, "null or an object whose views are texts"),
    "embedding_width": (
        lambda value: value is None or (_is_count(value) and value > 0),
        "null or a whole number",
    ),
    "parameters": (_is_object, "an object of shapes"),
    "config": (_is_object, "an object of sections"),
    "files": (_is_object, "an object of sizes and hashes"),
}
"""The entries that a resumed run needs: the check of each, and the values that pass it."""
_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {"bytes": _COUNT, "sha256": _TEXT}
