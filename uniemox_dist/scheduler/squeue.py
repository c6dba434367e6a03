"""Which jobs Slurm knows, from what squeue prints: `squeue -h -o '%A %T %l'`."""

from dataclasses import dataclass, field

from uniemox_dist.scheduler.allocation import parse_time

OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
}
"""States of jobs that hold nothing any more; squeue shows them for some minutes on request only."""


@dataclass(frozen=True)
class Live:
    """Jobs that are queued, run, or are just ending."""

    states: dict[int, str] = field(default_factory=dict)
    limits_s: dict[int, float] = field(default_factory=dict)
    """Time limits, of those that have one."""

    @classmethod
    def parse(cls, text: str) -> "Live":
        """Reads squeue's lines; others, and further columns, are passed over."""
        states, limits = {}, {}
        for line in text.splitlines():
            words = line.split()
            if len(words) < 2 or not words[0].isdigit():
                continue
            if words[1] not in OVER:
                states[int(words[0])] = words[1]
            limit = parse_time(words[2]) if len(words) > 2 else None
            if limit is not None:
                limits[int(words[0])] = limit
        return cls(states, limits)

    def knows(self, own_id: int) -> bool:
        """Whether squeue answered at all: then this job itself is among them."""
        return own_id in self.states
