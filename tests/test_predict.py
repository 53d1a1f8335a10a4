"""Seconds and copies: closed forms at the ends, the schedule between them, and the table of cards."""

import pytest

from wanfast.budget import make_budget
from wanfast.config import I2V_A14B, T2V_A14B, TI2V_5B, ModelConfig
from wanfast.errors import RequestError
from wanfast.machines import GPUS, find_gpu, known_gpu
from wanfast.plan import Plan, make_plan
from wanfast.predict import Prediction, Rates, datasheet_rates, predict, prediction_to_dict
from wanfast.request import Request
from wanfast.weight_sizes import weight_sizes

GB = 10**9


def _plan(config: ModelConfig, **asked: object) -> Plan:
    return make_plan(config, Request("a cat", **asked), precision="exact", device="cuda")  # type: ignore[arg-type]


def _predict(
    config: ModelConfig, stored: str, vram: int | None, rates: Rates | None = None, **asked: object
) -> Prediction:
    plan, sizes = _plan(config, **asked), weight_sizes(config, "exact", stored)
    budget = make_budget(config, plan, sizes, vram=vram)
    return predict(config, plan, sizes, budget, rates or datasheet_rates(GPUS["4090"], plan))


@pytest.mark.parametrize(
    ("config", "asked", "want"),
    [
        (T2V_A14B, {}, 3159),  # 80 forwards of 6,523 TFLOP at 165.2 TFLOP/s
        (T2V_A14B, {"width": 832, "height": 480}, 813),
        (TI2V_5B, {}, 313),
    ],
)
def test_a_resident_expert_takes_its_work_over_the_rate(
    config: ModelConfig, asked: dict[str, int], want: float
) -> None:
    prediction = _predict(config, "fp8", 24 * GB, **asked)
    assert prediction.seconds["steps"] == pytest.approx(want, rel=2e-3)
    assert prediction.stall < 0.05
    assert prediction.source == "computed"


def test_a_swap_copies_each_block_once() -> None:
    prediction = _predict(T2V_A14B, "fp8", 24 * GB)
    assert prediction.copied == 80 * weight_sizes(T2V_A14B, "exact", "fp8").slot
    assert prediction.switch_stall == 0.0


def test_a_ring_copies_what_has_no_slot_in_every_step() -> None:
    plan, sizes = _plan(T2V_A14B), weight_sizes(T2V_A14B, "exact", "bf16")
    budget = make_budget(T2V_A14B, plan, sizes, vram=24 * GB)
    prediction = predict(T2V_A14B, plan, sizes, budget, datasheet_rates(GPUS["4090"], plan))
    per_step = prediction.copied / sizes.slot / 40
    assert 40 - budget.num_slots <= per_step <= 41 - budget.num_slots + 1


def test_a_slow_link_shows_as_stall() -> None:
    slow = Rates(165e12, 82e12, 1e8, "measured")
    prediction = _predict(T2V_A14B, "bf16", 12 * GB, slow, width=832, height=480, num_frames=5)
    assert prediction.source == "measured"
    assert prediction.stall > 0.9 * prediction.seconds["steps"]
    assert prediction.seconds["steps"] == pytest.approx(prediction.copied / 1e8, rel=0.05)


def test_a_picture_costs_an_encode() -> None:
    i2v = _predict(I2V_A14B, "fp8", 24 * GB, image_size=(1280, 720))
    assert list(i2v.seconds) == ["text", "picture", "steps", "decode"]
    assert 0 < i2v.seconds["picture"] < i2v.seconds["decode"]
    assert prediction_to_dict(i2v)["total"] == pytest.approx(sum(i2v.seconds.values()))


def test_the_vae_s_work_is_what_its_dimensions_give() -> None:
    rates = Rates(1.0, 1e12, 1.0, "measured")
    seconds = _predict(T2V_A14B, "fp8", None, rates, num_inference_steps=1).seconds["decode"]
    # 639 TFLOP, less 5 of every 9 products of three 3 x 3 convolutions over doubled pictures, 53 TFLOP.
    assert seconds == pytest.approx(639 - 53 * 5 / 9, rel=0.01)


@pytest.mark.parametrize("name", ["4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx4090", "geforce-rtx-4090"])
def test_cards_are_known_by_what_people_and_drivers_call_them(name: str) -> None:
    assert find_gpu(name) is GPUS["4090"]


def test_cards_of_the_same_number_are_not_mixed_up() -> None:
    assert known_gpu("NVIDIA H200") is GPUS["h200"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 PCIe", "", "RTX"):
        assert known_gpu(other) is None, other
    with pytest.raises(RequestError, match=r"^gpu: must be one of 3090, .*got 'voodoo'; for another card give --vram"):
        find_gpu("voodoo")
