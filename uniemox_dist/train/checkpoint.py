"""Saving and loading a run: all ranks together, into a temporary folder, renamed when everyone is done."""

import os
import shutil
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from uniemox_dist.checkpoints.files import FragmentReader, fragment_key
from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, FORMAT, FORMAT_VERSION, Checkpoint, step_folder
from uniemox_dist.config.schema import Config
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import publish_dir, sha256_file, share, write_json
from uniemox_dist.runtime.world import World
from uniemox_dist.train import comm
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.fragments import adam_step, fragments, load_fragments, shapes


@dataclass(frozen=True)
class RunState:
    """What a resumed run must find again, besides the weights."""

    step: int
    config: Config
    data_identity: str
    precision: str
    teacher: dict[str, Any] | None
    embedding_width: int | None

    @property
    def slots(self) -> int:
        """The cursor: slots consumed by steps, not by prefetching."""
        return self.step * self.config.batch.global_batch


def save(
    engine: Any,
    folder: Path,
    state: RunState,
    world: World,
    fixed: dict[str, Tensor],
    ema: Ema | None = None,
) -> dict[str, Any]:
    """Saves a checkpoint; collective. Returns facts for the event: seconds and bytes, or `error`.

    `fixed` are the parameters that are not trained, which rank 0 writes.
    A failed write (a full disk) leaves no folder behind and does not raise: training goes on.
    """
    began = time.perf_counter()
    final = folder / step_folder(state.step)
    temporary = folder / f".{final.name}.tmp"
    comm.on_main(world, lambda: _make_room(temporary, final))
    name = f"part_{world.rank:05d}.safetensors"
    outcome: dict[str, Any] = {"name": name}
    try:
        tensors = {
            fragment_key(f.name, f.start, kind): tensor.cpu().clone()
            for f in chain(fragments(engine), ema.fragments() if ema else ())
            for kind, tensor in f.tensors.items()
        }
        outcome.update(_write(temporary / name, tensors))
        if world.is_main:
            outcome["fixed"] = _write(temporary / FIXED, fixed)
    except OSError as error:
        outcome["error"] = f"{temporary / name}: {error.strerror or error}"
    except Exception as error:  # safetensors reports a full disk as its own type
        outcome["error"] = f"{temporary / name}: {error}"
    outcomes = _all(outcome, world)
    updates = adam_step(engine)
    facts: dict[str, Any] = comm.on_main(
        world, lambda: _publish(temporary, final, outcomes, state, engine, world, updates)
    )
    return {**facts, "seconds": round(time.perf_counter() - began, 3)}


def load(engine: Any, checkpoint: Checkpoint) -> int:
    """Loads weights and optimizer from a checkpoint of any world size and ZeRO stage; returns its step."""
    expected, found = shapes(engine), checkpoint.info["parameters"]
    if expected != found:
        names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise UserError(
            f"{checkpoint.folder}: is of another model: {names[0]} is {found.get(names[0])} there and "
            f"{expected.get(names[0])} here ({len(names)} differ); set model.* as in its run, or another run.name"
        )
    load_fragments(engine, FragmentReader(checkpoint), checkpoint.info["adam_step"])
    return checkpoint.step


def check_same_run(checkpoint: Checkpoint, state: RunState) -> None:
    """A resumed run must see the same data in the same order, through the same teacher and losses.

    Raises:
        UserError: naming each setting that differs.
    """
    old, new = checkpoint.info["config"], state.config.model_dump(mode="json")
    fixed = [
        ("run", "seed"),
        ("batch", "global_batch"),
        ("batch", "streams"),
        *((section, key) for section in ("model", "loss") for key in new[section] if key != "init_from"),
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
                "verify_hash",
            )
        ),
    ]
    lines = [
        f"{section}.{key} was {old[section].get(key)} and is {new[section][key]}"
        for section, key in fixed
        if key in old[section] and old[section][key] != new[section][key]
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
        lines.append("the teacher's weights are others")
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


def _make_room(temporary: Path, final: Path) -> None:
    # A resumed run can reach the step of a checkpoint that was passed over as damaged: ours takes its place.
    shutil.rmtree(final, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    save_file(tensors, path)
    share(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _all(outcome: dict[str, Any], world: World) -> list[dict[str, Any]]:
    if world.size == 1:
        return [outcome]
    outcomes: list[Any] = [None] * world.size
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def _publish(
    temporary: Path,
    final: Path,
    outcomes: list[dict[str, Any]],
    state: RunState,
    engine: Any,
    world: World,
    updates: float,
) -> dict[str, Any]:
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    files: dict[str, dict[str, Any]] = {}
    try:
        if not errors:
            files = {o["name"]: {"bytes": o["bytes"], "sha256": o["sha256"]} for o in outcomes}
            files[FIXED] = outcomes[0]["fixed"]
            info = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "step": state.step,
                "slots": state.slots,
                "adam_step": updates,
                "world_size": world.size,
                "zero_stage": state.config.zero.stage,
                "precision": state.precision,
                "data_identity": state.data_identity,
                "teacher": state.teacher,
                "embedding_width": state.embedding_width,
                "parameters": shapes(engine),
                "config": state.config.model_dump(mode="json"),
                "files": files,
            }
            write_json(temporary / COMPLETE, info)
            publish_dir(temporary, final)
    except OSError as error:
        errors.append(f"{final}: {error.strerror or error}")
    if errors:
        shutil.rmtree(temporary, ignore_errors=True)
        return {"error": errors[0]}
    return {"bytes": sum(facts["bytes"] for facts in files.values())}


def _scenes(teacher: dict[str, Any]) -> str:
    """Where the scene views, and the teacher's embeddings of them, come from."""
    if teacher.get("source", "live") == "live":
        return "drawn for a live teacher (teacher.source=live)"
    return f"replayed from {', '.join(teacher.get('views', []))} (teacher.source=cache)"


def _shares(data: dict[str, Any]) -> list[str]:
    """What decides how a mix is dealt: each source's weight, or its repeats."""
    return [
        f"repeat {source['repeat']:g}" if source.get("repeat") else f"weight {source.get('weight') or 1.0:g}"
        for source in data["sources"]
    ]
