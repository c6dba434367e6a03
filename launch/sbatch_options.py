"""Options of sbatch that a site may add, and those that the script or the command sets itself."""

import re

OURS = {
    "nodes": "nodes",
    "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpu_request: gres",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem",
    "time": "time",
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "exclusive": "exclusive",
    "signal": "signal_lead_s",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "job-name": "run.name=… of the command",
    "array": "--array of the command",
    "dependency": "--after or --dependency of the command",
    "exclude": "--exclude of the command",
    "output": None,
    "error": None,
    "open-mode": None,
    "chdir": None,
    "export": None,
    "wrap": None,
    "parsable": None,
    "test-only": None,
}
"""Options of sbatch that the script or the command sets, and where to say it; None for what must stay as it is."""


def refuse_own(option: str) -> None:
    """
    Raises:
        ValueError: if a site's further option is none, or one that is set elsewhere, with the place.
    """
    match = re.fullmatch(r"--([a-z][a-z-]*)(=.+)?", option)
    if match is None:
        raise ValueError(f"sbatch: {option!r} must look like --name or --name=value")
    if match[1] in OURS:
        instead = OURS[match[1]]
        fix = f"say it by {instead}" if instead else "leave it out: the script needs its own"
        raise ValueError(f"sbatch: --{match[1]} is set by the script; {fix}")
