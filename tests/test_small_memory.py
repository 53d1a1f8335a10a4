"""The VAE in little memory: strips where the plan or an allocation that fails asks for them, and the same video."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from reference.families import make_family
from reference.tiny import random_folder
from torch import Tensor

import wanfast
from wanfast import forecast, generation
from wanfast.errors import MemoryBudgetError
from wanfast.generation import decode_frames, encode_image
from wanfast.loaded import LoadedModel
from wanfast.pipeline import plan_for
from wanfast.plan import Plan
from wanfast.request import Request
from wanfast.vae import encode as encode_module
from wanfast.vae import pixels as pixels_module

WIDE = {"width": 256, "height": 32, "num_frames": 9, "num_inference_steps": 1, "seed": 0}  # 4 strips at most
ERROR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")


@pytest.fixture(scope="module")
def tiny() -> wanfast.Pipeline:
    return wanfast.load(random_folder(), device="cpu")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("i2v")
    return wanfast.load(make_family("i2v", folder).write_official(folder / "model"), device="cpu").loaded


def failing(real: Callable[..., Any], calls: set[int], made: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        made.append(1)
        if len(made) in calls:
            raise ERROR
        return real(*arguments, **more)

    return call


def latents_of(plan: Plan) -> Tensor:
    return torch.randn(plan.latent_shape, generator=torch.Generator().manual_seed(1))


def tell_tiles(monkeypatch: pytest.MonkeyPatch, num_tiles: int) -> None:
    monkeypatch.setattr(generation, "tiles_here", lambda model, plan, stage: num_tiles)


@pytest.mark.parametrize("calls", [{1}, {2, 5}, {3, 9}])
def test_decoding_goes_on_in_more_strips_where_memory_runs_out(
    tiny: wanfast.Pipeline, calls: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tiny.plan(Request("a", **WIDE))
    latents = latents_of(plan)
    want = list(decode_frames(tiny.loaded, plan, latents))
    tell_tiles(monkeypatch, 1)
    made: list[int] = []

    def decode(*arguments: Any) -> Iterator[Tensor]:
        step = failing(next, calls, made)
        chunks = pixels_decode(*arguments)
        while (chunk := step(chunks, None)) is not None:
            yield chunk

    pixels_decode = pixels_module.decode
    monkeypatch.setattr(pixels_module, "decode", decode)
    shares: list[int] = []
    got = list(decode_frames(tiny.loaded, plan, latents, lambda stage, done, total: shares.append(done)))
    assert [len(chunk) for chunk in got] == [1, 4, 4]
    difference = (torch.cat(got).int() - torch.cat(want).int()).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 1e-4
    assert shares[-1] == 9
    assert caplog.text.count("decode: out of memory") == len(calls)
    assert f"taken in {2 ** len(calls)} strips" in caplog.text


def test_without_a_narrower_strip_the_end_is_told(tiny: wanfast.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.plan(Request("a", **WIDE))
    tell_tiles(monkeypatch, 2)
    monkeypatch.setattr(pixels_module, "decode", failing(pixels_module.decode, {1, 2}, []))
    with pytest.raises(
        MemoryBudgetError, match=r"^decode: out of memory \(.*allocate\) .*4 of them; [\d.]+ GB are free; try"
    ):
        list(decode_frames(tiny.loaded, plan, latents_of(plan)))


def test_other_errors_are_not_taken_for_it(tiny: wanfast.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.plan(Request("a", **WIDE))

    def decode(*_: Any) -> Iterator[Tensor]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pixels_module, "decode", decode)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(decode_frames(tiny.loaded, plan, latents_of(plan)))


def test_a_picture_is_encoded_in_more_strips_where_memory_runs_out(
    i2v: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = Request("a", image_size=(256, 32), **WIDE)
    plan = plan_for(i2v, request)
    picture = Image.effect_noise((256, 32), 60).convert("RGB")
    want = encode_image(i2v, plan, picture, lambda *_: None)
    made: list[int] = []
    tell_tiles(monkeypatch, 1)
    monkeypatch.setattr(encode_module, "_run_encoder", failing(encode_module._run_encoder, {2, 4}, made))
    got = encode_image(i2v, plan, picture, lambda *_: None)
    assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())
    assert "taken in 2 strips" in caplog.text and "taken in 4 strips" in caplog.text
    monkeypatch.setattr(encode_module, "_run_encoder", failing(encode_module._run_encoder, set(range(9)), []))
    with pytest.raises(MemoryBudgetError, match=r"^picture: out of memory"):
        encode_image(i2v, plan, picture, lambda *_: None)


def test_what_is_free_decides(tiny: wanfast.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.plan(Request("a", **WIDE))
    budget = forecast.budget_here(tiny.loaded, plan)
    decode = next(stage for stage in budget.stages if stage.name == "decode")
    assert budget.tilings["decode"].num_tiles == 1
    seen = []
    needed = decode.total - decode.items["blocks of an expert"]  # which give way
    for free in (needed, needed - 1, needed // 2, 0):
        monkeypatch.setattr(forecast, "_limits_here", lambda model, free=free: (None, free))
        seen.append(forecast.tiles_here(tiny.loaded, plan, "decode"))
    assert seen[:2] == [1, 2] and seen == sorted(seen) and seen[-1] == 4
