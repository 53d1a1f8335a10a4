"""What cannot fit is refused before anything is loaded, with the numbers and the nearest requests that do."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from wanfast.budget import Budget, make_budget
from wanfast.config import ModelConfig
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.plan import Plan, make_plan, request_of
from wanfast.residency import gigabytes
from wanfast.weight_sizes import WeightSizes


def refuse_what_cannot_fit(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, *, vram: int | None, ram: int | None = None
) -> Budget:
    """Make the budget, and refuse a generation that does not fit.

    Raises:
        MemoryBudgetError: it does not fit; the message has the numbers, and the nearest requests that fit.
    """
    budget = make_budget(config, plan, sizes, vram=vram, ram=ram)
    if budget.fits:
        return budget
    if not budget.fits_slots:
        least = budget.num_slots * budget.slot_bytes
        raise MemoryBudgetError(
            f"vram: must hold {budget.num_slots} blocks of {gigabytes(budget.slot_bytes)} on a CPU, got"
            f" {gigabytes(budget.slots_limit or 0)}; try {least} bytes or more, or leave it out:"
            " blocks are used in place then"
        )
    what = f"{_named(plan.width, plan.height, plan.num_frames)} needs"
    near = nearest_that_fit(config, plan, sizes, vram=vram, ram=ram)
    remedy = " or ".join(near) + (" fits" if len(near) == 1 else " fit") if near else "no size of this model fits"
    if not budget.fits_device:
        peak, limit = budget.peak, budget.limit or 0
        raise MemoryBudgetError(
            f"{'vram' if plan.device.startswith('cuda') else 'ram'}: {what} {gigabytes(peak.total)} at its peak,"
            f" {peak.name} ({_largest(peak.items)}), got {gigabytes(limit)}; {remedy}"
        )
    needed, got = sum(budget.host.values()), budget.host_limit or 0
    raise MemoryBudgetError(
        f"ram: {what} {gigabytes(needed)} of host memory beside the GPU ({_largest(budget.host)}),"
        f" got {gigabytes(got)}; {remedy}"
    )


def _largest(items: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in sorted(items.items(), key=lambda item: -item[1])[:3])


def nearest_that_fit(
    config: ModelConfig, plan: Plan, sizes: WeightSizes, *, vram: int | None, ram: int | None = None
) -> list[str]:
    """Search the model's sizes and frame counts for what fits: the most frames at this size, the next size below.

    Returns:
        At most two, as text; none where even the smallest does not fit.
    """
    found = []
    width, height = plan.asked_size

    def most_frames(width: int, height: int) -> int | None:
        return _most_frames(config, plan, width, height, partial(make_budget, config, sizes=sizes, vram=vram, ram=ram))

    if (frames := most_frames(width, height)) is not None:
        found.append(_named(width, height, frames))
    smaller = sorted((size for size in _sizes_below(config, width, height)), key=lambda size: -size[0] * size[1])
    for width, height in smaller:
        frames = most_frames(width, height)
        if frames is not None:
            found.append(_named(width, height, frames))
            break
    return found


def _named(width: int, height: int, num_frames: int) -> str:
    return f"{width}x{height} with {num_frames} frame{'' if num_frames == 1 else 's'}"


def _sizes_below(config: ModelConfig, width: int, height: int) -> list[tuple[int, int]]:
    """The model's sizes of less area, of the same orientation where there is a choice."""
    below = [size for size in config.sizes if size[0] * size[1] < width * height]
    alike = [size for size in below if (size[0] >= size[1]) == (width >= height)]
    return alike or below


def _most_frames(
    config: ModelConfig, plan: Plan, width: int, height: int, budget_of: Callable[..., Budget]
) -> int | None:
    """The largest number of frames, at most the plan's, that fits; None where one frame does not."""
    stride = config.vae.temporal_stride

    def fits(latent_frames: int) -> bool:
        num_frames = (latent_frames - 1) * stride + 1
        request = replace(request_of(plan), width=width, height=height, num_frames=num_frames)
        try:
            smaller = make_plan(config, request, precision=plan.precision, device=plan.device)
        except RequestError:  # an image too thin for so small an area
            return False
        return budget_of(plan=smaller).fits

    low, high = 0, plan.latent_shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low == 0 else (low - 1) * stride + 1
