"""Any encoder of timm's, from a file of weights, for the tasks that look at features alone."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import EvaluationBatch
from uniemox_dist.evaluate.vectors import RELEASE, Embed, plain_rows
from uniemox_dist.models.patches import normalise

PREFIX = "timm:"


class TimmSubject:
    """`timm:NAME=FILE`: an architecture of timm's with the weights of a safetensors file."""

    def __init__(self, text: str, baselines: tuple[str, ...], device: str = "cpu") -> None:
        """Builds it.

        Raises:
            UserError: if timm does not know the name, the file is not there or fits no such model, or a baseline needs
                a release.
        """
        name, _, file = text.removeprefix(PREFIX).partition("=")
        if not file.endswith(".safetensors") or not Path(file).is_file():
            raise UserError(
                f"{text}: {file or 'nothing'} is no safetensors file; give timm:NAME=FILE.safetensors"
            )
        odd = [row for row in baselines if row not in ("histogram", "pixels")]
        if odd:
            raise UserError(f"--baselines={odd[0]}: {text} has none; give histogram or pixels here")
        try:
            model: Any = timm.create_model(name, checkpoint_path=file, num_classes=0)
        except Exception as error:  # timm raises many types for names and files that do not fit
            # The last line: what loading weights says first is only that something does not fit.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
            raise UserError(f"{text}: timm cannot build it ({reason})") from None
        self.model, self.device, self.baselines = model.eval().to(device), torch.device(device), baselines
        cfg = self.model.pretrained_cfg
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.settings = ViewSettings(image_size=cfg["input_size"][-1])
        self.facts: dict[str, Any] = {"step": None}

    def features(self) -> dict[str, Embed]:
        """Rows for methods that look at features: what timm gives before its head."""
        return {RELEASE: self._see, **plain_rows(self.baselines)}

    @torch.no_grad()
    def _see(self, batch: EvaluationBatch) -> np.ndarray:
        pixels = normalise(batch.scene_B3HW.to(self.device), self.mean, self.std, torch.float32)
        found: np.ndarray = self.model(pixels).float().cpu().numpy()
        return found
