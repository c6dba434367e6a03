"""A classifier's answers to a whole split, over all ranks, each sample once."""

import math
from typing import Any

import numpy as np
import torch

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.data.evaluation_batches import evaluation_batches
from uniemox_dist.data.labels import LabelledReader
from uniemox_dist.data.loader import view_settings
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World


@torch.no_grad()
def answers(
    classifier: Any, reader: LabelledReader, config: FinetuneRun, world: World, device: torch.device
) -> np.ndarray:
    """Answers n×C in the order of the split, on every rank; collective.

    Raises:
        UserError: naming the first sample that cannot be read, on all ranks.
    """
    persons = config.finetune.persons
    settings = view_settings(config, with_person=persons)
    batch = config.finetune.eval_batch

    def own() -> list[np.ndarray]:
        found = []
        views: tuple[Any, ...] = ()
        for number, part in enumerate(
            evaluation_batches(
                reader,
                settings,
                batch=batch,
                rank=world.rank,
                world_size=world.size,
                workers=config.data.workers,
                records=False,
            ),
            start=1,
        ):
            person = part.person_B3HW.to(device) if persons else None
            views = (part.scene_B3HW.to(device), person)
            found.append(classifier(*views)[0].cpu().numpy())
            passes = number
        if config.zero.stage == 3:
            # Weights come together for each pass of all ranks: one that is done earlier passes on, for nothing.
            most = math.ceil(math.ceil(reader.samples / world.size) / batch)
            size = config.model.image_size
            empty = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=device)
            for _ in range(most - (passes if found else 0)):
                classifier(*(views or (empty, empty if persons else None)))
        return found

    with torch.compiler.set_stance("force_eager"):  # other shapes, rarely: not worth graphs of their own
        rows = collectives.on_all(world, own)
    empty = np.zeros((0, reader.targets_nC.shape[1]), np.float32)
    everyone = collectives.gather_objects(np.concatenate(rows) if rows else empty, world)
    return np.concatenate(everyone)
