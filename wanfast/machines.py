"""Graphics cards as numbers: what their makers state, and what a host link gives in practice.

Rates are dense, without sparsity; 16-bit products with fp32 sums, 8-bit ones with int32 sums. Sources: NVIDIA's
architecture papers (Ampere GA102, Ada, Blackwell GeForce) and datasheets (A100, H100, H200, L40S). Links: what copies
from pinned memory reach, 25 of 31.5 GB/s over PCIe 4.0 x16 and 53 of 63 over PCIe 5.0 x16.
"""

from dataclasses import dataclass

from wanfast.errors import RequestError

DISK = 3e9  # bytes per second from files: an NVMe drive over PCIe 3.0; assumed of every machine
_PCIE_4, _PCIE_5 = 25e9, 53e9
_GIB = 2**30
_MAKERS_WORDS = {"nvidia", "geforce", "sxm", "sxm4", "sxm5", "80gb", "hbm3", "hbm3e"}  # around a card's name


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. None of these figures is measured."""

    name: str
    memory: int  # bytes
    flops_16: float  # per second, bf16 products
    flops_32: float  # per second, fp32 without tensor cores
    flops_8: float  # per second, int8 products; e4m3 with fp16 sums where the card has them
    bandwidth: float  # of its memory, bytes per second
    link: float  # from the host, bytes per second
    has_e4m3: bool = True  # whether its tensor cores multiply fp8


GPUS: dict[str, Gpu] = {
    "3090": Gpu("RTX 3090", 24 * _GIB, 71.2e12, 35.6e12, 284e12, 936e9, _PCIE_4, has_e4m3=False),
    "4080": Gpu("RTX 4080", 16 * _GIB, 97.5e12, 48.7e12, 390e12, 717e9, _PCIE_4),
    "4090": Gpu("RTX 4090", 24 * _GIB, 165.2e12, 82.6e12, 660.6e12, 1008e9, _PCIE_4),
    "5080": Gpu("RTX 5080", 16 * _GIB, 112.6e12, 56.3e12, 450e12, 960e9, _PCIE_5),
    "5090": Gpu("RTX 5090", 32 * _GIB, 209.5e12, 104.8e12, 838e12, 1792e9, _PCIE_5),
    "l40s": Gpu("L40S", 48 * _GIB, 362e12, 91.6e12, 733e12, 864e9, _PCIE_4),
    "a100": Gpu("A100 80GB", 80 * _GIB, 312e12, 19.5e12, 624e12, 2039e9, _PCIE_4, has_e4m3=False),
    "h100": Gpu("H100 SXM", 80 * _GIB, 989e12, 67e12, 1979e12, 3350e9, _PCIE_5),
    "h200": Gpu("H200 SXM", 141 * 10**9, 989e12, 67e12, 1979e12, 4800e9, _PCIE_5),
}


def find_gpu(name: str) -> Gpu:
    """Look a card up by the name people call it: "4090", "RTX 4090", "NVIDIA GeForce RTX 4090".

    Raises:
        RequestError: the table does not have it.
    """
    gpu = known_gpu(name)
    if gpu is None:
        raise RequestError(f"gpu: must be one of {', '.join(GPUS)}, got {name!r}; for another card give --vram alone")
    return gpu


def known_gpu(name: str) -> Gpu | None:
    """Look a card up as `find_gpu` does; None where the table does not have it, or has another of its family."""
    words = name.lower().replace("-", " ").split()
    return GPUS.get("".join(word for word in words if word not in _MAKERS_WORDS).removeprefix("rtx"))
