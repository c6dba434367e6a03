"""Other libraries' loaders for bench_loader.py: the same JPEGs, decoder and two views, through one loader process.

Every peer is used as its documentation advises for pictures: webdataset reads the tars in order, Grain reads them at
random through their index, MosaicML Streaming reads its own shards (MDS), and SPDL runs a pipeline with a thread that
decodes. They draw crops and mirrors at random, return uint8 batches, and check no hashes. A peer is a function of a
folder of shards that yields the number of samples of each batch, without end.
"""

import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from shards.format.index import index_path, read_index
from shards.format.manifest import read_manifest
from uniemox_dist.data.views import crop_and_resize

SIZE, MICRO_BATCH, PREFETCH = 224, 32, 4
Location = tuple[str, int, int]
"""Path of a tar, position and length of a picture in it."""


def draw_views(jpeg: bytes) -> torch.Tensor:
    """Returns two views, uint8 2×224×224×3: a random resized crop and the whole picture, each mirrored at random."""
    rgb_3HW = torch.from_numpy(simplejpeg.decode_jpeg(jpeg)).permute(2, 0, 1)
    top, left, height, width = RandomResizedCrop.get_params(rgb_3HW, [0.2, 1.0], [3 / 4, 4 / 3])
    views = torch.empty((2, SIZE, SIZE, 3), dtype=torch.uint8)
    boxes = (left, top, width, height), (0, 0, rgb_3HW.shape[2], rgb_3HW.shape[1])
    for view_SS3, box in zip(views, boxes):
        picture_3SS = crop_and_resize(rgb_3HW, box, SIZE)
        view_SS3.copy_((picture_3SS.flip(-1) if random.random() < 0.5 else picture_3SS).permute(1, 2, 0))
    return views


def list_pictures(shards: Path) -> list[Location]:
    """Lists the pictures of a data set with their places."""
    places = []
    for entry in read_manifest(shards).shards:
        index = read_index(index_path(shards, entry.name), ["image_offset", "image_length"])
        columns = (index[name].to_pylist() for name in ("image_offset", "image_length"))
        places += [(str(shards / entry.name), offset, length) for offset, length in zip(*columns)]
    return places


@cache
def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def read_picture(place: Location) -> bytes:
    """Reads the bytes of one picture."""
    path, offset, length = place
    return os.pread(_open(path), length, offset)


def load_views(place: Location) -> np.ndarray:
    """Reads a picture and draws its views."""
    return draw_views(read_picture(place)).numpy()


def in_one_process(dataset: Any, batch_size: int | None) -> Iterator[int]:
    """Yields the sizes of a torch DataLoader's batches."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=1,
        prefetch_factor=PREFETCH,
        multiprocessing_context="fork",
        worker_init_fn=_use_one_thread,
    )
    for batch in loader:
        yield len(batch)


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)


def read_webdataset(shards: Path) -> Iterator[int]:
    """webdataset: samples in the order of the tars, batched in the loader process."""
    import webdataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat().to_tuple("jpg")
    views = data.map(lambda sample: draw_views(sample[0]))
    return in_one_process(views.batched(MICRO_BATCH, collation_fn=torch.stack), None)


def read_grain(shards: Path) -> Iterator[int]:
    """Grain: a shuffled MapDataset, batched in one worker process."""
    import grain

    places = grain.MapDataset.source(list_pictures(shards)).seed(0).shuffle().repeat()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=MICRO_BATCH)
    process = grain.multiprocessing.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=PREFETCH)
    batches = places.map(load_views).to_iter_dataset(reading).batch(MICRO_BATCH)
    for batch in batches.mp_prefetch(process, worker_init_fn=_start_grain):
        yield len(batch)


def _start_grain(_: int, __: int) -> None:
    torch.set_num_threads(1)


def read_streaming(shards: Path) -> Iterator[int]:
    """MosaicML Streaming: its own shards, shuffled, through a torch DataLoader."""
    from streaming import MDSWriter, StreamingDataset

    class Views(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> torch.Tensor:
            return draw_views(super().__getitem__(at)["jpg"])

    folder = shards.parent / f"{shards.name}-mds"
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"jpg": "bytes"}) as out:
            for place in list_pictures(shards):
                out.write({"jpg": read_picture(place)})
    # An epoch that is longer than any measurement: a new one would begin with a pause.
    data = Views(local=str(folder), shuffle=True, batch_size=MICRO_BATCH, epoch_size=200_000)
    return in_one_process(data, MICRO_BATCH)


def read_spdl(shards: Path) -> Iterator[int]:
    """SPDL: a pipeline whose thread decodes beside the reader of batches, in the same process."""
    from spdl.pipeline import PipelineBuilder

    places = list_pictures(shards)

    def shuffled() -> Iterator[Location]:
        while True:
            yield from random.sample(places, len(places))

    pipeline = (
        PipelineBuilder()
        .add_source(shuffled())
        .pipe(load_views, concurrency=1)
        .aggregate(MICRO_BATCH)
        .pipe(np.stack)
        .add_sink(PREFETCH)
        .build(num_threads=1)
    )
    with pipeline.auto_stop():
        for batch in pipeline.get_iterator():
            yield len(batch)


PEERS: dict[str, tuple[str, Callable[[Path], Iterator[int]]]] = {
    "webdataset": ("webdataset", read_webdataset),
    "grain": ("grain", read_grain),
    "mosaicml-streaming": ("streaming", read_streaming),
    "spdl": ("spdl", read_spdl),
}
"""Name of the distribution -> name of the module, and the loader."""
