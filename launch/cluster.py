"""Cluster files: a site's account, partition, nodes, modules, containers and time-outs.

A cluster file is YAML, given by its path or by the name of a shipped one (launch/clusters).
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from uniemox_dist.config.sections import Seconds, Section, explain_errors
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler.durations import parse_duration

OWN_OPTIONS = {
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
"""Options of sbatch that the script or the command sets, and the setting to use instead; None for those that cannot be
changed."""


def _check_sbatch_option(option: str) -> str:
    """
    Raises:
        ValueError: if it does not look like an option, or is set elsewhere; the message names the setting to use.
    """
    match = re.fullmatch(r"--([a-z][a-z-]*)(=.+)?", option)
    if match is None:
        raise ValueError(f"sbatch: {option!r} must look like --name or --name=value")
    if match[1] in OWN_OPTIONS:
        instead = OWN_OPTIONS[match[1]]
        fix = f"use {instead}" if instead else "leave it out: the script needs its own value"
        raise ValueError(f"sbatch: --{match[1]} is set by the script; {fix}")
    return option


def _make_pattern_validator(pattern: str, wanted: str) -> AfterValidator:
    """A validator of texts that match a pattern; `wanted` describes it in the error."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            raise ValueError(f"{value!r}: {wanted}")
        return value

    return AfterValidator(check)


Word = Annotated[
    str, _make_pattern_validator(r"[^\s\"'\\$`]+", "must be one word, without spaces, quotes, $ and \\")
]
"""A text that scripts can hold without quotes."""
Line = Annotated[str, _make_pattern_validator(r"[^\n\r\x00]+", "must be one line")]
Nodes = Annotated[
    str, _make_pattern_validator(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", "give a number, as 4, or a range, as 2-4")
]
Size = Annotated[
    str,
    _make_pattern_validator(
        r"\d+[KMGT]?", "give a number with K, M, G or T, as 480G, or 0 for all of a node's memory"
    ),
]
Folder = Annotated[
    str,
    _make_pattern_validator(
        r"[^\s\"'\\`;&|<>()]+", "must be a path without spaces, quotes and ; & | < > ( )"
    ),
]


class Timeouts(Section):
    """Time-outs of this site. They set the run's settings below; the user's KEY=VALUE pairs take precedence."""

    start_s: Seconds | None = None
    """Seconds for each part of a start and for the first step: run.start_timeout_s."""
    step_s: Seconds | None = None
    """Seconds for one step: run.step_timeout_s."""
    compile_s: Seconds | None = None
    """Seconds for a step in which something is compiled: run.compile_timeout_s."""


class Container(Section):
    """The container that a job's commands run in."""

    kind: Literal["none", "apptainer", "pyxis"] = "none"
    """apptainer wraps each command; pyxis (with enroot) is srun's own --container-image."""
    image: Line | None = None
    """Path of a .sif or .sqsh file, or a URL from which the runtime pulls, such as docker://…"""
    mounts: tuple[Word, ...] = ()
    """Folders to mount, as PATH or PATH:PATH_INSIDE, besides run folder, working directory and local shards."""
    options: tuple[Line, ...] = ()
    """Further options: of `apptainer exec`, or of srun for pyxis."""

    @model_validator(mode="after")
    def _has_an_image(self) -> "Container":
        if (self.kind == "none") != (self.image is None):
            raise ValueError(
                f"container.kind={self.kind} and container.image={self.image}: give both, or neither"
            )
        return self


class Cluster(Section):
    """A site's settings. A missing one leaves Slurm's default in place."""

    account: Word | None = None
    """Account to charge."""
    partition: Word | None = None
    """Partition, or several with commas."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have, such as h100&ib."""
    reservation: Word | None = None
    """Reservation to run in."""
    nodes: Nodes = "1"
    """Nodes of a job, as 4 or as 2-4; with fewer than the most, a run uses the largest legal number of ranks."""
    gpus_per_node: int = Field(default=1, ge=0, le=64)
    """GPUs requested on each node; 0 for ranks on CPUs."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """Option that requests GPUs: --gpus-per-node=N, --gres=gpu:N, or none at sites that allocate whole nodes."""
    gpu_type: Word | None = None
    """Type in that request, such as h100."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on each node; as many as GPUs unless given, and needed without GPUs."""
    cpus_per_task: PositiveInt | None = None
    """Cores of each rank, for itself and its loader processes."""
    mem: Size | None = None
    """Memory of a node, such as 480G; 0 is all of it."""
    exclusive: bool = False
    """Allocate whole nodes."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it: minutes, hours:minutes:seconds, days-hours."""
    signal_lead_s: int = Field(default=180, ge=10, le=65535)
    """Seconds before the time limit at which Slurm signals the run to save; at least twice a save plus a step."""
    requeue: bool = True
    """Whether jobs may requeue themselves after a preemption or at their time limit; if not, use --chain or --after."""
    sbatch: tuple[Line, ...] = ()
    """Further options of sbatch, such as --mail-type=FAIL."""
    modules: tuple[Word, ...] = ()
    """Modules to load, in this order, after `module purge`."""
    setup: str = ""
    """Shell lines that run at the start of the job, such as the activation of an environment. Not checked."""
    env: dict[str, Line] = Field(default_factory=dict)
    """Environment variables of the job; values are not expanded."""
    container: Container = Container()
    """The container that the job's commands run in."""
    uniemox: Word | None = None
    """The command on compute nodes; otherwise the one that submits, or `uniemox` in a container."""
    timeouts: Timeouts = Timeouts()
    """Time-outs of this site."""
    node_tmp: Folder | None = None
    """Folder on each node's own disk for compiler caches; may use variables, such as $TMPDIR, the default."""
    gpu: Word | None = None
    """Name of these GPUs for `uniemox plan --gpu`."""
    network_gbit_s: PositiveFloat | None = None
    """Bandwidth from one node to the others, all cards together, in 10^9 bits per second: `uniemox plan --network`."""

    @field_validator("nodes", "mem", "time", mode="before")
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("env", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", str(key)):
                raise ValueError(f"env: {key!r} is not a valid name of a variable; use letters, digits and _")
        return {str(k): v if isinstance(v, str) else _shell(v) for k, v in value.items()}

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        seconds = parse_duration(value)
        if not seconds:
            raise ValueError(
                f"time={value}: give minutes, hours:minutes:seconds or days-hours, such as 24:00:00"
            )
        return value

    @field_validator("sbatch")
    @classmethod
    def _sbatch_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_check_sbatch_option, value))

    @model_validator(mode="after")
    def _fits_together(self) -> "Cluster":
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ValueError(
                "ranks_per_node: needed with gpus_per_node=0; give the number of CPU ranks on a node"
            )
        if self.min_nodes > self.max_nodes:
            raise ValueError(
                f"nodes={self.nodes}: the first number is the larger one; write {self.max_nodes}-{self.min_nodes}"
            )
        if self.signal_lead_s >= self.time_s:
            raise ValueError(
                f"signal_lead_s={self.signal_lead_s} must be shorter than time={self.time} ({self.time_s:.0f} s)"
            )
        return self

    @property
    def min_nodes(self) -> int:
        """The fewest nodes that a job starts with."""
        return int(self.nodes.partition("-")[0])

    @property
    def max_nodes(self) -> int:
        """The most nodes that a job gets."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def time_s(self) -> float:
        """The time limit in seconds; Slurm rounds it up to whole minutes."""
        return parse_duration(self.time) or 0.0

    def with_options(self, options: Mapping[str, Any]) -> "Cluster":
        """The same site with other values, such as a command's options. None keeps the file's value, and an empty text
        removes it.

        Raises:
            UserError: for an invalid value.
        """
        given = {key: value for key, value in options.items() if value is not None}
        values = {**self.model_dump(exclude_unset=True), **given}
        return _validate({key: value for key, value in values.items() if value != ""}, "options")

    def run_settings(self) -> dict[str, int]:
        """The time-outs as settings of a run's section `run`."""
        values = self.timeouts.model_dump(exclude_none=True)
        return {f"{name.removesuffix('_s')}_timeout_s": value for name, value in values.items()}


def list_shipped_clusters() -> list[str]:
    """Names of the cluster files that come with the package."""
    folder = resources.files("launch") / "clusters"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_cluster(site: str) -> Cluster:
    """A cluster by its file, or by the name of a shipped one.

    Raises:
        UserError: with one line for every mistake.
    """
    path = Path(site)
    if path.is_file():
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"--cluster={site}: not a text in UTF-8; give a YAML file") from None
        except OSError as error:
            raise UserError(f"--cluster={site}: cannot be read ({error.strerror})") from None
    elif site in list_shipped_clusters():
        text = (resources.files("launch") / "clusters" / f"{site}.yaml").read_text(encoding="utf-8")
        where = f"cluster {site}"
    else:
        names = ", ".join(list_shipped_clusters())
        raise UserError(f"--cluster={site}: no such file, nor a shipped cluster; shipped are: {names}")
    values = parse_yaml(text, where) or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: a cluster file is a mapping, found {type(values).__name__}")
    return _validate(values, where)


def _validate(values: Mapping[str, Any], where: str) -> Cluster:
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in explain_errors(error, Cluster))) from None


def _shell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
