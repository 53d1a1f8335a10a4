"""What is measured of a process and a machine: peaks that were reached, power where it can be read, rates, labels."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanfast.bench import about, measure
from wanfast.bench.measure import Meter, Stopwatch, peak_rate, peak_resident_bytes, power_reader, status_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CARD = SimpleNamespace(uuid="0a1b")


def test_a_peak_of_memory_is_seen_and_forgotten() -> None:
    meter = Meter(CPU)
    meter.start()
    before = status_bytes("VmRSS")
    assert before is not None
    torch.ones(50_000_000 // 4)
    first = meter.stop()
    assert first.ram is not None and first.ram >= before + 45e6
    meter.start()
    second = meter.stop()
    assert second.ram is not None and second.ram <= first.ram - 40e6
    assert (second.vram_allocated, second.vram_device, second.watts_mean, second.power_source) == (None,) * 4


def test_without_proc_the_systems_own_count_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_STATUS", Path("/nowhere"))
    assert status_bytes("VmRSS") is None
    peak = peak_resident_bytes()
    assert peak is not None and peak > 10e6


def test_a_stopwatch_adds_up_and_marks() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.stage("a"):
            time.sleep(0.002)
    with pytest.raises(KeyError), watch.stage("b"):
        raise KeyError
    watch.end("never begun")
    assert watch.seconds["a"] >= 0.004 and set(watch.seconds) == {"a", "b"}
    assert watch.steps == []
    for _ in range(3):
        watch.mark()
    assert len(watch.steps) == 2 and all(seconds >= 0 for seconds in watch.steps)


def test_a_cpus_peak_is_measured_and_labelled() -> None:
    peak = peak_rate(CPU, torch.float32)
    assert peak.source == "measured" and 1e8 < peak.flops < 1e14
    assert "float32" in peak.of and "threads" in peak.of


@pytest.mark.parametrize(
    ("dtype", "flops"), [(torch.bfloat16, 165.2e12), (torch.float32, 82.6e12), (torch.int8, 660.6e12)]
)
def test_a_known_cards_peak_is_its_datasheets(
    dtype: torch.dtype, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    peak = peak_rate(CUDA, dtype)
    assert (peak.flops, peak.source) == (flops, "datasheet") and "RTX 4090" in peak.of


class Nvml:
    """pynvml as far as it is used; milliwatts."""

    asked: str | None = None

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self.asked = name
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        return 312_500


def test_power_is_read_by_nvml_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    found = power_reader(CUDA)
    assert found is not None and (found[0], found[1](), nvml.asked) == ("NVML", 312.5, "GPU-0a1b")


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """nvidia-smi on the path, and no NVML."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARD)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@" >> "$0.log"\necho " 287.31"\n')
    program.chmod(0o755)
    return program


def test_power_is_read_by_nvidia_smi_else(smi: Path) -> None:
    found = power_reader(CUDA)
    assert found is not None and (found[0], found[1]()) == ("nvidia-smi", 287.31)
    assert "-i GPU-0a1b --query-gpu=power.draw" in smi.with_name("nvidia-smi.log").read_text()


def test_power_that_cannot_be_read_is_none(smi: Path) -> None:
    assert power_reader(CPU) is None
    smi.write_text('#!/bin/sh\necho "[N/A]"\n')
    assert power_reader(CUDA) is None
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert power_reader(CUDA) is None


def test_power_is_watched_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 300.0, *[200.0] * 1000])
    monkeypatch.setattr(measure, "power_reader", lambda device: ("a source", lambda: next(readings)))
    monkeypatch.setattr(measure, "_POWER_SECONDS", 0.001)
    meter = Meter(CPU)
    meter.start()
    time.sleep(0.05)
    seen = meter.stop()
    assert seen.watts_max == 300 and seen.watts_mean is not None and 100 < seen.watts_mean < 300
    assert seen.power_source == "a source"


def test_a_commit_is_that_of_a_checkout_that_has_the_package(tmp_path: Path) -> None:
    assert about.commit_of(tmp_path) is None

    def git(*words: str) -> None:
        line = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(line, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-q", "-m", "a")
    (tmp_path / "__init__.py").write_text("")
    assert about.commit_of(tmp_path) is None  # somebody else's checkout
    git("add", "__init__.py")
    git("commit", "-q", "-m", "b")
    clean = about.commit_of(tmp_path)
    assert clean is not None and len(clean) == 12
    (tmp_path / "a.txt").write_text("b")
    assert about.commit_of(tmp_path) == clean + "+"


def test_what_is_told_of_this_machine_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about.shutil, "which", lambda name: None)
    told: dict[str, Any] = about.about_here(["wanfast", "bench"], CPU)
    assert told["commit"] is None and told["machine"]["gpu"] is None
    assert (
        told["versions"]["torch"] == torch.__version__.split("+")[0] or told["versions"]["torch"] == torch.__version__
    )
    assert told["date"].endswith("+00:00")
