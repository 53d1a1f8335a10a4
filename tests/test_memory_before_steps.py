"""Memory that does not suffice before the first step: for prompts, and with LoRAs, of one clip or of one among many."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scarce import ERRORS, KINDS, SMALL, TEXTS, blocks_are_copied, failing, load, plans, write_lora
from torch import Tensor

from wanfast import batch, forecast, prompts
from wanfast.batch import Job, generate_batch
from wanfast.errors import MemoryBudgetError
from wanfast.forecast import budget_here
from wanfast.generation import Inputs
from wanfast.loaded import LoadedModel
from wanfast.lora import Lora, open_loras
from wanfast.plan import Plan
from wanfast.text.umt5 import encode_texts

__all__ = ["blocks_are_copied"]


@pytest.mark.parametrize(
    ("calls", "want"),
    [
        ({1}, [6, 6]),
        ({1, 2}, [6, 6, 3, 3]),
        ({1, 2, 3}, [6, 6, 3, 1, 1, 1, 1, 1, 1]),
        ({1, 2, 4}, [6, 6, 3, 3, 1, 1, 1]),
    ],
)
def test_prompts_are_encoded_again(
    calls: set[int], want: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First other weights go, then fewer prompts are taken at a time; nothing changes."""
    pipeline = load(3)
    texts = plans(pipeline, TEXTS)
    wanted = prompts.encode_prompts(pipeline.loaded, texts, lambda *_: None)
    pipeline.generate("a red ball", output="latents", **SMALL)
    numbers: list[int] = []

    def encode(ids: Any, *arguments: Any) -> list[Tensor]:
        numbers.append(len(ids))
        made = encode_texts(ids, *arguments)
        if len(numbers) in calls:
            raise ERRORS["numpy"]()
        return made

    monkeypatch.setattr(prompts, "encode_texts", encode)
    got = prompts.encode_prompts(pipeline.loaded, texts, lambda *_: None)
    assert all(torch.equal(a, b) for one, two in zip(got, wanted, strict=True) for a, b in zip(one, two, strict=True))
    assert numbers == want, "one negative prompt serves all"
    assert pipeline.loaded._residency._slots is None
    assert caplog.text.count("text: out of memory") == len(calls)


@KINDS
def test_a_prompt_that_cannot_be_encoded_is_told_with_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(3)
    monkeypatch.setattr(LoadedModel, "_read_text_block", failing(LoadedModel._read_text_block, ERRORS[kind], None))
    told = r"^text: out of memory with one prompt of \d+ tokens.*needs [\d.]+ [kM]B, [\d.]+ GB are free; end what else"
    with pytest.raises(MemoryBudgetError, match=told):
        pipeline.generate("a red ball", output="latents", **SMALL)
    with pytest.raises(MemoryBudgetError, match=told):
        list(generate_batch(pipeline.loaded, [Job(plan=plan, inputs=Inputs()) for plan in plans(pipeline, TEXTS)]))


def test_many_prompts_are_encoded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, numbers = load(3), []
    texts = plans(pipeline, TEXTS)
    wanted = prompts.encode_prompts(pipeline.loaded, texts, lambda *_: None)

    def encode(ids: Any, *arguments: Any) -> list[Tensor]:
        numbers.append(len(ids))
        return encode_texts(ids, *arguments)

    monkeypatch.setattr(prompts, "encode_texts", encode)
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 4)
    got = prompts.encode_prompts(pipeline.loaded, texts, lambda *_: None)
    assert numbers == [4, 2]
    assert all(torch.equal(a, b) for one, two in zip(got, wanted, strict=True) for a, b in zip(one, two, strict=True))


@pytest.fixture
def no_room_for_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are, they take a petabyte."""
    monkeypatch.setattr(
        forecast, "with_loras", lambda sizes, config, plan, loras: replace(sizes, loras=10**15 if loras else 0)
    )


def test_loras_that_do_not_fit_are_refused_before_anything_is_encoded(
    no_room_for_loras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(3)
    file = write_lora(tmp_path / "large.safetensors", rank=2)
    asked: list[str] = []
    for name in ("text_encoder", "expert", "vae_decoder", "vae_encoder"):
        monkeypatch.setattr(LoadedModel, name, lambda *_, name=name: asked.append(name))
    with pytest.raises(
        MemoryBudgetError, match=r"needs 1000000.00 GB at its peak, steps .*LoRAs 1000000.00 GB.* fits?$|no size"
    ):
        pipeline.generate("a red ball", loras=[file], **SMALL)
    assert asked == []


def test_a_clip_whose_loras_do_not_fit_fails_alone(
    no_room_for_loras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is: the first clip's LoRAs are not everybody's."""
    want = load(3).generate("a red ball", output="latents", **SMALL)
    pipeline = load(3)
    file = write_lora(tmp_path / "large.safetensors", rank=2)
    loras = open_loras([file], pipeline.loaded.config, pipeline.loaded.model.experts, merge=False)
    made: dict[int, Tensor] = {}

    def decode(model: LoadedModel, plan: Plan, latents: Tensor, *_: Any) -> Any:
        made[len(made)] = latents
        yield torch.zeros(plan.num_frames, plan.height, plan.width, 3, dtype=torch.uint8)

    monkeypatch.setattr(batch, "decode_frames", decode)
    texts: list[str] = []
    own = batch.encode_prompts

    def encode(model: LoadedModel, some: list[Plan], progress: Any) -> Any:
        texts.extend(plan.prompt for plan in some)
        return own(model, some, progress)

    monkeypatch.setattr(batch, "encode_prompts", encode)
    for large in range(3):
        made.clear()
        texts.clear()
        jobs = [
            Job(plan=plan, inputs=Inputs(loras=loras if index == large else ()))
            for index, plan in enumerate(plans(pipeline, ["a red ball", "a red ball", "a red ball"]))
        ]
        results = []
        for result in generate_batch(pipeline.loaded, jobs):
            results.append(result.error)
            list(result.frames or ())
        assert [error is None for error in results] == [index != large for index in range(3)]
        assert isinstance(results[large], MemoryBudgetError) and "LoRAs" in str(results[large])
        assert len(made) == 2 and all(torch.equal(latents, want) for latents in made.values())
        assert len(texts) == 2


def test_blocks_have_what_the_largest_loras_of_a_group_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipeline = load(3)
    loaded = pipeline.loaded
    file = write_lora(tmp_path / "a.safetensors", rank=2)
    loras = open_loras([file], loaded.config, loaded.model.experts, merge=False)
    jobs = [
        Job(plan=plan, inputs=Inputs(loras=some))
        for plan, some in zip(plans(pipeline, TEXTS), [(), loras, ()], strict=False)
    ]
    bounds: list[list[int]] = []

    def fewer(model: LoadedModel, plan: Plan, some: tuple[Lora, ...]) -> Any:
        return replace(budget_here(model, plan, some), num_slots=2 if some else 7)

    monkeypatch.setattr(batch, "budget_here", fewer)
    monkeypatch.setattr(batch, "bound_blocks", lambda _, budgets: bounds.append([one.num_slots for one in budgets]))
    for result in generate_batch(loaded, jobs):
        assert result.error is None
    assert bounds == [[7, 2, 7]]
