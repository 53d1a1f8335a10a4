"""All that a GPU is needed for, in one go of at most eight minutes: build, check, time, record.

    python benchmarks/gpu.py [--minutes 8] [--results FILE]

Works on a copy, with whatever torch, Triton and pytest the Python has that runs it: nothing is installed. Every part
is a process of its own with a limit on its time, the most telling first; what a part has measured is recorded as soon
as it ends, so a part that fails or hangs costs its own numbers only. Writes benchmarks/results/<gpu>.json.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("wanfast", "kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SIZES = ("14B-480p", "14B-720p", "5B")
KINDS = {
    "attention": 100,
    "linear": 90,
    "norm": 100,
    "conv": 60,
    "block": 60,
    "quantize_rows or guided": 40,
}  # seconds at most, of one size


@dataclass(frozen=True, slots=True)
class Part:
    """One process."""

    name: str
    command: Sequence[str]
    seconds: float  # at most
    records: bool = False  # whether it leaves a run for record.py
    environment: Mapping[str, str] = field(default_factory=dict)  # beside our own


def parts() -> list[Part]:
    """Everything there is to do, the most telling first."""
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    # Files whose imports this Python lacks are passed over, not failed.
    check = ["pytest", "-q", "tests/kernels", "--continue-on-collection-errors", "-p", "no:cacheprovider", *workers]
    build = Part("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 90)
    timings = [
        Part(f"{kind} {size}", _timing("test_kernels.py", f"({kind}) and {size}"), most, True)
        for size in SIZES
        for kind, most in KINDS.items()
    ]
    recipes = _timing("test_recipes.py", "recipe")
    residency = [sys.executable, "benchmarks/residency_gpu.py", "--json=run.json"]
    return [
        build,
        *timings[: len(KINDS)],
        Part("check", [sys.executable, "-m", *check], 120),
        Part("recipes", recipes, 60, True),
        Part("residency steps", [*residency, "--only=link,steps", "--seconds=100"], 140, True),
        Part("residency peaks", [*residency, "--only=peaks,peers", "--seconds=60"], 90, True),
        *timings[len(KINDS) :],
        Part("recipes as on Ada", recipes, 60, True, {"DISABLE_MMA_V3": "1"}),  # of Hopper: the model's other check
    ]


def _timing(file: str, selected: str) -> list[str]:
    options = ["-q", f"benchmarks/{file}", "-k", selected, "-p", "no:cacheprovider", "--benchmark-json=run.json"]
    return [sys.executable, "-m", "pytest", *options]


def run(part: Part, tree: Path, seconds: float) -> str:
    """Run one part in the copy and say how it ended; its output goes to ours."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1"} | part.environment
    environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    try:
        process = subprocess.Popen(part.command, cwd=tree, env=environment, start_new_session=True)
    except OSError as error:
        return f"{part.name}: did not start: {error}"
    try:
        ended = process.wait(seconds)
        how = "done" if ended == 0 else f"ended with {ended}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pytest's workers too
        process.wait()
        how = "stopped at its limit"
    return f"{part.name}: {how} after {time.monotonic() - start:.0f} s"


def record(tree: Path, results: Path) -> None:
    """Merge what a timing part measured into the results."""
    run_file = tree / "run.json"
    if run_file.exists() and run_file.stat().st_size:
        command = [sys.executable, str(ROOT / "benchmarks" / "record.py"), str(run_file), str(results)]
        subprocess.run(command, check=False, timeout=60)
        run_file.unlink()


def copy_tree(target: Path) -> None:
    """Copy the repository as it is installed: kernels/ stands inside the package."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored, symlinks=True)
        elif source.exists():
            shutil.copy(source, target / name)
    inside = target / "wanfast" / "kernels"
    if not inside.exists():
        inside.symlink_to("../kernels")


def gpu_name() -> str:
    """The GPU's name as part of a file's name: nvidia-geforce-rtx-4090."""
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        sys.exit(f"no GPU that torch can use: {done.stderr.strip().splitlines()[-1:]}")
    return re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().lower()).strip("-")


def main() -> None:
    """Do every part that fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<gpu>.json")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    results = arguments.results or ROOT / "benchmarks" / "results" / f"{gpu_name()}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for part in parts():
            left = end - time.monotonic()
            if left < 15:
                told.append(f"{part.name}: no time left")
                continue
            told.append(run(part, tree, min(part.seconds, left - 5)))
            print(told[-1], flush=True)
            if part.records:
                record(tree, results)
    print("\n".join(["", *told, f"results: {results}"]))


if __name__ == "__main__":
    main()
