"""Held-out pictures, looked at while training."""

import logging
from typing import TYPE_CHECKING

import torch

from uniemox_dist.train.monitor.metrics import Meter
from uniemox_dist.train.samples.contact_sheet import draw, title
from uniemox_dist.train.samples.pictures import facts, look, markdown, save
from uniemox_dist.train.samples.selection import Shown

if TYPE_CHECKING:
    from uniemox_dist.train.trainer import Trainer

log = logging.getLogger("uniemox")


def show(trainer: "Trainer", shown: Shown, meter: Meter, step: int) -> None:
    """Reconstructions and nearest texts of held-out pictures, on all ranks that know them."""
    model = trainer.config.model
    if shown.texts is None and trainer.student.decoder is None:
        return
    trainer.student.eval()
    with torch.compiler.set_stance("force_eager"):  # other shapes, rarely: not worth graphs of their own
        seen = look(trainer.student, shown, trainer.config.run.seed, trainer.device)
    trainer.student.train()
    if trainer.world.is_main:
        record = facts(seen, shown, step, model.mask)
        sheet = draw(seen, shown, title(trainer.config, record), boxes=model.mask == "person")
        try:
            save(trainer.folder.samples, step, sheet, record)
        except OSError as error:
            log.warning("%s: %s; training goes on without it", trainer.folder.samples, error.strerror)
        meter.pictures(step, sheet, markdown(record))
