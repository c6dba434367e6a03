"""A checkpoint of a large job, made by one process: its headers, index and hashes are real, its numbers are zeros."""

import json
import os
from typing import Any

import torch
from simulate_ranks import WIDTH, configure

from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, FORMAT, FORMAT_VERSION, step_folder
from uniemox_dist.checkpoints.format import EMA, KINDS, copy_fixed_parameters, write_part
from uniemox_dist.checkpoints.fragment_index import (
    FRAGMENTS,
    build_index,
    fragment_key,
    list_cuts,
    part_name,
)
from uniemox_dist.config.schema import Config
from uniemox_dist.core.files import sha256_file, write_json
from uniemox_dist.models.student import Student
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.ema import ENCODER
from uniemox_dist.train.engine import parameter_groups


def make_student(config: Config) -> Student:
    """An untrained student."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Student(config.model, config.loss, WIDTH)


def cut(student: Student, config: Config, ranks: int) -> list[dict[str, int]]:
    """The lengths of every rank's tensors by their keys, as DeepSpeed cuts them. `resume_and_save` compares them with
    those of the real engine."""
    names = {id(p): name for name, p in student.named_parameters()}
    places: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    for group in parameter_groups(student, config.optim.weight_decay):
        sizes = [(names[id(p)], p.numel()) for p in group["params"]]
        whole, offset = sum(size for _, size in sizes), 0
        share = 2 * -(-whole // (2 * ranks))  # stages 1 and 2: one partition of the group for each rank
        for name, size in sizes:
            if config.zero.stage in (0, 3):
                offset, share = 0, -(-size // ranks)
            for rank in range(offset // share, -(-(offset + size) // share)):
                a, b = max(offset, rank * share), min(offset + size, (rank + 1) * share)
                if a < b:
                    places[rank][name] = a - offset, b - offset
            offset += size
    return [
        {
            fragment_key(name, own[name][0], kind): own[name][1] - own[name][0]
            for kinds, prefix in ((KINDS, ""), ((EMA,), ENCODER))
            for name in names.values()
            if name in own and name.startswith(prefix)
            for kind in kinds
        }
        for own in places
    ]


def fabricate(folder: str, ranks: int, stage: int, overrides: list[str]) -> dict[str, Any]:
    """Writes a checkpoint of so many ranks. Headers, index and hashes are real; all numbers are zeros, in sparse files
    that need no disk."""
    config = configure(overrides, ranks, stage)
    student = make_student(config)
    checkpoint = RunFolder(folder).checkpoints / step_folder(1)
    checkpoint.mkdir(parents=True)
    cuts = cut(student, config, ranks)
    files = {}
    for rank, lengths in enumerate(cuts):
        path = checkpoint / part_name(rank)
        header = make_header(lengths)
        path.write_bytes(header)
        os.truncate(path, len(header) + 4 * sum(lengths.values()))
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    size, sha256 = write_part(checkpoint / FIXED, copy_fixed_parameters(student))
    files[FIXED] = {"bytes": size, "sha256": sha256}
    trained = {name: list(p.shape) for name, p in student.named_parameters() if p.requires_grad}
    info = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": 1,
        "slots": config.batch.global_batch,
        "adam_step": 1.0,
        "world_size": ranks,
        "zero_stage": stage,
        "precision": "fp32",
        "data_identity": "0" * 64,
        "teacher": None,
        "embedding_width": WIDTH,
        "parameters": trained,
        FRAGMENTS: build_index(map(list_cuts, cuts)),
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    write_json(checkpoint / COMPLETE, info)
    weights = sum(torch.Size(shape).numel() for shape in trained.values())
    return {
        "files": len(files),
        "bytes": sum(facts["bytes"] for facts in files.values()),
        "weights": weights,
        "complete_bytes": (checkpoint / COMPLETE).stat().st_size,
    }


def make_header(lengths: dict[str, int]) -> bytes:
    """The header of a part with these fp32 tensors."""
    header, end = {}, 0
    for key, length in lengths.items():
        start, end = end, end + 4 * length
        header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
