"""Takes what pytest-benchmark wrote into a results file; a benchmark that is there already is replaced.

pytest benchmarks/test_vae.py --benchmark-json=run.json
python benchmarks/record.py run.json benchmarks/results/cpu-2-cores.json
"""

import json
import sys
from pathlib import Path
from typing import Any

_SECONDS = ("median", "min", "max", "iqr", "rounds")


def record(run: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Merge one run into results.

    Args:
        run: as pytest-benchmark writes it.
        results: of earlier runs on the same machine; empty for a first one.

    Returns:
        The results with the run's benchmarks, each with the commit it was measured at.
    """
    commit = run["commit_info"]["id"][:12] + ("+" if run["commit_info"].get("dirty") else "")
    entries = {entry["name"]: entry for entry in results.get("benchmarks", [])}
    for benchmark in run["benchmarks"]:
        calls = benchmark["extra_info"].pop("calls_per_round", 1)
        seconds = {key: benchmark["stats"][key] / (1 if key == "rounds" else calls) for key in _SECONDS}
        rounded = {key: int(value) if key == "rounds" else float(f"{value:.4g}") for key, value in seconds.items()}
        entries[benchmark["name"]] = {
            "name": benchmark["name"],
            "file": benchmark["fullname"].split("::")[0],
            "commit": commit,
            "seconds": rounded,
            "extra_info": benchmark["extra_info"],
        }
    machine = run["machine_info"]
    machine["cpu"] = {key: machine["cpu"].get(key) for key in ("brand_raw", "count", "arch")}
    return {**results, "machine_info": machine, "benchmarks": list(entries.values())}


def main(run_file: str, results_file: str) -> None:
    """Merge a file of one run into a file of results."""
    target = Path(results_file)
    results = json.loads(target.read_text()) if target.exists() else {}
    merged = record(json.loads(Path(run_file).read_text()), results)
    target.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
