"""Captions composed from label and attributes (being written)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Captioner:
    """Stands in until the templates are there."""

    identity: dict[str, Any]

    def captions(
        self, given: tuple[str, ...], label: str | None, attributes: Mapping[str, Any]
    ) -> tuple[str, ...]:
        return given


def load_captioner(spec: str | None) -> Captioner | None:
    return None
