"""A released encoder as ONNX, compared with torch before anybody gets it."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from uniemox_dist.core.errors import Fault, missing_extra

AGREES = 1e-3
"""Largest difference of a feature between onnxruntime and torch, in units of the features' standard deviation."""
BATCHES = (1, 3)


def export_onnx(release: Path, path: Path) -> dict[str, Any]:
    """Writes the encoder of a release folder (config.json and model.safetensors) as one file: input `pixels`,
    normalised B×3×size×size, to output `features`, B×D; B is free. Returns facts for uniemox.json.

    Raises:
        UserError: if the extra `onnx` is not installed.
        Fault: if onnxruntime's features differ from torch's.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "onnx") from None
    encoder: Any = timm.create_model(f"local-dir:{release}", pretrained=True, num_classes=0).eval().float()
    size = encoder.pretrained_cfg["input_size"][-1]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((max(BATCHES), 3, size, size), generator=generator)
    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (pixels[:2],),
            input_names=["pixels"],
            output_names=["features"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
        expected = encoder(pixels).numpy()
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in BATCHES:
        found = session.run(["features"], {"pixels": pixels[:batch].numpy()})[0]
        worst = max(worst, float(np.abs(found - expected[:batch]).max() / expected.std()))
    if not worst < AGREES:
        raise Fault(
            f"{path.name}: onnxruntime's features differ from torch's by {worst:.2g} standard deviations (at most "
            f"{AGREES:g}); release without --onnx"
        )
    opset = max(entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import)
    return {"opset": opset, "differs_by": round(worst, 8), "onnxruntime": onnxruntime.__version__}
