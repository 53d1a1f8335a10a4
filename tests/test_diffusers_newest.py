"""What is held to the diffusers of constraints.txt is held to the newest one too, in a process that imports that."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What of wanfast meets diffusers: pipelines under `accelerate`, and the reference of `wanfast bench`.
FILES = [*sorted(path.name for path in ROOT.glob("tests/test_accelerate*.py")), "bench/test_engines.py"]


def newest() -> str:
    found = re.search(r"^NEWEST_DIFFUSERS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def run_with(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


def test_all_of_it_works_with_the_newest_diffusers() -> None:
    folder = ROOT / ".diffusers" / newest()
    if not folder.exists():
        pytest.skip(f"diffusers {newest()} is not there: `make diffusers-newest` fetches it")
    told = run_with(folder, "-P", "-c", "import diffusers; print(diffusers.__version__, diffusers.__file__)")
    version, place = told.stdout.split()[-2:]
    assert version == newest() and Path(place).is_relative_to(folder), told.stderr
    done = run_with(folder, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\b\d{3} passed", done.stdout), done.stdout[-2000:]


def test_it_is_newer_than_the_one_the_other_tests_run_with() -> None:
    pinned = re.search(r"^diffusers==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and importlib.util.find_spec("diffusers") is not None
    own, other = ([int(part) for part in version.split(".")] for version in (pinned[1], newest()))
    assert own < other
