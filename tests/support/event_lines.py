"""Events for tests, which may lack fields as those of old versions do."""

import time
from typing import Any

from uniemox_dist.runs.folder import RunFolder, append_line


def write_event(folder: RunFolder, kind: str, **fields: Any) -> None:
    """Appends an event of any kind with any fields to a run's events.jsonl, at the present time."""
    append_line(folder.events, {"time": round(time.time(), 3), "event": kind, **fields})
