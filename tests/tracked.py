"""Peak memory of an operation on the CPU, as torch's own allocator saw it: every tensor and every workspace."""

from collections.abc import Callable, Iterable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def tracked_peak(operation: Callable[[], Any]) -> int:
    """Run an operation and return by how many bytes it exceeded, at most, what was allocated before it.

    Its result counts as long as the operation holds it. Run it once before, if it caches anything.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        operation()
    assert recorded.profiler is not None
    events = _flattened(recorded.profiler.kineto_results.experimental_event_tree())
    allocations = [event for event in events if event.tag == _EventType.Allocation]
    allocations.sort(key=lambda event: event.start_time_ns)
    level = peak = 0
    for event in allocations:
        level += event.extra_fields.alloc_size
        peak = max(peak, level)
    assert allocations, "nothing was recorded"
    return peak


def _flattened(events: Iterable[Any]) -> Iterable[Any]:
    for event in events:
        yield event
        yield from _flattened(event.children)
