"""A plan as a JSON object, for programs."""

from dataclasses import asdict
from typing import Any

from launch.plan.model import PARTS, count_numbers
from launch.plan.plan import Plan


def facts(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object. Bytes are bytes, times seconds unless the name says hours."""
    config, asked = plan.config, plan.asked
    recommended = plan.recommended
    parts = {name: count_numbers(plan.parameters, name) for name in PARTS}
    return {
        "format": "uniemox-plan",
        "format_version": 1,
        "run": config.run.name,
        "device": asdict(asked.device),
        "nodes": asked.nodes,
        "gpus_per_node": asked.per_node,
        "nodes_used": plan.nodes,
        "ranks_per_node": plan.per_node,
        "ranks": plan.ranks,
        "idle": asked.nodes * asked.per_node - plan.ranks,
        "legal_ranks": list(plan.legal),
        "precision": plan.precision,
        "parameters": {
            "trained": sum(p.numbers for p in plan.parameters if p.trained),
            "fixed": sum(p.numbers for p in plan.parameters if not p.trained),
            **parts,
        },
        "teacher": asdict(plan.tower),
        "memory": [
            {**asdict(m), "checkpoint_blocks": again, "total": m.total, "fits": m.fits(asked.device)}
            for again, memories in ((False, plan.memory), (True, plan.again))
            for m in memories
        ],
        "recommended": recommended
        and {
            "zero_stage": recommended.stage,
            "micro_batch": recommended.micro_batch,
            "checkpoint_blocks": plan.recommended_again,
        },
        "network": [{**asdict(e), "traffic": [asdict(t) for t in e.traffic]} for e in plan.exchanges],
        "flops_per_sample": {**asdict(plan.flops), "training": plan.flops.training},
        "pace": plan.pace and asdict(plan.pace),
        "steps": plan.steps,
        "samples": plan.steps * config.batch.global_batch,
        "step_s": plan.step_s,
        "hours": plan.hours,
        "loading": plan.loading and asdict(plan.loading),
        "data": {
            key: getattr(plan.data, key) for key in ("samples", "epoch_samples", "bytes", "shards", "names")
        },
        "balance": plan.balance and asdict(plan.balance),
        "source_epochs": list(plan.source_epochs),
        "saving": asdict(plan.saving),
        "remarks": {name: [list(r) for r in remarks] for name, remarks in plan.remarks.items()},
    }
