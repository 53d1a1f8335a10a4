"""Reads pixels: which coloured shapes a clip shows and how they move, and whether that is what the prompt asks for.

It knows nothing of the model or of the renderer, only the closed world the prompts speak of: six colours, four shapes,
five motions, four backgrounds. An object is one of the six colours, so a clip never shows two of one colour.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.20),
    "blue": (0.15, 0.35, 0.98),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.70, 0.18, 0.85),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.04, 0.04, 0.05),
    "gray": (0.45, 0.45, 0.47),
    "brown": (0.42, 0.26, 0.13),
    "navy": (0.07, 0.09, 0.28),
}
DOTS = 0.18  # dots on a background are so much lighter than it
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # columns, rows
SPEEDS = {"slow": 0.75 / 64, "normal": 1.25 / 64, "fast": 2.0 / 64}  # of the frame's width, per frame

_MOTION_WORDS = {
    "left": "left", "leftwards": "left", "right": "right", "rightwards": "right", "up": "up", "upwards": "up",
    "down": "down", "downwards": "down", "still": "still", "rests": "still", "resting": "still", "motionless": "still",
}  # fmt: skip
_SPEED_WORDS = {"slowly": "slow", "gently": "slow", "quickly": "fast", "fast": "fast"}
_CAMERA = re.compile(r"(?:the )?camera (pans|zooms|moves) (?:to the )?(\w+)")
_PAN = {"left": "right", "right": "left"}  # what stands still moves against the camera
_MIN_AREA = 0.012  # of the frame; less is no object
_MIN_FRAMES = 0.6  # of the clip
_STILL = 0.35 / 64  # of the frame's width per frame: less is standing still
_SAMPLES = 4  # per pixel side, of a shape drawn for comparison


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt says of one object, as it appears on the screen."""

    colour: str
    shape: str
    direction: str
    speed: float  # of the frame's width, per frame; 0 stands still


@dataclass(frozen=True, slots=True)
class Seen:
    """What the pixels say of one object."""

    colour: str
    shapes: tuple[str, ...]  # of every frame; "" where the colour is absent or no shape fits
    velocity: tuple[float, float]  # columns and rows, of the frame's width, per frame
    area: float  # mean, of the frame
    growth: float  # area of the last third over that of the first
    centre: tuple[float, float]  # mean column and row, of the frame's width

    @property
    def shape(self) -> str:
        """The shape that most frames show; "" where none shows one."""
        return max(("", *SHAPES), key=lambda shape: self.shapes.count(shape) if shape else 0)

    @property
    def direction(self) -> str:
        """The nearest of the five motions."""
        columns, rows = self.velocity
        if max(abs(columns), abs(rows)) < _STILL:
            return "still"
        if abs(columns) >= abs(rows):
            return "left" if columns < 0 else "right"
        return "up" if rows < 0 else "down"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a clip shows what its prompt asks for; of several objects, all of them must."""

    colour: bool
    shape: bool
    direction: bool
    count: bool  # as many objects as asked for, no more
    speed_error: float  # of the frame's width per frame, mean over the objects found; nan where none was

    @property
    def follows(self) -> bool:
        """Colour, shape and direction together."""
        return self.colour and self.shape and self.direction


def wanted(prompt: str) -> list[Wanted]:
    """Understand a prompt: every colour and shape named side by side is an object, with the motion named after it.

    Args:
        prompt: such as "A small red circle moves left slowly on a black background."

    Raises:
        ValueError: it names no object, or one without a motion.
    """
    camera = _CAMERA.search(prompt.lower())
    words = re.findall(r"[a-z]+", _CAMERA.sub(" ", prompt.lower()))
    heads = [i for i in range(1, len(words)) if words[i] in SHAPES and words[i - 1] in COLOURS]
    if not heads:
        raise ValueError(f"prompt: must name a colour and a shape, got {prompt!r}")
    objects = []
    for head, end in zip(heads, [*heads[1:], len(words)], strict=True):
        directions = [_MOTION_WORDS[word] for word in words[head:end] if word in _MOTION_WORDS]
        if not directions:
            raise ValueError(f"prompt: must say how the {words[head - 1]} {words[head]} moves, got {prompt!r}")
        direction = directions[0]
        speed = next((_SPEED_WORDS[word] for word in words[head:end] if word in _SPEED_WORDS), "normal")
        if direction == "still" and camera and camera[1] == "pans":
            direction = _PAN[camera[2]]
        objects.append(Wanted(words[head - 1], words[head], direction, 0.0 if direction == "still" else SPEEDS[speed]))
    return objects


def see(video: Array) -> list[Seen]:
    """Find the objects of a clip.

    Args:
        video: frames, [F, H, W, 3], in [0, 1].

    Returns:
        One object per colour that is there for most of the clip, the largest first.
    """
    labels = _nearest_colours(video)
    found = []
    for index, colour in enumerate(COLOURS):
        masks = labels == index
        areas = masks.mean(axis=(1, 2))
        present = areas >= _MIN_AREA
        if present.mean() >= _MIN_FRAMES:
            found.append(_describe(colour, masks, areas, present))
    return sorted(found, key=lambda object_: -object_.area)


def judge(video: Array, prompt: str) -> Verdict:
    """Say whether a clip shows what its prompt asks for.

    Args:
        video: frames, [F, H, W, 3], in [0, 1].
        prompt: as `wanted` understands it.

    Returns:
        The verdict. Shape and direction are those of the largest objects, whatever their colour, so that one mistake
        counts once; of two objects the upper is the one the prompt names first.
    """
    asked = wanted(prompt)
    seen = see(video)
    shown = seen[: len(asked)]
    if len(asked) > 1:
        shown = sorted(shown, key=lambda object_: object_.centre[1])
    missing = len(shown) < len(asked)
    pairs = list(zip(asked, shown, strict=False))
    errors = [abs(float(np.hypot(*got.velocity)) - want.speed) for want, got in pairs]
    return Verdict(
        colour=not missing and all(want.colour == got.colour for want, got in pairs),
        shape=not missing and all(want.shape == got.shape for want, got in pairs),
        direction=not missing and all(want.direction == got.direction for want, got in pairs),
        count=len(seen) == len(asked),
        speed_error=float(np.mean(errors)) if errors else float("nan"),
    )


def flicker(video: Array) -> float:
    """How much the background's mean colour changes from frame to frame: mean absolute difference, in [0, 1]."""
    background = _nearest_colours(video) >= len(COLOURS)
    means = [frame[mask].mean(axis=0) for frame, mask in zip(video, background, strict=True) if mask.any()]
    return float(np.abs(np.diff(means, axis=0)).mean()) if len(means) > 1 else 0.0


def background_change(video: Array) -> float:
    """How far pixels that no object ever covers stray: their standard deviation over time, mean, in [0, 1]."""
    never_covered = (_nearest_colours(video) >= len(COLOURS)).all(axis=0)
    return float(video[:, never_covered].std(axis=0).mean()) if never_covered.any() else float("nan")


def accuracies(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Fractions of verdicts that hold, by what was judged."""
    names = ("colour", "shape", "direction", "count", "follows")
    rates = {name: float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in names}
    errors = [verdict.speed_error for verdict in verdicts if not np.isnan(verdict.speed_error)]
    return rates | {"speed_error": float(np.mean(errors)) if errors else float("nan")}


def _nearest_colours(video: Array) -> NDArray[np.int64]:
    """The nearest colour of every pixel: objects' colours first, then backgrounds and their dots."""
    backgrounds = np.array(list(BACKGROUNDS.values()))
    palette = np.concatenate([np.array(list(COLOURS.values())), backgrounds, backgrounds + DOTS])
    # |pixel - colour|^2 without |pixel|^2, which is the same for all
    distances = (palette**2).sum(axis=1) - 2 * (video.astype(np.float32) @ palette.T.astype(np.float32))
    nearest: NDArray[np.int64] = distances.argmin(axis=-1)
    return nearest


def _describe(colour: str, masks: NDArray[np.bool_], areas: Array, present: NDArray[np.bool_]) -> Seen:
    frames = np.flatnonzero(present)
    width = masks.shape[2]
    centres = np.array([np.argwhere(masks[frame]).mean(axis=0)[::-1] + 0.5 for frame in frames]) / width
    velocity = np.polyfit(frames, centres, 1)[0] if len(frames) > 1 else np.zeros(2)
    shapes = tuple(_shape(mask) if there else "" for mask, there in zip(masks, present, strict=True))
    third = max(1, len(areas) // 3)
    return Seen(
        colour=colour,
        shapes=shapes,
        velocity=(float(velocity[0]), float(velocity[1])),
        area=float(areas.mean()),
        growth=float(areas[-third:].mean() / max(areas[:third].mean(), 1e-6)),
        centre=(float(centres[:, 0].mean()), float(centres[:, 1].mean())),
    )


def _shape(mask: NDArray[np.bool_]) -> str:
    """The shape that, drawn with the mask's centre and area, covers it best; "" where none does well."""
    points = np.argwhere(mask)
    row, column = points.mean(axis=0) + 0.5
    scale = float(np.sqrt(mask.sum()))
    grid = (np.arange(mask.shape[0] * _SAMPLES) + 0.5) / _SAMPLES
    columns = (np.arange(mask.shape[1] * _SAMPLES) + 0.5) / _SAMPLES
    y, x = np.meshgrid((grid - row) / scale, (columns - column) / scale, indexing="ij")
    fine = mask.repeat(_SAMPLES, axis=0).repeat(_SAMPLES, axis=1)
    overlaps = {shape: _overlap(fine, _unit_shape(shape, x, y)) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] > 0.7 else ""


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def _unit_shape(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Points inside a shape of area 1 whose centre of mass is the origin; rows grow downwards."""
    inside: NDArray[np.bool_]
    if shape == "circle":
        inside = x**2 + y**2 <= 1 / np.pi
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.5
    elif shape == "triangle":  # equilateral, a corner on top: the sides are as far from the centre as the base
        inner = 1 / (3 * np.sqrt(3)) ** 0.5
        inside = (y <= inner) & (np.sqrt(3) * abs(x) - y <= 2 * inner)
    else:  # a cross of arms 2a wide and 2b long with a = 0.36 b: area 8ab - 4a^2 = 1
        arm = (8 * 0.36 - 4 * 0.36**2) ** -0.5
        inside = (np.maximum(abs(x), abs(y)) <= arm) & (np.minimum(abs(x), abs(y)) <= 0.36 * arm)
    return inside
