"""Kernels compile to what was designed: see tests/machine_code. The tables in tests/data/machine_code hold all of it.

After a change that is meant to alter the machine code of a family:
`python tests/machine_code --family rows --write`, and read the difference.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE_FILES = {path.stem for path in (ROOT / "tests" / "machine_code" / "cases").glob("[a-z]*.py")}
TABLES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests" / "data" / "machine_code").glob("*.json")}
ROWS = {name: (table["triton"], row) for table in TABLES.values() for name, row in table["cases"].items()}
OTHER_TRITON = 1.25  # registers: Triton 3.6 and 3.7 differ by up to 1.22 in kernels without tensor instructions
OTHER_VERSIONS = ("3.6.0", "3.9.0")  # `make triton-versions` fetches them


def measure(*options: str, paths: Sequence[Path] = ()) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "tests/machine_code", "--json", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def measured() -> dict:
    return measure()


def device_functions() -> dict[str, set[str]]:
    """Every @triton.jit function of kernels/, and the names that its body uses."""
    found = {}
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        real = {alias.asname: alias.name for alias in imports if alias.asname}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                names |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                found[node.name] = {real.get(name, name) for name in names}
    return found


def test_every_kernel_is_compiled(measured):
    uses = device_functions()
    reached: set[str] = set()
    left = {row["function"] for row in measured["cases"].values()}
    while left:
        reached |= left
        left = {name for function in left for name in uses.get(function, ()) if name in uses} - reached
    assert set(uses) - reached == set(), "in no case, nor called by a kernel that is"


def test_every_family_has_its_table(measured):
    assert set(TABLES) == CASE_FILES
    assert set(measured["cases"]) == set(ROWS)


def test_every_row_tile_is_compiled():
    from wanfast.kernels._tiles import ROW_WARPS

    assert {row["warps"] for row in TABLES["rows"]["cases"].values()} == {warps for _, warps in ROW_WARPS}


@pytest.mark.parametrize("name", ROWS)
def test_machine_code_is_as_designed(name, measured):
    row = dict(measured["cases"][name])
    assert row.pop("faults") == []
    written_by, want = ROWS[name]
    if measured["triton"] == written_by:
        assert row == want
    elif not want["loop"].get("tensor"):
        assert row["registers"] <= OTHER_TRITON * want["registers"]


@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions_of_triton_keep_the_design(version):
    folder = ROOT / ".triton" / version
    if not folder.exists():
        pytest.skip(f"Triton {version} is not there: `make triton-versions` fetches it")
    found = measure("--any-triton", paths=[folder])
    assert found["triton"] == version
    assert {name: row["faults"] for name, row in found["cases"].items() if row["faults"]} == {}
