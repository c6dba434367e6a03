"""Damaged samples of a run: each told when it is replaced, and all of them named when there are too many."""

import logging
from collections.abc import Sequence

from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.runs.events import BadSample
from uniemox_dist.runs.folder import RunFolder, read_lines

log = logging.getLogger("uniemox")
NAMED = 20
"""Damaged samples that the last line of a run names; all of them stand in events.jsonl."""


def report(folder: RunFolder, step: int, batches: Sequence[MicroBatch]) -> None:
    """An event and a warning for each sample that this rank replaced in a step, with its shard and key."""
    for batch in batches:
        for line in batch.damaged:
            folder.write(BadSample(step=step, damaged=line))
            log.warning("replaced a damaged sample: %s", line)


def describe(folder: RunFolder) -> str:
    """The damaged samples that the ranks reported so far, each once."""
    lines = [event["damaged"] for event in read_lines(folder.events) if "damaged" in event]
    # A sample is met again in each epoch, in other slots: what follows the slot is its name.
    names = list(dict.fromkeys(line.partition(": ")[2] for line in lines))
    rest = f"; and {len(names) - NAMED} more in {folder.events}" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + rest
