"""What a VAE computes in, and what happens where 16 bits do not hold its numbers: on a CPU that is taken for a GPU."""

import logging
from dataclasses import replace

import pytest
import torch
from scarce import SMALL
from torch import Tensor

import wanfast
from wanfast import generation, loaded
from wanfast.errors import NotFiniteError
from wanfast.generation import decode_frames
from wanfast.loaded import LoadedModel
from wanfast.request import Request
from wanfast.tiny import tiny_folder
from wanfast.vae.weights import VAEWeights, compute_dtype


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("fp32", "cuda", torch.float32),
        *((precision, "cuda:0", torch.float16) for precision in ("exact", "fp8", "int8")),
        *((precision, "cpu", torch.float32) for precision in ("fp32", "exact", "int8")),
    ],
)
def test_fp16_is_for_gpus_and_not_for_fp32(precision: str, device: str, dtype: torch.dtype) -> None:
    assert compute_dtype(precision, device) == dtype
    assert compute_dtype(precision, torch.device(device)) == dtype


@pytest.fixture
def narrow() -> wanfast.Pipeline:
    """wan-tiny with its VAE in fp16."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loaded, "compute_dtype", lambda precision, device: torch.float16)
        pipeline = wanfast.load(tiny_folder(), device="cpu")
        assert pipeline.loaded.vae_decoder().decoder is not None
    return pipeline


def decoded(pipeline: wanfast.Pipeline, latents: Tensor) -> list[Tensor]:
    plan = pipeline.plan(Request("a red ball", **SMALL))
    return list(decode_frames(pipeline.loaded, plan, latents))


def latents_of(pipeline: wanfast.Pipeline) -> Tensor:
    return generation.draw_noise(pipeline.plan(Request("a red ball", **SMALL)))[0]


def test_frames_that_leave_the_range_are_taken_again_in_fp32(
    narrow: wanfast.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    latents = latents_of(narrow)
    latents[:, 1:] *= 1e6  # the first frame has gone out by then
    want = decoded(wanfast.load(tiny_folder(), device="cpu", precision="fp32"), latents)
    with caplog.at_level(logging.WARNING, logger="wanfast"):
        got = decoded(narrow, latents)
        assert [len(frames) for frames in got] == [1, 4]
        assert (got[0].int() - want[0].int()).abs().max() <= 1
        assert torch.equal(got[1], want[1])
        assert all(map(torch.equal, decoded(narrow, latents), want))  # fp32 from there on
    told = [record.getMessage() for record in caplog.records]
    assert told == ["frames: not finite in 16 bits; the VAE computes in fp32 from here on"]


def test_what_fp32_does_not_hold_is_refused(narrow: wanfast.Pipeline) -> None:
    with pytest.raises(NotFiniteError, match="frames: must be finite"):
        decoded(narrow, latents_of(narrow) * float("nan"))


def test_a_picture_that_leaves_the_range_is_encoded_again_in_fp32(
    narrow: wanfast.Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, dtypes = generation.encode_chunks, []

    def overflows(vae: VAEWeights, *arguments: object) -> Tensor:
        assert vae.encoder is not None
        dtypes.append(vae.encoder.conv_in.bias.dtype)
        bias = torch.full(vae.encoder.conv_in.bias.shape, 1e5).to(dtypes[-1])  # beyond fp16
        conv_in = replace(vae.encoder.conv_in, bias=bias)
        return own(replace(vae, encoder=replace(vae.encoder, conv_in=conv_in)), *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "encode_chunks", overflows)
    monkeypatch.setattr(generation, "tiles_here", lambda *_: 1)
    plan = narrow.plan(Request("a red ball", **SMALL))
    model: LoadedModel = narrow.loaded
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="wanfast"):
        latents = generation._encode_in_less_memory(model, plan, [torch.zeros(1, 3, 1, plan.height, plan.width)])
    assert latents.isfinite().all()
    assert dtypes == [torch.float16, torch.float32]
    assert "latents of the picture: not finite in 16 bits" in caplog.text
