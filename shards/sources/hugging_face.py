"""Features of Hugging Face `datasets`, which its Parquet and Arrow files state in the schema's metadata.

Classes are stored as numbers there; their names are in the features.
"""

import json
from typing import Any

import pyarrow as pa


def read_features(schema: pa.Schema) -> dict[str, Any]:
    """The features by column; empty for files that `datasets` did not write, and for unreadable metadata."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        features = content["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def has_classes(feature: Any) -> bool:
    """Whether a feature holds class numbers at any depth."""
    if isinstance(feature, list):
        return any(map(has_classes, feature))
    if not isinstance(feature, dict):
        return False
    return _is_class(feature) or any(map(has_classes, feature.values()))


def name_classes(value: Any, feature: Any) -> Any:
    """A value with the names of classes instead of their numbers; None for -1, the number of unlabelled samples.

    Raises:
        ValueError: for a number without a name.
    """
    if value is None or not has_classes(feature):
        return value
    if _is_class(feature):
        names = feature["names"]
        if not isinstance(value, int):
            return value
        if not -1 <= value < len(names):
            raise ValueError(f"class {value} has no name; the table names {len(names)} classes")
        return None if value == -1 else str(names[value])
    inner = feature[0] if isinstance(feature, list) and feature else feature
    if isinstance(inner, dict) and "feature" in inner and "_type" in inner:  # Sequence, List, LargeList
        inner = inner["feature"]
    if isinstance(value, list | tuple):
        return [name_classes(item, inner) for item in value]
    if isinstance(value, dict) and isinstance(inner, dict):
        # A Sequence of objects is stored as an object of lists.
        return {
            key: [name_classes(i, inner.get(key)) for i in item]
            if inner is not feature and isinstance(item, list) and _is_class(inner.get(key))
            else name_classes(item, inner.get(key))
            for key, item in value.items()
        }
    return value


def _is_class(feature: Any) -> bool:
    return (
        isinstance(feature, dict)
        and feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), list)
    )
