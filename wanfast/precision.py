"""Which precision `auto` is, settled before anything is loaded: the same for `plan` and for `generate`.

In this order: what the files are ready in (`wanfast convert --precision int8` or `fp8` wrote the very numbers that are
multiplied, so that was chosen when they were written); the exact precision, where it fits; int8, where that fits and
the exact one does not, on a GPU alone and never without saying so.
"""

from collections.abc import Callable
from dataclasses import replace

from wanfast.budget import make_budget
from wanfast.checkpoint.reader import Reader
from wanfast.config import ModelConfig
from wanfast.fitting import refuse_what_cannot_fit
from wanfast.kernels import GROUP
from wanfast.model import Model
from wanfast.plan import EIGHT_BIT, Plan, Precision, Wish, weight_parts
from wanfast.residency import gigabytes
from wanfast.weight_sizes import WeightSizes

_STORED: dict[Precision, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}  # as files hold it


def usual_precision(device: str) -> Precision:
    """What `auto` is where nothing speaks for another: "cpu" computes in fp32, a GPU in exact."""
    return "exact" if device.startswith("cuda") else "fp32"


def wish_of_auto(model: Model, device: str, *, has_e4m3: bool, has_8_bit: bool = True) -> Wish:
    """Settle what `auto` is for a model's files.

    Args:
        model: open files.
        device: where it computes, "cpu" or "cuda:0".
        has_e4m3: whether that multiplies fp8; without it files in fp8 are used in the exact precision.
        has_8_bit: whether it multiplies in 8 bits at all.
    """
    if not has_8_bit:
        return Wish(usual_precision(device))
    ready = ready_precision(model)
    if ready is not None and (ready != "fp8" or has_e4m3):
        usual = usual_precision(device)
        return Wish(ready, reason=f"the files are ready in it; --precision {usual} expands them where they are used")
    return auto_without_files(device)


def auto_without_files(device: str) -> Wish:
    """Settle what `auto` is where no file speaks for another precision."""
    return Wish(usual_precision(device), may_round=device.startswith("cuda"))


def ready_precision(model: Model) -> Precision | None:
    """The 8-bit precision that a model was converted for, if it was: its folder says so, or else its tensors do."""
    for precision in EIGHT_BIT:
        if model.written_for == precision:
            return precision
        if all(_is_ready(reader, _STORED[precision]) for reader in model.experts.values()):
            return precision
    return None


def _is_ready(expert: Reader, stored_as: str) -> bool:
    """Whether the projections of a DiT's blocks lie in its file as 8-bit arithmetic takes them."""
    refs = [expert.ref(name) for name in expert.names() if name.startswith("blocks.") and name.endswith(".weight")]
    matrices = [ref for ref in refs if len(ref.shape) == 2]
    return bool(matrices) and all(ref.is_ready and ref.stored_as == stored_as for ref in matrices)


def plan_within(
    config: ModelConfig,
    plan: Plan,
    wish: Wish,
    sizes_of: Callable[[Plan], WeightSizes],
    *,
    vram: int | None,
    ram: int | None,
) -> tuple[Plan, str | None]:
    """Settle the precision of a plan by the memory there is, and refuse what does not fit.

    Args:
        config: the model.
        plan: of the request, in the wished precision.
        wish: the precision, and whether int8 may take its place.
        sizes_of: gives the sizes of the weights in a plan's precision, with what LoRAs add.
        vram: bytes of the GPU, and
        ram: of the host, as in `make_budget`.

    Returns:
        The plan, in the precision that it has by then, and why it is that one, where that needs saying.

    Raises:
        MemoryBudgetError: it does not fit; the message says what would.
    """
    budget = make_budget(config, plan, sizes_of(plan), vram=vram, ram=ram)
    if budget.fits:
        return plan, wish.reason
    if wish.may_round and wish.precision not in EIGHT_BIT and can_round(config):
        rounded = in_precision(config, plan, "int8")
        if make_budget(config, rounded, sizes_of(rounded), vram=vram, ram=ram).fits:
            host = sum(budget.host.values())
            needed, limit = (host, ram) if budget.fits_device else (budget.peak.total, vram)
            where = "host memory" if budget.fits_device else "the GPU at its peak"
            return rounded, (
                f"{wish.precision} needs {gigabytes(needed)} of {where}, {gigabytes(limit or 0)} are there;"
                f" --precision {wish.precision} refuses instead"
            )
    refuse_what_cannot_fit(config, plan, sizes_of(plan), vram=vram, ram=ram)
    return plan, wish.reason


def can_round(config: ModelConfig) -> bool:
    """Whether a GPU's kernels multiply a model in 8 bits: its channels come in whole groups."""
    return config.dit.dim % GROUP == 0 and config.dit.ffn_dim % GROUP == 0


def in_precision(config: ModelConfig, plan: Plan, precision: Precision) -> Plan:
    """The same generation in another precision."""
    vae = next((part.parameters for part in plan.parts if part.name == "VAE"), None)
    return replace(plan, precision=precision, parts=weight_parts(config, precision, vae_parameters=vae))
