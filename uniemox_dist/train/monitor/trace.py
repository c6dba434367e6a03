"""Records what every slot of a run was: proof that two runs saw the same samples, whatever their ranks."""

import json
import logging
import zlib
from collections.abc import Sequence

from torch import Tensor

from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")


class Trace:
    """Appends one line for each step of a rank to trace/rank<r>.jsonl: slots, keys, and checksums (CRC-32) of scene,
    person, caption vector and both masks of each sample. A step that was done again after a restart has two lines."""

    def __init__(self, folder: RunFolder, rank: int, config: Config) -> None:
        self.model, self.seed = config.model, config.run.seed
        self.path = folder.path / "trace" / f"rank{rank}.jsonl"
        self.path.parent.mkdir(exist_ok=True)

    def write(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Appends the micro-batches of the update that made `step`."""
        slots: list[int] = []
        sums: list[list[int]] = []
        for batch in batches:
            slots += batch.slots_B.tolist()
            masks = [
                choose_patch_order(self.model, batch.slots_B, view, self.seed, on)[:, : self.model.visible]
                for view, on in ((SCENE_VIEW, batch.on_person_BN), (PERSON_VIEW, None))
            ]
            parts = [batch.scene_B3HW, batch.person_B3HW, batch.texts_BE, *masks]
            sums += [
                [_checksum(part[i]) for part in parts if part is not None] for i in range(len(batch.slots_B))
            ]
        keys = [key for batch in batches for key in batch.keys]
        line = {"step": step, "slots": slots, "keys": keys, "sums": sums}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().cpu().numpy().tobytes())
