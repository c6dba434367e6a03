"""GPUs by the names that operators use: memory, links and peaks. Names are those of core/device_peaks.py."""

import difflib
import re
from dataclasses import dataclass

from uniemox_dist.core.device_peaks import PEAKS
from uniemox_dist.core.errors import UserError

GIB = 1 << 30
MEMORY_AND_LINK: dict[str, tuple[int, float]] = {
    # Columns: memory in GiB as the data sheets of core/device_peaks.py name it, and what one GPU sends to others of its
    # node, 10^9 bytes per second in one direction: NVLink or Infinity Fabric of boards with eight, otherwise PCIe x16.
    "B200": (180, 900),
    "H100 PCIe": (80, 64),
    "H100 NVL": (94, 64),
    "H200 NVL": (141, 64),
    "H100": (80, 450),
    "H200": (141, 450),
    "GH200": (96, 450),
    "H20": (96, 450),
    "A100": (80, 300),
    "A100 40GB": (40, 300),
    "A800": (80, 200),
    "A30": (24, 32),
    "A10": (24, 32),
    "A40": (48, 32),
    "L40S": (48, 32),
    "L40": (48, 32),
    "L4": (24, 32),
    "RTX 6000 Ada": (48, 32),
    "RTX A6000": (48, 32),
    "RTX 5090": (32, 64),
    "RTX 4090": (24, 32),
    "RTX 3090": (24, 32),
    "V100 SXM2": (16, 150),
    "V100 SXM3": (32, 150),
    "V100": (16, 16),
    "T4": (16, 16),
    "MI300X": (192, 448),
    "MI325X": (256, 448),
}
CONTEXT_BYTES = 1.0e9
"""Assumed of what lies outside torch's allocator on a GPU: the CUDA context, kernels, cuBLAS's workspace, NCCL's
buffers."""
MARGIN = 0.1
"""Share of a device's memory that a plan leaves free: for fragmentation and for what is not counted."""


@dataclass(frozen=True)
class Device:
    """What one rank computes on."""

    name: str
    memory_bytes: float | None
    """None for a CPU, whose memory the ranks of a node share."""
    link_gb_s: float | None
    """To other devices of its node, in one direction; None where it is not known."""
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    is_gpu: bool = True

    @property
    def room_bytes(self) -> float | None:
        """What a plan may fill."""
        return None if self.memory_bytes is None else self.memory_bytes * (1 - MARGIN)

    @property
    def has_bf16(self) -> bool:
        """Whether `auto` means bf16 there; of a device that is not in the table, that it is a recent one."""
        return self.is_gpu and (self.bf16_tflops is not None or self.fp32_tflops is None)

    def peak(self, precision: str) -> float | None:
        """Stated peak, 10^12 operations per second; fp32 without TF32, which training switches off."""
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


def find_device(name: str | None, memory_gb: float | None) -> Device:
    """A device by name, spaces and hyphens alike, or one of which only the memory is known; `cpu` is none.

    Raises:
        UserError: for a name that is not known, with the nearest ones.
    """
    if name is None:
        memory = None if memory_gb is None else memory_gb * 1e9
        return Device("GPU" if memory else "unknown", memory, None)
    if _plain(name) == "cpu":
        memory = None if memory_gb is None else memory_gb * 1e9
        return Device("cpu", memory, None, is_gpu=False)
    known = {_plain(key): key for key in MEMORY_AND_LINK}
    if _plain(name) not in known:
        if memory_gb is not None:
            return Device(name, memory_gb * 1e9, None)
        near = difflib.get_close_matches(_plain(name), known, n=4, cutoff=0.3) or ["h100", "a100"]
        names = ", ".join(known[key].lower().replace(" ", "-") for key in near)
        raise UserError(
            f"--gpu={name}: not in the table; nearest: {names}; or cpu, or state --gpu-memory GB of another device"
        )
    key = known[_plain(name)]
    gib, link = MEMORY_AND_LINK[key]
    bf16, _, fp32 = dict(PEAKS)[key.removesuffix(" 40GB")]
    return Device(key, memory_gb * 1e9 if memory_gb is not None else float(gib * GIB), link, bf16, fp32)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
