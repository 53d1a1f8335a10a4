"""How many programs (CTAs) of a kernel fit on one streaming multiprocessor at a time."""

from dataclasses import dataclass

REGISTERS = 65_536  # of 32 bits, in four partitions with warps of their own
PARTITIONS = 4
REGISTER_UNIT = 256  # a warp's registers are given out in these
RESERVED_SHARED = 1024  # bytes that every CTA takes beside its own
SHARED_UNIT = 128


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """Limits of one SM, from NVIDIA's tuning guides."""

    shared: int  # bytes
    warps: int
    ctas: int

    @property
    def shared_per_cta(self) -> int:
        return self.shared - RESERVED_SHARED


MULTIPROCESSORS = {
    89: Multiprocessor(shared=100 * 1024, warps=48, ctas=24),
    90: Multiprocessor(shared=228 * 1024, warps=64, ctas=32),
    120: Multiprocessor(shared=100 * 1024, warps=48, ctas=24),
}


def ctas_per_sm(*, arch: int, registers: int, warps: int, shared: int) -> int:
    """Count the CTAs that registers (per thread), warps and shared memory (bytes) leave room for; 0: none fits."""
    sm = MULTIPROCESSORS[arch]
    per_warp = _up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = sm.shared // _up(shared + RESERVED_SHARED, SHARED_UNIT)
    return min(by_registers, by_shared, sm.warps // warps, sm.ctas)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
