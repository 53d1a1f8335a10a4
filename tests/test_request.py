"""What may be asked: every rule by name, with a value that works beside it; and the reference's own table of sizes."""

from dataclasses import replace

import numpy as np
import pytest

from wanfast.config import DEFAULT_NEGATIVE_PROMPT, I2V_A14B, T2V_A14B, TI2V_5B
from wanfast.errors import RequestError
from wanfast.request import (
    MAX_SEED,
    Request,
    i2v_size,
    parse_size,
    parse_solver,
    resolve_fps,
    resolve_guidance,
    resolve_mode,
    resolve_num_frames,
    resolve_num_inference_steps,
    resolve_prompts,
    resolve_seed,
    resolve_shift,
    resolve_size,
    resolve_solver,
    ti2v_size,
    video_size,
)

A_720P, A_480P, A_5B = 1280 * 720, 832 * 480, 704 * 1280


def refusal(call, *args) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("image", "at_720p", "at_480p"),
    [
        ((1280, 720), (1280, 720), (832, 464)),
        ((1920, 1080), (1280, 720), (832, 464)),
        ((832, 480), (1248, 720), (832, 464)),
        ((1024, 1024), (960, 960), (624, 624)),
        ((1080, 1920), (720, 1280), (464, 832)),
        ((4000, 3000), (1104, 816), (720, 544)),
        ((1000, 333), (1648, 544), (1088, 352)),
    ],
)
def test_i2v_sizes_are_the_reference_s(image, at_720p, at_480p):
    assert i2v_size(*image, A_720P, I2V_A14B) == at_720p
    assert i2v_size(*image, A_480P, I2V_A14B) == at_480p
    portrait_480p = Request("a", image_size=image, width=480, height=832)
    assert video_size(portrait_480p, I2V_A14B) == at_480p  # only the area counts


@pytest.mark.parametrize(
    ("image", "want"),
    [
        ((1280, 720), (1248, 704)),
        ((1920, 1080), (1248, 704)),
        ((832, 480), (1248, 704)),
        ((1280, 704), (1280, 704)),
        ((1024, 1024), (960, 928)),
        ((1080, 1920), (704, 1248)),
        ((4000, 3000), (1088, 800)),
        ((1000, 333), (1632, 544)),
    ],
)
def test_ti2v_sizes_are_the_reference_s(image, want):
    assert ti2v_size(*image, A_5B, TI2V_5B) == want
    assert video_size(Request("a", image_size=image), TI2V_5B) == want


@pytest.mark.parametrize("config", [I2V_A14B, TI2V_5B])
@pytest.mark.parametrize("image", [(100_000, 10), (10, 100_000), (4000, 1), (1, 100_000)])
def test_an_image_no_size_fits_is_refused(config, image):
    message = refusal(video_size, Request("a", image_size=image), config)
    assert message.startswith("image: must ")
    assert f"got {image[0]}x{image[1]}; crop" in message


@pytest.mark.parametrize("config", [I2V_A14B, TI2V_5B])
def test_the_refused_image_works_once_cropped_as_the_message_says(config):
    assert video_size(Request("a", image_size=(config.width, config.height)), config) == (config.width, config.height)


@pytest.mark.parametrize("text", ["832x480", "832*480", "832X480", " 832 x 480 ", "832×480"])
def test_a_size_is_read_in_every_usual_spelling(text):
    assert parse_size(text, T2V_A14B) == (832, 480)


@pytest.mark.parametrize(
    ("text", "config", "want"),
    [
        ("480p", T2V_A14B, (832, 480)),
        ("720P", I2V_A14B, (1280, 720)),
        ("720p", TI2V_5B, (1280, 704)),
        ("480p", TI2V_5B, (832, 480)),
    ],
)
def test_a_named_size_is_the_model_s_own_of_that_name(text, config, want):
    assert parse_size(text, config) == want
    assert resolve_size(Request("a", width=want[0], height=want[1]), config) == want


@pytest.mark.parametrize(
    "text", ["", "832", "832x", "x480", "832x480x3", "-832x480", "8.5x4", "1080p", "9" * 5000 + "x1"]
)
def test_a_size_that_is_none_is_refused(text):
    assert refusal(parse_size, text, T2V_A14B).startswith("size: must be WIDTHxHEIGHT, 480p or 720p, got ")


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B, TI2V_5B])
def test_all_sizes_the_reference_offers_are_accepted(config):
    for width, height in config.sizes:
        assert resolve_size(Request("a", width=width, height=height), config) == (width, height)


@pytest.mark.parametrize(
    ("config", "width", "height", "want"),
    [
        (
            T2V_A14B,
            830,
            480,
            "width: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got 830; nearest: 816 or 832",
        ),
        (
            T2V_A14B,
            832,
            481,
            "height: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got 481; nearest: 480 or 496",
        ),
        (
            TI2V_5B,
            1280,
            720,
            "height: must be a multiple of 32 from 32 to 32768 for ti2v-5B, got 720; nearest: 704 or 736",
        ),
        (T2V_A14B, 0, 480, "width: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got 0; nearest: 16"),
        (T2V_A14B, -16, 480, "width: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got -16; nearest: 16"),
        (T2V_A14B, 7, 480, "width: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got 7; nearest: 16"),
        (
            T2V_A14B,
            16400,
            480,
            "width: must be a multiple of 16 from 16 to 16384 for t2v-A14B, got 16400; nearest: 16384",
        ),
    ],
)
def test_a_side_that_does_not_divide_is_refused_with_the_nearest(config, width, height, want):
    assert refusal(resolve_size, Request("a", width=width, height=height), config) == want


@pytest.mark.parametrize(("width", "height", "missing"), [(832, None, "height"), (None, 480, "width")])
def test_one_side_alone_is_refused(width, height, missing):
    assert refusal(resolve_size, Request("a", width=width, height=height), T2V_A14B).startswith(
        f"{missing}: must be given"
    )


@pytest.mark.parametrize("count", [1, 5, 81, 121, 4093])
def test_frame_counts_of_whole_latent_frames_are_accepted(count):
    assert resolve_num_frames(Request("a", num_frames=count), T2V_A14B) == count


@pytest.mark.parametrize(
    ("count", "nearest"),
    [(80, "77 or 81"), (82, "81 or 85"), (2, "1 or 5"), (0, "1"), (-3, "1"), (-100, "1"), (4097, "4093")],
)
def test_other_frame_counts_are_refused_with_the_nearest(count, nearest):
    message = refusal(resolve_num_frames, Request("a", num_frames=count), T2V_A14B)
    assert message == f"num_frames: must be 4n + 1, from 1 to 4093, got {count}; nearest: {nearest}"


INTEGERS = {
    "num_frames": (resolve_num_frames, 81),
    "num_inference_steps": (resolve_num_inference_steps, 20),
    "fps": (resolve_fps, 24),
    "seed": (lambda request, config: resolve_seed(request), 7),
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 81.0, "81", float("nan"), np.float32(81), np.True_, [81], 81 + 0j])
def test_what_is_no_integer_is_refused_by_name(name, value):
    assert refusal(INTEGERS[name][0], Request("a", **{name: value}), T2V_A14B).startswith(
        f"{name}: must be an integer, got "
    )


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint16])
def test_numpy_integers_are_integers(name, kind):
    resolve, value = INTEGERS[name]
    got = resolve(Request("a", **{name: kind(value)}), T2V_A14B)
    assert got == value
    assert type(got) is int


@pytest.mark.parametrize("value", [True, 832.0, "832"])
def test_a_side_that_is_no_integer_is_refused_by_name(value):
    message = refusal(resolve_size, Request("a", width=value, height=480), T2V_A14B)
    assert message.startswith("width: must be an integer, got ")


@pytest.mark.parametrize(("steps", "nearest"), [(0, 1), (-1, 1), (1001, 1000)])
def test_a_number_of_steps_out_of_range_is_refused(steps, nearest):
    message = refusal(resolve_num_inference_steps, Request("a", num_inference_steps=steps), T2V_A14B)
    assert message == f"num_inference_steps: must be from 1 to 1000, got {steps}; nearest: {nearest}"


@pytest.mark.parametrize("shift", [0, -1.0, 0.001, 101, 1e30])
def test_a_shift_out_of_range_is_refused(shift):
    message = refusal(resolve_shift, Request("a", shift=shift), T2V_A14B)
    assert message == f"shift: must be from 0.01 to 100, got {shift!r}; t2v-A14B has 12"


@pytest.mark.parametrize("name", ["shift", "guidance", "guidance_high", "guidance_low"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (True, "a number"),
        ("3", "a number"),
        (np.bool_(1), "a number"),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(name, value, rule):
    resolve = resolve_shift if name == "shift" else resolve_guidance
    assert refusal(resolve, Request("a", **{name: value}), T2V_A14B).startswith(f"{name}: must be {rule}, got ")


def test_numpy_and_whole_numbers_are_numbers():
    assert resolve_shift(Request("a", shift=np.float32(3.5)), T2V_A14B) == 3.5
    assert resolve_shift(Request("a", shift=3), T2V_A14B) == 3.0
    assert resolve_guidance(Request("a", guidance=np.int64(2)), TI2V_5B) == {"single": 2.0}


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ({}, {"high_noise": 4.0, "low_noise": 3.0}),
        ({"guidance": 2.0}, {"high_noise": 2.0, "low_noise": 2.0}),
        ({"guidance_high": 6.0}, {"high_noise": 6.0, "low_noise": 3.0}),
        ({"guidance_low": 6.0}, {"high_noise": 4.0, "low_noise": 6.0}),
        ({"guidance_high": 1.0, "guidance_low": 0.0}, {"high_noise": 1.0, "low_noise": 0.0}),
        ({"guidance": 0.0}, {"high_noise": 0.0, "low_noise": 0.0}),
    ],
)
def test_guidance_goes_to_the_expert_it_names(asked, want):
    assert resolve_guidance(Request("a", **asked), T2V_A14B) == want


@pytest.mark.parametrize("name", ["guidance_high", "guidance_low"])
def test_guidance_for_both_beside_guidance_for_one_is_refused(name):
    message = refusal(resolve_guidance, Request("a", guidance=3.0, **{name: 2.0}), T2V_A14B)
    assert message.startswith(f"guidance: must not be given beside {name}, got 3.0 and 2.0; give ")


@pytest.mark.parametrize("name", ["guidance_high", "guidance_low"])
def test_guidance_of_an_expert_the_model_lacks_is_refused(name):
    message = refusal(resolve_guidance, Request("a", **{name: 2.0}), TI2V_5B)
    assert message == f"{name}: must not be given for ti2v-5B, which has one expert, got 2.0; use guidance"


@pytest.mark.parametrize(
    ("config", "image", "want"),
    [(T2V_A14B, None, "t2v"), (TI2V_5B, None, "t2v"), (TI2V_5B, (640, 480), "i2v"), (I2V_A14B, (640, 480), "i2v")],
)
def test_the_mode_follows_from_model_and_image(config, image, want):
    assert resolve_mode(Request("a", image_size=image), config) == want


def test_an_image_the_model_cannot_use_and_one_it_lacks_are_refused():
    assert refusal(resolve_mode, Request("a"), I2V_A14B).startswith("image: must be given for i2v-A14B, got None; ")
    message = refusal(resolve_mode, Request("a", image_size=(64, 32)), T2V_A14B)
    assert message == "image: must not be given for t2v-A14B, got one of 64x32; use an i2v or ti2v model"


@pytest.mark.parametrize("name", ["unipc", "dpmpp", "euler"])
def test_known_solvers_are_accepted(name):
    assert resolve_solver(Request("a", solver=name), T2V_A14B) == name == parse_solver(name)


def test_dpmpp_may_be_spelled_as_the_reference_does_on_a_command_line():
    assert parse_solver("dpm++") == "dpmpp"


@pytest.mark.parametrize("value", ["ddim", "UNIPC", "", 3, True, ["unipc"]])
def test_another_solver_is_refused(value):
    message = refusal(resolve_solver, Request("a", solver=value), T2V_A14B)
    assert message == f"solver: must be one of unipc, dpmpp, euler, got {value!r}; Wan's own is unipc"


@pytest.mark.parametrize(
    "value", ["", " ", "\n\t", "&nbsp;", "&amp;nbsp;", "\u200b\u2060\ufeff", "\u3000&#x200b;\u2028"]
)
def test_an_empty_prompt_is_refused_where_no_image_speaks_for_it(value):
    assert refusal(resolve_prompts, Request(value)).startswith("prompt: must not be empty without an image, got ")
    assert resolve_prompts(Request(value, image_size=(64, 64)))[0] == value


@pytest.mark.parametrize("value", ["&", "&lt;", ".", "é", "红", "\u200ba"])
def test_a_prompt_that_shows_anything_is_taken_as_it_is(value):
    assert resolve_prompts(Request(value))[0] == value


def test_no_prompt_at_all_is_the_caller_s_business():
    assert resolve_prompts(Request(None)) == ("", DEFAULT_NEGATIVE_PROMPT)


@pytest.mark.parametrize("value", [3, ["a cat"], b"a cat"])
def test_prompts_that_are_no_text_are_refused(value):
    assert refusal(resolve_prompts, Request(value)).startswith("prompt: must be text, got ")
    assert refusal(resolve_prompts, Request("a", negative_prompt=value)).startswith(
        "negative_prompt: must be text, got "
    )


@pytest.mark.parametrize(
    ("given", "want"), [(None, DEFAULT_NEGATIVE_PROMPT), ("", DEFAULT_NEGATIVE_PROMPT), ("blur", "blur")]
)
def test_an_empty_negative_prompt_means_the_model_s_own(given, want):
    assert resolve_prompts(Request("a", negative_prompt=given)) == ("a", want)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_a_seed_is_kept(seed):
    assert resolve_seed(Request("a", seed=seed)) == seed


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_is_a_new_one_each_time(seed):
    seeds = {resolve_seed(Request("a", seed=seed)) for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= s <= MAX_SEED for s in seeds)


@pytest.mark.parametrize(("seed", "nearest"), [(-2, -1), (MAX_SEED + 1, MAX_SEED)])
def test_a_seed_out_of_range_is_refused(seed, nearest):
    message = refusal(resolve_seed, Request("a", seed=seed))
    assert message == f"seed: must be from -1 to {MAX_SEED}, got {seed}; nearest: {nearest}"


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B, TI2V_5B])
def test_what_is_left_out_is_the_model_s_own(config):
    request = Request("a")
    assert resolve_size(request, config) == (config.width, config.height)
    assert resolve_num_frames(request, config) == config.num_frames
    assert resolve_num_inference_steps(request, config) == config.num_inference_steps
    assert resolve_shift(request, config) == config.shift
    assert resolve_solver(request, config) == config.solver
    assert resolve_fps(request, config) == config.fps
    assert resolve_guidance(request, config) == {expert.name: expert.guidance for expert in config.experts}


def test_units_come_from_the_model_and_not_from_a_constant():
    wide = replace(T2V_A14B, dit=replace(T2V_A14B.dit, patch_size=(1, 2, 4)))
    assert resolve_size(Request("a", width=64, height=48), wide) == (64, 48)
    assert refusal(resolve_size, Request("a", width=48, height=64), wide).startswith("width: must be a multiple of 32 ")
    assert i2v_size(832, 480, A_480P, replace(wide, task="i2v")) == (832, 464)
    assert i2v_size(1024, 1024, A_480P, replace(wide, task="i2v")) == (608, 624)
