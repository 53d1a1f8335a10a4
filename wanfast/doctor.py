"""What this machine is, which of wanfast's paths it takes, what is missing, and the one command that mends it.

`probe` looks and changes nothing; `diagnose` is a pure function of what it saw.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import av
import torch

from wanfast.kernels._launch import HAS_TRITON
from wanfast.residency import free_memory
from wanfast.vae.extension import instruction_sets
from wanfast.version import __version__

Status = Literal["ok", "note", "problem"]

_SLOW_TRITON = (3, 8)  # from here on, Triton's 8-bit products spill on Ada
_MIN_CAPABILITY = (8, 0)  # bf16
_MIN_DISK_BYTES = 40e9  # the smallest published model
_COPY_BYTES = 256 << 20
_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    copy_bytes_per_second: float | None  # host to device from pinned memory, measured; None where pinning failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is."""

    system: str
    python: str
    torch: str
    torch_cuda: str | None  # version of CUDA that torch was built for
    has_nvidia_driver: bool
    gpus: tuple[GPU, ...]
    triton: str | None
    instruction_sets: tuple[str, ...]  # of the C++ extension on this CPU, best first; none where it was not built
    has_compiler: bool
    threads: int
    free_memory_bytes: int
    pin_limit_bytes: int | None  # of locked memory; None is no limit
    has_x264: bool
    disk_free_bytes: int  # where models are downloaded to
    packages: dict[str, str | None]  # optional ones and their versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    about: str
    status: Status
    says: str
    remedy: str | None = None  # a command, or what to do


def probe() -> Machine:
    """Look at this machine; on each GPU some copies are timed."""
    version = importlib.metadata.version("triton") if HAS_TRITON else None
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        has_nvidia_driver=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))) if torch.cuda.is_available() else (),
        triton=version,
        instruction_sets=tuple(instruction_sets()),
        has_compiler=any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")),
        threads=torch.get_num_threads(),
        free_memory_bytes=free_memory(torch.device("cpu")),
        pin_limit_bytes=_pin_limit(),
        has_x264="libx264" in av.codecs_available,
        disk_free_bytes=shutil.disk_usage(_nearest(_models_folder())).free,
        packages={name: _version(name) for name in ("diffusers", "transformers", "peft")},
    )


def diagnose(machine: Machine) -> list[Finding]:
    """Say what each thing means for wanfast, and how to mend what is wrong."""
    findings = [
        Finding(about="wanfast", status="ok", says=f"{__version__} on Python {machine.python}, {machine.system}"),
        *_gpu_findings(machine),
        _triton_finding(machine),
        _extension_finding(machine),
        _memory_finding(machine),
        _pin_finding(machine),
        _disk_finding(machine),
    ]
    if machine.has_x264:
        findings.append(Finding(about="video", status="ok", says="H.264 by libx264"))
    else:
        remedy = "pip install --force-reinstall --no-deps av"
        findings.append(Finding(about="video", status="problem", says="PyAV has no libx264 encoder", remedy=remedy))
    found = ", ".join(f"{name} {version}" for name, version in machine.packages.items() if version is not None)
    findings.append(Finding(about="optional packages", status="ok", says=found or "none"))
    return findings


def _gpu_findings(machine: Machine) -> list[Finding]:
    if not machine.gpus:
        built_for = f" for CUDA {machine.torch_cuda}" if machine.torch_cuda else ", CPU build"
        torch_is = f"torch {machine.torch}{built_for}"
        if not machine.has_nvidia_driver:
            says = f"none; {torch_is}; everything runs on the CPU; precision auto is fp32, or that of converted files"
            return [Finding(about="GPU", status="note", says=says)]
        if machine.torch_cuda is None:
            remedy = (
                "pip install --force-reinstall torch, with the index that torch's install page names for your driver"
            )
            return [Finding(about="GPU", status="problem", says=f"a driver is there, but {torch_is}", remedy=remedy)]
        says = f"a driver is there, but {torch_is} sees no GPU"
        remedy = "nvidia-smi; update the driver if its CUDA version is lower"
        return [Finding(about="GPU", status="problem", says=says, remedy=remedy)]
    findings = []
    for index, gpu in enumerate(machine.gpus):
        rate = gpu.copy_bytes_per_second
        copies = "no pinned memory" if rate is None else f"{rate / 1e9:.1f} GB/s from pinned memory (measured)"
        says = (
            f"{gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, {gpu.memory_bytes / 1e9:.1f} GB,"
            f" {gpu.free_bytes / 1e9:.1f} GB free, {copies}; torch {machine.torch};"
            " precision auto is exact, int8 where that does not fit, or that of converted files"
        )
        is_old = gpu.capability < _MIN_CAPABILITY
        findings.append(
            Finding(
                about=f"GPU {index}",
                status="problem" if is_old else "ok",
                says=says + ("; bf16 needs sm_80 or newer" if is_old else ""),
                remedy="--device cpu, or --precision fp32" if is_old else None,
            )
        )
    return findings


def _triton_finding(machine: Machine) -> Finding:
    if machine.triton is None:
        status: Status = "problem" if machine.gpus else "note"
        remedy = "pip install triton==3.7.1" if machine.gpus else None
        return Finding(about="Triton", status=status, says="not installed; torch's own operations serve", remedy=remedy)
    major, minor = (int(part) for part in machine.triton.split(".")[:2])
    is_ada = any(gpu.capability == (8, 9) for gpu in machine.gpus)
    if (major, minor) >= _SLOW_TRITON and is_ada:
        says = f"{machine.triton} makes slow 8-bit products on Ada"
        return Finding(about="Triton", status="note", says=says, remedy="pip install triton==3.7.1")
    used = (
        "runs attention, norms, solver, dequantisation and the 8-bit precisions"
        if machine.gpus
        else "not used without a GPU"
    )
    return Finding(about="Triton", status="ok", says=f"{machine.triton}, {used}")


def _extension_finding(machine: Machine) -> Finding:
    if machine.instruction_sets:
        says = f"VAE convolutions in C++ by {machine.instruction_sets[0]} on {machine.threads} threads"
        return Finding(about="extension", status="ok", says=says)
    install = "pip install --force-reinstall --no-deps wanfast"
    if not machine.has_compiler:
        install = f"install a C++ compiler (Debian: apt install g++), then {install}"
    # On a GPU the extension is not used.
    status: Status = "note" if machine.gpus else "problem"
    return Finding(about="extension", status=status, says="not built; the VAE is slower on a CPU", remedy=install)


def _memory_finding(machine: Machine) -> Finding:
    says = f"{machine.free_memory_bytes / 1e9:.1f} GB of host memory free"
    if machine.free_memory_bytes >= 32e9:
        return Finding(about="memory", status="ok", says=says)
    return Finding(
        about="memory",
        status="note",
        says=f"{says}; blocks of a larger model are read from the disk in every step",
        remedy="wanfast convert --model t2v-a14b --precision int8",
    )


def _pin_finding(machine: Machine) -> Finding:
    limit = machine.pin_limit_bytes
    if limit is None or not machine.gpus:
        says = "no limit" if limit is None else f"{limit / 1e6:.0f} MB; of no account without a GPU"
        return Finding(about="locked memory", status="ok", says=says)
    return Finding(
        about="locked memory",
        status="note",
        says=f"{limit / 1e6:.0f} MB (ulimit -l); where CUDA keeps to it, weights go through two small buffers",
        remedy="ulimit -l unlimited",
    )


def _disk_finding(machine: Machine) -> Finding:
    folder, free = _models_folder(), machine.disk_free_bytes
    says = f"{free / 1e9:.0f} GB free in {folder}"
    if free >= _MIN_DISK_BYTES:
        return Finding(about="disk", status="ok", says=says)
    return Finding(about="disk", status="note", says=f"{says}; a model has 34 to 126 GB", remedy="export HF_HOME=DIR")


def format_findings(findings: list[Finding]) -> str:
    """Lay findings out for a terminal."""
    width = max(len(finding.about) for finding in findings)
    marks = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.status]}  {finding.about:<{width}}  {finding.says}")
        if finding.remedy is not None:
            lines.append(f"{'':7}  {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def findings_to_dict(machine: Machine, findings: list[Finding]) -> dict[str, Any]:
    """Return machine and findings as JSON-able values."""
    return {"machine": asdict(machine), "findings": [asdict(finding) for finding in findings]}


def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    return GPU(
        name=properties.name,
        capability=torch.cuda.get_device_capability(index),
        memory_bytes=properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(index)[0],
        copy_bytes_per_second=_copy_rate(index),
    )


def _copy_rate(index: int) -> float | None:
    try:
        source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    except RuntimeError:
        return None
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(index)
    start = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(index)
    return _COPIES * _COPY_BYTES / (time.perf_counter() - start)


def _pin_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _models_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
