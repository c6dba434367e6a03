"""One rank of a large job, alone in its process, for `simulate_ranks.py`.

The process group is torch's fake one, whose collectives return at once. Ranks of a job run one after the other: rank 0
records what it sends to all others (the tape), and they replay it. `Counts` has the bytes of each exchange, of files
that are read, and the names of files that are opened.

    python tools/simulated_rank.py '["FUNCTION", {"ARGUMENT": VALUE}]'
"""

import gc
import json
import os
import pickle
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from simulate_ranks import configure
from simulate_stream import write as write_manifest
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from shards.format.manifest import read_manifest
from uniemox_dist.checkpoints.async_writer import AsyncWriter
from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, FORMAT, FORMAT_VERSION, step_folder
from uniemox_dist.checkpoints.format import EMA, KINDS, copy_fixed_parameters, write_part
from uniemox_dist.checkpoints.fragment_index import (
    FRAGMENTS,
    build_index,
    fragment_key,
    list_cuts,
    part_name,
)
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.checkpoints.zero_state import load_fragments
from uniemox_dist.config.schema import Config
from uniemox_dist.core.files import sha256_file, write_json
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.shared_manifests import read_shared_manifests
from uniemox_dist.data.sources import Sources, list_places
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.local_launcher import run_ranks
from uniemox_dist.distributed.world import World
from uniemox_dist.models.student import Student
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.ema import ENCODER, Ema
from uniemox_dist.train.engine import make_engine, parameter_groups
from uniemox_dist.train.pretrain import gather_texts
from uniemox_dist.train.resume import choose_checkpoint

WIDTH = 512
"""Width of the teacher's space."""
CPU = torch.device("cpu")
EXCHANGES = ("gather", "all_gather", "all_gather_into_tensor", "all_reduce", "broadcast")


@dataclass
class Counts:
    """What this rank did while it was counted."""

    opened: Counter[str] = field(default_factory=Counter)
    """Files by name."""
    read_bytes: int = 0
    """As the kernel counts them, of all files."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by exchange; what a rank passes on in a tree or ring is not counted."""
    received: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    @property
    def parts(self) -> int:
        """Number of part files that were opened, repetitions included."""
        return sum(count for name, count in self.opened.items() if name.startswith("part_"))

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "parts": self.parts,
            "read_bytes": self.read_bytes,
            "sent": dict(self.sent),
            "received": dict(self.received),
            "cpu_s": self.cpu_s,
        }


class Opens:
    """Counts the files that this process opens, by name."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()

    def count_open(self, path: str | os.PathLike[str]) -> None:
        """Counts a file that this process opens."""
        self.files[Path(path).name] += 1


class Rank:
    """A rank of a job whose other ranks are not there."""

    def __init__(self, rank: int, size: int, tape: Path) -> None:
        self.world = World(rank, size, local_rank=rank % 8)
        self._tape = open(tape, "wb" if rank == 0 else "rb")  # noqa: SIM115
        self._counts: Counts | None = None

    def __enter__(self) -> "Rank":
        return self

    def __exit__(self, *_: object) -> None:
        self._tape.close()

    def count_open(self, path: str | os.PathLike[str]) -> None:
        """Counts a file that this process opens."""
        if self._counts is not None:
            self._counts.opened[Path(path).name] += 1

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Counts what happens, and lets rank 0's words reach the others."""
        found = Counts()
        originals = {(where, name): getattr(where, name) for where in (dist, c10d) for name in EXCHANGES}
        for (where, name), original in originals.items():
            setattr(where, name, self._counting(name, original, found))
        on_main, collectives.on_main = collectives.on_main, self._on_main  # type: ignore[assignment]
        self._counts, before, began = found, _read_bytes(), time.process_time()
        PLAYED[:] = [self]
        try:
            yield found
        finally:
            self._counts = None
            found.read_bytes, found.cpu_s = _read_bytes() - before, time.process_time() - began
            collectives.on_main = on_main
            for (where, name), original in originals.items():
                setattr(where, name, original)

    def _on_main(self, _: World, work: Callable[[], Any]) -> Any:
        value = self._share(pickle.dumps(work()) if self.world.is_main else None)
        if self._counts is not None:
            (self._counts.sent if self.world.is_main else self._counts.received)["on_main"] += len(value)
        return pickle.loads(value)

    def _share(self, content: bytes | None) -> bytes:
        """Rank 0's bytes, by way of the tape."""
        if content is not None:
            self._tape.write(len(content).to_bytes(8, "little") + content)
            self._tape.flush()
            return content
        counts, self._counts = self._counts, None
        before = _read_bytes()
        found = self._tape.read(int.from_bytes(self._tape.read(8), "little"))
        self.replayed += _read_bytes() - before
        self._counts = counts
        return found

    def _counting(self, name: str, original: Callable[..., Any], found: Counts) -> Callable[..., Any]:
        others = self.world.size - 1

        def exchange(*arguments: Any, **named: Any) -> Any:
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            if name == "broadcast":
                source = named.get("src", arguments[1] if len(arguments) > 1 else 0)
                own = source == self.world.rank
                (found.sent if own else found.received)[name] += tensors[0].nbytes
                if source == 0:
                    _fill(tensors[0], self._share(_content(tensors[0]) if own else None))
                return None
            count = tensors[-1].nbytes
            if name == "gather":
                main = self.world.is_main
                (found.received if main else found.sent)[name] += count * others if main else count
            else:
                found.sent[name] += count
                found.received[name] += count if name == "all_reduce" else count * others
            return original(*arguments, **named)

        return exchange

    replayed = 0
    """Bytes of the tape that were read, which are no files of the job."""


PLAYED: list[Rank | Opens] = []
"""Where opened files are counted."""


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and PLAYED and isinstance(arguments[0], str | os.PathLike):
        PLAYED[0].count_open(arguments[0])


sys.addaudithook(_see)


def _content(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensor: Tensor, content: bytes) -> None:
    if tensor.numel():
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=tensor.dtype).view(tensor.shape))


def _read_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split()[1])


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
    read, cpu, began = _read_bytes(), time.process_time(), time.perf_counter()
    checkpoint = choose_checkpoint(world, RunFolder(folder), "auto")
    assert checkpoint is not None
    chosen, chosen_cpu = time.perf_counter(), time.process_time()
    assert load_fragments(engine, checkpoint, ema.fragments())
    collectives.barrier()
    found = {
        "parts": sum(count for name, count in opens.files.items() if name.startswith("part_")),
        "read_bytes": _read_bytes() - read,
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
    sources.plan(config).locate(0)
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
    plan = sources.plan(config)
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
