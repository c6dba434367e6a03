"""One rank of a large job, alone in its process, for `simulate_ranks.py`.

python tools/simulated_rank.py '["FUNCTION", {"ARGUMENT": VALUE}]'
"""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from fabricated_checkpoint import fabricate, make_student
from fake_rank import PLAYED, Counts, Opens, Rank, read_bytes
from simulate_ranks import WIDTH, configure
from simulate_stream import write as write_manifest
from torch.testing._internal.distributed.fake_pg import FakeStore

from shards.format.manifest import read_manifest
from uniemox_dist.checkpoints.async_writer import AsyncWriter
from uniemox_dist.checkpoints.folders import step_folder
from uniemox_dist.checkpoints.format import copy_fixed_parameters
from uniemox_dist.checkpoints.fragment_index import part_name
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.checkpoints.zero_state import load_fragments
from uniemox_dist.core.files import sha256_file, write_json
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.shared_manifests import read_shared_manifests
from uniemox_dist.data.sources import Sources, list_places
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.local_launcher import run_ranks
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import make_engine
from uniemox_dist.train.pretrain import gather_texts
from uniemox_dist.train.resume import choose_checkpoint

CPU = torch.device("cpu")


def choose(folder: str, ranks: int) -> dict[str, Any]:
    """Chooses the checkpoint on every rank of the job, one after the other; each hashes its files and keeps them."""
    found: list[Counts] = []
    for rank in range(ranks):
        with Rank(rank, ranks, Path(folder, "choose.tape")) as one, one.counted() as counts:
            assert choose_checkpoint(one.world, RunFolder(folder), "auto") is not None
        counts.read_bytes -= one.replayed
        found.append(counts)
    return {
        "most_parts": max(counts.parts for counts in found),
        "parts": sum(counts.parts for counts in found),
        "read_bytes": sum(counts.read_bytes for counts in found),
    }


def resume_and_save(
    folder: str, rank: int, ranks: int, stage: int, texts: int, overrides: list[str]
) -> dict[str, Any]:
    """Plays one rank: makes the engine, resumes, saves, and gathers the texts of a step."""
    warnings.filterwarnings("ignore")
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    for name in collectives.HOLDERS:
        __import__(name)
    one = Rank(rank, ranks, Path(folder, "resume.tape"))
    world = one.world
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    config = configure(overrides, ranks, stage)
    student = make_student(config)
    fixed = copy_fixed_parameters(student)
    with one.counted() as choosing:
        checkpoint = choose_checkpoint(world, RunFolder(folder), "auto")
    assert checkpoint is not None
    choosing.read_bytes -= one.replayed
    engine = make_engine(student, config, world, "fp32", CPU)
    ema = Ema(engine, config.optim.ema_decay)
    with one.counted() as loading:
        load_fragments(engine, checkpoint, ema.fragments())
    saved = Path(folder, "saved")
    state = RunState(2, config, "0" * 64, "fp32", None, WIDTH)
    with one.counted():
        writer = AsyncWriter(engine, saved, world, fixed, ema)
        assert writer.start(state) is None  # the first save of an engine exchanges the fragment index as well
        assert "error" not in writer.commit()
    state = RunState(3, config, "0" * 64, "fp32", None, WIDTH)
    with one.counted():
        assert writer.start(state) is None
        while not writer.written:
            time.sleep(0.01)
        part = next(saved.glob(f".step_00000003.tmp/{part_name(rank)}"))
        written = part.read_bytes()
    with one.counted() as commit:
        assert "error" not in writer.commit()
    writer.close()
    own = (checkpoint.folder / part_name(rank)).read_bytes()
    header = 8 + int.from_bytes(own[:8], "little")
    assert (written[:header], len(written)) == (own[:header], len(own)), (
        "fabricated parts differ from saved ones"
    )
    rows = torch.zeros(texts // ranks, WIDTH, dtype=torch.half)
    none = torch.empty(0)
    batch = MicroBatch(none, none, None, rows, None, None, (), (), (), ReadCounts())
    with one.counted() as gather:
        assert gather_texts([batch], ranks, world, CPU).shape == (texts, WIDTH)
    return {
        "rank": rank,
        "choosing": choosing.facts(),
        "loading": loading.facts(),
        "commit": commit.facts(),
        "texts": gather.facts(),
    }


def resume_in_ranks(folder: str, ranks: int, stage: int, overrides: list[str]) -> dict[str, Any]:
    """Resumes the fabricated checkpoint in real ranks on this machine, after it has hashed a part in one thread and
    kept its bytes, as each rank does."""
    part = RunFolder(folder).checkpoints / step_folder(1) / part_name(0)
    began = time.process_time()
    sha256_file(part, bytearray(part.stat().st_size))
    rate = part.stat().st_size / (time.process_time() - began)
    arguments = {"folder": folder, "stage": stage, "overrides": overrides}
    command = [sys.executable, __file__, json.dumps(["resume_as_rank", arguments])]
    assert run_ranks(command, ranks, gpus=False) == 0
    found = [json.loads(Path(folder, f"resumed{rank}.json").read_text()) for rank in range(ranks)]
    return {"ranks": found, "hashed_bytes_per_s": rate}


def resume_as_rank(folder: str, stage: int, overrides: list[str]) -> dict[str, Any]:
    """One of the real ranks that resume."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    world = World.from_env()
    device = collectives.init(world, 600)
    config = configure(overrides, world.size, stage)
    student = make_student(config)
    engine = make_engine(student, config, world, "fp32", device)
    ema = Ema(engine, config.optim.ema_decay)
    collectives.barrier()
    opens = Opens()
    PLAYED[:] = [opens]
    read, cpu, began = read_bytes(), time.process_time(), time.perf_counter()
    checkpoint = choose_checkpoint(world, RunFolder(folder), "auto")
    assert checkpoint is not None
    chosen, chosen_cpu = time.perf_counter(), time.process_time()
    assert load_fragments(engine, checkpoint, ema.fragments())
    collectives.barrier()
    found = {
        "parts": sum(count for name, count in opens.files.items() if name.startswith("part_")),
        "read_bytes": read_bytes() - read,
        "choosing_s": chosen - began,
        "choosing_cpu_s": chosen_cpu - cpu,
        "loading_s": time.perf_counter() - chosen,
        "loading_cpu_s": time.process_time() - chosen_cpu,
    }
    write_json(Path(folder, f"resumed{world.rank}.json"), found)
    collectives.close()
    return {}


def make_data(folder: str, samples: int, shards: int) -> dict[str, Any]:
    """Writes the manifest of a data set, and its tars as sparse files without content."""
    found = write_manifest(folder, samples, shards)
    for shard in read_manifest(folder).shards:
        path = Path(folder, shard.name)
        path.touch()
        os.truncate(path, shard.bytes)
    return found


def open_data(folder: str, rank: int, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Plays one rank that opens the data and makes the plan."""
    one = Rank(rank, ranks, Path(folder, "data.tape"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    config = configure([*overrides, f"data.path={folder}"], ranks, 1)
    with one.counted() as counts:
        [manifest] = read_shared_manifests(list_places(config), one.world, CPU)
    counts.read_bytes -= one.replayed
    sources = Sources(config, rank=rank, world_size=ranks, manifests=[manifest])
    sources.plan.locate(0)
    return {
        "rank": rank,
        "manifests": counts.opened["manifest.json"],
        "identity": sources.identity,
        **counts.facts(),
    }


def open_on_node(folder: str, ranks: int) -> dict[str, Any]:
    """Opens the data in real ranks of this node; returns their memory."""
    command = [sys.executable, __file__, json.dumps(["open_as_rank", {"folder": folder}])]
    assert run_ranks(command, ranks, gpus=False) == 0
    found = [json.loads(Path(folder, f"memory{rank}.json").read_text()) for rank in range(ranks)]
    return {"ranks": ranks, "memory": found}


def open_as_rank(folder: str) -> dict[str, Any]:
    """One of the real ranks of a node."""
    world = World.from_env()
    device = collectives.init(world, 600)
    config = configure([f"data.path={folder}"], world.size, 1)
    measured = [measure_memory()]
    manifests = read_shared_manifests(list_places(config), world, device)
    sources = Sources(config, rank=world.rank, world_size=world.size, manifests=manifests)
    for shard in manifests[0].shards:  # so that every page of the table is there
        assert shard.samples >= 0
    collectives.barrier()
    measured.append(measure_memory())
    plan = sources.plan
    plan.locate(0)
    measured.append(measure_memory())
    objects = tuple(manifests[0].shards)  # as each rank kept them before
    measured.append(measure_memory())
    assert len(objects) == len(manifests[0].shards)
    start, opened, planned, before = measured
    found = {"private": opened - start, "plan": planned - opened, "objects": before - planned}
    write_json(Path(folder, f"memory{world.rank}.json"), found)
    collectives.close()
    return {}


def measure_memory() -> int:
    """Resident memory of this process alone."""
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "fabricate": fabricate,
    "choose": choose,
    "resume_and_save": resume_and_save,
    "resume_in_ranks": resume_in_ranks,
    "resume_as_rank": resume_as_rank,
    "make_data": make_data,
    "open_data": open_data,
    "open_on_node": open_on_node,
    "open_as_rank": open_as_rank,
}

if __name__ == "__main__":
    name, arguments = json.loads(sys.argv[1])
    print(json.dumps(FUNCTIONS[name](**arguments)))
