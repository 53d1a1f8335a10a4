"""What the doctor makes of machines that are not here."""

import json
import shlex
from dataclasses import replace

import pytest

from wanfast.__main__ import main
from wanfast.arguments import build_parser
from wanfast.checkpoint.lookup import Sources
from wanfast.command_parts import sources_of
from wanfast.doctor import GPU, Finding, Machine, diagnose, probe

CARD = GPU(
    name="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    memory_bytes=25_000_000_000,
    free_bytes=24_000_000_000,
    copy_bytes_per_second=25e9,
)
HEALTHY = Machine(
    system="Linux 6.1 x86_64",
    python="3.12.3",
    torch="2.11.0+cu128",
    torch_cuda="12.8",
    has_nvidia_driver=True,
    gpus=(CARD,),
    triton="3.7.1",
    instruction_sets=("avx2", "portable"),
    has_compiler=True,
    threads=8,
    free_memory_bytes=64_000_000_000,
    pin_limit_bytes=None,
    has_x264=True,
    disk_free_bytes=500_000_000_000,
    packages={"diffusers": "0.35.2", "gguf": None},
)


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    findings = diagnose(HEALTHY)
    assert {finding.status for finding in findings} == {"ok"}
    assert all(finding.remedy is None for finding in findings)
    gpu = next(finding.says for finding in findings if finding.about == "GPU 0")
    assert "RTX 4090, sm_89, 25.0 GB, 24.0 GB free, 25.0 GB/s from pinned memory (measured)" in gpu


# what differs: what it is about, how bad, and words of the remedy
CASES: dict[str, tuple[Machine, str, str, str | None]] = {
    "no GPU": (replace(HEALTHY, gpus=(), has_nvidia_driver=False), "GPU", "note", None),
    "CPU build": (replace(HEALTHY, gpus=(), torch_cuda=None), "GPU", "problem", "pip install --force-reinstall torch"),
    "old driver": (replace(HEALTHY, gpus=()), "GPU", "problem", "update the driver"),
    "old card": (replace(HEALTHY, gpus=(replace(CARD, capability=(7, 5)),)), "GPU 0", "problem", "--precision fp32"),
    "no Triton": (replace(HEALTHY, triton=None), "Triton", "problem", "pip install triton==3.7.1"),
    "no Triton, no GPU": (
        replace(HEALTHY, triton=None, gpus=(), has_nvidia_driver=False),
        "Triton",
        "note",
        None,
    ),
    "slow Triton": (replace(HEALTHY, triton="3.9.0"), "Triton", "note", "pip install triton==3.7.1"),
    "no extension": (
        replace(HEALTHY, instruction_sets=(), gpus=(), has_nvidia_driver=False),
        "extension",
        "problem",
        "pip install --force-reinstall --no-deps wanfast",
    ),
    "no compiler": (
        replace(HEALTHY, instruction_sets=(), has_compiler=False),
        "extension",
        "note",
        "apt install g++",
    ),
    "little memory": (replace(HEALTHY, free_memory_bytes=10**10), "memory", "note", "wanfast convert"),
    "locked memory": (replace(HEALTHY, pin_limit_bytes=8_388_608), "locked memory", "note", "ulimit -l unlimited"),
    "no x264": (replace(HEALTHY, has_x264=False), "video", "problem", "av"),
    "full disk": (replace(HEALTHY, disk_free_bytes=10**9), "disk", "note", "HF_HOME"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_ill_has_its_remedy(name: str) -> None:
    machine, about, status, remedy = CASES[name]
    before = {finding.about: finding for finding in diagnose(HEALTHY)}
    finding: Finding = next(finding for finding in diagnose(machine) if finding.about == about)
    assert finding.status == status
    assert finding.remedy is None if remedy is None else remedy in (finding.remedy or "")
    others = [found for found in diagnose(machine) if found.about in before and found.about != about]
    if machine.gpus and name != "old card":
        assert all(found == before[found.about] for found in others)


def test_commands_of_wanfast_can_be_pasted() -> None:
    """They are lines that wanfast takes, and name a model: without one they would mean the built-in one."""
    remedies = {finding.remedy or "" for machine, *_ in CASES.values() for finding in diagnose(machine)}
    commands = [shlex.split(remedy) for remedy in remedies if remedy.startswith("wanfast ")]
    assert commands
    for _, *words in commands:
        arguments = build_parser().parse_args(words)
        assert arguments.command == "doctor" or sources_of(arguments) != Sources()


def test_newer_triton_is_well_where_there_is_no_ada() -> None:
    hopper = replace(HEALTHY, triton="3.9.0", gpus=(replace(CARD, capability=(9, 0)),))
    assert {finding.status for finding in diagnose(hopper)} == {"ok"}


def test_the_command_tells_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "wanfast" in told and "Triton" in told and "Traceback" not in told
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machine"]["python"] == probe().python
    assert {finding["status"] for finding in told["findings"]} <= {"ok", "note", "problem"}
