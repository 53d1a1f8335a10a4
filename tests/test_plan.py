"""The plan: official step counts, shapes and sizes by table, and properties that hold for every valid request."""

import json
from dataclasses import FrozenInstanceError, replace
from itertools import groupby, pairwise

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from wanfast.config import I2V_A14B, MODELS, NUM_TRAIN_TIMESTEPS, T2V_A14B, TI2V_5B, UMT5_XXL, DiTConfig, ModelConfig
from wanfast.errors import RequestError
from wanfast.plan import (
    Plan,
    dit_parameters,
    forward_flops,
    make_plan,
    plan_to_dict,
    request_of,
    text_parameters,
    ti2v_resize,
    weight_parts,
)
from wanfast.plan_text import format_plan
from wanfast.request import Request

VAE_PARAMETERS = 126_892_531  # of VAE 2.1


def plan_for(config: ModelConfig, **asked) -> Plan:
    return make_plan(config, Request(asked.pop("prompt", "a cat"), **asked), precision="exact")


@pytest.mark.parametrize(
    ("config", "asked", "want"),
    [
        (T2V_A14B, {}, {"high_noise": 26, "low_noise": 14}),
        (T2V_A14B, {"solver": "dpmpp"}, {"high_noise": 26, "low_noise": 14}),
        (I2V_A14B, {"image_size": (640, 480)}, {"high_noise": 15, "low_noise": 25}),
        (I2V_A14B, {"image_size": (640, 480), "shift": 3.0}, {"high_noise": 10, "low_noise": 30}),
        (I2V_A14B, {"image_size": (640, 480), "shift": 3.0, "solver": "dpmpp"}, {"high_noise": 11, "low_noise": 29}),
        (T2V_A14B, {"solver": "euler", "num_inference_steps": 4, "shift": 5.0}, {"high_noise": 2, "low_noise": 2}),
        (
            I2V_A14B,
            {"image_size": (640, 480), "solver": "euler", "num_inference_steps": 4},
            {"high_noise": 2, "low_noise": 2},
        ),
        (T2V_A14B, {"num_inference_steps": 1}, {"high_noise": 1}),
        (TI2V_5B, {}, {"single": 50}),
    ],
)
def test_each_expert_takes_the_steps_it_takes_in_the_reference(config, asked, want):
    assert plan_for(config, **asked).steps_per_expert == want


def test_the_high_noise_expert_runs_at_the_boundary_itself():
    at_boundary = replace(T2V_A14B, boundary=0.937)
    steps = plan_for(at_boundary, solver="dpmpp", num_inference_steps=4, shift=5.0).steps
    assert [(step.timestep, step.expert) for step in steps[:3]] == [
        (1000, "high_noise"),
        (937, "high_noise"),
        (833, "low_noise"),
    ]


def test_each_step_carries_its_expert_s_guidance():
    steps = plan_for(T2V_A14B, guidance_high=1.0, guidance_low=7.0).steps
    assert {(step.expert, step.guidance) for step in steps} == {("high_noise", 1.0), ("low_noise", 7.0)}
    assert plan_for(T2V_A14B, guidance_high=1.0, guidance_low=7.0).num_forwards == 26 + 2 * 14


@pytest.mark.parametrize(
    ("config", "asked", "latent_shape", "num_tokens"),
    [
        (T2V_A14B, {}, (16, 21, 90, 160), 75_600),
        (T2V_A14B, {"width": 832, "height": 480}, (16, 21, 60, 104), 32_760),
        (T2V_A14B, {"width": 480, "height": 832, "num_frames": 1}, (16, 1, 104, 60), 1560),
        (I2V_A14B, {"width": 832, "height": 480, "image_size": (832, 480)}, (16, 21, 58, 104), 31_668),
        (TI2V_5B, {}, (48, 31, 44, 80), 27_280),
        (TI2V_5B, {"image_size": (1920, 1080)}, (48, 31, 44, 78), 26_598),
    ],
)
def test_shapes_are_the_reference_s(config, asked, latent_shape, num_tokens):
    plan = plan_for(config, **asked)
    assert plan.latent_shape == latent_shape
    assert plan.num_tokens == num_tokens


@pytest.mark.parametrize(
    ("image", "target", "scaled", "box"),
    [
        ((1280, 704), (1280, 704), (1280, 704), (0, 0, 1280, 704)),
        ((1920, 1080), (1248, 704), (1252, 704), (2, 0, 1250, 704)),
        ((832, 480), (1248, 704), (1248, 720), (0, 8, 1248, 712)),
        ((1080, 1920), (704, 1248), (704, 1252), (0, 2, 704, 1250)),
        ((1024, 1024), (960, 928), (960, 960), (0, 16, 960, 944)),
        ((90, 66), (64, 32), (64, 47), (0, 7, 64, 39)),
        ((66, 90), (32, 64), (47, 64), (7, 0, 39, 64)),
    ],
)
def test_the_picture_of_ti2v_covers_the_video_and_is_cut_in_the_middle(image, target, scaled, box):
    assert ti2v_resize(*image, *target) == (scaled, box)


@pytest.mark.parametrize(
    ("config", "want"), [(T2V_A14B, 14_288_491_584), (I2V_A14B, 14_288_901_184), (TI2V_5B, 4_999_787_712)]
)
def test_the_dit_s_parameters_are_counted_exactly(config, want):
    assert dit_parameters(config.dit) == want


def test_the_text_encoder_s_parameters_are_counted_exactly():
    assert text_parameters(UMT5_XXL) == 5_680_910_336


def test_bytes_of_each_part_by_precision():
    fp32 = {p.name: p.bytes for p in weight_parts(T2V_A14B, "fp32", vae_parameters=VAE_PARAMETERS)}
    assert fp32 == {
        "text encoder": 4 * 5_680_910_336,
        "high_noise": 4 * 14_288_491_584,
        "low_noise": 4 * 14_288_491_584,
        "VAE": 4 * VAE_PARAMETERS,
    }
    exact = {p.name: p.bytes for p in weight_parts(T2V_A14B, "exact", vae_parameters=VAE_PARAMETERS)}
    # In fp32: 12 vectors of 5120 per block, the timestep's three layers, and the head with its modulation.
    kept = 40 * 12 * 5120 + (256 + 1) * 5120 + 7 * (5120 + 1) * 5120 + 2 * 5120 + 64 * (5120 + 1)
    assert exact["high_noise"] == 2 * 14_288_491_584 + 2 * kept
    assert (exact["text encoder"], exact["VAE"]) == (2 * 5_680_910_336, fp32["VAE"])
    assert [p.name for p in weight_parts(TI2V_5B, "exact")] == ["text encoder", "single"]


@pytest.mark.parametrize(
    ("config", "num_tokens", "want"), [(T2V_A14B, 32_760, 1678), (T2V_A14B, 75_600, 6523), (TI2V_5B, 27_280, 517)]
)
def test_work_per_evaluation_is_what_the_dimensions_give(config, num_tokens, want):
    assert forward_flops(config.dit, num_tokens) / 1e12 == pytest.approx(want, abs=0.5)


def test_work_of_a_small_model_is_the_count_of_its_multiply_adds():
    dit = DiTConfig(
        in_channels=3,
        out_channels=2,
        dim=4,
        ffn_dim=6,
        num_heads=2,
        num_layers=1,
        text_dim=5,
        text_len=7,
        freq_dim=8,
        patch_size=(1, 2, 2),
        eps=1e-6,
    )
    tokens, text = 10, 7
    products = [  # (rows, inner, columns)
        *[(tokens, 4, 4)] * 6,
        *[(text, 4, 4)] * 2,
        (tokens, 4, 6),
        (tokens, 6, 4),
        *[(tokens, 4, tokens)] * 2,
        *[(tokens, 4, text)] * 2,
        (tokens, 12, 4),
        (tokens, 4, 8),
        (text, 5, 4),
        (text, 4, 4),
        (1, 8, 4),
        (1, 4, 4),
        (1, 4, 24),
    ]
    assert forward_flops(dit, tokens) == sum(2 * rows * inner * columns for rows, inner, columns in products)


@pytest.mark.parametrize("name", ["", "bf16", "auto", None])
def test_an_unknown_precision_is_refused(name):
    with pytest.raises(RequestError, match=r"^precision: must be one of fp32, exact, fp8, int8, got "):
        make_plan(T2V_A14B, Request("a cat"), precision=name)


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan_for(T2V_A14B).seed = 1


def test_a_printed_plan_says_what_will_run():
    text = format_plan(make_plan(T2V_A14B, Request("a cat", seed=5), precision="exact", vae_parameters=VAE_PARAMETERS))
    for line in (
        "t2v-A14B, text to video",
        "cpu, precision exact",
        "a cat",
        "1280x720, 81 frames at 16 per second (5.1 s)",
        "21 x 45 x 80 = 75,600",
        "seed             5",
        "unipc, shift 12, 40 steps, 80 DiT evaluations",
        "steps 1-26  high_noise, guidance 4, sigma 1.000 -> 0.866, timesteps 999 -> 877",
        "steps 27-40  low_noise, guidance 3, sigma 0.866 -> 0.000, timesteps 865 -> 235",
        "6,523 TFLOP per DiT evaluation, 521,875 TFLOP in all; computed",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 120
    assert "image" not in text.replace("image to video", "")
    fitted = format_plan(plan_for(I2V_A14B, image_size=(640, 480)))
    assert "640 x 480, fitted to the area of 1280 x 720" in fitted
    assert "VAE" not in fitted


def test_a_plan_as_json_repeats_itself():
    plan = plan_for(I2V_A14B, image_size=(832, 480), width=832, height=480, num_inference_steps=3)
    plain = json.loads(json.dumps(plan_to_dict(plan)))
    assert plain == plan_to_dict(plan)
    assert plain["steps"][0]["timestep"] == 999
    assert plain["steps_per_expert"] == plan.steps_per_expert
    asked = plain["request"] | {"image_size": tuple(plain["request"]["image_size"])}
    assert make_plan(I2V_A14B, Request(**asked), precision="exact") == plan  # the asked area, not the fitted size


FINITE = st.floats(-20, 20, allow_nan=False)


@st.composite
def valid_requests(draw) -> tuple[ModelConfig, Request]:
    config = draw(st.sampled_from(list(MODELS.values())))
    unit = config.vae.spatial_stride * 2
    sides = st.integers(1, 128).map(lambda n: n * unit)
    width, height = draw(st.one_of(st.just((None, None)), st.tuples(sides, sides)))
    images = st.tuples(st.integers(64, 4096), st.integers(64, 4096))
    guidances = ["guidance"] if len(config.experts) == 1 else ["guidance_high", "guidance_low"]
    asked = {name: draw(st.none() | FINITE) for name in guidances}
    return config, Request(
        draw(st.text().map("a cat".__add__)),
        negative_prompt=draw(st.none() | st.text()),
        image_size=draw({"t2v": st.none(), "i2v": images, "ti2v": st.none() | images}[config.task]),
        width=width,
        height=height,
        num_frames=draw(st.none() | st.integers(0, 60).map(lambda n: 4 * n + 1)),
        num_inference_steps=draw(st.none() | st.integers(1, 60)),
        shift=draw(st.none() | st.floats(0.01, 100)),
        solver=draw(st.none() | st.sampled_from(["unipc", "dpmpp", "euler"])),
        seed=draw(st.none() | st.integers(-1, 2**63 - 1)),
        fps=draw(st.none() | st.integers(1, 240)),
        **asked,
    )


@settings(max_examples=150, deadline=None)
@given(valid_requests())
def test_every_valid_request_becomes_a_sound_plan(case):
    config, request = case
    try:
        plan = make_plan(config, request, precision="exact")
    except RequestError as error:
        assert "so long and thin" in str(error)
        reject()

    channels, frames, rows, columns = plan.latent_shape
    assert channels == config.vae.z_dim
    assert (frames - 1) * 4 + 1 == plan.num_frames == (request.num_frames or config.num_frames)
    assert (columns * config.vae.spatial_stride, rows * config.vae.spatial_stride) == (plan.width, plan.height)
    if request.image_size is None:
        assert (plan.width, plan.height) == (request.width or config.width, request.height or config.height)
    else:
        assert plan.width * plan.height <= plan.asked_size[0] * plan.asked_size[1] + 1
    assert plan.token_grid == (frames, rows // 2, columns // 2)

    assert len(plan.steps) == (request.num_inference_steps or config.num_inference_steps)
    assert all(step.index == i and step.num_steps == len(plan.steps) for i, step in enumerate(plan.steps))
    assert all(step.sigma > step.sigma_next for step in plan.steps)
    assert all(left.sigma_next == right.sigma for left, right in pairwise(plan.steps))
    assert plan.steps[-1].sigma_next == 0.0
    runs = [expert for expert, _ in groupby(plan.steps, key=lambda step: step.expert)]
    order = [expert.name for expert in config.experts]
    assert runs == [name for name in order if name in runs]
    for step in plan.steps:
        is_high = config.boundary is not None and step.timestep >= config.boundary * NUM_TRAIN_TIMESTEPS
        assert step.expert == ("single" if config.boundary is None else "high_noise" if is_high else "low_noise")

    assert make_plan(config, request_of(plan), precision="exact") == plan
    assert json.loads(json.dumps(plan_to_dict(plan)))["request"]["seed"] == plan.seed
    assert format_plan(plan)
