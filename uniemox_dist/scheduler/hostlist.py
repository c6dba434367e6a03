"""Slurm's short form of node names, `gpu[001-004,7],login1`, as a list. Standard library only."""

import re

from uniemox_dist.core.errors import UserError

MOST = 65_536
"""Nodes beyond which a list is taken for a mistake."""


def expand(text: str) -> list[str]:
    """The names of a node list in their order; numbers keep their leading zeros.

    Raises:
        UserError: if it is none.
    """
    names = [name for part in _parts(text) for name in _expand_one(part, text)]
    if len(names) > MOST:
        raise UserError(f"node list {text!r}: has {len(names)} nodes; at most {MOST}")
    return names


def _parts(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth, part = [], 0, ""
    for letter in text.strip():
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _no_list(text)
        if letter == "," and not depth:
            parts.append(part)
            part = ""
        else:
            part += letter
    parts.append(part)
    if depth or (text.strip() and not all(parts)):
        raise _no_list(text)
    return [part for part in parts if part]


def _expand_one(part: str, text: str) -> list[str]:
    """The names of one part; several brackets multiply, the first one slowest."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        if not re.fullmatch(r"[\w.-]*", part):
            raise _no_list(text)
        return [part]
    inside, _, tail = rest.partition("]")
    numbers = [number for span in inside.split(",") for number in _numbers(span, text)]
    tails = _expand_one(tail, text)
    return [f"{head}{number}{end}" for number in numbers for end in tails]


def _numbers(span: str, text: str) -> list[str]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
    if found is None:
        raise _no_list(text)
    first, last = found[1], found[2] or found[1]
    if not 0 <= int(last) - int(first) < MOST:
        raise _no_list(text)
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _no_list(text: str) -> UserError:
    return UserError(f"node list {text!r}: is none of Slurm's; write names such as n1,n2 or n[1-2]")
