"""What devices can do at most by their data sheets: dense matrix products, 10^12 operations per second.

Columns: bf16 with fp32 accumulation, tf32, fp32 without tf32. A name of torch.cuda's fits a row if it has all of the
row's words; the first row that fits counts. A device that is not here is no guess: compute.peak_tflops states it.
"""

import re

Row = tuple[float | None, float | None, float]

PEAKS: tuple[tuple[str, Row], ...] = (
    # NVIDIA B200 (HGX B200 data sheet, a GPU's share of eight, without sparsity)
    ("B200", (2250.0, 1125.0, 75.0)),
    # NVIDIA H100 data sheet (SXM, PCIe, NVL; without sparsity), H200 data sheet: the same chip as H100 SXM
    ("H100 PCIe", (756.0, 378.0, 51.0)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H100", (989.4, 494.7, 66.9)),
    ("H200", (989.4, 494.7, 66.9)),
    ("GH200", (989.4, 494.7, 66.9)),
    ("H20", (148.0, 74.0, 44.0)),
    # NVIDIA A100, A30, A10, A40 data sheets
    ("A100", (312.0, 156.0, 19.5)),
    ("A800", (312.0, 156.0, 19.5)),
    ("A30", (165.0, 82.0, 10.3)),
    ("A10", (125.0, 62.5, 31.2)),
    ("A40", (149.7, 74.8, 37.4)),
    # NVIDIA Ada and Ampere architecture white papers: L40S, L40, L4, RTX 6000 Ada, A6000, GeForce
    ("L40S", (362.0, 183.0, 91.6)),
    ("L40", (181.0, 90.5, 90.5)),
    ("L4", (121.0, 60.0, 30.3)),
    ("RTX 6000 Ada", (364.2, 182.1, 91.1)),
    ("RTX A6000", (154.8, 77.4, 38.7)),
    ("RTX 5090", (209.5, 104.8, 104.8)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71.0, 35.6, 35.6)),
    # NVIDIA V100 and T4 data sheets: no bf16, no tf32
    ("V100 SXM2", (None, None, 15.7)),
    ("V100 SXM3", (None, None, 16.4)),
    ("V100", (None, None, 14.0)),
    ("T4", (None, None, 8.1)),
    # AMD CDNA 3 white paper
    ("MI300X", (1307.4, 653.7, 163.4)),
    ("MI325X", (1307.4, 653.7, 163.4)),
)
OTHERS = re.compile(r"MIG|\d+[ABCQ]|LAPTOP|MAX|D|TI|SUPER")
"""Words of devices that only share a name with one of the table: slices of a GPU (MIG, or a virtual one's profile as in
A40-48Q), mobile, cut and enlarged versions."""


def peak_tflops(device: str, number_format: str) -> float | None:
    """The stated peak of a device by torch.cuda's name for it, in `bf16`, `tf32` or `fp32`; None if not known."""
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    if any(OTHERS.fullmatch(word) for word in words):
        return None
    for name, row in PEAKS:
        if words.issuperset(name.upper().split()):
            return row[("bf16", "tf32", "fp32").index(number_format)]
    return None
