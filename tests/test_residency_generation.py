"""Whole runs with blocks that move: the same bits for every number of slots, in every stored form, through trouble."""

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from blocks import movers
from reference.formats import LOSSLESS, QUANTISED, Original, make_original

import wanfast
from wanfast.loaded import LoadedModel
from wanfast.residency import Residency, weight_bytes
from wanfast.residency.slots import HostSlots
from wanfast.residency.store import HostBlock
from wanfast.tiny import tiny_folder

SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}


@pytest.fixture
def always_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies on a CPU too, where everything fits; each copy takes a while."""
    fill = HostSlots.fill

    def slowly(self: HostSlots, slot: int, block: HostBlock) -> None:
        time.sleep(0.001)
        fill(self, slot, block)

    monkeypatch.setattr(HostSlots, "fill", slowly)
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)


def open_model(num_slots: int, **options: object) -> wanfast.Pipeline:
    pipeline = wanfast.load(tiny_folder(), device="cpu", **options)
    largest = pipeline.loaded._residency._slot_bytes
    return wanfast.load(tiny_folder(), device="cpu", vram=max(num_slots * largest, 1), **options)


@pytest.mark.parametrize(("precision", "counts"), [("fp32", range(2, 8)), ("exact", (2, 5))])
def test_the_same_bits_for_every_number_of_slots(precision: str, counts: Iterable[int], always_copied: None) -> None:
    """wan-tiny has four blocks in each of two experts: eight slots hold everything, four are swapped, fewer stream."""
    want = open_model(8, precision=precision).generate("a red ball", output="latents", **SMALL)
    for num_slots in counts:
        pipeline = open_model(num_slots, precision=precision)
        for _ in range(2 if num_slots in (3, 4) else 1):
            got = pipeline.generate("a red ball", output="latents", **SMALL)
            assert torch.equal(got, want), f"{num_slots} slots"
            assert len(pipeline.loaded._residency._held) == num_slots
    assert movers() == []


def test_blocks_in_place_give_the_same_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    want = open_model(100).generate("a red ball", output="latents", **SMALL)
    got = open_model(2).generate("a red ball", output="latents", **SMALL)
    # Tensors at other addresses may be summed in another order.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def original() -> Original:
    return make_original()


FORMS = ["official fp32 shards", "ComfyUI fp8_scaled", "LightX2V int8", "TurboWan", "GGUF F16", "GGUF Q5_K_M"]


@pytest.mark.parametrize(
    ("form", "precision"),
    [*((form, "fp32") for form in FORMS), *((form, "exact") for form in FORMS[:2])],
)
def test_every_stored_form_moves(
    form: str, precision: str, original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = (LOSSLESS | QUANTISED)[form].write(original, tmp_path)
    in_place = wanfast.load(**sources, device="cpu", precision=precision)
    two_slots = 2 * in_place.loaded._residency._slot_bytes
    want = in_place.generate("a red ball", output="latents", **SMALL)
    monkeypatch.setattr(Residency, "_is_in_place", lambda self, experts: False)  # an expert has but two
    moved = wanfast.load(**sources, device="cpu", precision=precision, vram=two_slots)
    got = moved.generate("a red ball", output="latents", **SMALL)
    assert len(moved.loaded._residency._held) == 2
    if precision == "fp32":
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    else:
        assert ((got - want).square().mean() / want.square().mean()).sqrt() < 0.02
    loaded = moved.loaded
    largest = max(weight_bytes(loaded._read_block(expert, i)) for expert in loaded.model.experts for i in range(2))
    assert largest <= loaded._residency._slot_bytes <= 1.1 * largest + 27 * 256


def test_a_model_is_announced_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(Residency, "begin", lambda self, passes: begun.append(list(passes)))
    pipeline = wanfast.load(tiny_folder(), device="cpu")
    pipeline.generate("a red ball", output="latents", **SMALL)
    plan = pipeline.plan(wanfast.Request("a red ball", **SMALL))
    assert begun == [[step.expert for step in plan.steps]]


@pytest.mark.parametrize("num_slots", [2, 4, 8])
def test_a_run_that_is_cancelled_leaves_nothing(num_slots: int, always_copied: None) -> None:
    pipeline = open_model(num_slots)
    want = pipeline.generate("a red ball", output="latents", **SMALL)

    def cancel(step: object, latents: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate("a red ball", output="latents", on_step=cancel, **SMALL)
    assert movers() == []
    assert torch.equal(pipeline.generate("a red ball", output="latents", **SMALL), want)


def test_released_weights_are_read_again(always_copied: None) -> None:
    pipeline = open_model(3, precision="exact")
    want = pipeline.generate("a red ball", output="latents", **SMALL)
    pipeline.release()
    loaded: LoadedModel = pipeline.loaded
    assert loaded._residency._slots is None and loaded._residency._store._kept == {}
    assert torch.equal(pipeline.generate("a red ball", output="latents", **SMALL), want)
