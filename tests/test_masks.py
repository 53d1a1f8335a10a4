"""A masked-off lane that reads past the end changes no result, so bounds are read from the source, not measured."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
IN_BOUNDS = "# in bounds:"


def faults(source: str) -> list[str]:
    """Loads and stores that neither have a mask nor say why they need none, and masked loads without `other`."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store")):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        comment = any(IN_BOUNDS in line for line in lines[node.lineno - 1 : node.end_lineno])
        if not comment and "mask" not in keywords:
            found.append(f"line {node.lineno}: no mask, and no `{IN_BOUNDS} why`")
        if "mask" in keywords and "load" in ast.unparse(node.func) and "other" not in keywords:
            found.append(f"line {node.lineno}: what do masked lanes read? state `other=`")
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_access_is_masked_or_says_why_not(path):
    assert not faults(path.read_text())


def test_block_pointers_are_not_used():
    assert not [path.name for path in KERNELS if "make_block_ptr" in path.read_text()]


@pytest.mark.parametrize(
    ("access", "count"),
    [
        ("tl.load(x_ptr + i)", 1),
        ("tl.store(y_ptr + i, y)", 1),
        ("tl.load(x_ptr + i, mask=live)", 1),
        ("tl.load(x_ptr + i)  # in bounds: one value", 0),
        ("tl.load(\n    x_ptr + i,  # in bounds: one value\n)", 0),
        ("tl.load(x_ptr + i, mask=live, other=0.0)", 0),
        ("tl.store(y_ptr + i, y, mask=live)", 0),
    ],
)
def test_the_check_sees_what_it_should(access, count):
    assert len(faults(access)) == count
