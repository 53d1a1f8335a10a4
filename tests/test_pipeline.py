"""Whole runs: against diffusers' pipelines over the same weights, and the promises the Python interface makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.families import NEGATIVE, PROMPT, Family, make_family, noise

import wanfast

SIZE = 64
FRAMES = 9


MODES = [("t2v", False), ("i2v", True), ("ti2v", False), ("ti2v", True)]  # family, whether a picture is given


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> wanfast.Pipeline:
    folder = tmp_path_factory.mktemp("t2v")
    return wanfast.load(make_family("t2v", folder).write_official(folder / "model"), device="cpu")


def picture(size: int = SIZE) -> Image.Image:
    ramp = torch.linspace(0, 255, size).expand(size, size)
    pixels = torch.stack([ramp, ramp.T, 255 - ramp])
    return Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())


def options(pipeline: wanfast.Pipeline, **changes: object) -> dict[str, object]:
    stride = pipeline.loaded.config.vae.spatial_stride
    shape = (pipeline.loaded.config.vae.z_dim, 3, SIZE // stride, SIZE // stride)
    usual = {"negative_prompt": NEGATIVE, "width": SIZE, "height": SIZE, "num_frames": FRAMES, "num_inference_steps": 5}
    return usual | {"latents": noise(shape)} | changes


def diffusers_frames(family: Family, image: Image.Image | None, latents: torch.Tensor) -> np.ndarray:
    """Run diffusers' own pipeline; frames in [0, 255], not rounded."""
    guidance = [expert.guidance for expert in family.row.experts]
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": 5,
        "guidance_scale": guidance[0],
        "latents": latents[None],
        "output_type": "np",
    }
    if len(guidance) > 1:
        arguments["guidance_scale_2"] = guidance[1]
    if image is not None:
        arguments["image"] = image
    return family.pipeline(image_to_video=image is not None)(**arguments).frames[0] * 255.0


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(("family", "has_image"), MODES, indirect=["family"])
def test_a_whole_run_equals_diffusers(family: Family, layout: str, has_image: bool, tmp_path: Path) -> None:
    folder = family.write_official(tmp_path) if layout == "official" else family.write_diffusers(tmp_path)
    pipeline = wanfast.load(folder, precision="fp32", device="cpu")
    image = picture() if has_image else None
    arguments = options(pipeline)
    seen: list[str] = []
    video = pipeline.generate(PROMPT, image=image, on_step=lambda step, latents: seen.append(step.expert), **arguments)
    assert set(seen) == {expert.name for expert in family.row.experts}, "every expert must have had a part in it"
    want = diffusers_frames(family, image, arguments["latents"])
    assert video.frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert np.abs(want - np.trunc(want)).mean() > 0.1, "a frame of flat colour would prove nothing"
    assert want.std() > 5
    assert np.abs(video.frames.numpy() - np.trunc(want)).max() <= 1


def test_the_same_seed_gives_the_same_bytes(t2v: wanfast.Pipeline) -> None:
    arguments = options(t2v, latents=None)
    first, second = (t2v.generate(PROMPT, seed=3, **arguments).frames for _ in range(2))
    other = t2v.generate(PROMPT, seed=4, **arguments).frames
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_latents_come_back_before_decoding(t2v: wanfast.Pipeline) -> None:
    arguments = options(t2v)
    seen = []
    latents = t2v.generate(PROMPT, output="latents", on_step=lambda step, x: seen.append((step.index, x)), **arguments)
    assert isinstance(latents, torch.Tensor)
    assert latents.dtype == torch.float32
    assert latents.shape == arguments["latents"].shape
    assert [index for index, _ in seen] == list(range(5))
    assert torch.equal(seen[-1][1], latents)


def test_a_callback_cannot_disturb_the_run(t2v: wanfast.Pipeline) -> None:
    arguments = options(t2v, output="latents")
    undisturbed = t2v.generate(PROMPT, **arguments)
    disturbed = t2v.generate(PROMPT, on_step=lambda step, x: x.zero_(), **arguments)
    assert torch.equal(undisturbed, disturbed)


def test_context_stands_in_for_prompts(t2v: wanfast.Pipeline) -> None:
    from wanfast.prompts import encode_prompts
    from wanfast.request import Request

    plan = t2v.plan(Request(PROMPT, negative_prompt=NEGATIVE))
    (contexts,) = encode_prompts(t2v.loaded, [plan], lambda *_: None)
    length = max(context.shape[1] for context in contexts)
    padded = torch.cat([torch.nn.functional.pad(c, (0, 0, 0, length - c.shape[1])) for c in contexts])
    arguments = options(t2v, output="latents", negative_prompt=None)
    by_context = t2v.generate(context=padded, **arguments)
    by_prompt = t2v.generate(PROMPT, **(arguments | {"negative_prompt": NEGATIVE}))
    torch.testing.assert_close(by_context, by_prompt, rtol=0, atol=0)


def test_guidance_one_needs_no_second_pass(t2v: wanfast.Pipeline) -> None:
    arguments = options(t2v, output="latents", guidance=1.0)
    one = t2v.generate(PROMPT, **arguments)
    other_negative = t2v.generate(PROMPT, **(arguments | {"negative_prompt": "a ball"}))
    assert torch.equal(one, other_negative)
    nearly = t2v.generate(PROMPT, **(arguments | {"guidance": 1.0 + 1e-6}))
    assert (one - nearly).abs().max() < 1e-3 * one.abs().max()


def test_bf16_stays_near_fp32(t2v: wanfast.Pipeline) -> None:
    exact = wanfast.load(t2v.loaded.model.path, precision="exact", device="cpu")
    got = exact.generate(PROMPT, **options(t2v, output="latents"))
    want = t2v.generate(PROMPT, **options(t2v, output="latents"))
    error = ((got - want).square().mean() / want.square().mean()).sqrt()
    assert 0 < error < 0.05, f"relative RMS error {error:.4f}"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latents": torch.zeros(16, 3, 8, 4)}, "latents: "),
        ({"latents": torch.zeros(16, 3, 8, 8, dtype=torch.int64)}, "latents: "),
        ({"latents": torch.full((16, 3, 8, 8), float("nan"))}, "latents: "),
        ({"latents": [1.0, 2.0]}, "latents: "),
        ({"context": [torch.zeros(4, 24), torch.zeros(4, 24)]}, "context: "),
        ({"context": torch.zeros(1, 4, 24)}, "context: "),
        ({"context": torch.zeros(2, 4, 23)}, "context: "),
        ({"output": "gif"}, "output: "),
        ({"num_frames": 10}, "num_frames: .*9 or 13"),
        ({"width": 60}, "width: .*48 or 64"),
        ({"image": Image.new("RGB", (64, 64))}, "image: "),
    ],
)
def test_a_bad_argument_is_refused_by_name(t2v: wanfast.Pipeline, changes: dict, named: str) -> None:
    with pytest.raises(wanfast.RequestError, match=f"^{named}"):
        t2v.generate(PROMPT, **options(t2v, **changes))


def test_nan_in_a_weight_is_found_and_named(tmp_path: Path) -> None:
    family = make_family("t2v", tmp_path)
    family.transformers[0].blocks[1].ffn.net[2].weight.data[3, 4] = float("nan")
    pipeline = wanfast.load(family.write_official(tmp_path / "model"), device="cpu")
    with pytest.raises(wanfast.CheckpointError, match=r"high_noise_model.*blocks\.1\.ffn\.2\.weight"):
        pipeline.generate(PROMPT, **options(pipeline))


@pytest.mark.parametrize(("key", "value"), [("precision", "fp4"), ("device", "abacus"), ("vram", "lots"), ("model", 5)])
def test_load_refuses_by_name(key: str, value: object) -> None:
    with pytest.raises(wanfast.RequestError, match=f"^{key}: "):
        wanfast.load(**{key: value})


def test_few_resident_blocks_change_nothing(t2v: wanfast.Pipeline) -> None:
    streamed = wanfast.load(t2v.loaded.model.path, precision="fp32", device="cpu", vram=2 * t2v.loaded.block_bytes)
    assert torch.equal(
        streamed.generate(PROMPT, **options(t2v, output="latents")),
        t2v.generate(PROMPT, **options(t2v, output="latents")),
    )


def test_the_callers_autocast_does_not_reach_the_numbers(t2v: wanfast.Pipeline) -> None:
    want = t2v.generate(PROMPT, **options(t2v)).frames
    with torch.autocast("cpu", torch.bfloat16):
        got = t2v.generate(PROMPT, **options(t2v)).frames
    assert torch.equal(got, want)


def test_another_default_dtype_is_refused(t2v: wanfast.Pipeline) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(wanfast.RequestError, match="default dtype"):
            t2v.generate(PROMPT, **options(t2v))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("output", ["latents", "video"])
def test_latents_that_overflow_stop_the_step_and_name_it(output: str, tmp_path: Path) -> None:
    family = make_family("t2v", tmp_path)
    family.transformers[0].blocks[1].ffn.net[0].proj.weight.data[0, 0] = 3e38  # finite, so loading cannot see it
    pipeline = wanfast.load(family.write_official(tmp_path / "model"), device="cpu")
    with pytest.raises(wanfast.NumericsError, match=r"step 1 of 5 \(high_noise\)"):
        pipeline.generate(PROMPT, **options(pipeline, output=output))
