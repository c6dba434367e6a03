"""Small tars of arrays, classes and JSON, and streams over them whose samples are their numbers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from uniemox_dist.data import ElasticShards

COUNTS = (40, 41, 42, 43, 44)
SAMPLES = sum(COUNTS)


def write_tars(folder: Path, counts: tuple[int, ...] = COUNTS, first: int = 0) -> Path:
    """Tars of arrays, classes and JSON, as webdataset's own writer makes them; sample n holds the number n."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for tar, count in enumerate(counts):
        with wds.TarWriter(str(folder / f"{tar:03}.tar")) as writer:
            for _ in range(count):
                array = io.BytesIO()
                np.save(array, np.full(4, number))
                members = {"npy": array.getvalue(), "cls": str(number % 7), "json": json.dumps({"n": number})}
                writer.write({"__key__": f"s{number:05}", **members})
                number += 1
    return folder


def number_of(sample: dict[str, Any]) -> int:
    return int(sample["json"]["n"])


def open_stream(data: Any, **options: Any) -> ElasticShards[Any]:
    settings = {"global_batch": 24, "streams": 12, "window": 16, "decode": [], "transform": number_of}
    return ElasticShards(data, **{**settings, **options})


def epoch(stream: ElasticShards[Any], micro_batch: int = 6, **options: Any) -> list[list[int]]:
    loader = stream.loader(micro_batch, **options)
    batches = list(loader)
    loader.close()
    return batches
