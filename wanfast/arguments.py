"""The command line: every flag, its aliases, and one-line errors."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from wanfast.config import MODELS
from wanfast.version import __version__

# Flags of the reference's generate.py without a meaning here: accepted, so that a side-by-side run is a one-word edit.
_NOT_NEEDED = {
    "--offload-model": "weights are placed by the memory that is free",
    "--convert-model-dtype": "--precision decides",
    "--t5-cpu": "the text encoder is streamed block by block",
    "--ulysses-size": "one GPU is used",
}
# Flags of the reference that ask for what is not done here: refused, as ignoring them would give another video or run.
_ONE_GPU, _PROMPT_AS_IS = "a model runs on one GPU", "prompts are taken as they are"
_NOT_SUPPORTED = {
    "--t5-fsdp": _ONE_GPU,
    "--dit-fsdp": _ONE_GPU,
    "--use-prompt-extend": _PROMPT_AS_IS,
    "--prompt-extend-method": _PROMPT_AS_IS,
    "--prompt-extend-model": _PROMPT_AS_IS,
    "--prompt-extend-target-lang": _PROMPT_AS_IS,
}
# Arguments where "" would be taken for "not given".
_NEVER_EMPTY = (
    *("model", "high", "low", "vae", "text_encoder", "tokenizer", "task", "image", "size", "device", "vram", "preset"),
    *("ram", "gpu", "stored"),
    *("output", "clip", "run", "path", "prompts", "preview"),
    *("tiers", "reference", "json", "markdown", "compare"),
)
_SOLVERS = {"unipc": "unipc", "dpm++": "dpmpp", "dpmpp": "dpmpp", "euler": "euler"}
_REQUEST_ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_frames",
    "num_inference_steps",
    "guidance",
    "guidance_high",
    "guidance_low",
    "shift",
    "solver",
    "seed",
    "fps",
    "attention_density",
)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line that names the thing and what would work (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        print(f"{self.prog}: {message}; {self.prog} --help lists what there is", file=sys.stderr)
        sys.exit(2)

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Name the first word that means nothing, and the flag it resembles."""
        flags = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(words[0].split("=")[0], flags, n=1)
        self.error(f"{words[0]}: no such argument" + (f", did you mean {near[0]}?" if near else ""))


class _NotSupported(argparse.Action):
    """Refuse the flag wherever it stands, with `const` as the reason."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: is not supported, as {self.const}; leave it out")


def build_parser() -> OneLineParser:
    """Build the parser of `wanfast` with all its commands."""
    parser = OneLineParser(prog="wanfast", description="Make videos with Wan 2.2.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"wanfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser, metavar="COMMAND")
    generate = commands.add_parser("generate", help="make a video from a prompt or a picture", allow_abbrev=False)
    add_generate_arguments(generate)
    plan = commands.add_parser("plan", help="show what generate would do; loads nothing", allow_abbrev=False)
    add_generate_arguments(plan)
    add_machine_arguments(plan)
    inspect = commands.add_parser("inspect", help="say what a checkpoint, tensor file or clip is", allow_abbrev=False)
    inspect.add_argument("path", help="folder, .safetensors, .gguf, .pth, LoRA, .mp4 or wan-tiny")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    convert = commands.add_parser("convert", help="write a model as one ready folder", allow_abbrev=False)
    _add_convert_arguments(convert)
    doctor = commands.add_parser("doctor", help="say what this machine is and what it lacks", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    bench = commands.add_parser("bench", help="measure speed and its cost beside the reference", allow_abbrev=False)
    _add_bench_arguments(bench)
    verify = commands.add_parser("verify", help="say whether a setting changes what videos show", allow_abbrev=False)
    _add_verify_arguments(verify)
    rerun = commands.add_parser("rerun", help="repeat a clip from the settings embedded in it", allow_abbrev=False)
    rerun.add_argument("clip", help="an .mp4 that wanfast wrote")
    resume = commands.add_parser("resume", help="go on with a run that was stopped", allow_abbrev=False)
    resume.add_argument("run", help="the .resume file beside the clip it was to become")
    for command in (rerun, resume):
        _add_repeat_arguments(command)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `generate` and `plan` share: ours, and the reference's generate.py flags as aliases."""
    add = parser.add_argument
    add("prompt", nargs="?", default=None, help="what to show")
    add("--prompt", dest="prompt_flag", metavar="TEXT", help=argparse.SUPPRESS)
    add("--prompts", metavar="FILE", help="make a clip of each line, into the folder -o; .jsonl lines may say more")
    _add_model_arguments(parser, "; default: the built-in wan-tiny, with a picture wan-tiny-i2v")
    add("--task", type=_task, metavar="NAME", help=f"check that the model is this one: {', '.join(MODELS)}")
    add("--negative-prompt", default="", metavar="TEXT", help="what to avoid; default: Wan's own list")
    add("--image", metavar="FILE", help="first frame, for image to video")
    add("--size", metavar="WxH", help="pixels, such as 832x480, or 480p, 720p; an image keeps its aspect on that area")
    add("--num-frames", "--frame-num", type=int, metavar="N", help="frames, 4n + 1")
    add("--seed", "--base-seed", type=int, metavar="N", help="same seed, same video; default: a random one, printed")
    add("--fps", type=int, metavar="N", help="frames per second of the file")
    _add_sampling_arguments(parser)
    add("--lora", action="append", default=[], metavar="FILE[:S][@E]", help="LoRA file, strength, expert (high, low)")
    add("--merge-loras", action="store_true", help="add LoRAs to copies of the weights, not beside; 16-bit models only")
    precisions = ("auto", "fp32", "exact", "fp8", "int8")
    says = "exact: bf16 where the reference has it; fp8, int8: the DiT multiplies in 8 bits, faster and less exact"
    add("--precision", choices=precisions, default="auto", help=says)
    says = "share of the keys, by blocks, that tokens attend to after the first steps: 1 is all; a GPU saves the rest"
    add("--attention-density", type=float, metavar="D", help=says)
    _add_device_arguments(parser)
    _add_output_arguments(parser, save_alias=True)
    _add_preview_argument(parser)
    add("--offload-model", type=_true_or_false, help=argparse.SUPPRESS)
    add("--convert-model-dtype", action="store_true", default=None, help=argparse.SUPPRESS)
    add("--t5-cpu", action="store_true", default=None, help=argparse.SUPPRESS)
    add("--ulysses-size", type=_one, help=argparse.SUPPRESS)
    for flag, reason in _NOT_SUPPORTED.items():
        add(flag, action=_NotSupported, nargs="?", const=reason, help=argparse.SUPPRESS)


def _add_model_arguments(parser: argparse.ArgumentParser, default: str = "") -> None:
    add = parser.add_argument
    add("--model", "--ckpt-dir", metavar="PATH", help=f"model folder or file, t2v-a14b, or Hub id{default}")
    add("--high", metavar="PATH", help="file or folder of the high-noise expert, instead of --model")
    add("--low", metavar="PATH", help="of the low-noise expert; default: the one named like the other")
    add("--vae", metavar="FILE", help="the VAE; default: the model's own, or one near its files")
    add("--text-encoder", metavar="FILE", help="the umT5 encoder; default: likewise")
    add("--tokenizer", metavar="FILE", help="tokenizer.json or spiece.model; default: likewise")


def _add_repeat_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", "--ckpt-dir", metavar="PATH", help="use this model folder instead of the recorded one")
    add("--image", metavar="FILE", help="use this picture instead of the recorded one")
    add("--lora", action="append", default=[], metavar="FILE", help="where a recorded LoRA is by now")
    _add_device_arguments(parser)
    _add_output_arguments(parser)
    _add_preview_argument(parser)


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model_arguments(parser)
    add("-o", "--output", metavar="DIR", help="the folder to write; default: named after model and precision")
    add(
        "--precision",
        choices=("exact", "fp8", "int8"),
        default="exact",
        help="of the DiT's blocks; exact changes no number that the exact precision computes with",
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress, no notes")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", default=None, help="what to show")
    _add_model_arguments(parser)
    add("--random", action="store_true", help="random weights in the sizes of --model: speed alone, no checkpoint")
    add("--tiny", action="store_true", help="wan-tiny, or with --model one of its family as small; runs anywhere")
    add(
        "--tiers",
        metavar="NAMES",
        help="precisions, presets, densities or sums of them, by commas: exact,int8+density0.5",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what to avoid; default: Wan's own list")
    add("--image", metavar="FILE", help="first frame; default, where the model needs one: a drawn one")
    add("--size", metavar="WxH", help="pixels, such as 832x480, or 480p, 720p")
    add("--num-frames", "--frame-num", type=int, metavar="N", help="frames, 4n + 1")
    add("--seed", type=int, default=0, metavar="N", help="of the noise, which all engines have")
    _add_sampling_arguments(parser)
    add("--lora", action="append", default=[], metavar="FILE[:S][@E]", help="of every engine, the reference included")
    add("--runs", type=int, default=3, metavar="N", help="of each engine in turn, after its cold one; default: 3")
    add("--warmup", type=int, default=0, metavar="N", help="runs after the cold one that do not count; default: 0")
    add("--reference", metavar="DIR", help="a checkout of Wan-Video/Wan2.2, to be run beside diffusers")
    precisions = ("auto", "fp32", "bf16")
    add(
        "--reference-precision", choices=precisions, default="auto", help="of diffusers; auto: bf16 on a GPU, else fp32"
    )
    placements = ("resident", "model", "group")
    add("--reference-offload", choices=placements, default="model", help="where diffusers keeps weights, with a GPU")
    _add_device_arguments(parser)
    add("-o", "--output", metavar="DIR", help="folder for bench.json and bench.md; default: here")
    add("--json", metavar="FILE", help="name of the JSON")
    add("--markdown", metavar="FILE", help="name of the Markdown")
    add("--overwrite", action="store_true", help="replace the report's files if they exist")
    add("--compare", metavar="FILE", help="an earlier JSON of the same case: flag stages that are slower than in it")
    add("--fail-if-slower", action="store_true", help="exit code 1 if one is")
    add("--fail-if-different", action="store_true", help="exit code 1 if a video differs more from the reference's")
    add("--quiet", action="store_true", help="no progress, no notes")
    parser.set_defaults(task=None, fps=None, attention_density=None)


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suite", choices=("tiny",), default="tiny", help="tiny: captions for a trained wan-tiny, judged by pixels")
    _add_model_arguments(parser, "; default: the built-in wan-tiny")
    says = "precisions, presets, densities or sums like int8+density0.5, by commas; each is compared with exact"
    add("--tiers", default="fp32,int8,fp8", metavar="NAMES", help=f"{says}; default: fp32,int8,fp8")
    _add_step_arguments(parser)
    add("--lora", action="append", default=[], metavar="FILE[:S][@E]", help="of the tiers, not of exact")
    add("--captions", type=int, default=200, metavar="N", help="the first N of 200; default: all")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    add("--fail-if-worse", action="store_true", help="exit code 1 if a tier follows clearly fewer captions than exact")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress, no notes")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names another machine than this one, and how files that are not there would store a model."""
    add = parser.add_argument
    add("--gpu", metavar="NAME", help="plan for this card: 4090, 5090, h200, ...")
    add("--stored", metavar="FORMAT", help="of a model named without files: fp32 (as published), bf16, fp8, q4_k, ...")


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    add("--vram", metavar="SIZE", help="of a GPU that may be used, such as 24GB; on a CPU what blocks are copied to")
    add("--ram", metavar="SIZE", help="host memory that may be used, such as 64GB; default: what is free")


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    _add_step_arguments(parser)
    names = "lightning4: 4 steps, euler, shift 5, guidance 1, for step-distilled files"
    parser.add_argument("--preset", metavar="NAME", help=names)


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    steps = ("--steps", "--num-inference-steps", "--sample-steps")
    add(*steps, dest="num_inference_steps", type=int, metavar="N", help="solver steps")
    add("--guidance", "--sample-guide-scale", type=float, metavar="G", help="guidance of both experts")
    add("--guidance-high", type=float, metavar="G", help="guidance of the high-noise expert")
    add("--guidance-low", type=float, metavar="G", help="guidance of the low-noise expert")
    add("--shift", "--sample-shift", type=float, metavar="S", help="shift of the noise schedule")
    add("--solver", "--sample-solver", choices=sorted(_SOLVERS), help="how a step is taken")


def _add_output_arguments(parser: argparse.ArgumentParser, *, save_alias: bool = False) -> None:
    names = ["-o", "--output", *(["--save-file"] if save_alias else [])]
    parser.add_argument(
        *names, metavar="FILE", dest="output", help="the .mp4 to write; default: named after the prompt"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def _add_preview_argument(parser: argparse.ArgumentParser) -> None:
    says = "a small .webp or .gif of the video to come, replaced after each step"
    parser.add_argument("--preview", metavar="FILE", help=says)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        A namespace with `command` and, for `generate` and `plan`, one `prompt` and a list `notes` of lines to show.

    Raises:
        SystemExit: code 2 after a one-line message, or 0 after help.
    """
    words = [_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = build_parser().parse_known_args(words)
    parser: OneLineParser = arguments.parser
    if unknown:
        parser.refuse_unknown(unknown)
    for name in _NEVER_EMPTY:
        if getattr(arguments, name, None) == "":
            parser.error(f"{name}: must not be empty; leave it out or give a value")
    if arguments.command in ("generate", "plan"):
        _settle_generate(parser, arguments)
    if arguments.command == "bench":
        arguments.words = words
    if arguments.command in ("bench", "verify"):
        arguments.solver = _SOLVERS[arguments.solver] if arguments.solver else None
    return arguments


def _with_dashes(word: str) -> str:
    """Spell a flag's name with dashes: the reference and Python people write underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z0-9_-]+", name) else word


def _settle_generate(parser: OneLineParser, arguments: argparse.Namespace) -> None:
    if arguments.prompt is not None and arguments.prompt_flag is not None:
        parser.error("prompt: given twice, as an argument and as --prompt")
    if arguments.prompt is None:
        arguments.prompt = arguments.prompt_flag
    if arguments.prompts is not None:
        _settle_batch(parser, arguments)
    elif arguments.prompt is None and arguments.image is None and arguments.command == "generate":
        parser.error('prompt: must be given, got none, for example "a red circle moves left"')
    if arguments.prompt is None and arguments.command == "generate":
        arguments.prompt = ""
    arguments.solver = _SOLVERS[arguments.solver] if arguments.solver else None
    arguments.notes = [
        f"{flag} is not needed: {reason}"
        for flag, reason in _NOT_NEEDED.items()
        if getattr(arguments, flag.removeprefix("--").replace("-", "_")) is not None
    ]


def _settle_batch(parser: OneLineParser, arguments: argparse.Namespace) -> None:
    if arguments.command == "plan":
        parser.error("prompts: must be left out, as a plan is of one clip; give one prompt")
    if arguments.prompt is not None:
        parser.error("prompts: must not be given beside a prompt; put it into the file")
    if arguments.preview is not None:
        parser.error("preview: must be left out with --prompts, as it is of one clip")


def _task(text: str) -> str:
    names = {name.lower(): name for name in MODELS}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MODELS)}, got {text}")
    return names[text.lower()]


def _true_or_false(text: str) -> str:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text


def _one(text: str) -> str:
    if text != "1":
        raise argparse.ArgumentTypeError(f"must be 1, as {_ONE_GPU}, got {text!r}; more are not supported")
    return text


def request_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pick from a parsed `generate` line what `Pipeline.plan` takes, but for the size and the picture."""
    return {name: getattr(arguments, name) for name in _REQUEST_ARGUMENTS}
