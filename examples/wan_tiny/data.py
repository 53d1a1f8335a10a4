"""Procedural clips with captions: coloured shapes that move over a background, in one or two, under a simple camera.

Clip number `index` of a seed is always the same clip, so training resumes anywhere and nothing is stored.
Some combinations of colour, shape and motion never appear in training; the evaluation asks for those.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from wanfast.judge import BACKGROUNDS, COLOURS, DIRECTIONS, DOTS, SHAPES, SPEEDS, Array

NUM_FRAMES = 17
SIDE = 64  # pixels; lengths below are in pixels of a frame of this size
RADII = {"small": (8.5, 10.0), "large": (12.0, 13.5), "": (8.5, 13.5)}
LANES = (17.0, 47.0)  # rows of the upper and the lower of two objects
PAN = 1.25  # pixels per frame
ZOOM = 0.5  # growth over the clip

_MOVES = ("moves", "slides", "drifts", "goes", "moving", "is moving", "sliding")
_MOVING = ("moving", "sliding", "drifting", "going")
_PLACES = ("on a {} background", "over a {} background", "in front of a {} background")


@dataclass(frozen=True, slots=True)
class Subject:
    """One shape on its way."""

    colour: str
    shape: str
    direction: str
    speed: str
    size: str
    radius: float
    centre: tuple[float, float]  # column and row in the first frame


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a clip shows."""

    subjects: tuple[Subject, ...]  # of two, the upper first
    background: str
    dotted: bool
    camera: str  # "", "left" or "right" for a pan, "in" for a zoom
    caption: str = ""


def is_held_out(colour: str, shape: str, direction: str) -> bool:
    """One motion of every colour and shape is kept from training: 24 of 120 combinations, of every value its share."""
    numbers = list(COLOURS).index(colour), SHAPES.index(shape), list(DIRECTIONS).index(direction)
    return (numbers[0] + 2 * numbers[1] + numbers[2]) % 5 == 0


def make_scene(seed: int, index: int, *, kind: str = "", held_out: bool = False) -> Scene:
    """Draw a scene.

    Args:
        seed: of the data set.
        index: of the clip, from 0.
        kind: "single", "pair" or "camera"; "" draws one of them, mostly single.
        held_out: only combinations that training never sees, instead of never one of those.
    """
    rng = np.random.default_rng([seed, index])
    kind = kind or str(rng.choice(["single", "pair", "camera"], p=[0.7, 0.18, 0.12]))
    camera = str(rng.choice(["left", "right", "in"])) if kind == "camera" else ""
    allowed = {"single": list(DIRECTIONS), "pair": ["left", "right", "still"], "camera": ["still"]}[kind]
    subjects: list[Subject] = []
    while len(subjects) < (2 if kind == "pair" else 1):
        colour, shape, direction = (str(rng.choice(names)) for names in (list(COLOURS), SHAPES, allowed))
        if is_held_out(colour, shape, direction) == held_out and colour not in [one.colour for one in subjects]:
            lane = LANES[len(subjects)] if kind == "pair" else None
            subjects.append(_make_subject(rng, (colour, shape, direction), lane, camera))
    scene = Scene(
        tuple(subjects),
        background=str(rng.choice(list(BACKGROUNDS))),
        dotted=bool(camera) or bool(rng.random() < 0.4),
        camera=camera,
    )
    return replace(scene, caption=describe(rng, scene))


def _make_subject(rng: np.random.Generator, kind: tuple[str, str, str], lane: float | None, camera: str) -> Subject:
    colour, shape, direction = kind
    speed = "normal" if direction == "still" else str(rng.choice(list(SPEEDS)))
    size = "small" if lane else str(rng.choice(["", "small", "large"]))
    radius = float(rng.uniform(*RADII[size]))
    if camera == "in":
        radius *= 0.9
    shift = np.array(DIRECTIONS[direction]) * SPEEDS[speed] * SIDE * (NUM_FRAMES - 1)
    if camera in ("left", "right"):  # the world moves against the camera
        shift = np.array([PAN if camera == "left" else -PAN, 0.0]) * (NUM_FRAMES - 1)
    reach = np.array([1.1 * radius, 1.25 * radius]) * (1 + ZOOM if camera == "in" else 1) + 1
    low, high = reach - np.minimum(shift, 0), SIDE - reach - np.maximum(shift, 0)
    centre = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    if lane:
        centre[1] = lane
    if camera == "in":
        centre = np.clip(centre, SIDE / 2 - 6, SIDE / 2 + 6)
    return Subject(colour, shape, direction, speed, "" if lane else size, radius, (float(centre[0]), float(centre[1])))


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """Say what a scene shows, in one of many ways; what a caption leaves out may be anything."""
    upper, *lower = scene.subjects
    text = f"{_name(rng, upper)} {_motion(rng, upper, _MOVES)}"
    if lower:
        text += f" above {_name(rng, lower[0])} {_motion(rng, lower[0], _MOVING)}"
    if rng.random() < 0.75:
        ground = f"dotted {scene.background}" if scene.dotted else scene.background
        place = str(rng.choice(_PLACES)).format(ground)
        text = f"{place}, {text}" if rng.random() < 0.2 else f"{text} {place}"
    if scene.camera:
        move = {"left": "pans left", "right": "pans right", "in": "zooms in"}[scene.camera]
        text += f", the camera {move}" if rng.random() < 0.5 else f" while the camera {move}"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")


def _name(rng: np.random.Generator, subject: Subject) -> str:
    size = {"small": ("small", "little"), "large": ("large", "big"), "": ("",)}[subject.size]
    words = (str(rng.choice(["a", "the"], p=[0.85, 0.15])), str(rng.choice(size)), subject.colour, subject.shape)
    return " ".join(word for word in words if word)


def _motion(rng: np.random.Generator, subject: Subject, verbs: tuple[str, ...]) -> str:
    if subject.direction == "still":
        resting = ("stands still", "rests", "is motionless") if verbs is _MOVES else ("standing still", "resting")
        return str(rng.choice(resting))
    ways = [subject.direction, f"{subject.direction}wards"]
    if subject.direction in ("left", "right"):
        ways.append(f"to the {subject.direction}")
    pace = {"slow": ("slowly", "gently"), "normal": ("",), "fast": ("quickly", "fast")}[subject.speed]
    verb, way, adverb = str(rng.choice(verbs)), str(rng.choice(ways)), str(rng.choice(pace))
    words = (adverb, verb, way) if rng.random() < 0.3 else (verb, way, adverb)
    return " ".join(word for word in words if word)


def render(scene: Scene, side: int = SIDE, frames: Sequence[int] = range(NUM_FRAMES)) -> Array:
    """Draw frames of a scene with smooth edges.

    Args:
        scene: what to draw.
        side: pixels of a frame, either way.
        frames: which ones.

    Returns:
        Pixels, [F, side, side, 3], in [0, 1].
    """
    pixels = (np.arange(side, dtype=np.float32) + 0.5) * (SIDE / side)
    rows, columns = np.meshgrid(pixels, pixels, indexing="ij")
    sharpness = side / SIDE  # an edge is one pixel wide
    base = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    video = np.empty((len(frames), side, side, 3), dtype=np.float32)
    for index, frame in enumerate(frames):
        zoom = 1 + ZOOM * frame / (NUM_FRAMES - 1) if scene.camera == "in" else 1.0
        pan = {"left": PAN, "right": -PAN}.get(scene.camera, 0.0) * frame
        x = (columns - SIDE / 2) / zoom + SIDE / 2 - pan
        y = (rows - SIDE / 2) / zoom + SIDE / 2
        image = np.broadcast_to(base, (side, side, 3))
        if scene.dotted:
            away = np.hypot((x + 8) % 16 - 8, (y + 8) % 16 - 8)
            image = _over(image, base + np.float32(DOTS), np.clip((2.6 - away) * sharpness * zoom + 0.5, 0, 1))
        for subject in scene.subjects:
            moved = np.array(DIRECTIONS[subject.direction]) * SPEEDS[subject.speed] * SIDE * frame
            place = (x - subject.centre[0] - moved[0], y - subject.centre[1] - moved[1])
            inside = _depth(subject, *place)
            colour = np.array(COLOURS[subject.colour], dtype=np.float32)
            image = _over(image, colour, np.clip(inside * sharpness * zoom + 0.5, 0, 1))
        video[index] = image
    return video


def _over(image: Array, colour: Array, cover: Array) -> Array:
    return image + cover[..., None] * (colour - image)


def _depth(subject: Subject, x: Array, y: Array) -> Array:
    """Distance into the shape, negative outside; exact enough for an edge one pixel wide."""
    r = subject.radius
    if subject.shape == "circle":
        return r - np.hypot(x, y)
    if subject.shape == "square":
        return 0.9 * r - np.maximum(abs(x), abs(y))
    if subject.shape == "triangle":  # a corner on top, 1.25 r from the centre
        return np.minimum(0.625 * r - y, 0.625 * r - (abs(x) * np.float32(3**0.5) - y) / 2)
    arm = 1.1 * r
    flat = np.minimum(arm - abs(x), 0.36 * arm - abs(y))
    return np.maximum(flat, np.minimum(arm - abs(y), 0.36 * arm - abs(x)))
