"""What a run takes, measured in the process that runs it: seconds by stage, memory, power; and a device's peak."""

import ctypes
import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from wanfast.machines import known_gpu
from wanfast.plan import EIGHT_BIT, Precision

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY_SECONDS, _POWER_SECONDS = 0.05, 0.5  # between two looks
_PEAK_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square products that a peak is measured with
_PEAK_ROUNDS = 7

PowerReader = Callable[[], float]  # gives watts


class Stopwatch:
    """Seconds of the stages and steps of one run; on a GPU each reading waits for what is queued there."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing measured."""
        self.seconds: dict[str, float] = {}
        self._device = device
        self._begun: dict[str, float] = {}
        self._marks: list[float] = []

    def now(self) -> float:
        """Read the clock once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's seconds to a stage."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def begin(self, name: str) -> None:
        """Begin a stage."""
        self._begun[name] = self.now()

    def end(self, name: str) -> None:
        """End a stage, if it was begun; its seconds add up."""
        if name in self._begun:
            self.add(name, self.now() - self._begun.pop(name))

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def mark(self) -> None:
        """Note that a step begins here, or that the last one has ended."""
        self._marks.append(self.now())

    @property
    def steps(self) -> list[float]:
        """Seconds between the marks."""
        return [end - begin for begin, end in zip(self._marks, self._marks[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peaks of memory and power over a while; None is what cannot be read here."""

    ram: int | None  # bytes of this process resident in host memory, pages of mapped files included
    vram_allocated: int | None  # bytes that tensors had, as torch's allocator counts
    vram_reserved: int | None  # bytes that torch's allocator had from the driver
    vram_device: int | None  # bytes in use on the whole card as the driver counts, other processes included; sampled
    watts_mean: float | None
    watts_max: float | None
    power_source: str | None


class Meter:
    """Watches memory and power from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        """Find out what can be read here."""
        self._device = device
        found = power_reader(device)
        self._source = None if found is None else found[0]
        self._watts = None if found is None else found[1]
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._device_bytes: list[int] = []
        self._readings: list[float] = []

    def start(self) -> None:
        """Forget earlier peaks and begin."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed is not this run's
        with suppress(OSError):
            _CLEAR.write_text("5")  # the system's peak restarts from what is resident now
        self._device_bytes, self._readings = [], []
        self._stopped.clear()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._watch(lambda: self._device_bytes.append(_used_on_device(self._device)), _MEMORY_SECONDS)
        if self._watts is not None:
            self._watch(self._read_power, _POWER_SECONDS)

    def stop(self) -> Footprint:
        """End, and say what was seen."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        is_cuda = self._device.type == "cuda"
        return Footprint(
            ram=peak_resident_bytes(),
            vram_allocated=torch.cuda.max_memory_allocated(self._device) if is_cuda else None,
            vram_reserved=torch.cuda.max_memory_reserved(self._device) if is_cuda else None,
            vram_device=max(self._device_bytes, default=None),
            watts_mean=sum(self._readings) / len(self._readings) if self._readings else None,
            watts_max=max(self._readings, default=None),
            power_source=self._source if self._readings else None,
        )

    def _watch(self, look: Callable[[], None], seconds: float) -> None:
        def work() -> None:
            look()
            while not self._stopped.wait(seconds):
                look()

        self._threads.append(threading.Thread(target=work, name="wanfast-bench", daemon=True))
        self._threads[-1].start()

    def _read_power(self) -> None:
        with suppress(Exception):  # a reading that fails is none: the run goes on
            if self._watts is not None:
                self._readings.append(self._watts())


def status_bytes(field: str) -> int | None:
    """Read an amount of memory from /proc/self/status, such as VmRSS or VmHWM; None where there is no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_resident_bytes() -> int | None:
    """The most this process had in host memory, since `Meter.start` where the system allows to forget the rest."""
    if (peak := status_bytes("VmHWM")) is not None:
        return peak
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _used_on_device(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def power_reader(device: torch.device) -> tuple[str, PowerReader] | None:
    """Find what tells a card's power: NVML if its Python package is there, else nvidia-smi.

    Returns:
        The source's name and a function that gives watts; None where neither works, and on a CPU.
    """
    if device.type != "cuda":
        return None
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    for source, make in (("NVML", _nvml), ("nvidia-smi", _nvidia_smi)):
        with suppress(Exception):  # a package or a driver that is not there, or refuses: the next one may work
            read = make(name)
            read()
            return source, read
    return None


def _nvml(name: str) -> PowerReader:
    nvml: Any = import_module("pynvml")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(name)
    return lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000


def _nvidia_smi(name: str) -> PowerReader:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("nvidia-smi")
    line = [program, "-i", name, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    return lambda: float(subprocess.run(line, check=True, capture_output=True, text=True, timeout=10).stdout)


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device could do in a second."""

    flops: float
    of: str  # what these are
    source: Literal["datasheet", "measured"]


def peak_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the products that a precision is held to."""
    return torch.float32 if precision == "fp32" else torch.int8 if precision in EIGHT_BIT else torch.bfloat16


def peak_rate(device: torch.device, dtype: torch.dtype) -> Peak:
    """Give the rate of matrix products of a dtype: a known card's from its datasheet, any other device's measured.

    Args:
        device: that computes.
        dtype: torch.float32, torch.bfloat16, or torch.int8 for any 8-bit products. A device that is not in the table of
            cards is held to its 16-bit rate there.
    """
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return _measured_peak(device, torch.bfloat16 if dtype == torch.int8 else dtype)
    if dtype == torch.float32:
        return Peak(gpu.flops_32, f"{gpu.name}, fp32 without tensor cores", "datasheet")
    if dtype == torch.int8:
        return Peak(gpu.flops_8, f"{gpu.name}, 8-bit products, dense", "datasheet")
    return Peak(gpu.flops_16, f"{gpu.name}, 16-bit products, fp32 sums, dense", "datasheet")


def _measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Time square products; the fastest counts, as a peak is what nothing else disturbs."""
    side = _PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(_PEAK_ROUNDS):
        torch.mm(a, b)
        watch.mark()
    name = str(dtype).removeprefix("torch.")
    threads = f" on {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    what = f"the fastest of {_PEAK_ROUNDS} products of {side} x {side} matrices in {name}{threads}"
    return Peak(2 * side**3 / min(watch.steps), what, "measured")
