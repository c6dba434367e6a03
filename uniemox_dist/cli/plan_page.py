"""A plan as tables for the terminal, at most about 110 columns wide."""

import math
from collections.abc import Sequence

import click

from launch.plan.data import MS_PER_SAMPLE, count_bytes_in_use
from launch.plan.memory import Memory
from launch.plan.model import count_numbers
from launch.plan.network import Traffic
from launch.plan.pace import ASSUMED_MFU
from launch.plan.plan import Plan, Remark
from uniemox_dist.cli.tables import columns, render_fact, render_ok, render_warning, title
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.core.devices import UNNAMED, device_names
from uniemox_dist.core.formatting import (
    counted,
    duration,
    gigabytes,
    power_of_ten,
    rate,
    short_duration,
    size,
)


def render_page(plan: Plan) -> str:
    """Returns the lines of all sections."""
    sections = [
        _head(plan),
        _memory(plan),
        _network(plan),
        _hours(plan),
        _loading(plan),
        _balance(plan),
        _saving(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _head(plan: Plan) -> list[str]:
    config, model = plan.config, plan.config.model
    trained = sum(p.numbers for p in plan.parameters if p.trained)
    finetunes = isinstance(config, FinetuneRun)
    parts = [
        f"{name} {count_numbers(plan.parameters, name) / 1e6:.{2 if name == 'head' else 1}f}"
        for name in ("encoder", "decoder", "fusion", "head")
        if count_numbers(plan.parameters, name)
    ]
    name = model.name or f"ViT {model.width} x {model.depth}, patch {model.patch_size}"
    batch = config.batch
    accumulation = batch.global_batch // (batch.micro_batch * plan.ranks)
    lines = [
        title(f"{config.run.name}: {name} on {_place(plan)}"),
        render_fact(
            "classifier" if finetunes else "student",
            f"{trained / 1e6:.1f} M trained parameters ({', '.join(parts)}), {plan.precision}",
        ),
        render_fact(
            "step",
            f"{batch.global_batch} samples = {plan.ranks:,} ranks x micro-batch {batch.micro_batch} x accumulation "
            f"{accumulation}, ZeRO {config.zero.stage}",
        ),
    ]
    if plan.tower.embedding_width is not None:
        source = "live" if config.teacher.source == "live" else "from a cache"
        size_ = f"{plan.tower.parameters / 1e6:.1f} M, " if plan.tower.parameters else ""
        lines.append(render_fact("teacher", f"{size_}{source}, embedding width {plan.tower.embedding_width}"))
    if plan.tower.remark:
        lines.append(render_warning(plan.tower.remark))
    lines += _remarks(plan.remarks["ranks"])
    legal = [n for n in plan.legal if n <= 4 * plan.inputs.nodes * plan.inputs.per_node]
    text = ", ".join(f"{n:,}" for n in legal[-12:])
    lines.append(render_fact("legal ranks", f"{'… ' if len(legal) > 12 else ''}{text}"))
    return lines


def _place(plan: Plan) -> str:
    name = plan.inputs.device.name
    unit = "GPUs" if name in UNNAMED else "ranks on CPUs" if name == "cpu" else name
    nodes = counted(plan.nodes, "node")
    return f"{nodes} x {plan.per_node} {unit}"


def _memory(plan: Plan) -> list[str]:
    device, config = plan.inputs.device, plan.config
    stages = sorted({m.stage for m in plan.memory})
    of = "" if device.memory_bytes is None else f" (of {device.memory_bytes / 1e9:.1f})"
    head = (
        "ZeRO",
        "format",
        "weights",
        "gradients",
        "optimiser",
        "EMA",
        "teacher",
        "activations",
        "buffers",
        "views",
        "context",
        "total",
        "",
    )
    checkpointed = config.compute.checkpoint_blocks
    rows = [
        _parts(plan.chosen(plan.checkpointed if checkpointed else plan.memory, stage), plan)
        for stage in stages
    ]
    where = "one GPU" if device.is_gpu else "one rank"
    blocks = ", compute.checkpoint_blocks=true" if checkpointed else ""
    lines = [
        title(f"Memory of {where}, GB{of}"),
        f"micro-batch {config.batch.micro_batch}{blocks}; the total is the peak, less than the sum: "
        "activations are freed while gradients are made",
        *columns(head, rows, left=("format", "")),
        "",
        *_grid(plan),
        *_remarks(plan.remarks["memory"]),
    ]
    if device.memory_bytes is None:
        if not device.is_gpu:
            return [
                *lines,
                "--gpu=cpu: the table has no memory of CPUs; give --gpu-memory GB, a rank's share, to see what fits",
            ]
        return [*lines, "give --gpu or --gpu-memory to see what fits"]
    return [*lines, *_recommendation(plan)]


def _parts(m: Memory, plan: Plan) -> list[str]:
    mine = m.stage == plan.config.zero.stage
    cells = [
        m.weights,
        m.gradients,
        m.optimiser,
        m.ema,
        m.teacher,
        m.activations,
        m.buffers,
        m.views,
        m.context,
    ]
    fits = {True: "fits", False: click.style("too large", fg="red"), None: ""}[m.fits(plan.inputs.device)]
    return [
        f"{'* ' if mine else ''}{m.stage}",
        m.precision,
        *(gigabytes(value) for value in cells),
        gigabytes(m.total),
        fits,
    ]


def _grid(plan: Plan) -> list[str]:
    micros = sorted({m.micro_batch for m in plan.memory})
    head = ["total, by micro-batch", *(f"{'*' * (n == plan.config.batch.micro_batch)}{n}" for n in micros)]
    rows = []
    for stage in sorted({m.stage for m in plan.memory}):
        for name, memories in (("", plan.memory), (", checkpoint_blocks", plan.checkpointed)):
            row = [_cell(m, plan) for m in memories if m.stage == stage]
            rows.append([f"ZeRO {stage}{name}", *row])
    return columns(head, rows, left=head[:1])


def _cell(m: Memory, plan: Plan) -> str:
    fits = m.fits(plan.inputs.device)
    if fits is None:
        return gigabytes(m.total)
    text = gigabytes(m.total)
    return click.style(text, fg="green") + " " if fits else click.style(f"{text}!", fg="red")


def _recommendation(plan: Plan) -> list[str]:
    found, device = plan.recommended, plan.inputs.device
    assert device.usable_bytes is not None
    room = f"{device.usable_bytes / 1e9:.1f} GB, which leaves a tenth free"
    if found is None:
        return [
            render_warning(
                f"nothing of this fits in {room} (! marks what does not); more GPUs, or a smaller model"
            )
        ]
    pairs = [f"zero.stage={found.stage}", f"batch.micro_batch={found.micro_batch}"]
    pairs += ["compute.checkpoint_blocks=true"] if plan.recommended_checkpointed else []
    all_fit = all(m.fits(device) for m in (*plan.memory, *plan.checkpointed))
    said = f"all of this fits in {room}" if all_fit else f"! does not fit in {room}"
    return [said, render_ok(f"recommended: {' '.join(pairs)}: {gigabytes(found.total)} GB")]


def _network(plan: Plan) -> list[str]:
    head = ("ZeRO", "gradients", "weights", "captions", "a rank sends", "in a node", "between", "of a step")
    rows = []
    for e in plan.exchanges:
        grads, weights, captions = (
            _sum(e.traffic, plan.ranks, word) for word in ("gradients", "weights", "caption")
        )
        rows.append(
            [
                f"{'* ' if e.stage == plan.config.zero.stage else ''}{e.stage}",
                *(size(n) if n else "–" for n in (grads, weights, captions, e.sent_bytes)),
                short_duration(e.time.within_s if plan.per_node > 1 else None),
                short_duration(e.time.between_s if plan.nodes > 1 else None),
                "–" if e.share is None else f"{100 * e.share:.3g} %",
            ]
        )
    inputs = plan.inputs
    link = f"{inputs.device.link_gb_s:g} GB/s in a node" if inputs.device.link_gb_s else ""
    net = f"{inputs.network_gbit_s:g} Gbit/s between" if inputs.network_gbit_s and plan.nodes > 1 else ""
    speeds = ", ".join(text for text in (link, net) if text)
    if plan.ranks == 1:
        return [title("Exchanges in a step"), "one rank sends nothing"]
    lines = [
        title("Exchanges in a step"),
        f"ring algorithms, without overlap{': ' if speeds else ''}{speeds}",
        *columns(head, rows),
    ]
    if plan.nodes > 1 and inputs.network_gbit_s is None:
        lines.append("give --network GBIT_PER_S of a node, to see the time between nodes")
    return [*lines, *_remarks(plan.remarks["network"])]


def _sum(traffic: Sequence[Traffic], ranks: int, word: str) -> float:
    return sum(t.sent(ranks) for t in traffic if word in t.what)


def _hours(plan: Plan) -> list[str]:
    config, pace = plan.config, plan.pace
    samples = plan.steps * config.batch.global_batch
    flops = plan.flops.training
    lines = [
        title("Time"),
        render_fact(
            "length",
            f"{plan.steps:,} steps = {samples:,} samples = {samples / plan.data.epoch_samples:.4g} epochs of "
            f"{plan.data.epoch_samples:,}",
        ),
        render_fact("FLOPs", f"{flops / 1e9:.4g} x 10^9 per sample, {power_of_ten(flops * samples)} in all"),
    ]
    if pace is None or plan.step_s is None or plan.hours is None:
        return [*lines, render_fact("pace", f"not known: {_how_to_state_the_pace(plan)}")]
    share = "" if pace.mfu is None else f", {100 * pace.mfu:.3g} % of the peak"
    source = (
        f"assumed: {100 * ASSUMED_MFU:g} % of the peak; set it with --mfu"
        if pace.assumed
        else f"by {pace.source}"
    )
    gpu_hours = plan.hours * plan.inputs.nodes * plan.inputs.per_node
    unit = "GPU" if plan.inputs.device.is_gpu else "rank"
    pace_line = f"{rate(pace.samples_per_s)} samples/s{share}, {plan.step_s:.3g} s per step"
    lines.append(render_fact("pace", f"{pace_line} ({source})"))
    hours = f"{duration(plan.hours * 3600)} = {rate(plan.hours)} hours, {rate(gpu_hours)} {unit} hours"
    rest = "starts, validations, saves" if isinstance(config, FinetuneRun) else "starts, saves"
    lines.append(render_fact("run", f"{hours}, without {rest} and failures"))
    return [*lines, *_remarks(plan.remarks["pace"])]


def _how_to_state_the_pace(plan: Plan) -> str:
    """The reason why the pace is unknown, and the options that state it."""
    device = plan.inputs.device
    if device.name in UNNAMED:
        return "give --gpu NAME with --mfu, or --samples-per-s, or --from-run RUN"
    fix = "give --samples-per-s, --from-run RUN or compute.peak_tflops"
    if device.is_gpu:
        return f"the table has no peak of {device.name} in {plan.precision}; {fix}"
    return f"--gpu=cpu: the table has peaks of GPUs only; {fix}; or a GPU: {', '.join(device_names())}"


def _loading(plan: Plan) -> list[str]:
    need = plan.loading
    if need is None:
        return [title("Loader"), "cores follow from the pace"]
    ms = plan.inputs.ms_per_sample
    measured = f"{MS_PER_SAMPLE:g} ms per sample, measured at 500 pixels' width"
    if isinstance(plan.config, FinetuneRun):
        measured += " without RandAugment"
    cost = f"{ms:g} ms per sample" if ms else measured
    return [
        title("Loader, of one node"),
        render_fact("pace", f"{rate(need.samples_per_s)} samples/s x {cost} = {need.busy:.3g} cores busy"),
        render_fact(
            "needs", f"data.workers={need.workers} per rank; {need.cores} cores with one for each rank"
        ),
        *_remarks(plan.remarks["loading"]),
    ]


def _balance(plan: Plan) -> list[str]:
    data, found = plan.data, plan.balance
    streams = plan.config.batch.streams
    if found is None:
        text = f"{data.samples:,} samples, as stated by --samples; no manifest was read"
        mean = data.samples / streams
        return [
            title("Data"),
            text,
            render_fact("streams", f"{streams}, {mean:,.6g} samples each, {streams // plan.ranks} per rank"),
            *_remarks(plan.remarks["balance"]),
        ]
    rows = [
        ["samples of a stream", *_cells(found.samples_per_stream, ",.0f")],
        ["samples of a rank", *_cells(found.samples_per_rank, ",.0f")],
        ["GB of a rank", *_cells(found.bytes_per_rank, ",.4g", 1e9)],
        ["shards of a rank", *_cells(found.shards_per_rank, ",.0f")],
    ]
    assert data.bytes is not None
    lines = [
        title("Data, one epoch"),
        f"{data.samples:,} samples in {data.shards:,} shards, {size(data.bytes)}; {streams} streams, "
        f"{streams // plan.ranks} per rank",
        *columns(("", "least", "mean", "most", "most/mean"), rows, left=("",)),
    ]
    node = count_bytes_in_use(plan.config, data, streams * plan.per_node // plan.ranks)
    lines.append(
        f"a stream reads from at most {counted(found.shards_at_a_time, 'shard')} at a time; a node's streams from "
        f"{size(node)} of shards"
    )
    if len(data.manifests) > 1:
        for name, share, epochs in zip(data.names, found.streams, plan.source_epochs):
            lines.append(f"{name}: {share} of {streams} streams, {epochs:.3g} epochs in the run")
    return [*lines, *_remarks(plan.remarks["balance"])]


def _saving(plan: Plan) -> list[str]:
    saving, config = plan.saving, plan.config
    save, interval = saving.save, saving.interval
    lines = [
        title("Checkpoints"),
        render_fact(
            "size",
            f"{size(saving.size.total)}, {size(saving.size.per_rank)} per rank; {size(saving.size.kept)} kept at most",
        ),
        render_fact(
            "a save", f"steps wait {save.waits_s:.2g} s, written after {save.seconds:.3g} s: {save.source}"
        ),
    ]
    if interval is not None and plan.step_s is not None:
        assumed = " (assumed)" if saving.mtbf_assumed else ""
        lines.append(
            render_fact(
                "failures",
                f"a node fails every {saving.node_mtbf_h:,.4g} h{assumed}, so the job every "
                f"{duration(interval.job_mtbf_s)}",
            )
        )
        advice = f"run.save_every={interval.steps} ({duration(interval.seconds)}) loses {_share(interval.lost_share)}"
        mine = (
            f"the recipe's {config.run.save_every} ({duration(config.run.save_every * plan.step_s)}) loses "
        )
        mine += _share(interval.lost_share_now)
        far = interval.lost_share_now > 1.5 * interval.lost_share and interval.lost_share_now > 0.005
        lines.append(render_fact("interval", f"{advice} of the time (Young/Daly); {mine}"))
        if far:
            lines.append(render_warning(f"run.save_every={config.run.save_every} is far from that"))
    lead = f"a signal at least {math.ceil(saving.lead.seconds)} s before the time limit: {saving.lead.source}"
    lines.append(render_fact("lead", lead))
    return lines


def _share(share: float) -> str:
    return f"{100 * share:.2g} %"


def _cells(spread: object, form: str, scale: float = 1.0) -> list[str]:
    values = [getattr(spread, key) / scale for key in ("least", "mean", "most")]
    return [*(f"{v:{form}}" for v in values), f"{spread.ratio:.3f}"]  # type: ignore[attr-defined]


def _remarks(remarks: Sequence[Remark]) -> list[str]:
    return [render_warning(text) if status == "warn" else render_ok(text) for status, text in remarks]
