"""The judge reads rendered truth without error, guesses when captions are shuffled, and is not fooled by its inputs."""

import numpy as np
import pytest
from data import make_scene, render

from wanfast.judge import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Array,
    accuracies,
    background_change,
    flicker,
    judge,
    see,
    wanted,
)

NUM_CLIPS = 40


@pytest.fixture(scope="module", params=["single", "pair", "camera"])
def clips(request: pytest.FixtureRequest) -> list[tuple[Array, str]]:
    scenes = [make_scene(11, index, kind=request.param, held_out=index % 2 == 0) for index in range(NUM_CLIPS)]
    return [(render(scene), scene.caption) for scene in scenes]


@pytest.fixture(scope="module")
def singles() -> list[tuple[Array, str]]:
    scenes = [make_scene(12, index, kind="single") for index in range(NUM_CLIPS)]
    return [(render(scene), scene.caption) for scene in scenes]


def clip_of(caption: str) -> Array:
    """A rendered clip with the caption's object."""
    want = wanted(caption)[0]
    for index in range(10_000):
        subject = make_scene(13, index, kind="single", held_out=index % 2 == 0).subjects[0]
        if (subject.colour, subject.shape, subject.direction) == (want.colour, want.shape, want.direction):
            return render(make_scene(13, index, kind="single", held_out=index % 2 == 0))
    raise AssertionError(caption)


def test_rendered_truth_is_read_without_error(clips: list[tuple[Array, str]]) -> None:
    rates = accuracies([judge(video, caption) for video, caption in clips])
    assert {rates[name] for name in ("colour", "shape", "direction", "count", "follows")} == {1.0}
    assert rates["speed_error"] < 0.1 / 64


def test_shapes_are_right_in_every_frame(singles: list[tuple[Array, str]]) -> None:
    for video, caption in singles:
        assert set(see(video)[0].shapes) == {wanted(caption)[0].shape}


def test_shuffled_captions_are_met_by_chance(singles: list[tuple[Array, str]]) -> None:
    verdicts = [
        judge(video, caption)
        for shift in (7, 13, 20)
        for (video, _), (_, caption) in zip(singles, singles[shift:] + singles[:shift], strict=True)
    ]
    rates = accuracies(verdicts)
    for name, chance in (("colour", 1 / len(COLOURS)), ("shape", 1 / len(SHAPES)), ("direction", 1 / len(DIRECTIONS))):
        assert abs(rates[name] - chance) < 0.15, name  # four standard deviations of 120 guesses
    assert rates["follows"] < 0.08


@pytest.mark.parametrize("fault", ["noise", "blur", "dim"])
def test_small_faults_of_a_picture_do_not_matter(fault: str, singles: list[tuple[Array, str]]) -> None:
    def spoil(video: Array) -> Array:
        if fault == "noise":
            return video + np.random.default_rng(0).normal(0, 0.04, video.shape).astype(np.float32)
        if fault == "dim":
            return video * np.float32(0.92)
        return (video + np.roll(video, 1, 1) + np.roll(video, 1, 2) + np.roll(video, (1, 1), (1, 2))) / 4

    rates = accuracies([judge(spoil(video), caption) for video, caption in singles[:20]])
    assert rates["follows"] >= 0.95


def test_a_clip_played_backwards_moves_the_other_way() -> None:
    video = clip_of("a red circle moves left")
    assert judge(video, "a red circle moves left").follows
    backwards = judge(video[::-1], "a red circle moves left")
    assert (backwards.colour, backwards.shape, backwards.direction) == (True, True, False)
    assert judge(video[::-1], "a red circle moves right").follows
    assert judge(video.transpose(0, 2, 1, 3), "a red circle moves up").follows


def test_what_looks_like_no_shape_is_none() -> None:
    """A flat bar in motion: colour and direction are right, and it is no circle either."""
    video = np.broadcast_to(np.array(BACKGROUNDS["black"], dtype=np.float32), (17, 64, 64, 3)).copy()
    for frame in range(17):
        video[frame, 30:34, 40 - frame : 62 - frame] = COLOURS["red"]
    assert see(video)[0].shape == ""
    for shape in SHAPES:
        verdict = judge(video, f"a red {shape} moves left")
        assert (verdict.colour, verdict.shape, verdict.direction) == (True, False, True), shape


def test_shape_and_colour_are_judged_apart() -> None:
    video = clip_of("a green square stands still")
    assert judge(video, "a green triangle stands still").colour
    assert not judge(video, "a green triangle stands still").shape
    wrong_colour = judge(video, "a purple square rests")
    assert (wrong_colour.colour, wrong_colour.shape, wrong_colour.direction) == (False, True, True)


def test_of_two_objects_the_upper_is_named_first() -> None:
    scene = make_scene(14, 3, kind="pair")
    upper, lower = scene.caption.split(" above ")
    assert judge(render(scene), scene.caption).follows
    turned = judge(render(scene)[:, ::-1], scene.caption)
    assert not turned.colour
    assert wanted(f"{upper} above {lower}")[0].colour == scene.subjects[0].colour


def test_objects_too_many_and_too_few_are_counted() -> None:
    pair, single = make_scene(14, 3, kind="pair"), make_scene(14, 3, kind="single")
    assert not judge(render(pair), single.caption).count
    missing = judge(render(single), pair.caption)
    assert (missing.count, missing.colour, missing.shape, missing.direction) == (False,) * 4


def test_an_empty_clip_shows_nothing() -> None:
    for value in (0.05, 0.45):
        empty = np.full((17, 64, 64, 3), value, dtype=np.float32)
        assert see(empty) == []
        verdict = judge(empty, "a red circle moves left")
        assert not (verdict.colour or verdict.shape or verdict.direction or verdict.count)
        assert np.isnan(verdict.speed_error)


def test_a_shape_of_no_kind_is_none() -> None:
    video = np.full((5, 64, 64, 3), 0.05, dtype=np.float32)
    video[:, 20:24, 5:60] = COLOURS["red"]  # a bar
    assert see(video)[0].shapes == ("",) * 5
    assert not any(judge(video, f"a red {shape} stands still").shape for shape in SHAPES[1:])


def test_the_size_of_the_picture_does_not_matter() -> None:
    scene = make_scene(15, 0, kind="single")
    coarse, fine = see(render(scene))[0], see(render(scene, side=128))[0]
    assert (coarse.colour, coarse.shape, coarse.direction) == (fine.colour, fine.shape, fine.direction)
    assert coarse.velocity == pytest.approx(fine.velocity, abs=0.05 / 64)
    assert coarse.area == pytest.approx(fine.area, rel=0.12)  # edges count half a pixel more or less


def test_growth_and_speed_are_measured() -> None:
    zoomed = next(s for i in range(50) if (s := make_scene(16, i, kind="camera")).camera == "in")
    assert 1.3 < see(render(zoomed))[0].growth < 2.0  # the whole zoom is 1.5 ** 2, thirds see less of it
    fast = clip_of("a blue cross moves down fast")
    columns, rows = see(fast)[0].velocity
    assert abs(columns) < 1e-3
    assert rows * 64 == pytest.approx(next(v for v in (0.75, 1.25, 2.0) if abs(rows * 64 - v) < 0.2), abs=0.02)


def test_flicker_and_background_change_are_what_they_say() -> None:
    video = np.full((4, 64, 64, 3), 0.05, dtype=np.float32)
    assert flicker(video) == background_change(video) == 0.0
    video[1::2] += 0.04
    assert flicker(video) == pytest.approx(0.04, rel=1e-3)
    assert background_change(video) == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("prompt", ["a cat on a mat", "a red circle", "red moves left"])
def test_a_prompt_the_judge_cannot_judge_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt: must"):
        wanted(prompt)
