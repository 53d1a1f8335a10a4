"""Memory that runs out in steps and while decoding, whoever says so: less is done at a time, or numbers are told."""

import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import SLOT_BYTES, Block, Loads, is_block
from scarce import BLOCKS, ERRORS, KINDS, SMALL, blocks_are_copied, failing, load, plans, write_lora
from torch import Tensor

from wanfast import denoise, forecast, generation
from wanfast.errors import MemoryBudgetError
from wanfast.loaded import LoadedModel
from wanfast.out_of_memory import OutOfMemory, attempt
from wanfast.residency import Residency
from wanfast.residency.slots import HostSlots

__all__ = ["blocks_are_copied"]


@pytest.fixture(scope="module")
def want() -> Tensor:
    with pytest.MonkeyPatch.context() as copied:
        copied.setattr(Residency, "_is_in_place", lambda self, experts: False)
        return load(3).generate("a red ball", output="latents", **SMALL)


@KINDS
def test_slots_that_cannot_be_had_are_fewer(
    kind: str, want: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is memory for three blocks, where eight are planned."""
    own = HostSlots.__init__

    def few(self: HostSlots, count: int, num_bytes: int) -> None:
        if count > 3:
            raise ERRORS[kind]()
        own(self, count, num_bytes)

    monkeypatch.setattr(HostSlots, "__init__", few)
    pipeline = load(2 * BLOCKS)
    for _ in range(2):
        assert torch.equal(pipeline.generate("a red ball", output="latents", **SMALL), want)
    assert len(pipeline.loaded._residency._held) == 2
    # Found once, remembered in the second run.
    told = [record.getMessage() for record in caplog.records]
    assert [text.rpartition("); ")[2] for text in told] == [
        "4 are kept on the device",
        "2 are kept on the device",
    ]


@KINDS
@pytest.mark.parametrize("calls", [{1}, {1, 2}, {1, 2, 3}])
def test_two_slots_that_cannot_be_had_are_asked_for_again(
    kind: str, calls: set[int], want: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First when the passes are announced, then in the step, then when they are announced anew."""
    monkeypatch.setattr(HostSlots, "__init__", failing(HostSlots.__init__, ERRORS[kind], calls))
    assert torch.equal(load(2).generate("a red ball", output="latents", **SMALL), want)


@KINDS
def test_without_two_slots_the_end_is_told_with_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostSlots, "__init__", failing(HostSlots.__init__, ERRORS[kind], None))
    pipeline = load(2 * BLOCKS)
    size = f"two blocks take {2 * pipeline.loaded.block_bytes / 1e6:.2f} MB"
    with pytest.raises(MemoryBudgetError, match=rf"^step 1 of 4: .*{size}, [\d.]+ GB are free; try a smaller size"):
        pipeline.generate("a red ball", output="latents", **SMALL)


@KINDS
def test_a_step_that_fails_is_taken_again(kind: str, want: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, and where the step is taken."""
    for name, calls in {"predict_velocities": {2, 3, 5}, "take_step": {1, 4}}.items():
        with monkeypatch.context() as patched:
            patched.setattr(denoise, name, failing(getattr(denoise, name), ERRORS[kind], calls))
            assert torch.equal(load(2 * BLOCKS).generate("a red ball", output="latents", **SMALL), want)


@KINDS
def test_a_lora_that_cannot_be_read_at_once_is_read_with_fewer_blocks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lora(tmp_path / "a.safetensors", rank=2)
    want = load(3).generate("a red ball", output="latents", loras=[file], **SMALL)
    from wanfast import loaded

    monkeypatch.setattr(loaded, "make_adapter", failing(loaded.make_adapter, ERRORS[kind], {1, 3}))
    pipeline = load(2 * BLOCKS)
    assert torch.equal(pipeline.generate("a red ball", output="latents", loras=[file], **SMALL), want)
    assert len(pipeline.loaded._residency._held) == 2


@KINDS
def test_decoding_goes_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoder is read, and later; first the experts go, then the picture is cut."""
    pipeline = load(3)
    whole = pipeline.generate("a red ball", **SMALL)
    monkeypatch.setattr(generation, "load_vae", None)  # previews alone
    monkeypatch.setattr(LoadedModel, "vae_decoder", failing(LoadedModel.vae_decoder, ERRORS[kind], {1}))
    assert torch.equal(pipeline.generate("a red ball", **SMALL).frames, whole.frames)
    assert pipeline.loaded._residency._slots is None, "blocks have made room"
    monkeypatch.setattr(LoadedModel, "vae_decoder", failing(LoadedModel.vae_decoder, ERRORS[kind], None))
    with pytest.raises(MemoryBudgetError, match=r"^decode: out of memory .* strips, .* GB are free; try a smaller"):
        pipeline.generate("a red ball", **SMALL)


def test_what_cannot_be_taken_less_of_is_told_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "rope_rotations", failing(denoise.rope_rotations, ERRORS["cuda"], None))
    with pytest.raises(MemoryBudgetError, match=r"^32x32 with 5 frames: .*Tried to allocate 2 GiB.*GB are free; try"):
        load(3).generate("a red ball", **SMALL)


@pytest.mark.parametrize("kind", ERRORS)
def test_whoever_says_so(kind: str) -> None:
    """And nothing that was alive where it failed is alive after it."""
    alive: list[weakref.ref[Tensor]] = []

    def work() -> None:
        activations = torch.zeros(3)
        alive.append(weakref.ref(activations))
        raise ERRORS[kind]()

    failure = attempt(work)
    assert isinstance(failure, OutOfMemory) and failure.reason == (str(ERRORS[kind]()) or "MemoryError")
    assert alive[0]() is None


def test_a_refusal_passes_as_it_is() -> None:
    refusal = MemoryBudgetError("ram: can't allocate memory")

    def refuse() -> None:
        raise refusal

    with pytest.raises(MemoryBudgetError) as caught:
        attempt(refuse)
    assert caught.value is refusal
    for error in (RuntimeError("shapes do not match"), ValueError("can't allocate memory"), KeyError()):
        with pytest.raises(type(error)):
            attempt(failing(refuse, lambda error=error: error, None))


def test_blocks_in_place_make_room() -> None:
    """Those that are mapped files take none; the others are loaded for each use from then on."""
    loads = Loads()
    residency: Residency[Block] = Residency(loads, 5, torch.device("cpu"), slot_bytes=SLOT_BYTES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Residency, "_is_in_place", lambda self, experts: True)
        for _ in range(2):
            assert all(is_block(block, "high_noise", i) for i, block in enumerate(residency.blocks("high_noise")))
        assert len(loads.keys) == 5
        assert residency.shrink() and not residency.shrink()
        for passes in range(1, 3):
            assert all(is_block(block, "high_noise", i) for i, block in enumerate(residency.blocks("high_noise")))
            assert len(loads.keys) == 5 + 5 * passes
        assert residency.release() is False
        assert all(is_block(block, "high_noise", i) for i, block in enumerate(residency.blocks("high_noise")))
        assert residency.release() is True


@KINDS
def test_what_stands_around_the_blocks_is_read_in_its_turn_where_both_do_not_fit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is pretended, which has that of both experts where it can."""
    loaded, read, begun = load(3).loaded, [], []
    own = loaded._read_outer
    monkeypatch.setattr(loaded, "device", torch.device("cuda"))
    monkeypatch.setattr(loaded._residency, "begin", begun.append)

    def reading(expert: Any) -> Any:
        read.append(expert)
        if len(read) == 2:
            raise ERRORS[kind]()
        with monkeypatch.context() as on_cpu:
            on_cpu.setattr(loaded, "device", torch.device("cpu"))
            return own(expert)

    monkeypatch.setattr(loaded, "_read_outer", reading)
    with loaded.passes(["high_noise", "low_noise"]):
        assert begun == [["high_noise", "low_noise"]] and loaded._outers == {}
        loaded.expert("high_noise")
    assert read == ["high_noise", "low_noise", "high_noise"]


def test_a_decoder_has_room_beside_the_blocks_where_both_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is pretended: only the arithmetic is run."""
    pipeline = load(3)
    loaded, plan = pipeline.loaded, replace(plans(pipeline, ["a"])[0], device="cuda")
    sizes = forecast.sizes_of(loaded, loaded.precision)
    whole = forecast.make_budget(loaded.config, plan, sizes, vram=None)
    decode = next(stage for stage in whole.stages if stage.name == "decode")
    together = decode.total + 2 * BLOCKS * sizes.slot + 2 * sizes.outer
    for missing, fits in ((0, True), (1, False)):
        monkeypatch.setattr(forecast, "_limits_here", lambda _, missing=missing: (together - missing, None))
        budget = forecast.make_budget(loaded.config, plan, sizes, vram=together)
        assert budget.num_slots == 2 * BLOCKS
        assert forecast.decodes_beside_blocks(loaded, plan) is fits


def test_a_step_has_one_number_that_the_host_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"__float__": 0, "__bool__": 0}
    own_take = denoise._take

    def counted(name: str) -> Callable[[Tensor], Any]:
        own = getattr(Tensor, name)

        def call(self: Tensor) -> Any:
            counts[name] += threading.current_thread() is threading.main_thread()  # others check what they load
            return own(self)

        return call

    for name in counts:
        monkeypatch.setattr(Tensor, name, counted(name))
    steps: dict[str, list[int]] = {}

    def take(run: Any, step: Any, *arguments: Any, **more: Any) -> Any:
        before = sum(counts.values())
        taken = own_take(run, step, *arguments, **more)
        steps.setdefault(step.expert, []).append(sum(counts.values()) - before)
        return taken

    monkeypatch.setattr(denoise, "_take", take)
    told: dict[str, list[int]] = {}
    load(3).generate(
        "a red ball",
        output="latents",
        on_step=lambda step, _: told.setdefault(step.expert, []).append(sum(counts.values())),
        **SMALL | {"num_inference_steps": 8},
    )
    assert steps.keys() == {"high_noise", "low_noise"}
    for expert, numbers in steps.items():
        assert numbers[1:] == [1] * (len(numbers) - 1), "the first reads its expert's weights"
        assert [late - early for early, late in pairwise(told[expert])] == numbers[1:], "nor is there one between them"


def test_rotations_are_made_once(monkeypatch: pytest.MonkeyPatch, want: Tensor) -> None:
    from wanfast.dit import model as dit

    made: list[Any] = []
    for module in (denoise, dit):
        own = module.rope_rotations
        monkeypatch.setattr(module, "rope_rotations", lambda *grid, own=own: made.append(grid) or own(*grid))
    assert torch.equal(load(3).generate("a red ball", output="latents", **SMALL), want)
    assert len(made) == 1
    assert re.match(r"\(\(2, \d+, \d+\), \d+\)", str(made[0]))
