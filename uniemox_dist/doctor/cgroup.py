"""Limits that a container or a batch system sets on this process through Linux control groups, versions 1 and 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 reports a value above this where there is no limit."""


@dataclass(frozen=True)
class Limits:
    """Limits of a process, and its use of them; None without a limit."""

    memory_bytes: int | None = None
    memory_used: int = 0
    """Bytes used in that group, without inactive file pages, which the kernel can drop."""
    pids: int | None = None
    """Processes and threads."""
    pids_used: int = 0
    cores: float | None = None
    """Cores by the CPU quota."""


def read_limits(root: Path = Path("/")) -> Limits:
    """The lowest limits of all groups of this process; `root` is the parent of /proc and /sys."""
    memory: tuple[int, int] | None = None
    pids: tuple[int, int] | None = None
    cores: float | None = None
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        if limit is not None and limit < UNLIMITED:
            used = max(0, used - _inactive(group / "memory.stat"))
            if memory is None or limit - used < memory[0] - memory[1]:
                memory = (limit, used)
    for group in _groups(root, "pids"):
        limit = _number(group / "pids.max")
        if limit is not None and (pids is None or limit < pids[0]):
            pids = (limit, _number(group / "pids.current") or 0)
    for group in _groups(root, "cpu"):
        quota = _quota(group)
        if quota is not None and (cores is None or quota < cores):
            cores = quota
    limit, used = memory or (None, 0)
    most, running = pids or (None, 0)
    return Limits(limit, used, most, running, cores)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of its parents, for one controller."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / (names and controller)
        group = top / path.lstrip("/")
        while True:
            # In a container the path may be the host's, which does not exist here; the root is then this process's
            # group.
            if group.is_dir():
                yield group
            if group == top:
                break
            group = group.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # also "max"
        return None


def _inactive(path: Path) -> int:
    try:
        facts = dict(line.split(" ", 1) for line in path.read_text().splitlines())
        return int(facts.get("total_inactive_file", facts.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0


def _quota(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    v1 = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return v1[0] / v1[1] if v1[0] is not None and v1[0] > 0 and v1[1] else None
