"""Checkpoints of Lightning's Trainer that are resumed with another number of micro-batches in a step."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from uniemox_dist.core.errors import UserError


def rescale_batches(checkpoint: MutableMapping[str, Any], accumulate: int) -> None:
    """Makes a checkpoint of Lightning fit another number of micro-batches in a step, as it is if a run goes on with
    fewer devices and the same micro-batch. Call it in `LightningModule.on_load_checkpoint`.

    Lightning stores how many batches of the epoch it has used, and goes on counting from there. If steps now have twice
    as many batches, it must go on from twice that number.

    Args:
        checkpoint: what Lightning passes to `on_load_checkpoint`; changed in place.
        accumulate: `Trainer.accumulate_grad_batches`, the micro-batches of a device in a step.

    Raises:
        UserError: if it is not a checkpoint of a run with our loader, or was written within a step.
    """
    loop: Mapping[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {})
    states = [
        state for state in loop.get("state_dict", {}).get("combined_loader", ()) if "accumulate" in state
    ]
    if not states:
        raise UserError(
            "checkpoint: has no state of a loader of ElasticShards; was it written by Trainer.fit?"
        )
    before = states[0]["accumulate"]
    progress = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        counts = progress[part]
        ready = counts["ready"]
        if ready * accumulate % before:
            raise UserError(
                f"checkpoint: was written within a step, after {ready} batches of {before} in a step; resume with "
                f"accumulate_grad_batches={before}, or save at the end of a step (every_n_train_steps)"
            )
        # Lightning saves while its last batch is not yet counted as completed.
        counts.update(
            {name: ready * accumulate // before - (ready - count) for name, count in counts.items()}
        )
    for state in states:
        state["accumulate"] = accumulate
