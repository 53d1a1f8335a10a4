"""What a user may ask for, and the rules that settle it for one model.

A `Request` holds what was asked; None stands for the model's own value. Each `resolve_*` settles one thing and refuses,
by name, what the model cannot do. Nothing here loads or computes anything.

Sizes with an image follow the reference to the last rounding, in its own order of float64 operations: a pixel more or
less is another video. Source: Wan-Video/Wan2.2, wan/image2video.py and wan/textimage2video.py.
"""

import html
import math
import re
import secrets
import unicodedata
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

from wanfast.config import DEFAULT_NEGATIVE_PROMPT, NUM_TRAIN_TIMESTEPS, ExpertName, ModelConfig, SolverName
from wanfast.errors import RequestError

Mode = Literal["t2v", "i2v"]

MAX_SEED = 2**63 - 1
MAX_POSITIONS = 1024  # the DiT's rotary table has no more, on any axis

# Beyond these, neighbouring sigmas of a 1000-step run come out equal in fp32.
_SHIFT_LIMITS = (0.01, 100.0)
_MAX_FPS = 240
_NEW_SEEDS = 2**32  # short enough to read out, and whole in any JSON reader
_NAMED_SIZES = {"480p": (832, 480), "720p": (1280, 720)}
_SOLVER_ALIASES = {"dpm++": "dpmpp"}
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # categories of spaces, line ends, controls and zero-width characters


@dataclass(frozen=True, slots=True)
class Request:
    """One video as asked for."""

    prompt: str | None  # None where the caller has text encodings of its own
    _: KW_ONLY
    negative_prompt: str | None = None  # None and "" both mean the model's own
    image_size: tuple[int, int] | None = None  # (width, height) of the conditioning image; None: there is none
    width: int | None = None  # pixels; with an image, width x height is an area and the aspect is the image's
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance: float | None = None  # of every expert
    guidance_high: float | None = None  # of the high-noise expert
    guidance_low: float | None = None
    shift: float | None = None  # of the noise schedule
    solver: SolverName | None = None
    seed: int | None = None  # None and -1: a new one for each run
    fps: int | None = None
    attention_density: float | None = None  # share of the blocks of keys that are attended to; None: all


def parse_size(text: str, config: ModelConfig) -> tuple[int, int]:
    """Read a size as people write it: 832x480 or 832*480, or 480p and 720p for the model's landscape size of that name.

    Returns:
        (width, height) in pixels, not yet held to the model's rules.

    Raises:
        RequestError: the text is none of these.
    """
    if named := _NAMED_SIZES.get(text.strip().lower()):
        width, height = (side // unit * unit for side, unit in zip(named, size_units(config), strict=True))
        return width, height
    match = re.fullmatch(r"(\d{1,6})\s*[x×*]\s*(\d{1,6})", text.strip(), re.IGNORECASE)
    if match is None:
        raise RequestError(f"size: must be WIDTHxHEIGHT, 480p or 720p, got {text!r}; for example 832x480")
    return int(match[1]), int(match[2])


def parse_solver(text: str) -> SolverName:
    """Read a solver's name; dpm++ is the reference's spelling of dpmpp.

    Raises:
        RequestError: there is no such solver.
    """
    return _solver(_SOLVER_ALIASES.get(text, text))


def size_units(config: ModelConfig) -> tuple[int, int]:
    """Return what width and height must be multiples of, in pixels: one patch of latents."""
    _, patch_rows, patch_columns = config.dit.patch_size
    return config.vae.spatial_stride * patch_columns, config.vae.spatial_stride * patch_rows


def resolve_prompts(request: Request) -> tuple[str, str]:
    """Settle prompt and negative prompt; a prompt of None becomes "".

    Raises:
        RequestError: one of them is not text, or the prompt shows nothing (blanks, invisible characters, `&nbsp;`) and
            no image says what to show.
    """
    prompt, negative_prompt = request.prompt, request.negative_prompt
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(f"prompt: must be text, got {prompt!r}; for several prompts, run once for each")
    if prompt is not None and _is_blank(prompt) and request.image_size is None:
        raise RequestError(f"prompt: must not be empty without an image, got {prompt!r}; say what the video shows")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise RequestError(f"negative_prompt: must be text, got {negative_prompt!r}; leave it out for the model's own")
    return prompt or "", negative_prompt or DEFAULT_NEGATIVE_PROMPT


def _is_blank(text: str) -> bool:
    """Tell whether a text shows nothing, HTML entities resolved as a prompt's are."""
    plain = html.unescape(html.unescape(text))
    return all(unicodedata.category(character) in _INVISIBLE for character in plain)


def resolve_mode(request: Request, config: ModelConfig) -> Mode:
    """Tell text to video from image to video.

    Raises:
        RequestError: an image the model cannot use, or none where it needs one.
    """
    if request.image_size is None:
        if config.task == "i2v":
            raise RequestError(
                f"image: must be given for {config.name}, got None; for text alone use a t2v or ti2v model"
            )
        return "t2v"
    width, height = request.image_size
    _integer("image", width, 1, None)
    _integer("image", height, 1, None)
    if config.task == "t2v":
        raise RequestError(
            f"image: must not be given for {config.name}, got one of {width}x{height}; use an i2v or ti2v model"
        )
    return "i2v"


def resolve_size(request: Request, config: ModelConfig) -> tuple[int, int]:
    """Settle (width, height) in pixels, as asked; with an image they only give the area.

    Raises:
        RequestError: one of the two is missing, is not a multiple of the model's unit, or is beyond its positions.
    """
    if request.width is None and request.height is None:
        return config.width, config.height
    sides = []
    for name, value, unit in zip(("width", "height"), (request.width, request.height), size_units(config), strict=True):
        if value is None:
            raise RequestError(f"{name}: must be given where the other side is, got None; for example {_sizes(config)}")
        side = _integer(name, value, None, None)
        largest = MAX_POSITIONS * unit
        if side % unit or not 0 < side <= largest:
            near = dict.fromkeys(
                min(max(edge, unit), largest) for edge in (side // unit * unit, (side // unit + 1) * unit)
            )
            raise RequestError(
                f"{name}: must be a multiple of {unit} from {unit} to {largest} for {config.name}, got {value!r}; "
                f"nearest: {' or '.join(map(str, near))}"
            )
        sides.append(side)
    width, height = sides
    return width, height


def video_size(request: Request, config: ModelConfig) -> tuple[int, int]:
    """Settle (width, height) of the video in pixels: as asked, or by the reference's rule where there is an image.

    Raises:
        RequestError: as `resolve_size`, or the image is so long and thin that no size of that area fits it.
    """
    width, height = resolve_size(request, config)
    if request.image_size is None:
        return width, height
    size_rule = i2v_size if config.task == "i2v" else ti2v_size
    fitted = size_rule(*request.image_size, width * height, config)
    if all(0 < side <= MAX_POSITIONS * unit for side, unit in zip(fitted, size_units(config), strict=True)):
        return fitted
    raise RequestError(
        f"image: must not be so long and thin for an area of {width}x{height}, "
        f"got {request.image_size[0]}x{request.image_size[1]}; crop it nearer to {width}:{height}"
    )


def i2v_size(image_width: int, image_height: int, area: int, config: ModelConfig) -> tuple[int, int]:
    """Fit a video of about `area` pixels to an image's aspect, as the reference does for I2V-A14B.

    Returns:
        (width, height) in pixels, multiples of the model's units, 0 where the image is too thin.
    """
    aspect = image_height / image_width
    stride, (_, patch_rows, patch_columns) = config.vae.spatial_stride, config.dit.patch_size
    rows = math.sqrt(area * aspect) // stride // patch_rows * patch_rows
    columns = math.sqrt(area / aspect) // stride // patch_columns * patch_columns
    return round(columns) * stride, round(rows) * stride


def ti2v_size(image_width: int, image_height: int, area: int, config: ModelConfig) -> tuple[int, int]:
    """Fit a video of at most `area` pixels to an image's aspect, as the reference does for TI2V-5B.

    Rounds down the width first, then the height first, and takes the nearer aspect; a tie goes to the second.

    Returns:
        (width, height) in pixels, multiples of the model's units, (0, 0) where the image is too thin.
    """
    unit_width, unit_height = size_units(config)
    ratio = image_width / image_height
    ideal_width = math.sqrt(area * ratio)
    ideal_height = area / ideal_width
    if ideal_width < unit_width or ideal_height < unit_height:
        return 0, 0
    width_1 = int(ideal_width // unit_width * unit_width)
    height_1 = int(area / width_1 // unit_height * unit_height)
    height_2 = int(ideal_height // unit_height * unit_height)
    width_2 = int(area / height_2 // unit_width * unit_width)
    ratio_1, ratio_2 = width_1 / height_1, width_2 / height_2
    if max(ratio / ratio_1, ratio_1 / ratio) < max(ratio / ratio_2, ratio_2 / ratio):
        return width_1, height_1
    return width_2, height_2


def resolve_num_frames(request: Request, config: ModelConfig) -> int:
    """Settle the number of frames: one, then whole latent frames.

    Raises:
        RequestError: not of the form 4n + 1 (for a temporal stride of 4), or beyond the model's positions.
    """
    if request.num_frames is None:
        return config.num_frames
    value = _integer("num_frames", request.num_frames, None, None)
    stride = config.vae.temporal_stride
    largest = stride * (MAX_POSITIONS - 1) + 1
    if (value - 1) % stride or not 1 <= value <= largest:
        below = (value - 1) // stride * stride + 1
        near = dict.fromkeys(min(max(edge, 1), largest) for edge in (below, below + stride))
        raise RequestError(
            f"num_frames: must be {stride}n + 1, from 1 to {largest}, got {value}; "
            f"nearest: {' or '.join(map(str, near))}"
        )
    return value


def resolve_num_inference_steps(request: Request, config: ModelConfig) -> int:
    """Settle the number of solver steps, 1 to 1000; RequestError otherwise."""
    if request.num_inference_steps is None:
        return config.num_inference_steps
    return _integer("num_inference_steps", request.num_inference_steps, 1, NUM_TRAIN_TIMESTEPS)


def resolve_guidance(request: Request, config: ModelConfig) -> dict[ExpertName, float]:
    """Settle the guidance of each expert the model has.

    Raises:
        RequestError: not finite, an expert the model does not have, or `guidance` beside one of the two it stands for.
    """
    by_expert: dict[ExpertName, tuple[str, float | None]] = {
        "high_noise": ("guidance_high", request.guidance_high),
        "low_noise": ("guidance_low", request.guidance_low),
    }
    names = [expert.name for expert in config.experts]
    for expert, (argument, value) in by_expert.items():
        if value is None:
            continue
        if expert not in names:
            raise RequestError(
                f"{argument}: must not be given for {config.name}, which has one expert, got {value!r}; use guidance"
            )
        if request.guidance is not None:
            raise RequestError(
                f"guidance: must not be given beside {argument}, got {request.guidance!r} and {value!r}; "
                "give guidance alone, or guidance_high and guidance_low"
            )
    resolved = {}
    for known in config.experts:
        argument, value = by_expert.get(known.name, ("guidance", None))
        if value is None:
            argument, value = "guidance", request.guidance
        resolved[known.name] = known.guidance if value is None else _finite(argument, value, known.guidance)
    return resolved


def resolve_shift(request: Request, config: ModelConfig) -> float:
    """Settle the shift of the noise schedule, 0.01 to 100; RequestError otherwise."""
    if request.shift is None:
        return config.shift
    shift = _finite("shift", request.shift, config.shift)
    low, high = _SHIFT_LIMITS
    if not low <= shift <= high:
        raise RequestError(
            f"shift: must be from {low:g} to {high:g}, got {request.shift!r}; {config.name} has {config.shift:g}"
        )
    return shift


def resolve_solver(request: Request, config: ModelConfig) -> SolverName:
    """Settle the solver; RequestError names the known ones."""
    return config.solver if request.solver is None else _solver(request.solver)


def resolve_attention_density(request: Request, num_steps: int) -> float:
    """Settle the share of the blocks of keys that a block of queries attends to, above 0 up to 1, which is all.

    Raises:
        RequestError: another number, or less than 1 for a single step, whose attention is dense.
    """
    if request.attention_density is None:
        return 1.0
    density = _finite("attention_density", request.attention_density, 0.5)
    if not 0 < density <= 1:
        raise RequestError(
            f"attention_density: must be above 0, up to 1 (all keys), got {request.attention_density!r};"
            " for example 0.5"
        )
    if density < 1 and num_steps == 1:
        raise RequestError(
            f"attention_density: must be 1 for a single step, as early steps are dense, got {density:g};"
            " take 2 steps or more"
        )
    return density


def resolve_seed(request: Request) -> int:
    """Settle the seed: as asked, or a new one from the system's entropy for None and -1.

    Raises:
        RequestError: not an integer from -1 to 2**63 - 1.
    """
    seed = -1 if request.seed is None else _integer("seed", request.seed, -1, MAX_SEED)
    return secrets.randbelow(_NEW_SEEDS) if seed == -1 else seed


def resolve_fps(request: Request, config: ModelConfig) -> int:
    """Settle frames per second of the file, 1 to 240; RequestError otherwise."""
    return config.fps if request.fps is None else _integer("fps", request.fps, 1, _MAX_FPS)


def _integer(name: str, value: Any, low: int | None, high: int | None) -> int:
    """Accept Python and numpy integers alike; a bool is a mistake, a float is one too even where it is whole."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        example = f"; for example {low if low is not None else 1}"
        raise RequestError(f"{name}: must be an integer, got {value!r}{example}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        rule = f"at least {low}" if high is None else f"from {low} to {high}"
        nearest = low if low is not None and number < low else high
        raise RequestError(f"{name}: must be {rule}, got {number}; nearest: {nearest}")
    return number


def _finite(name: str, value: Any, example: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RequestError(f"{name}: must be a number, got {value!r}; for example {example:g}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{name}: must be finite, got {value!r}; for example {example:g}")
    return number


def _solver(value: Any) -> SolverName:
    for name in get_args(SolverName):
        if value == name:
            return cast(SolverName, name)
    raise RequestError(f"solver: must be one of {', '.join(get_args(SolverName))}, got {value!r}; Wan's own is unipc")


def _sizes(config: ModelConfig) -> str:
    return ", ".join(f"{width}x{height}" for width, height in config.sizes)
