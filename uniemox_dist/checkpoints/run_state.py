"""The state of a run that a checkpoint records besides the weights, and loading a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.zero_state import Fragment, load_fragments
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed.deepspeed_internals import read_shapes


@dataclass(frozen=True)
class RunState:
    """The state that a resumed run must share with its checkpoint, besides the weights."""

    step: int
    config: Config
    data_identity: str
    precision: str
    teacher: dict[str, Any] | None
    embedding_width: int | None

    @property
    def slots(self) -> int:
        """Slots consumed by steps; samples that were only prefetched do not count."""
        return self.step * self.config.batch.global_batch


def load(engine: Any, checkpoint: Checkpoint, averages: Iterable[Fragment] = ()) -> bool:
    """Loads weights and optimizer from a checkpoint of any world size and ZeRO stage, and the fragments of the moving
    average; returns False if the checkpoint has none. Collective."""
    expected, found = read_shapes(engine), checkpoint.info["parameters"]
    if expected != found:
        names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise UserError(
            f"{checkpoint.folder}: is of another model: {names[0]} is {found.get(names[0])} there and "
            f"{expected.get(names[0])} here ({len(names)} differ); set model.* as in its run, or another run.name"
        )
    return load_fragments(engine, checkpoint, averages)


def check_same_run(checkpoint: Checkpoint, state: RunState) -> None:
    """Checks that a resumed run sees the same data in the same order, with the same teacher and losses.

    Raises:
        UserError: naming each setting that differs.
    """
    old, new = dict(checkpoint.info["config"]), state.config.model_dump(mode="json")
    # Checkpoints from before data.resize were trained with the bicubic filter.
    old["data"] = {"resize": "bicubic", **old["data"]}
    fixed = [
        ("run", "seed"),
        ("batch", "global_batch"),
        ("batch", "streams"),
        *(
            (section, key)
            for section in ("model", "loss", "finetune")
            for key in new.get(section, {})
            if key not in ("init_from", "patience", "validate_epochs", "eval_batch")
        ),
        *(
            ("data", key)
            for key in (
                "shuffle_window",
                "scene_scale",
                "flip",
                "person",
                "person_margin",
                "background",
                "colour_jitter",
                "resize",
                "verify_hash",
            )
        ),
    ]
    lines = [
        f"{section}.{key} was {old[section].get(key)} and is {new[section][key]}"
        for section, key in fixed
        if key in old.get(section, {}) and old[section][key] != new[section][key]
    ]
    shares_before, shares_now = _shares(old["data"]), _shares(new["data"])
    if shares_before != shares_now:
        lines.append(
            f"the weights or repeats of data.sources were {', '.join(shares_before)} and are {', '.join(shares_now)}"
        )
    if checkpoint.info["data_identity"] != state.data_identity:
        lines.append(
            f"the data was {checkpoint.info['data_identity'][:12]} and is {state.data_identity[:12]}"
        )
    before, now = checkpoint.info["teacher"] or {}, state.teacher or {}
    if before.get("weights_sha256") != now.get("weights_sha256"):
        lines.append("the teacher's weights differ")
    lines += [
        f"the teacher's {key} was {before[key]} and is {now[key]}"
        for key in ("activation", "mean", "std")
        if key in before and key in now and before[key] != now[key]
    ]
    views_before, views_now = _scenes(before), _scenes(now)
    if before and now and views_before != views_now:
        lines.append(f"scenes were {views_before} and are {views_now}")
    if lines:
        raise UserError(
            f"{checkpoint.folder}: cannot be resumed with other settings ({'; '.join(lines)}); "
            "restore them, give another run.name, or --resume never with an empty folder"
        )


def _scenes(teacher: dict[str, Any]) -> str:
    """The source of the scene views and of their teacher embeddings."""
    if teacher.get("source", "live") == "live":
        return "drawn for a live teacher (teacher.source=live)"
    return f"replayed from {', '.join(teacher.get('views', []))} (teacher.source=cache)"


def _shares(data: dict[str, Any]) -> list[str]:
    """How a mix is composed: the weight of each source, or its repeats."""
    return [
        f"repeat {source['repeat']:g}" if source.get("repeat") else f"weight {source.get('weight') or 1.0:g}"
        for source in data.get("sources", [])
    ]
