"""The start of a run: its folder, the checkpoint that it goes on from, and what it says of itself."""

import logging
import os
import socket
from collections.abc import Mapping

import torch

from uniemox_dist.checkpoints import run_state as checkpoints
from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, LostPeer
from uniemox_dist.core.files import write_json, write_text
from uniemox_dist.core.versions import environment
from uniemox_dist.data.sources import describe_data
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding
from uniemox_dist.doctor.preflight import preflight
from uniemox_dist.runs.events import Convert, Init, Resume, Start
from uniemox_dist.runs.folder import RunFolder, report_bad_nodes
from uniemox_dist.train.engine import grad_accum
from uniemox_dist.train.trainer import Trainer

log = logging.getLogger("uniemox")


def check(config: Config, world: World, device: torch.device, folder: RunFolder) -> None:
    """The short form of `uniemox doctor`, by all ranks together: what is not well is said, and what fails ends the run.

    Raises:
        Fault: if these ranks cannot train, on all of them.
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
            _report_nodes(folder, failed, dict(zip(hosts, nodes, strict=True)))
        collectives.barrier()  # until it is written: who starts the ranks kills the others when one ends
        raise (Fault if world.is_main else LostPeer)(
            f"the preflight failed ({failed[0].line()}); `uniemox doctor` says more"
        )


def _report_nodes(folder: RunFolder, failed: list[Finding], names: Mapping[str, str]) -> None:
    """Writes down the nodes of a Slurm job that a later one should leave out; what is wrong on every node alike would
    be so elsewhere, too. `names` are Slurm's, by host: a host's own name may be another, such as one with a domain."""
    job = os.environ.get("SLURM_JOB_ID", "")
    nodes = {
        names.get(host, host): finding.line()
        for finding in reversed(failed)
        for host in finding.about
        if len(names) == 1 or len(finding.about) < len(names)
    }
    if job.isdigit():
        report_bad_nodes(folder, nodes, int(job))


def begin(trainer: Trainer) -> int:
    """Loads the checkpoint that rank 0 chose, writes down what runs, and returns the first step."""
    folder, world, config, chosen = trainer.folder, trainer.world, trainer.config, trainer.chosen
    step = 0
    if chosen is not None:
        step = checkpoints.load(trainer.engine, chosen)
        if trainer.ema is not None and not trainer.ema.load(chosen) and world.is_main:
            log.warning("%s holds no moving average: it starts from the weights", chosen.folder.name)
    if world.is_main:
        facts = environment()
        try:
            write_text(folder.config, dump_yaml(config))
            write_json(folder.environment, facts)
        except OSError as error:
            where = error.filename or folder.path
            log.warning("%s: %s; training goes on without config or environment", where, error.strerror)
        # Where the teacher's embeddings come from: live, cache, or None without one.
        source = config.teacher.source if trainer.facts else None
        folder.write(
            Start(
                step=step,
                ranks=world.size,
                zero_stage=config.zero.stage,
                precision=trainer.precision,
                teacher=source,
                host=facts["host"],
                hosts=list(dict.fromkeys(trainer.hosts)),
                versions=facts["versions"],
            )
        )
        if chosen is not None:
            saved = chosen.info
            ranks, stage = saved["world_size"], saved["zero_stage"]
            folder.write(Resume(step=step, checkpoint=chosen.folder.name, ranks=ranks, zero_stage=stage))
            if (ranks, stage) != (world.size, config.zero.stage):
                log.info("its checkpoint is of %d rank%s, ZeRO-%d", ranks, "" if ranks == 1 else "s", stage)
                folder.write(
                    Convert(
                        step=step,
                        from_ranks=ranks,
                        from_zero_stage=stage,
                        ranks=world.size,
                        zero_stage=config.zero.stage,
                    )
                )
        if trainer.loaded is not None:
            folder.write(Init(**trainer.loaded.facts()))
        _introduce(trainer, step)
    collectives.barrier()
    return step


def _introduce(trainer: Trainer, step: int) -> None:
    config, world, schedule, chosen = trainer.config, trainer.world, trainer.schedule, trainer.chosen
    trained = sum(
        p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in trainer.student.parameters()
    )
    log.info(
        "run %s: %s at step %d of %d; student %.1f M parameters, teacher %s; %d samples; ranks %d x micro-batch %d x "
        "accumulation %d = global batch %d; ZeRO-%d, %s on %s",
        trainer.folder.path,
        f"resumes {chosen.folder.name}" if chosen else "starts",
        step,
        schedule.max_steps,
        trained / 1e6,
        _teacher(trainer),
        trainer.sources.samples,
        world.size,
        config.batch.micro_batch,
        grad_accum(config, world.size),
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
    for line in describe_data(trainer.sources, trainer.plan, config, world.size, local_ranks):
        log.info("%s", line)
    if trainer.sources.samples < config.batch.global_batch:
        log.warning(
            "batch.global_batch exceeds the %d samples: a batch repeats samples", trainer.sources.samples
        )


def _teacher(trainer: Trainer) -> str:
    if trainer.facts is None:
        return "none"
    name = trainer.config.teacher.name
    return f"{name} (live)" if trainer.replay is None else f"{name} as {trainer.replay}"
