"""Capabilities of GPUs by their data sheets: rates of dense matrix products, memory, and links to the other GPUs of a
node."""

import difflib
import re
from dataclasses import dataclass, replace

from uniemox_dist.core.errors import UserError

GIB = 1 << 30
UNNAMED = ("GPU", "unknown")
"""Names of devices whose model the user did not state: with, and without a stated memory."""
FREE_SHARE = 0.1
"""Share of a device's memory that a plan leaves free, for fragmentation and memory that is not counted."""


@dataclass(frozen=True)
class Device:
    """The device of one rank. A missing value is unknown."""

    name: str
    bf16_tflops: float | None = None
    """Dense products with fp32 accumulation, 10^12 operations per second."""
    tf32_tflops: float | None = None
    fp32_tflops: float | None = None
    """Peak in fp32 without TF32, which training switches off."""
    memory_bytes: float | None = None
    """Also unknown for a CPU, because the ranks of a node share its memory."""
    link_gb_s: float | None = None
    """Bandwidth to the other GPUs of its node in one direction, 10^9 bytes per second: NVLink or Infinity Fabric on
    boards with eight GPUs, otherwise PCIe x16."""
    is_gpu: bool = True

    @property
    def usable_bytes(self) -> float | None:
        """The memory that a plan may fill."""
        return None if self.memory_bytes is None else self.memory_bytes * (1 - FREE_SHARE)

    @property
    def has_bf16(self) -> bool:
        """Whether `auto` precision means bf16 on this device; True for a GPU that is not in the table."""
        return self.is_gpu and (self.bf16_tflops is not None or self.fp32_tflops is None)

    def peak(self, number_format: str) -> float | None:
        """Peak in `bf16`, `tf32` or `fp32`, 10^12 operations per second."""
        peaks = {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "fp32": self.fp32_tflops}
        return peaks[number_format]


def _gpu(
    name: str, bf16: float | None, tf32: float | None, fp32: float, memory_gib: int, link_gb_s: float
) -> Device:
    return Device(name, bf16, tf32, fp32, float(memory_gib * GIB), float(link_gb_s))


DEVICES: tuple[Device, ...] = (
    # Columns: bf16, tf32 and fp32 peaks, memory in GiB as in the data sheets, link in GB/s.
    # NVIDIA B200 (HGX B200 data sheet, a GPU's share of eight, without sparsity)
    _gpu("B200", 2250.0, 1125.0, 75.0, 180, 900),
    # NVIDIA H100 data sheet (SXM, PCIe, NVL; without sparsity), H200 data sheet: the same chip as H100 SXM
    _gpu("H100 PCIe", 756.0, 378.0, 51.0, 80, 64),
    _gpu("H100 NVL", 835.5, 417.5, 60.0, 94, 64),
    _gpu("H200 NVL", 835.5, 417.5, 60.0, 141, 64),
    _gpu("H100", 989.4, 494.7, 66.9, 80, 450),
    _gpu("H200", 989.4, 494.7, 66.9, 141, 450),
    _gpu("GH200", 989.4, 494.7, 66.9, 96, 450),
    _gpu("H20", 148.0, 74.0, 44.0, 96, 450),
    # NVIDIA A100, A30, A10, A40 data sheets
    _gpu("A100", 312.0, 156.0, 19.5, 80, 300),
    _gpu("A100 40GB", 312.0, 156.0, 19.5, 40, 300),
    _gpu("A800", 312.0, 156.0, 19.5, 80, 200),
    _gpu("A30", 165.0, 82.0, 10.3, 24, 32),
    _gpu("A10", 125.0, 62.5, 31.2, 24, 32),
    _gpu("A40", 149.7, 74.8, 37.4, 48, 32),
    # NVIDIA Ada and Ampere architecture white papers: L40S, L40, L4, RTX 6000 Ada, A6000, GeForce
    _gpu("L40S", 362.0, 183.0, 91.6, 48, 32),
    _gpu("L40", 181.0, 90.5, 90.5, 48, 32),
    _gpu("L4", 121.0, 60.0, 30.3, 24, 32),
    _gpu("RTX 6000 Ada", 364.2, 182.1, 91.1, 48, 32),
    _gpu("RTX A6000", 154.8, 77.4, 38.7, 48, 32),
    _gpu("RTX 5090", 209.5, 104.8, 104.8, 32, 64),
    _gpu("RTX 4090", 165.2, 82.6, 82.6, 24, 32),
    _gpu("RTX 3090", 71.0, 35.6, 35.6, 24, 32),
    # NVIDIA V100 and T4 data sheets: no bf16, no tf32
    _gpu("V100 SXM2", None, None, 15.7, 16, 150),
    _gpu("V100 SXM3", None, None, 16.4, 32, 150),
    _gpu("V100", None, None, 14.0, 16, 16),
    _gpu("T4", None, None, 8.1, 16, 16),
    # AMD CDNA 3 white paper
    _gpu("MI300X", 1307.4, 653.7, 163.4, 192, 448),
    _gpu("MI325X", 1307.4, 653.7, 163.4, 256, 448),
)
"""A name from torch.cuda matches a row if it has all words of the row; the first matching row counts. Users write
names with spaces, hyphens or neither."""
OTHERS = re.compile(r"MIG|\d+[ABCQ]|LAPTOP|MAX|D|TI|SUPER")
"""Words that mark a device as another one than its name in the table suggests: slices of a GPU (MIG, or the profile of
a virtual GPU, as in A40-48Q), and mobile, reduced and enlarged versions."""


def peak_tflops(device: str, number_format: str) -> float | None:
    """The stated peak of a device by its name in torch.cuda, in `bf16`, `tf32` or `fp32`. None if unknown; the user
    can then set compute.peak_tflops."""
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    if any(OTHERS.fullmatch(word) for word in words):
        return None
    for row in DEVICES:
        if words.issuperset(row.name.upper().split()):
            return row.peak(number_format)
    return None


def find_device(name: str | None, memory_gb: float | None) -> Device:
    """Returns the device for a name as users write it, or a device with only its memory; `cpu` is not a GPU.

    Raises:
        UserError: for an unknown name, with the nearest ones.
    """
    memory = None if memory_gb is None else memory_gb * 1e9
    if name is None:
        return Device(UNNAMED[0] if memory else UNNAMED[1], memory_bytes=memory)
    if _letters(name) == "cpu":
        return Device("cpu", memory_bytes=memory, is_gpu=False)
    known = {_letters(device.name): device for device in DEVICES}
    found = known.get(_letters(name))
    if found is not None:
        return found if memory is None else replace(found, memory_bytes=memory)
    if memory is not None:
        return Device(name, memory_bytes=memory)
    near = difflib.get_close_matches(_letters(name), known, n=4, cutoff=0.5)
    nearest = f"nearest: {', '.join(_option(known[key]) for key in near)}; " if near else ""
    raise UserError(
        f"--gpu={name}: not in the table; {nearest}valid are {', '.join(device_names())}; or cpu, or "
        "state --gpu-memory GB of another device"
    )


def device_names() -> list[str]:
    """The GPUs of the table, as users write them."""
    return [_option(device) for device in DEVICES]


def _option(device: Device) -> str:
    return device.name.lower().replace(" ", "-")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
