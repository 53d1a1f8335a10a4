"""docs/benchmarks.md says what benchmarks/results/*.json say, and nothing else."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tools() -> tuple[Any, Any]:
    sys.path.append(str(ROOT / "benchmarks"))
    import record
    import report

    return record, report


def test_the_page_is_that_of_the_results(tools: tuple[Any, Any]) -> None:
    _, report = tools
    results = report.load_results(ROOT / "benchmarks" / "results")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.make_page(results), "python benchmarks/report.py"
    assert (ROOT / "docs" / "benchmarks.svg").read_text() == report.make_picture(results)


RUN: dict[str, Any] = {
    "commit_info": {"id": "0123456789abcdef", "dirty": False},
    "machine_info": {
        "cpu": {"brand_raw": "X", "count": 2, "arch": "Y", "flags": []},
        "python_version": "3",
        "gpu": None,
    },
    "benchmarks": [
        {
            "name": "test_a[b]",
            "fullname": "benchmarks/test_a.py::test_a[b]",
            "stats": {"median": 0.123456, "min": 0.1, "max": 0.2, "iqr": 0.0, "rounds": 5},
            "extra_info": {"peer_seconds": 0.5, "peer_seconds_over_ours": 4.05, "peak_mb": 10.2, "note": 3},
        }
    ],
}


def test_seconds_are_of_one_call(tools: tuple[Any, Any]) -> None:
    record, _ = tools
    run = copy.deepcopy(RUN)
    run["benchmarks"][0]["extra_info"]["calls_per_round"] = 10
    entry = record.record(run, {})["benchmarks"][0]
    assert entry["seconds"] == {"median": 0.01235, "min": 0.01, "max": 0.02, "iqr": 0.0, "rounds": 5}
    assert "calls_per_round" not in entry["extra_info"]


def test_a_run_replaces_what_it_measured_and_keeps_the_rest(tools: tuple[Any, Any]) -> None:
    record, report = tools
    kept = {"name": "test_c", "seconds": {"median": 1.0}, "extra_info": {}}
    old = {"name": "test_a[b]", "seconds": {"median": 9.0}, "extra_info": {}}
    merged = record.record(RUN, {"how": "by hand", "benchmarks": [old, kept]})
    assert [entry["name"] for entry in merged["benchmarks"]] == ["test_a[b]", "test_c"]
    assert merged["benchmarks"][0]["seconds"]["median"] == 0.1235
    assert merged["benchmarks"][0]["commit"] == "0123456789ab" and merged["how"] == "by hand"
    page = report.make_page({"here": merged})
    assert "| a[b] | 0.1235 | peer | 0.5 | 4.05 | 10 |  | 0123456789ab |" in page
    assert "- a[b]: note 3" in page and "| c | 1 |" in page
    assert "a[b]" in report.make_picture({"here": merged})
