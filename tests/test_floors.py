"""The shape of the code, held by the code: imports go down, files and functions stay short, packages are all listed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("wanfast/**/*.py"), *ROOT.glob("kernels/**/*.py")])
EVERYTHING = sorted(
    [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("csrc/*"), ROOT / "setup.py"]
)

# A module imports from floors below its own; modules inside one package folder may import each other.
FLOOR = {
    "block_sizes": -1,  # numbers that the kernels read too
    "errors": 0,
    "config": 0,
    "version": 0,
    "locks": 0,
    "kernels": 0,
    "_C": 0,
    "stored": 0,
    "linear": 1,
    "out_of_memory": 1,
    "open_file": 1,
    "mappings": 1,
    "schedule": 2,
    "request": 2,
    "rope": 2,
    "residency": 2,
    "checkpoint": 2,
    "images": 2,
    "video": 2,
    "mp4": 1,
    "pixels": 1,
    "progress": 2,
    "preview": 1,
    "arguments": 2,
    "solvers": 2,
    "plan": 3,
    "dit": 3,
    "text": 3,
    "vae": 3,
    "machines": 1,
    "weight_sizes": 4,
    "host_memory": 4,
    "budget": 5,
    "fitting": 6,
    "predict": 6,
    "precision": 7,
    "plan_text": 7,
    "rates": 7,
    "forecast": 8,
    "plan_command": 12,
    "lora_names": 3,
    "lora": 4,
    "adapter": 5,
    "lora_summary": 5,
    "inspect_command": 6,
    "presets": 4,
    "settings": 4,
    "model": 4,
    "tiny": 1,
    "convert": 5,
    "prompt_cache": 5,
    "run_state": 5,
    "prompt_file": 1,
    "loaded": 6,
    "diffusers_backend": 6,
    "denoise": 7,
    "prompts": 8,
    "generation": 9,
    "pipeline": 10,
    "batch": 10,
    "doctor": 10,
    "__init__": 11,
    "command_parts": 11,
    "batch_command": 12,
    "judge": 0,
    "random_weights": 1,
    "bench": 12,
    "verify": 13,
    "commands": 14,
    "__main__": 15,
}


def _part(path: Path) -> str:
    relative = path.relative_to(ROOT).parts
    return "kernels" if relative[0] == "kernels" else relative[1].removesuffix(".py")


def _wanfast_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "wanfast":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("wanfast.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    part = _part(path)
    for imported in _wanfast_imports(path) - {part}:
        if imported not in FLOOR:  # a name taken from wanfast/__init__.py itself
            assert FLOOR[part] > FLOOR["__init__"], f"{path}: imports {imported} from the package's door"
            continue
        assert FLOOR[imported] < FLOOR[part], (
            f"{path.name} (floor {FLOOR[part]}) imports {imported} (floor {FLOOR[imported]})"
        )


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def _is_device_kernel(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of signature and body; the docstring is for the reader and does not count."""
    first = node.body[0]
    is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_documented else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


@pytest.mark.parametrize("path", [p for p in EVERYTHING if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_is_longer_than_60_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_device_kernel(node):
            assert _length(node) <= 60, f"{path.name}: {node.name} has {_length(node)} lines"


def test_every_package_folder_is_installed() -> None:
    folders = (
        {"wanfast"} | {f"wanfast.{p.parent.name}" for p in ROOT.glob("wanfast/*/__init__.py")} | {"wanfast.kernels"}
    )
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    listed = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "packages")
    assert set(listed) == folders
