"""Where every byte lives: what fits on which card, what is refused and what is named in its place, as properties."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanfast.budget import Budget, make_budget, slots_that_fit
from wanfast.config import I2V_A14B, MODELS, T2V_A14B, TI2V_5B, ModelConfig
from wanfast.dit.chunking import CHUNKINGS
from wanfast.errors import MemoryBudgetError
from wanfast.fitting import nearest_that_fit, refuse_what_cannot_fit
from wanfast.plan import Plan, make_plan
from wanfast.request import Request
from wanfast.weight_sizes import STORED, parse_stored, weight_sizes

GB = 10**9


def _plan(config: ModelConfig, **asked: object) -> Plan:
    image = {"image_size": (1280, 720)} if config.task == "i2v" else {}
    return make_plan(config, Request("a cat", **image, **asked), precision="exact", device="cuda")  # type: ignore[arg-type]


def _budget(config: ModelConfig, stored: str, vram: int | None, **asked: object) -> Budget:
    return make_budget(config, _plan(config, **asked), weight_sizes(config, "exact", stored), vram=vram)


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B], ids=lambda config: config.name)
@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_an_8_bit_expert_stays_at_720p_under_23_gb(config: ModelConfig, stored: str) -> None:
    budget = _budget(config, stored, 23 * GB)
    assert budget.fits
    assert budget.is_resident
    assert budget.peak.total < 23 * GB


@pytest.mark.parametrize("vram", [8 * GB, 12 * GB])
@pytest.mark.parametrize("stored", ["bf16", "fp8", "q4_k"])
def test_480p_streams_on_small_cards(stored: str, vram: int) -> None:
    budget = _budget(T2V_A14B, stored, vram, width=832, height=480)
    assert budget.fits
    assert 2 <= budget.num_slots < 40


def test_the_blocks_are_what_the_format_makes_them() -> None:
    slots = {stored: weight_sizes(T2V_A14B, "exact", stored).slot for stored in ("bf16", "fp8", "q8_0", "q4_k")}
    parameters = 8 * 5120**2 + 2 * 5120 * 13_824  # of a block's matrices; its vectors are a thousandth
    for stored, bits in (("bf16", 16), ("fp8", 8), ("q8_0", 8.5), ("q4_k", 4.5)):
        assert slots[stored] == pytest.approx(parameters * bits / 8, rel=4e-3)
    assert weight_sizes(T2V_A14B, "fp32").slot == pytest.approx(4 * parameters, rel=4e-3)


def test_stages_are_those_of_the_run_and_name_every_byte() -> None:
    budget = _budget(I2V_A14B, "fp8", None)
    assert [stage.name for stage in budget.stages] == ["text", "picture", "steps (high_noise, low_noise)", "decode"]
    for stage in budget.stages:
        assert stage.total == sum(stage.items.values())
        assert all(size > 0 for size in stage.items.values())
    assert [stage.name for stage in _budget(TI2V_5B, "bf16", None).stages] == ["text", "steps (single)", "decode"]


def test_without_a_limit_everything_stays() -> None:
    budget = _budget(T2V_A14B, "bf16", None)
    assert budget.fits
    assert budget.num_slots == 80
    assert not budget.host_missing


@pytest.mark.parametrize(
    ("free", "other", "want"), [(100, 0, 5), (1000, 100, 40), (99, 100, -1), (139, 100, 1), (140, 100, 2)]
)
def test_slots_that_fit(free: int, other: int, want: int) -> None:
    assert slots_that_fit(free, other, 20, 40) == want


def test_a_refusal_gives_the_numbers_and_what_fits() -> None:
    plan, sizes = _plan(T2V_A14B), weight_sizes(T2V_A14B, "exact", "fp8")
    with pytest.raises(MemoryBudgetError) as refusal:
        refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=6 * GB)
    message = str(refusal.value)
    assert re.match(r"vram: 1280x720 with 81 frames needs [\d.]+ GB at its peak, ", message)
    assert "got 6.00 GB" in message
    assert re.search(r"; 1280x720 with \d+ frames or 832x480 with 81 frames fit$", message)
    with pytest.raises(MemoryBudgetError, match=r"got 1\.00 GB; no size of this model fits$"):
        refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=GB)
    assert refuse_what_cannot_fit(T2V_A14B, plan, sizes, vram=24 * GB).fits


@pytest.mark.parametrize(("vram", "in_turn"), [(8, True), (12, False), (16, False), (24, False)])
def test_720p_of_81_frames_runs_on_cards_of_8_gb_and_up(vram: int, in_turn: bool) -> None:
    """A resident 8-bit expert stays under 23 GB; what does not fit is streamed, and cut finer where it must be."""
    budget = _budget(T2V_A14B, "fp8", vram * GB)
    assert budget.fits
    assert budget.chunking.in_turn == in_turn
    assert budget.is_resident == (vram == 24)
    assert budget.peak.total < 23 * GB


def test_a_portrait_is_offered_a_portrait() -> None:
    plan, sizes = _plan(T2V_A14B, width=720, height=1280), weight_sizes(T2V_A14B, "exact", "fp8")
    assert nearest_that_fit(T2V_A14B, plan, sizes, vram=6 * GB)[-1].startswith("480x832 ")


CASES = st.tuples(
    st.sampled_from(list(MODELS.values())),
    st.sampled_from(STORED),
    st.integers(0, 20).map(lambda n: 4 * n + 1),
    st.integers(4, 48),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_what_is_offered_fits_and_one_step_more_does_not(case: tuple[ModelConfig, str, int, int]) -> None:
    config, stored, num_frames, gigabytes = case
    plan, sizes, vram = _plan(config, num_frames=num_frames), weight_sizes(config, "exact", stored), gigabytes * GB
    budget = make_budget(config, plan, sizes, vram=vram)
    if budget.fits:
        assert budget.peak.total <= vram
        more = budget.num_slots + 1 if budget.num_slots < budget.num_blocks else budget.num_slots
        steps = next(stage for stage in budget.stages if stage.name.startswith("steps"))
        is_full = budget.is_resident or steps.total + (more - budget.num_slots) * sizes.slot > vram
        assert is_full
        return
    for offer in nearest_that_fit(config, plan, sizes, vram=vram):
        match = re.fullmatch(r"(\d+)x(\d+) with (\d+) frames?", offer)
        assert match is not None
        width, height, frames = map(int, match.groups())
        assert make_budget(config, _plan(config, width=width, height=height, num_frames=frames), sizes, vram=vram).fits
        if frames < num_frames:
            longer = _plan(config, width=width, height=height, num_frames=frames + 4)
            assert not make_budget(config, longer, sizes, vram=vram).fits


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_more_of_anything_takes_more(case: tuple[ModelConfig, str, int, int]) -> None:
    config, stored, num_frames, gigabytes = case
    here = _budget(config, stored, gigabytes * GB, num_frames=num_frames)
    longer = _budget(config, stored, gigabytes * GB, num_frames=num_frames + 4)
    larger = _budget(config, stored, (gigabytes + 1) * GB, num_frames=num_frames)
    # A finer cut of the steps may leave room for more slots than the one before had.
    longer_rank, rank, larger_rank = (
        (CHUNKINGS.index(budget.chunking), -budget.num_slots) for budget in (longer, here, larger)
    )
    assert longer_rank >= rank >= larger_rank
    tilings = [budget.tilings["decode"] for budget in (here, longer, larger)]
    assert tilings[0].whole == tilings[2].whole <= tilings[1].whole
    assert tilings[2].num_tiles <= tilings[0].num_tiles <= tilings[1].num_tiles


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_a_picture_is_cut_only_where_it_must_be_and_no_further_than_that(
    case: tuple[ModelConfig, str, int, int],
) -> None:
    config, stored, num_frames, gigabytes = case
    vram = gigabytes * GB
    budget = _budget(config, stored, vram, num_frames=num_frames)
    for stage in budget.stages:
        if (tiling := budget.tilings.get(stage.name)) is None:
            continue
        if tiling.num_tiles == 1:
            assert stage.total == tiling.whole
        else:
            assert tiling.whole > vram
            assert stage.total < tiling.whole
        # With the memory that it takes in fewer strips, it would be taken in fewer.
        if stage.total <= vram and tiling.num_tiles > 1:
            assert _budget(config, stored, stage.total - 1, num_frames=num_frames).tilings[stage.name].num_tiles > (
                tiling.num_tiles
            )


def test_720p_is_decoded_and_encoded_whole_under_8_gb_and_in_strips_under_4() -> None:
    budget = _budget(I2V_A14B, "fp8", 8 * GB)
    totals = {stage.name: stage.total for stage in budget.stages}
    assert max(totals["picture"], totals["decode"]) < 7.5 * GB
    assert {stage: tiling.num_tiles for stage, tiling in budget.tilings.items()} == {"picture": 1, "decode": 1}
    assert "pixels of strips" not in budget.host
    small = _budget(TI2V_5B, "bf16", 4 * GB)
    assert small.stages[-1].total < 4 * GB
    assert small.tilings["decode"].num_tiles == 3
    assert small.host["pixels of strips"] == 121 * 704 * 1280 * 3


def test_in_fp32_a_gpu_decodes_with_torch_which_joins_frames_in_twice_the_memory() -> None:
    decoding = []
    for precision in ("exact", "fp32"):
        plan = make_plan(T2V_A14B, Request("a cat"), precision=precision, device="cuda")
        sizes = weight_sizes(T2V_A14B, precision, "bf16")
        decoding.append(make_budget(T2V_A14B, plan, sizes, vram=None).stages[-1].items)
    narrow, wide = decoding
    for name in ("VAE decoder", "frames remembered"):
        assert wide[name] == 2 * narrow[name]
    assert wide["one chunk of frames"] > 2 * narrow["one chunk of frames"]


def test_loras_take_their_place_among_the_steps() -> None:
    plan, sizes = _plan(T2V_A14B), weight_sizes(T2V_A14B, "exact", "bf16")
    alone, beside = (
        make_budget(T2V_A14B, plan, replace(sizes, loras=loras), vram=24 * GB) for loras in (0, sizes.slot + 1)
    )
    assert beside.num_slots in (alone.num_slots - 1, alone.num_slots - 2)
    assert beside.fits


def test_on_a_cpu_nothing_is_kept_for_a_driver() -> None:
    plan = replace(_plan(T2V_A14B, num_frames=1), device="cpu")
    budget = make_budget(T2V_A14B, plan, weight_sizes(T2V_A14B, "exact"), vram=64 * GB)
    assert all("driver and libraries" not in stage.items for stage in budget.stages)


def test_formats_are_read_as_people_write_them() -> None:
    assert parse_stored("Q4_K") == "q4_k"
    with pytest.raises(ValueError, match=r"^stored: must be one of fp32, bf16, fp8, int8, .*got 'fp4'$"):
        parse_stored("fp4")
