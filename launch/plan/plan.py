"""The whole plan of a run: its inputs and all results."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.plan.data import (
    Balance,
    Data,
    Loading,
    compute_balance,
    compute_loading,
    count_epochs_of_sources,
    describe_balance,
    describe_loading,
)
from launch.plan.memory import (
    Memory,
    choose_micro_batches,
    choose_precision,
    count_memory,
    list_stages,
    recommend,
)
from launch.plan.model import Tower, list_trained_parameters, read_tower, run_flops
from launch.plan.network import CPU_LINK_GB_S, NetworkTime, Traffic, list_exchanges, network_time
from launch.plan.pace import Measured, Pace, compare_settings, find_pace, run_steps
from launch.plan.ranks import explain_illegal, largest_legal, legal_ranks
from launch.plan.saving import (
    NODE_MTBF_HOURS,
    CheckpointSize,
    Interval,
    Lead,
    SaveTime,
    advise_interval,
    checkpoint_size,
    estimate_save,
    signal_lead,
)
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import Device
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted
from uniemox_dist.models.flops import Flops
from uniemox_dist.models.parameters import Parameter
from uniemox_dist.runs.folder import RunFolder

Remark = tuple[str, str]
"""Status (ok or warn) and text."""


@dataclass(frozen=True)
class PlanInputs:
    """The operator's hardware and options."""

    nodes: int
    per_node: int
    device: Device
    network_gbit_s: float | None = None
    """Bandwidth from one node to the others, all cards together."""
    mfu: float | None = None
    samples_per_s: float | None = None
    earlier: Measured | None = None
    earlier_run: RunFolder | None = None
    node_mtbf_h: float | None = None
    disk_gb_s: float | None = None
    ms_per_sample: float | None = None
    cpus_per_node: int | None = None


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends in a step of one ZeRO stage, and the time that this takes."""

    stage: int
    precision: str
    traffic: tuple[Traffic, ...]
    sent_bytes: float
    time: NetworkTime
    share: float | None
    """Share of a step's computing time, without overlap."""


@dataclass(frozen=True)
class Saving:
    """Checkpoints of the run."""

    size: CheckpointSize
    save: SaveTime
    node_mtbf_h: float
    mtbf_assumed: bool
    interval: Interval | None
    """None if the pace is unknown."""
    lead: Lead


@dataclass(frozen=True)
class Plan:
    """Everything that a plan reports."""

    config: Config
    inputs: PlanInputs
    nodes: int
    per_node: int
    """Ranks that run on each node; fewer than its GPUs if more would be illegal."""
    legal: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    tower: Tower
    precision: str
    memory: tuple[Memory, ...]
    checkpointed: tuple[Memory, ...]
    """The same with compute.checkpoint_blocks."""
    recommended: Memory | None
    recommended_checkpointed: bool
    """Whether the recommended choice needs compute.checkpoint_blocks."""
    exchanges: tuple[Exchange, ...]
    flops: Flops
    pace: Pace | None
    steps: int
    loading: Loading | None
    data: Data
    balance: Balance | None
    source_epochs: tuple[float, ...]
    saving: Saving
    remarks: dict[str, list[Remark]]

    @property
    def ranks(self) -> int:
        """Ranks that run."""
        return self.nodes * self.per_node

    @property
    def step_s(self) -> float | None:
        """Seconds of a step."""
        return self.config.batch.global_batch / self.pace.samples_per_s if self.pace else None

    @property
    def hours(self) -> float | None:
        """Hours of the whole run, without starts, saves and failures."""
        return self.steps * self.step_s / 3600 if self.step_s else None

    @property
    def own_memory(self) -> Memory:
        """Memory of the recipe's own ZeRO stage and micro-batch."""
        return self.chosen(self.checkpointed if self.config.compute.checkpoint_blocks else self.memory)

    def chosen(self, memories: Sequence[Memory], stage: int | None = None) -> Memory:
        """Memory of the recipe's micro-batch in a stage, by default the recipe's."""
        stage = self.config.zero.stage if stage is None else stage
        return next(
            m for m in memories if m.stage == stage and m.micro_batch == self.config.batch.micro_batch
        )


def make_plan(config: Config, inputs: PlanInputs, data: Data) -> Plan:
    """Computes the plan.

    Raises:
        UserError: if no number of ranks can run, or there are more GPUs than streams.
    """
    here = inputs.nodes * inputs.per_node
    if here > config.batch.streams:
        raise UserError(
            f"--nodes={inputs.nodes} --gpus-per-node={inputs.per_node}: {explain_illegal(config, here)}"
        )
    nodes, per_node = largest_legal(config, inputs.nodes, inputs.per_node)
    ranks, device = nodes * per_node, inputs.device
    tower = read_tower(config)
    parameters = list_trained_parameters(config, tower, data.labels)
    precision = choose_precision(config, device, config.zero.stage)
    memory, checkpointed = (
        tuple(
            count_memory(
                config,
                parameters,
                tower,
                device,
                stage=stage,
                micro_batch=micro,
                ranks=ranks,
                checkpointed=with_checkpoints,
            )
            for stage in list_stages(config)
            for micro in choose_micro_batches(config, ranks)
        )
        for with_checkpoints in (False, True)
    )
    plainly = recommend(memory, device, config.batch.micro_batch)
    recommended = plainly or recommend(checkpointed, device, config.batch.micro_batch)
    flops = run_flops(config, tower, data.labels)
    pace = find_pace(
        config,
        flops,
        device,
        precision,
        ranks,
        mfu=inputs.mfu,
        samples_per_s=inputs.samples_per_s,
        earlier=inputs.earlier,
    )
    steps = run_steps(config, data.epoch_samples)
    step_s = config.batch.global_batch / pace.samples_per_s if pace else None
    found = compute_balance(config, data, ranks) if data.manifests else None
    load = compute_loading(pace.samples_per_s / nodes, per_node, inputs.ms_per_sample) if pace else None
    exchanges = tuple(
        _plan_exchange(config, inputs, parameters, tower, stage, (nodes, per_node), step_s)
        for stage in list_stages(config)
    )
    return Plan(
        config=config,
        inputs=inputs,
        nodes=nodes,
        per_node=per_node,
        legal=tuple(legal_ranks(config)),
        parameters=parameters,
        tower=tower,
        precision=precision,
        memory=memory,
        checkpointed=checkpointed,
        recommended=recommended,
        recommended_checkpointed=plainly is None,
        exchanges=exchanges,
        flops=flops,
        pace=pace,
        steps=steps,
        loading=load,
        data=data,
        balance=found,
        source_epochs=tuple(count_epochs_of_sources(config, data, steps, found.streams)) if found else (),
        saving=_plan_saving(config, inputs, parameters, ranks, nodes, steps, step_s),
        remarks={
            "ranks": _describe_idle_gpus(config, inputs, (nodes, per_node)),
            "memory": _memory_remarks(config),
            "pace": _pace_remarks(config, inputs.earlier),
            "network": _network_remarks(config, exchanges),
            "loading": describe_loading(load, config, per_node, inputs.cpus_per_node) if load else [],
            "balance": describe_balance(config, data, found, config.batch.streams * per_node // ranks),
        },
    )


def _describe_idle_gpus(config: Config, inputs: PlanInputs, used: tuple[int, int]) -> list[Remark]:
    """A remark about idle GPUs, with the reason."""
    here = inputs.nodes * inputs.per_node
    idle = here - used[0] * used[1]
    if not idle:
        return []
    parts = []
    if nodes := inputs.nodes - used[0]:
        parts.append(counted(nodes, "node"))
    if gpus := inputs.per_node - used[1]:
        parts.append(
            f"{counted(gpus, 'GPU')} on each of the other nodes"
            if nodes
            else f"{counted(gpus, 'GPU')} per node"
        )
    reason = explain_illegal(config, here)
    return [("warn", f"{' and '.join(parts)} would stay idle, {idle} of {here} GPUs: {reason}")]


def _memory_remarks(config: Config) -> list[Remark]:
    """Settings whose effect on memory a plan does not count."""
    zero = config.deepspeed.get("zero_optimization") or {}
    unknown = [key for key in zero if key.startswith(("offload", "cpu_offload", "zero_quantized"))]
    return [("warn", f"deepspeed.zero_optimization.{key}: what it saves is not counted") for key in unknown]


def _pace_remarks(config: Config, earlier: Measured | None) -> list[Remark]:
    """A remark about the run whose pace is used, if its settings differ."""
    text = None if earlier is None else compare_settings(config, earlier)
    return [] if text is None else [("warn", text)]


def _network_remarks(config: Config, exchanges: Sequence[Exchange]) -> list[Remark]:
    """A remark if the exchanges of the recipe's stage take longer than its computing."""
    share = next(e.share for e in exchanges if e.stage == config.zero.stage)
    if share is None or share <= 1:
        return []
    words = "exchanges take longer than a step computes, so that the pace will be lower"
    return [("warn", f"{words}; a larger batch.global_batch, fewer ranks, or a faster network")]


def _plan_exchange(
    config: Config,
    inputs: PlanInputs,
    parameters: tuple[Parameter, ...],
    tower: Tower,
    stage: int,
    used: tuple[int, int],
    step_s: float | None,
) -> Exchange:
    nodes, per_node = used
    precision = choose_precision(config, inputs.device, stage)
    found = list_exchanges(
        config,
        parameters,
        tower.embedding_width,
        stage=stage,
        precision=precision,
        micro_batches=config.batch.global_batch // (config.batch.micro_batch * nodes * per_node),
    )
    sent = sum(t.sent(nodes * per_node) for t in found)
    link = inputs.device.link_gb_s if inputs.device.is_gpu else CPU_LINK_GB_S
    time = network_time(
        sent, nodes=nodes, per_node=per_node, link_gb_s=link, network_gbit_s=inputs.network_gbit_s
    )
    share = None if time.seconds is None or step_s is None else time.seconds / step_s
    return Exchange(stage, precision, tuple(found), sent, time, share)


def _plan_saving(
    config: Config,
    inputs: PlanInputs,
    parameters: tuple[Parameter, ...],
    ranks: int,
    nodes: int,
    steps: int,
    step_s: float | None,
) -> Saving:
    size = checkpoint_size(config, parameters, ranks, steps)
    save = estimate_save(size, inputs.disk_gb_s)
    if inputs.earlier is not None and inputs.earlier.save_s is not None and inputs.disk_gb_s is None:
        waits = inputs.earlier.waits_s if inputs.earlier.waits_s is not None else save.waits_s
        save = SaveTime(waits, inputs.earlier.save_s, "as --from-run measured")
    mtbf = NODE_MTBF_HOURS if inputs.node_mtbf_h is None else inputs.node_mtbf_h
    interval = None
    if step_s is not None:
        interval = advise_interval(
            save,
            step_s=step_s,
            nodes=nodes,
            node_mtbf_h=mtbf,
            save_every=config.run.save_every,
            max_steps=steps,
        )
    lead = signal_lead(config, inputs.earlier_run, ranks=ranks, disk_gb_s=inputs.disk_gb_s, step_s=step_s)
    return Saving(size, save, mtbf, inputs.node_mtbf_h is None, interval, lead)
