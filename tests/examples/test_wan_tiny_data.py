"""The clips wan-tiny is trained on: the same every time, true to their captions, and without the held-out ones."""

from itertools import product

import numpy as np
import pytest
from data import NUM_FRAMES, SIDE, Scene, describe, is_held_out, make_scene, render

from wanfast.judge import BACKGROUNDS, COLOURS, DIRECTIONS, DOTS, SHAPES, SPEEDS, wanted

KINDS = ("single", "pair", "camera")


def test_a_clip_is_known_by_its_number_alone() -> None:
    alone = make_scene(5, 40)
    assert [make_scene(5, index) for index in (40, 3, 40)][::2] == [alone, alone]
    assert np.array_equal(render(alone), render(alone))
    assert len({make_scene(seed, index) for seed in (5, 6) for index in range(50)}) == 100


def test_single_frames_are_those_of_the_clip() -> None:
    scene = make_scene(5, 2, kind="camera")
    assert np.array_equal(render(scene, frames=[7, 3]), render(scene)[[7, 3]])
    assert render(scene).shape == (NUM_FRAMES, SIDE, SIDE, 3)


def test_one_motion_of_every_colour_and_shape_is_held_out() -> None:
    held_out = [combination for combination in product(COLOURS, SHAPES, DIRECTIONS) if is_held_out(*combination)]
    assert len(held_out) == 24
    assert len({(colour, shape) for colour, shape, _ in held_out}) == 24
    assert {direction for *_, direction in held_out} == set(DIRECTIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_training_never_sees_what_is_held_out(kind: str, held_out: bool) -> None:
    scenes = [make_scene(1, index, kind=kind, held_out=held_out) for index in range(100)]
    assert all(is_held_out(s.colour, s.shape, s.direction) is held_out for scene in scenes for s in scene.subjects)
    assert all(len(scene.subjects) == (2 if kind == "pair" else 1) for scene in scenes)
    assert all(bool(scene.camera) is (kind == "camera") for scene in scenes)


def test_every_caption_says_what_its_scene_shows() -> None:
    wordings = set()
    for index in range(400):
        scene = make_scene(2, index)
        caption = describe(np.random.default_rng(index), scene)
        wordings |= {caption, scene.caption}
        for text in (caption, scene.caption):
            for want, subject in zip(wanted(text), scene.subjects, strict=True):
                assert (want.colour, want.shape) == (subject.colour, subject.shape)
                assert want.direction == on_screen(scene, subject.direction)
                assert want.speed == (0.0 if want.direction == "still" else SPEEDS[subject.speed])
    assert len(wordings) > 700  # natural variation: the same scene is described in many ways


def on_screen(scene: Scene, direction: str) -> str:
    return {"left": "right", "right": "left"}.get(scene.camera, direction)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_stay_inside_the_frame(kind: str) -> None:
    for index in range(40):
        scene = make_scene(3, index, kind=kind)
        frames = render(scene, frames=[0, 8, 16])
        border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        ground = np.array(BACKGROUNDS[scene.background])
        # At the end of a zoom a corner's blurred tip may touch the border.
        assert border.min(axis=(0, 1)) == pytest.approx(ground, abs=0.03)
        assert (border <= ground + DOTS + 0.03).all()


def test_a_finer_picture_is_of_the_same_scene() -> None:
    scene = make_scene(4, 1, kind="single")
    coarse, fine = render(scene, frames=[4]), render(scene, side=2 * SIDE, frames=[4])
    pooled = fine.reshape(1, SIDE, 2, SIDE, 2, 3).mean(axis=(2, 4))
    assert np.abs(pooled - coarse).mean() < 0.01
