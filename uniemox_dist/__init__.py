"""uniemox-dist: UniEmoX pretraining at scale. The public names below are resolved on first use.

Importing this package imports neither torch nor other slow modules, so packing, planning and launching work on
machines without a GPU stack.
"""

from importlib import import_module
from typing import Any

from uniemox_dist.core.imports import collection_paused

__version__ = "0.1.0"

_PUBLIC = {
    "load_encoder": "uniemox_dist.release.load",
    "load_pretrained": "uniemox_dist.release.load",
    "load_uniemox": "uniemox_dist.release.load",
    "load_config": "uniemox_dist.config.load",
    "Config": "uniemox_dist.config.schema",
    "UserError": "uniemox_dist.core.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        with collection_paused():
            return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'uniemox_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
