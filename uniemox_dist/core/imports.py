"""Importing large libraries without collections of cyclic garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses the collection of cyclic garbage, for imports of large libraries.

    Imports create hundreds of thousands of objects that live as long as the process. Python traverses them again and
    again while their number grows, which takes a fifth of the time to import torch, timm and DeepSpeed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
