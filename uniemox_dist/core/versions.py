"""Versions of the packages that affect a run's results, and facts about this host."""

import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "uniemox-dist",
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "open_clip_torch",
    "webdataset",
    "pyarrow",
    "numpy",
)


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that affect a run's results."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """Versions and host, for environment.json and the start event."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
    }
