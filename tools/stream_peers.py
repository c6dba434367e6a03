"""One rank of one library for bench_stream_peers.py: reads micro-batches of samples of plain tars, and keeps its state.

Every library is used as its documentation advises for reading that can be resumed: webdataset shuffles tars and a
buffer and splits tars by rank; Hugging Face `datasets` streams the same tars, with its buffer; torchdata's loader has a
map-style data set, whose samples it finds through our index, and torch's distributed sampler; MosaicML Streaming
reads its own shards (MDS), made from the same samples. Each is a function of a job that yields micro-batches, the
numbers of the samples and their labels.

As a script it runs one job, a JSON object, and prints what it read as JSON.
"""

import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset, DistributedSampler

from uniemox_dist.data.samples import open_samples

Batches = Iterator[Any]
BUFFER = 1000
"""Samples that webdataset and `datasets` shuffle together; ours shuffles windows of 512 in each stream."""
STREAMS = 16


@dataclass(frozen=True)
class Job:
    """What one rank does."""

    peer: str
    folder: str
    micro_batch: int
    world: int = 1
    rank: int = 0
    workers: int = 1
    epochs: int = 1
    stop: int | None = None
    """Micro-batches after which the rank ends, before its epochs do."""
    load: str | None = None
    save: str | None = None
    """Files of the state."""
    hashes: bool = True
    """Check hashes, if the library does so."""
    seconds: float | None = None
    """Measure for so long instead."""


class State:
    """The state of a reader in a file, which this script wrote itself."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loaded: Any = None
        self.get: Callable[[], Any] | None = None
        """Set by a library that has states."""
        if job.load is not None:
            self.loaded = pickle.loads(Path(job.load).read_bytes())

    def attach(self, loader: Any) -> None:
        """Loads the state into a loader that has states, and saves that of this loader at the end."""
        if self.loaded is not None:
            loader.load_state_dict(self.loaded)
        self.get = loader.state_dict

    def save(self) -> bool:
        """Writes the state; returns False if the library has none."""
        if self.get is None or self.job.save is None:
            return False
        Path(self.job.save).write_bytes(pickle.dumps(self.get()))
        return True


def parse(sample: dict[str, Any]) -> tuple[int, int]:
    """The number and label of a sample."""
    return int(sample["__key__"]), int(sample["cls"])


def collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers and labels of a micro-batch. Tensors, because some libraries count samples by their length."""
    numbers, labels = zip(*map(parse, samples))
    return torch.tensor(numbers), torch.tensor(labels)


def list_tars(job: Job) -> list[str]:
    """Lists the tars of a folder."""
    return sorted(str(path) for path in Path(job.folder).glob("*.tar"))


def read_ours(job: Job, state: State) -> Batches:
    """ElasticShards."""
    from uniemox_dist.data import ElasticShards

    stream: ElasticShards[dict[str, Any]] = ElasticShards(
        job.folder,
        global_batch=job.micro_batch * job.world,
        streams=STREAMS,
        rank=job.rank,
        world_size=job.world,
        verify_hash=job.hashes,
    )
    loader = stream.loader(job.micro_batch, workers=job.workers, collate=collate)
    state.attach(loader)
    # Epochs share a step where the global batch does not divide the samples, so the end is that of all epochs.
    end = job.epochs * stream.samples
    while stream.state_dict()["samples"] < end:
        yield from loader
    loader.close()


def read_webdataset(job: Job, state: State) -> Batches:
    """webdataset: no state; a resumed run begins the epoch anew."""
    import webdataset as wds

    data = wds.WebDataset(list_tars(job), shardshuffle=100, nodesplitter=wds.split_by_node, seed=0).shuffle(
        BUFFER
    )
    loader = wds.WebLoader(data, batch_size=job.micro_batch, num_workers=job.workers, collate_fn=collate)
    for _ in range(job.epochs):
        yield from loader


def read_datasets(job: Job, state: State) -> Batches:
    """Hugging Face `datasets`, streaming, through torchdata's StatefulDataLoader, as its documentation advises."""
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = load_dataset("webdataset", data_files=list_tars(job), split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=BUFFER)
    data = split_dataset_by_node(data, rank=job.rank, world_size=job.world)
    loader = StatefulDataLoader(
        data,
        batch_size=job.micro_batch,
        num_workers=job.workers,
        collate_fn=collate,
    )
    state.attach(loader)
    for epoch in range(job.epochs):
        data.set_epoch(epoch)
        yield from loader


class _Indexed(Dataset[dict[str, Any]]):
    """Samples of tars by number."""

    def __init__(self, folder: str) -> None:
        self.reader = open_samples(folder, field="data", verify_hash=False)
        self.places = [(shard, row) for shard, count in enumerate(self.reader.counts) for row in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.reader.read(*self.places[number])


def read_torchdata(job: Job, state: State) -> Batches:
    """torchdata's StatefulDataLoader over a map-style data set with torch's DistributedSampler."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = _Indexed(job.folder)
    sampler: Any = DistributedSampler(data, num_replicas=job.world, rank=job.rank, seed=0)
    loader = StatefulDataLoader(
        data, batch_size=job.micro_batch, sampler=sampler, num_workers=job.workers, collate_fn=collate
    )
    state.attach(loader)
    for epoch in range(job.epochs):
        sampler.set_epoch(epoch)
        yield from loader


def make_mds(folder: Path, out: Path) -> None:
    """Writes the samples of tars as MosaicML's shards, one for each tar."""
    from streaming import MDSWriter

    reader = open_samples(folder, field="data")
    columns = {"key": "str", "cls": "bytes", "bin": "bytes"}
    with MDSWriter(out=str(out), columns=columns, size_limit=1 << 22) as writer:
        for shard, count in enumerate(reader.counts):
            for row in range(count):
                sample = reader.read(shard, row)
                writer.write({"key": sample["__key__"], "cls": sample["cls"], "bin": sample["bin"]})


def read_streaming(job: Job, state: State) -> Batches:
    """MosaicML Streaming with its own loader."""
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(
        local=f"{job.folder}-mds",
        shuffle=True,
        batch_size=job.micro_batch,
        num_canonical_nodes=1,
        shuffle_block_size=STREAMS * 512,
    )
    loader = StreamingDataLoader(
        data,
        batch_size=job.micro_batch,
        num_workers=job.workers,
        collate_fn=lambda samples: collate([{**sample, "__key__": sample["key"]} for sample in samples]),
    )
    state.attach(loader)
    for _ in range(job.epochs):
        yield from loader


PEERS: dict[str, tuple[str, Callable[[Job, State], Batches]]] = {
    "this stream": ("uniemox_dist", read_ours),
    "webdataset": ("webdataset", read_webdataset),
    "mosaicml-streaming": ("streaming", read_streaming),
    "torchdata": ("torchdata", read_torchdata),
    "datasets": ("datasets", read_datasets),
}
"""Name of a row -> the module that it needs, and how it reads."""


def run(job: Job) -> dict[str, Any]:
    """Reads, and returns what was read or measured."""
    torch.set_num_threads(1)
    state = State(job)
    began = time.perf_counter()
    batches = PEERS[job.peer][1](job, state)
    read: list[list[tuple[int, int]]] = []
    first_s = rss = 0.0
    if job.seconds is not None:
        return _measure_rate(batches, job)
    for batch in batches:
        if not read:
            first_s = time.perf_counter() - began
            rss = _measure_memory()
        read.append(list(zip(batch[0].tolist(), batch[1].tolist())))
        if len(read) == job.stop:
            break
    return {"read": read, "first_s": first_s, "rss": rss, "saved": state.save()}


def _processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _measure_memory() -> float:
    """Memory of this process and its loaders, each shared page counted once (PSS), in bytes."""
    return float(sum(process.memory_full_info().pss for process in _processes()))


def _measure_rate(batches: Batches, job: Job) -> dict[str, Any]:
    """Samples per second of CPU time of all processes, after a warm-up."""
    for _ in range(20):
        next(batches)

    def cpu_s() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        living = sum(sum(process.cpu_times()[:2]) for process in _processes())
        return living + ended.ru_utime + ended.ru_stime

    done, began, used = 0, time.perf_counter(), cpu_s()
    for batch in batches:
        done += len(batch[0])
        if time.perf_counter() - began > (job.seconds or 0):
            break
    return {"rate": done / (cpu_s() - used)}


def main() -> None:
    """Runs the job in the first argument."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = Job(**json.loads(sys.argv[1]))
    found = run(job)
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some libraries' loader processes and threads would keep this one


if __name__ == "__main__":
    main()
