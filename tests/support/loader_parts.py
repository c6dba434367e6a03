"""A small configuration, its data set of micro-batches, and whether processes have ended."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import CaptionVectors, PlannedDataset, view_settings
from uniemox_dist.data.sources import Sources


def config(*folders: Path, workers: int = 0, **batch: Any) -> Config:
    origins = (
        {"sources": [{"path": str(f)} for f in folders]} if len(folders) > 1 else {"path": str(folders[0])}
    )
    return Config.model_validate(
        {
            "run": {"max_steps": 1, "seed": 3},
            "data": {**origins, "workers": workers, "shuffle_window": 8, "background": "random"},
            "batch": {"global_batch": 12, "micro_batch": 6, "streams": 6, **batch},
            "model": {"image_size": 32, "patch_size": 8},
            "teacher": {"name": "shipped:demo"},
        }
    )


class PlaceVectors:
    """Stands in for a text cache: the vector of a caption is its place."""

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        return torch.tensor([shard, row, caption], dtype=torch.float16)


def dataset(
    of: Config, vectors: bool = True, with_person: bool = True, ranks: tuple[int, int] = (0, 1)
) -> PlannedDataset:
    sources = Sources(of, rank=ranks[0], world_size=ranks[1])
    found: list[CaptionVectors] | None = [PlaceVectors() for _ in sources.readers] if vectors else None
    settings = view_settings(of, with_person=with_person)
    return PlannedDataset(sources, found, settings)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))
