"""The start of a run: the duration of each part, the preflight, and the log lines and events about the run."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, LostPeer
from uniemox_dist.core.files import write_json, write_text
from uniemox_dist.core.formatting import millions
from uniemox_dist.core.versions import environment
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.data.sources import describe_data
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.deepspeed_internals import count_parameters
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding
from uniemox_dist.doctor.preflight import preflight
from uniemox_dist.runs.events.training import Convert, FirstStep, Init, Resume, Start
from uniemox_dist.runs.folder import RunFolder, report_bad_nodes
from uniemox_dist.train.trainer import Trainer

log = logging.getLogger("uniemox")
BATCH_BEGAN = "UNIEMOX_BATCH_BEGAN"
"""The variable in which a batch script states when it began, in seconds since 1970."""
PARTS = {
    "the preflight": "preflight",
    "opening the data": "data",
    "choosing a checkpoint, whose files are hashed": "checkpoint",
    "opening the teacher": "teacher",
    "choosing the pictures that are shown": "pictures",
    "making the engine, and loading the checkpoint": "engine",
}
"""The part that starts with a phase of the watchdog; any other phase belongs to the part before it."""


class StartupTimer:
    """Adds up the seconds of a start by part, in the order in which the parts first occurred."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        """The time since the process began counts as `imports`; the time from the beginning of the batch script, if
        known, to the beginning of the process as `batch script`."""
        self.seconds: dict[str, float] = {}
        now, began = time.time(), read_process_start()
        try:
            # Bash uses the decimal sign of the locale.
            batch = float(env.get(BATCH_BEGAN, "").replace(",", "."))
        except ValueError:
            batch = began
        if batch < began:
            self.seconds["batch script"] = began - batch
        self.seconds["imports"] = max(0.0, now - began)
        self._part, self._since = "meeting", time.monotonic()

    def start_phase(self, doing: str) -> None:
        """Starts the part that begins with a phase of the watchdog."""
        part = PARTS.get(doing, self._part)
        if part != self._part:
            self.start(part)

    def start(self, part: str) -> None:
        """Ends the current part and starts another."""
        now = time.monotonic()
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def expecting(self, watchdog: Watchdog, limit_s: float) -> Callable[[str], None]:
        """Returns `expect(phase)`, which starts a named phase here and in the watchdog, with `limit_s` seconds."""

        def expect(doing: str) -> None:
            watchdog.expect(doing, limit_s)
            self.start_phase(doing)

        return expect

    def report(self, folder: RunFolder, step: int) -> None:
        """Reports the first step of this attempt, which came after `step` others, in the events and in the log."""
        seconds = self.facts()
        folder.write(FirstStep(step=step, seconds=seconds))
        log.info("%s", describe(seconds))

    def facts(self) -> dict[str, float]:
        """Seconds by part, and `total`."""
        under_way = self.seconds.get(self._part, 0.0) + time.monotonic() - self._since
        seconds = {**self.seconds, self._part: under_way}
        rounded = {part: round(value, 2) for part, value in seconds.items()}
        return {**rounded, "total": round(sum(seconds.values()), 2)}


def describe(seconds: Mapping[str, float]) -> str:
    """`first step after 14.2 s: imports 6.1, …`."""
    parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items() if part != "total")
    return f"first step after {seconds['total']:.1f} s: {parts}"


def read_process_start() -> float:
    """When this process began by the kernel's record, in seconds since 1970: before the interpreter was loaded."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = float(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


def run_preflight(config: Config, world: World, device: torch.device, folder: RunFolder) -> None:
    """Runs the short form of `uniemox doctor`, and logs warnings and failures. Collective.

    Raises:
        Fault: on all ranks, if these ranks cannot train.
    """
    hosts = collectives.hosts(world)
    nodes = collectives.gather_objects(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), world)
    found = preflight(config, world, device, folder.path)
    if world.is_main:
        for finding in found:
            if finding.status != "ok":
                log.warning("preflight: %s", finding.line())
    if failed := [finding for finding in found if finding.status == "fail"]:
        if world.is_main:
            _report_bad_nodes(folder, failed, dict(zip(hosts, nodes, strict=True)))
        collectives.barrier()  # wait until it is written, because the launcher kills the other ranks when one ends
        raise (Fault if world.is_main else LostPeer)(
            f"the preflight failed ({failed[0].line()}); `uniemox doctor` says more"
        )


def _report_bad_nodes(folder: RunFolder, failed: list[Finding], names: Mapping[str, str]) -> None:
    """Records the nodes of a Slurm job that a later job should exclude. A fault of all nodes is not recorded, because
    other nodes would have it too. `names` maps hosts to Slurm's node names, because a host's own name may differ, for
    example by a domain."""
    job = os.environ.get("SLURM_JOB_ID", "")
    nodes = {
        names.get(host, host): finding.line()
        for finding in reversed(failed)
        for host in finding.about
        if len(names) == 1 or len(finding.about) < len(names)
    }
    if job.isdigit():
        report_bad_nodes(folder, nodes, int(job))


def announce(trainer: Trainer, step: int) -> None:
    """Writes config.yaml, environment.json and the events of a start, and logs what the run trains. Collective."""
    if trainer.world.is_main:
        versions = environment()
        _write_settings(trainer, versions)
        _report_start(trainer, step, versions)
        _log_run(trainer, step)
    collectives.barrier()


def _write_settings(trainer: Trainer, versions: Mapping[str, Any]) -> None:
    folder = trainer.folder
    try:
        write_text(folder.config, dump_yaml(trainer.config))
        write_json(folder.environment, dict(versions))
    except OSError as error:
        where = error.filename or folder.path
        log.warning("%s: %s; training continues without config or environment", where, error.strerror)


def _report_start(trainer: Trainer, step: int, versions: Mapping[str, Any]) -> None:
    """Writes the events of a start, of a resumed checkpoint, and of weights that the run starts from."""
    folder, world, checkpoint = trainer.folder, trainer.world, trainer.checkpoint
    stage = trainer.config.zero.stage
    folder.write(
        Start(
            step=step,
            ranks=world.size,
            zero_stage=stage,
            precision=trainer.precision,
            teacher=trainer.teacher_source,
            host=versions["host"],
            hosts=list(dict.fromkeys(trainer.hosts)),
            versions=versions["versions"],
        )
    )
    if checkpoint is not None:
        ranks, saved_stage = checkpoint.info["world_size"], checkpoint.info["zero_stage"]
        name = checkpoint.folder.name
        folder.write(Resume(step=step, checkpoint=name, ranks=ranks, zero_stage=saved_stage))
        if (ranks, saved_stage) != (world.size, stage):
            plural = "" if ranks == 1 else "s"
            log.info("the checkpoint was saved by %d rank%s with ZeRO-%d", ranks, plural, saved_stage)
            folder.write(
                Convert(
                    step=step,
                    from_ranks=ranks,
                    from_zero_stage=saved_stage,
                    ranks=world.size,
                    zero_stage=stage,
                )
            )
    if trainer.loaded is not None:
        folder.write(Init(**trainer.loaded.facts()))


def _log_run(trainer: Trainer, step: int) -> None:
    config, world, checkpoint = trainer.config, trainer.world, trainer.checkpoint
    parameters = count_parameters(trainer.engine.module)
    log.info(
        "run %s: %s at step %d of %d; student %s parameters, teacher %s; %d samples; ranks %d x micro-batch %d x "
        "accumulation %d = global batch %d; ZeRO-%d, %s on %s",
        trainer.folder.path,
        f"resumes {checkpoint.folder.name}" if checkpoint else "starts",
        step,
        trainer.schedule.max_steps,
        millions(parameters),
        trainer.describe_teacher(),
        trainer.sources.samples,
        world.size,
        config.batch.micro_batch,
        config.batch.grad_accum(world.size),
        config.batch.global_batch,
        config.zero.stage,
        trainer.precision,
        trainer.device,
    )
    if trainer.loaded is not None:
        for line in trainer.loaded.describe().splitlines():
            log.info("%s", line)
    log.info("%s", trainer.flops.describe(trainer.peak_tflops))
    local_ranks = trainer.hosts.count(trainer.hosts[world.rank])
    for line in describe_data(trainer.sources, config, world.size, local_ranks):
        log.info("%s", line)
    if trainer.sources.samples < config.batch.global_batch:
        log.warning(
            "batch.global_batch exceeds the %d samples: a batch repeats samples", trainer.sources.samples
        )
