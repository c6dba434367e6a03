"""Slurm's short form of node names, such as `gpu[001-004,7],login1`."""

import re

from uniemox_dist.core.errors import UserError

MAX_NODES = 65_536
"""A longer list is a mistake."""


def expand_hostlist(text: str) -> list[str]:
    """The names in a node list, in its order; numbers keep their leading zeros.

    Raises:
        UserError: if the text is not a node list.
    """
    names = [name for part in _parts(text) for name in _expand_one(part, text)]
    if len(names) > MAX_NODES:
        raise UserError(f"node list {text!r}: has {len(names)} nodes; give at most {MAX_NODES}")
    return names


def _parts(text: str) -> list[str]:
    """Splits a list at the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for letter in text.strip():
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _not_a_list(text)
        if letter == "," and not depth:
            parts.append(part)
            part = ""
        else:
            part += letter
    parts.append(part)
    if depth or (text.strip() and not all(parts)):
        raise _not_a_list(text)
    return [part for part in parts if part]


def _expand_one(part: str, text: str) -> list[str]:
    """The names of one part; several brackets multiply, and the last one varies fastest."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        if not re.fullmatch(r"[\w.-]*", part):
            raise _not_a_list(text)
        return [part]
    inside, _, tail = rest.partition("]")
    numbers = [number for span in inside.split(",") for number in _numbers(span, text)]
    tails = _expand_one(tail, text)
    return [f"{head}{number}{end}" for number in numbers for end in tails]


def _numbers(span: str, text: str) -> list[str]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
    if found is None:
        raise _not_a_list(text)
    first, last = found[1], found[2] or found[1]
    if not 0 <= int(last) - int(first) < MAX_NODES:
        raise _not_a_list(text)
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _not_a_list(text: str) -> UserError:
    return UserError(f"node list {text!r}: is not a node list; write names such as n1,n2 or n[1-2]")
