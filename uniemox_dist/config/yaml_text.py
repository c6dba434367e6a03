"""YAML as people write it, from files that may come from elsewhere; and YAML that reads back to the same values."""

import re
from typing import Any

import yaml

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import cut

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Reads YAML with numbers as people write them: `1e-4` is a number, `on` is a word, and `12:00:00` is not a number
    in base 60, and `2024-10-10` a word. Rejects repeated keys."""


class Dumper(yaml.SafeDumper):
    """Writes YAML that both `_Loader` and plain PyYAML read back unchanged: quotes a text that either would read as
    another type."""


# Separate tables, because all users of PyYAML in the process share those of SafeLoader.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in rules
        if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`, which construct_mapping resolves
            continue
        key = loader.construct_object(key_node)
        if isinstance(key, list | dict):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word, not {key!r}")
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + rules
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML, which may come from elsewhere. `where` names it in errors.

    Raises:
        UserError: with one line that names file and place, if it is not YAML, or has more values than `MAX_VALUES`
            (each alias counts as what it stands for), or lists and mappings that are nested more deeply than
            `MAX_DEPTH` or in themselves.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: has {len(text)} characters of YAML, more than {MAX_CHARACTERS}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested more deeply than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}:{place} is not valid YAML: {_printable(problem)}") from None
    except (ValueError, OverflowError) as error:  # a number with thousands of digits
        raise UserError(f"{where}: is not valid YAML: {_printable(str(error))}") from None


def _count_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """The values below a node, aliases included as often as they occur. `known` holds those of earlier nodes, by id;
    0 for those that are being counted, which a node reaches again only through an alias of itself."""
    if depth > MAX_DEPTH:
        raise UserError(f"line {node.start_mark.line + 1}: is nested more deeply than {MAX_DEPTH} levels")
    if id(node) in known:
        if not known[id(node)]:
            raise UserError(f"line {node.start_mark.line + 1}: contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    total = 1 + sum(_count_values(child, known, depth + 1) for child in children)
    if total > MAX_VALUES:
        raise UserError(f"line {node.start_mark.line + 1}: has more than {MAX_VALUES} values")
    known[id(node)] = total
    return total


def _printable(text: str) -> str:
    """One line without control characters."""
    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split())), 200)
