"""benchmarks/gpu.py loses nothing but the part that fails: here without a GPU, with parts that stand in for its own."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def gpu() -> Any:
    import gpu

    return gpu


def part(gpu: Any, code: str, *, records: bool = False) -> Any:
    return gpu.Part("part", [sys.executable, "-c", code], 60, records)


def test_a_part_says_how_it_ended(gpu, tmp_path):
    assert gpu.run(part(gpu, "pass"), tmp_path, 60).startswith("part: done after")
    assert gpu.run(part(gpu, "raise SystemExit(3)"), tmp_path, 60).startswith("part: ended with 3")
    assert gpu.run(gpu.Part("part", ["/no/such/program"], 60), tmp_path, 60).startswith("part: did not start")


def test_a_part_has_its_own_environment(gpu, tmp_path):
    code = "import os; raise SystemExit(os.environ['WANTED'] != 'yes' or 'TRITON_INTERPRET' in os.environ)"
    one = gpu.Part("part", [sys.executable, "-c", code], 60, environment={"WANTED": "yes"})
    assert gpu.run(one, tmp_path, 60).startswith("part: done")


def test_a_part_that_hangs_is_stopped_with_its_children(gpu, tmp_path):
    child = "import time, pathlib; time.sleep(2); pathlib.Path('late').touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run(part(gpu, code), tmp_path, 0.5).startswith("part: stopped at its limit")
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_the_copy_is_importable_as_installed(gpu, tmp_path):
    gpu.copy_tree(tmp_path)
    code = "import wanfast.kernels as k; open('where', 'w').write(k.attention.__code__.co_filename)"
    assert gpu.run(part(gpu, code), tmp_path, 60).startswith("part: done")
    assert Path((tmp_path / "where").read_text()).is_relative_to(tmp_path)


def test_what_a_part_measured_is_merged_and_what_it_did_not_is_no_loss(gpu, tmp_path):
    run = {
        "commit_info": {"id": "unversioned"},
        "machine_info": {"cpu": {"brand_raw": "X", "count": 2, "arch": "Y"}, "gpu": "G"},
        "benchmarks": [
            {
                "name": "test_kernel[attention-5B]",
                "fullname": "benchmarks/test_kernels.py::test_kernel[attention-5B]",
                "stats": {"median": 1.0, "min": 1.0, "max": 1.0, "iqr": 0.0, "rounds": 7},
                "extra_info": {"calls_per_round": 4},
            }
        ],
    }
    results = tmp_path / "results.json"
    (tmp_path / "run.json").write_text(json.dumps(run))
    gpu.record(tmp_path, results)
    assert not (tmp_path / "run.json").exists()  # or the next part's failure would record it again
    (tmp_path / "run.json").write_text("")  # as a part leaves it that was stopped
    gpu.record(tmp_path, results)
    gpu.record(tmp_path, results)
    assert [entry["seconds"]["median"] for entry in json.loads(results.read_text())["benchmarks"]] == [0.25]


def test_the_parts_are_there_and_fit_the_time_one_by_one(gpu):
    for one in gpu.parts():
        assert 0 < one.seconds <= 140
        assert all((ROOT / name).exists() for name in one.command if name.endswith(".py") and "/" in name)
    assert sum(one.records for one in gpu.parts()) == len(gpu.SIZES) * len(gpu.KINDS) + 4


def test_every_pair_is_of_a_kind_that_is_timed(gpu):
    from kernel_pairs import PAIRS

    words = [kind.split(" or ") for kind in gpu.KINDS]
    assert [name for name in PAIRS if sum(any(word in name for word in kind) for kind in words) != 1] == []


SECTIONS = {
    "link": r"link",
    "steps": r"(step|switch step) (int8|exact) (480p|720p)",
    "peaks": r"peak int8 720p (24|16|12|8) GB",
    "peers": r"few blocks bf16 480p, (wanfast|diffusers)",
}


def test_the_residency_part_runs_up_to_cuda_itself_and_is_recorded(gpu, tmp_path):
    """Tiny shapes, and a GPU that is played: streams, pinned memory and the clock are not CUDA's, all else is."""
    command = [sys.executable, str(ROOT / "benchmarks" / "residency_gpu.py"), "--small", "--seconds=2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    one = gpu.Part("residency", [*command, "--json", str(tmp_path / "run.json")], 300, True, environment)
    assert gpu.run(one, ROOT, 300).startswith("residency: done")
    results = tmp_path / "results.json"
    gpu.record(tmp_path, results)
    entries = {entry["name"]: entry for entry in json.loads(results.read_text())["benchmarks"]}
    for pattern in SECTIONS.values():
        assert any(re.match(pattern, name) for name in entries)
    assert all(any(re.match(pattern, name) for pattern in SECTIONS.values()) for name in entries)
    assert entries["step int8 480p 2-slots"]["extra_info"]["slots"] == 2
    assert entries["step int8 480p resident"]["extra_info"]["over_resident"] == 1
    assert all(entry["seconds"]["median"] > 0 for name, entry in entries.items())
    assert not any("error" in entry["extra_info"] or "diffusers" in entry["extra_info"] for entry in entries.values())
    assert {entry["file"] for entry in entries.values()} == {"benchmarks/residency_gpu.py"}


def test_a_section_that_fails_costs_its_own(monkeypatch, tmp_path, capsys):
    import residency_gpu

    monkeypatch.setattr(residency_gpu, "play", lambda: None)

    def fail(bench):
        bench.note("before", [1.0])
        raise RuntimeError("no such thing")

    sections = {"one": fail, "other": lambda bench: bench.note("after", [2.0])}
    monkeypatch.setattr(residency_gpu, "SECTIONS", sections)
    assert residency_gpu.main(["--small", "--only=one,other", "--json", str(tmp_path / "run.json")]) == 1
    assert "failed: one" in capsys.readouterr().out
    names = [entry["name"] for entry in json.loads((tmp_path / "run.json").read_text())["benchmarks"]]
    assert names == ["before", "after"]
    with pytest.raises(SystemExit):
        residency_gpu.main(["--small", "--only=nothing"])
