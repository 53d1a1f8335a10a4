"""Where weights are: blocks in slots on the device, moved ahead of their use; a model only asks for them in order.

moves.py      which block is copied when, into which slot: settled in advance, without a tensor
timeline.py   how such a schedule runs in time
packing.py    a block as one run of bytes
store.py      blocks in host memory and in files
slots.py      blocks on the device; cuda.py the same with streams and events
mover.py      the thread that moves them
residency.py  the class that owns all of it
"""

from wanfast.residency.memory import free_memory, gigabytes, map_tensors, parse_bytes, to_device, weight_bytes
from wanfast.residency.mover import Traffic
from wanfast.residency.packing import packed_bytes
from wanfast.residency.residency import Residency

__all__ = [
    "Residency",
    "Traffic",
    "free_memory",
    "gigabytes",
    "map_tensors",
    "packed_bytes",
    "parse_bytes",
    "to_device",
    "weight_bytes",
]
