"""What a report says of where it was made: machine, versions, commit."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import wanfast
from wanfast.doctor import probe
from wanfast.version import __version__

_PACKAGES = ("torch", "triton", "diffusers", "transformers")


def about_here(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Gather date, command, commit, versions and machine, as the report's schema has them.

    Args:
        command: the words of the command line, program first.
        device: that the case runs on; some copies to a GPU are timed.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": commit_of(Path(wanfast.__file__).parent),
        "versions": {
            "wanfast": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "ram": _ram(),
            "gpu": _gpu(device) if device.type == "cuda" else None,
        },
    }


def commit_of(folder: Path) -> str | None:
    """Name the commit of a folder's checkout, with + where something in it was changed; None where there is none."""
    git = shutil.which("git")
    if git is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        commit = _told([git, "-C", str(folder), "rev-parse", "HEAD"])
        # An installed package may lie inside a checkout of something else, which does not have it.
        _told([git, "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"])
        changed = _told([git, "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
        return commit[:12] + ("+" if changed else "")
    return None


def _told(line: list[str]) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = probe().gpus[index]
    driver, limit, clock = _settings(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    return {
        "name": seen.name,
        "capability": ".".join(map(str, seen.capability)),
        "memory": seen.memory_bytes,
        "link": seen.copy_bytes_per_second,
        "driver": driver,
        "power_limit": limit,
        "max_clock": clock,
    }


def _settings(name: str) -> tuple[str | None, str | None, str | None]:
    """Driver, power limit and highest clock, where nvidia-smi tells them."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
            driver, limit, clock = _told([program, "-i", name, query, "--format=csv,noheader"]).split(", ")
            return driver, limit, clock
    return None, None, None
