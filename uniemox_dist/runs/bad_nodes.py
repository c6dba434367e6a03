"""RUN/nodes.jsonl: nodes on which a run's preflight failed. Later submissions leave them out for a day."""

import time
from collections.abc import Mapping
from typing import Any

from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.folder import RunFolder, append_line, read_lines

COUNTS_S = 24 * 3600.0
"""How long an entry counts: nodes are mended, and names are given again."""


def report(folder: RunFolder, findings: Mapping[str, str], job_id: int | None) -> None:
    """Writes down what failed on which nodes."""
    for node, finding in findings.items():
        line = {"time": round(time.time(), 3), "node": node, "job_id": job_id, "finding": finding}
        append_line(folder.bad_nodes, line)


def entries(folder: RunFolder) -> list[dict[str, Any]]:
    """All entries that make sense, the oldest first."""
    lines = read_lines(folder.bad_nodes)
    return [line for line in lines if isinstance(line.get("node"), str) and is_number(line.get("time"))]


def excluded(folder: RunFolder, now: float) -> list[str]:
    """The nodes that the next submission should leave out, each once."""
    return list(dict.fromkeys(e["node"] for e in entries(folder) if now - e["time"] < COUNTS_S))
