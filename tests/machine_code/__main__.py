"""The command line; __init__.py says how it is used."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine_code
from machine_code.case import FAMILIES, Case, cases
from machine_code.measure import Compiled, build, measure, row

TABLES = Path(__file__).parents[1] / "data" / "machine_code"


def main() -> None:
    """Measure what is asked for, and print or write it."""
    parser = argparse.ArgumentParser(
        prog="python tests/machine_code",
        description=machine_code.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one; may be repeated")
    parser.add_argument("--arch", type=int, choices=(89, 90, 120), help="only this GPU generation")
    parser.add_argument(
        "--any-triton", action="store_true", help="only what is held under other versions of Triton too"
    )
    parser.add_argument("--case", help="show one case: its name, or a part of it")
    parser.add_argument("--show", action="store_true", help="what --case does without it too")
    for code in ("sass", "ptx", "ttgir"):
        parser.add_argument(f"--{code}", action="store_true", help="with --case: print this code too")
    parser.add_argument("--write", action="store_true", help="replace the tables in tests/data/machine_code")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    arguments = parser.parse_args()
    families = arguments.family or list(FAMILIES)
    if arguments.case:
        for case in _matching(arguments.case, families, arguments.arch):
            show(case, build(case), [code for code in ("sass", "ptx", "ttgir") if getattr(arguments, code)])
    elif arguments.json:
        print(json.dumps(_measured(families, arguments.arch, arguments.any_triton), indent=1))
    else:
        for family in families:
            _one_family(family, _measured([family], arguments.arch, arguments.any_triton), arguments.write)


def _matching(part: str, families: list[str], arch: int | None) -> list[Case]:
    known = cases(families)
    if part in known:
        return [known[part]]
    found = [case for name, case in known.items() if part in name and arch in (None, case.arch)]
    if not found:
        sys.exit(f"no case has {part!r} in its name: {', '.join(known)}")
    return found


def _measured(families: list[str], arch: int | None, any_triton: bool) -> dict[str, Any]:
    known = cases(families).values()
    return measure(
        families, [case.name for case in known if arch in (None, case.arch) and case.any_triton in (True, any_triton)]
    )


def _one_family(family: str, table: dict[str, Any], write: bool) -> None:
    for name, found in table["cases"].items():
        print(f"{name}: {line(found)}")
        for fault in found.pop("faults"):
            print(f"    not as designed: {fault}")
    if write:
        missing = set(cases([family])) - set(table["cases"])
        assert not missing, f"--write: a table holds all cases, this one not {missing}"
        (TABLES / f"{family}.json").write_text(json.dumps(table, indent=1) + "\n")


def line(found: dict[str, Any]) -> str:
    """A row in one line."""
    resources = (
        f"{found['registers']} registers, {found['shared_bytes']} B shared, {found['warps']} warps, "
        f"{found['ctas_per_sm']} CTAs/SM, {found['spilled_bytes']} B spilled"
    )
    loop = found["loop"]
    tensor = ", ".join(f"{count} {name}" for name, count in loop.get("tensor", {}).items())
    return f"{resources}; {loop['instructions']} instructions a loop, {tensor}" if tensor else resources


def show(case: Case, compiled: Compiled, code: list[str]) -> None:
    """Print one case: its row, the main loop's instructions by exact name, and the code that is asked for."""
    from machine_code import sass
    from machine_code.gates import faults

    found = row(case, compiled)
    print(f"{case.name}: {line(found)}")
    for fault in faults(case, found):
        print(f"    not as designed: {fault}")
    for kind in ("loads", "stores"):
        print(f"    {kind}: {', '.join(f'{count} of {width}' for width, count in found[kind].items())}")
    loop = sass.main_loop(compiled.code)
    print(f"    main loop: {len(loop)} of {len(compiled.code)} instructions")
    by_name: dict[str, int] = {}
    for one in loop:
        by_name[one.opcode] = by_name.get(one.opcode, 0) + 1
    for name, count in sorted(by_name.items(), key=lambda item: -item[1]):
        print(f"        {count:4d} {name}")
    if "sass" in code:
        edge = {loop[0].at: "main loop starts", loop[-1].at: "main loop ends"} if loop else {}
        for one in compiled.code:
            print(
                f"{' '.join(one.labels):12s} {one.at:06x} {one.text}{'   <- ' + edge[one.at] if one.at in edge else ''}"
            )
    for kind in ("ptx", "ttgir"):
        if kind in code:
            print(compiled.binary.asm[kind])


if __name__ == "__main__":
    main()
