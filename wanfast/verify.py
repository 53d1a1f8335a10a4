"""`wanfast verify`: whether a precision, a preset or a setting changes what videos show, read from their pixels.

The same captions and seeds go through `exact` and through each tier. The judge reads every clip without knowing whose
it is; how far the pixels are from those of `exact` is measured beside it.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from wanfast.bench.case import Tier, parse_tiers
from wanfast.bench.difference import PEAK, Difference, Frames, compare_videos
from wanfast.command_parts import note, sources_of
from wanfast.errors import RequestError
from wanfast.judge import Seen, Verdict, accuracies, background_change, flicker, judge, see
from wanfast.lora import LoraSpec, parse_lora
from wanfast.pipeline import Pipeline, open_loaded
from wanfast.plan import Precision
from wanfast.progress import Progress
from wanfast.video import Video

WORSE = 0.02  # of the captions: a tier that follows so many fewer than `exact` has changed what videos show

_REFERENCE = Tier("exact", "exact")
_SETTINGS = ("num_inference_steps", "guidance", "guidance_high", "guidance_low", "shift", "solver")
_PERCENT = ("colour", "shape", "direction", "count", "follows")

Make = Callable[[str, int], Frames]  # caption, seed -> uint8 [F, H, W, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one clip shows."""

    verdict: Verdict
    objects: tuple[Seen, ...]
    flicker: float
    background_change: float  # NaN where an object passes over every pixel
    seconds: float  # that making it took


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What the clips of one tier show, and how far they are from those of `exact`."""

    name: str
    num_captions: int
    following: dict[str, float]  # as `accuracies`
    flicker: float
    background_change: float | None
    seconds: float  # per clip, mean
    lost: int  # captions that `exact` follows and this does not
    gained: int  # that this follows and `exact` does not
    psnr: float | None  # dB, over all pixels of all clips; None where none differs
    ssim: float  # mean
    worst_pixel: int  # of 255
    motion_error: float | None  # of the frame's width per frame, mean over objects both show; None where there is none

    @property
    def is_worse(self) -> bool:
        """Whether so many captions are followed by `exact` alone that it cannot be passed over."""
        return self.lost - self.gained > WORSE * self.num_captions


def verify(arguments: argparse.Namespace) -> None:
    """Run a parsed `wanfast verify` line; the table, or with --json all numbers, go to stdout.

    Raises:
        RequestError: an argument breaks a rule; nothing has been computed then.
        SystemExit: code 1 where the line asked to fail for a tier that is worse.
    """
    captions = held_out_captions()
    if not 1 <= arguments.captions <= len(captions):
        raise RequestError(f"captions: must be from 1 to {len(captions)}, got {arguments.captions}")
    loras = [parse_lora(text) for text in arguments.lora]
    own = {name: getattr(arguments, name) for name in _SETTINGS}
    makers = _makers(arguments, own, loras)
    with Progress(is_shown=not arguments.quiet, unit="clip") as progress:
        columns = compare(makers, captions[: arguments.captions], progress.update)
    if arguments.json:
        print(json.dumps([asdict(column) | {"is_worse": column.is_worse} for column in columns], indent=1))
    else:
        print(format_columns(columns))
    worse = [column.name for column in columns if column.is_worse]
    for name in worse:
        note(arguments, f"{name}: follows fewer captions than exact by more than {WORSE:.0%} of them")
    if worse and arguments.fail_if_worse:
        raise SystemExit(1)


def held_out_captions() -> list[str]:
    """Give the 200 captions of the suite: colours, shapes and motions in combinations no training of wan-tiny saw."""
    return (files("wanfast") / "wan_tiny" / "captions.txt").read_text().splitlines()


def compare(makers: dict[str, Make], captions: Sequence[str], tell: Callable[[str, int, int], None]) -> list[Column]:
    """Make every caption's clip in every way and judge them.

    Args:
        makers: by the tier's name; the first is what the others are compared with. Each gets a caption and its number
            as the seed.
        captions: as `wanfast.judge.wanted` understands them.
        tell: called with "clips", captions done and captions in all.

    Returns:
        A column for each maker; that of the first is compared with itself.
    """
    shown: dict[str, list[Shown]] = {name: [] for name in makers}
    differences: dict[str, list[Difference]] = {name: [] for name in makers}
    for number, caption in enumerate(captions):
        tell("clips", number, len(captions))
        reference: Frames | None = None
        for name, make in makers.items():
            started = time.perf_counter()
            clip = make(caption, number)
            shown[name].append(_look(clip, caption, time.perf_counter() - started))
            reference = clip if reference is None else reference
            differences[name].append(compare_videos(clip, reference))
    tell("clips", len(captions), len(captions))
    first = next(iter(shown.values()))
    return [_column(name, shown[name], first, differences[name]) for name in makers]


def format_columns(columns: Sequence[Column]) -> str:
    """Lay columns out as a table for people."""
    rows: list[tuple[str, list[str]]] = [("", [column.name for column in columns])]
    titles = ("colour", "shape", "direction", "as many objects", "colour, shape and direction")
    for title, key in zip(titles, _PERCENT, strict=True):
        rows.append((title, [f"{100 * column.following[key]:.1f} %" for column in columns]))
    rows += [
        ("speed error, of the width per frame", [_share(column.following["speed_error"]) for column in columns]),
        ("flicker, of 255", [f"{255 * column.flicker:.2f}" for column in columns]),
        ("background's change, of 255", [_of_255(column.background_change) for column in columns]),
        ("captions only exact follows", ["", *(str(column.lost) for column in columns[1:])]),
        ("captions exact does not follow", ["", *(str(column.gained) for column in columns[1:])]),
        ("PSNR to exact", ["", *(_decibels(column) for column in columns[1:])]),
        ("SSIM to exact", ["", *(f"{column.ssim:.4f}" for column in columns[1:])]),
        ("motion error to exact, per frame", ["", *(_share(column.motion_error) for column in columns[1:])]),
        ("seconds per clip", [f"{column.seconds:.2f}" for column in columns]),
    ]
    first = max(len(title) for title, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(columns))]
    lines = [
        f"{title:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for title, cells in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _makers(arguments: argparse.Namespace, own: dict[str, Any], loras: Sequence[LoraSpec]) -> dict[str, Make]:
    """Open the model once for each precision; the line's own settings and LoRAs are the tiers', not those of exact."""
    opened: dict[Precision, Pipeline] = {}

    def pipeline(precision: Precision) -> Pipeline:
        if precision not in opened:
            model = open_loaded(sources_of(arguments), precision=precision, vram=None, device=arguments.device)
            if model.config.task == "i2v":
                raise RequestError(f"model: must make videos from text alone for this suite, got {model.config.name}")
            opened[precision] = Pipeline(model)
        return opened[precision]

    def maker(tier: Tier, settings: dict[str, Any], loras: Sequence[LoraSpec]) -> Make:
        source = pipeline(tier.precision)

        def make(caption: str, seed: int) -> Frames:
            density = tier.attention_density
            video = source.generate(
                caption, seed=seed, preset=tier.preset, attention_density=density, loras=loras, **settings
            )
            assert isinstance(video, Video)  # latents only where they are asked for
            return video.frames.numpy()

        return make

    reference = maker(_REFERENCE, {}, ())
    tiers = parse_tiers(arguments.tiers, pipeline("exact").loaded.device)
    changes = bool(loras) or any(value is not None for value in own.values())
    if any(tier.name == _REFERENCE.name for tier in tiers) and not changes:
        raise RequestError("tiers: must differ from exact, which all are compared with; try fp32,int8,fp8")
    named = {_name(tier, changes): maker(tier, own, loras) for tier in tiers}
    return {_REFERENCE.name: reference, **named}


def _name(tier: Tier, changes: bool) -> str:
    return f"{tier.name}, as asked" if changes and tier.name == _REFERENCE.name else tier.name


def _look(clip: Frames, caption: str, seconds: float) -> Shown:
    video = clip.astype(np.float32) / np.float32(PEAK)
    return Shown(
        verdict=judge(video, caption),
        objects=tuple(see(video)),
        flicker=flicker(video),
        background_change=background_change(video),
        seconds=seconds,
    )


def _column(name: str, shown: Sequence[Shown], first: Sequence[Shown], differences: Sequence[Difference]) -> Column:
    follows = [(one.verdict.follows, other.verdict.follows) for one, other in zip(shown, first, strict=True)]
    noise = [0.0 if one.psnr is None else PEAK**2 / 10 ** (one.psnr / 10) for one in differences]
    motion = [error for one, other in zip(shown, first, strict=True) for error in _motion_errors(one, other)]
    return Column(
        name=name,
        num_captions=len(shown),
        following=accuracies([one.verdict for one in shown]),
        flicker=float(np.mean([one.flicker for one in shown])),
        background_change=_mean([one.background_change for one in shown]),
        seconds=float(np.mean([one.seconds for one in shown])),
        lost=follows.count((False, True)),
        gained=follows.count((True, False)),
        psnr=10 * math.log10(PEAK**2 / np.mean(noise)) if any(noise) else None,
        ssim=float(np.mean([one.ssim for one in differences])),
        worst_pixel=max(one.worst_pixel for one in differences),
        motion_error=_mean(motion),
    )


def _motion_errors(one: Shown, other: Shown) -> list[float]:
    """How far apart the velocities of objects of one colour are in two clips."""
    velocities = {seen.colour: seen.velocity for seen in other.objects}
    return [math.dist(seen.velocity, velocities[seen.colour]) for seen in one.objects if seen.colour in velocities]


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def _of_255(value: float | None) -> str:
    return "-" if value is None else f"{255 * value:.2f}"


def _decibels(column: Column) -> str:
    return "identical" if column.psnr is None else f"{column.psnr:.1f} dB"
