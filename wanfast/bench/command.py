"""`wanfast bench`: settle the case, run it, write the report."""

import argparse
import importlib.util
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from wanfast.bench.about import about_here
from wanfast.bench.case import Case, plan_of
from wanfast.bench.compare import check_comparable, read_report, slower_stages
from wanfast.bench.diffusers_engine import DiffusersEngine
from wanfast.bench.engine import WanfastEngine
from wanfast.bench.files import choose_targets, write_files
from wanfast.bench.markdown import KINDS, make_markdown
from wanfast.bench.measure import Peak, peak_dtype, peak_rate
from wanfast.bench.official_engine import OfficialEngine, check_checkout
from wanfast.bench.report import case_of, judge, make_report
from wanfast.bench.rounds import Contender, Result, run_rounds
from wanfast.bench.schema import faults, report_schema
from wanfast.bench.settle import check_memory, duration, least_seconds, notes, settle_case
from wanfast.bench.worker import Worker
from wanfast.command_parts import note
from wanfast.errors import MemoryBudgetError, RequestError
from wanfast.generation import draw_noise

Answer = TypeVar("Answer")

_NEEDED = ("diffusers", "transformers")
_UNEQUAL = {"different", "unsteady"}


def bench(arguments: argparse.Namespace) -> None:
    """Run a parsed `wanfast bench` line; the paths of the report go to stdout.

    Raises:
        RequestError: an argument breaks a rule, or diffusers is not installed; nothing has been computed then.
        MemoryBudgetError: the case does not fit.
        SystemExit: code 1, with the report written, where the line asked to fail for what it holds.
    """
    targets = choose_targets(arguments.output, arguments.json, arguments.markdown, overwrite=arguments.overwrite)
    earlier = None if arguments.compare is None else read_report(arguments.compare)
    _check_packages()
    case = settle_case(arguments)
    if earlier is not None:
        check_comparable(case_of(case, []), earlier, arguments.compare)
    checkout = None if arguments.reference is None else Path(arguments.reference).expanduser().absolute()
    if checkout is not None:
        check_checkout(checkout, case)
    check_memory(case)
    note(arguments, *notes(case))
    report = run_case(case, checkout, arguments, earlier)
    json_text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    contents = dict(zip(targets, (json_text, make_markdown(report)), strict=True))
    for path in write_files(contents, overwrite=arguments.overwrite):
        print(path)
    for finding in report["findings"]:
        where = " ".join(filter(None, (finding["engine"], finding["stage"])))
        note(arguments, f"{KINDS[finding['kind']]}: {where + ': ' if where else ''}{finding['says']}")
    kinds = {finding["kind"] for finding in report["findings"]}
    if (arguments.fail_if_slower and "slower" in kinds) or (arguments.fail_if_different and kinds & _UNEQUAL):
        raise SystemExit(1)


def run_case(
    case: Case, checkout: Path | None, arguments: argparse.Namespace, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Run a settled case and make its report."""
    look = partial(look_around, ["wanfast", *arguments.words], case)
    about, peaks = look() if torch.device(case.device).type == "cpu" else apart(look)
    least = duration(least_seconds(case, peaks))
    note(arguments, f"at least {least} for all runs (computed: the largest products alone, at this device's best rate)")
    began = time.monotonic()

    def tell(name: str, done: int, total: int) -> None:
        passed = f" ({duration(time.monotonic() - began)} so far)" if done else ""
        note(arguments, f"run {done + 1} of {total}: {name}{passed}")

    with tempfile.TemporaryDirectory(prefix="wanfast-bench-") as folder:
        results = run_rounds(
            contenders_of(case, checkout, Path(folder)),
            draw_noise(plan_of(case))[0],
            runs=case.runs,
            warmup=case.warmup,
            tell=tell,
        )
    _refuse_failure(results)
    report = make_report(case, results, peaks, about)
    report["findings"] = judge(report, case, results)
    if earlier is not None:
        report["findings"] += slower_stages(report, earlier)
        report["compared_with"] = earlier["date"]
    if found := faults(report, report_schema()):
        raise AssertionError(f"the report breaks its schema: {found[0]}")
    return report


def look_around(words: Sequence[str], case: Case) -> tuple[dict[str, Any], dict[torch.dtype, Peak]]:
    """Say what machine this is, and what its device could do at best in each dtype that an engine computes in."""
    device = torch.device(case.device)
    precisions = {plan_of(case, tier).precision for tier in (None, *case.tiers)}
    dtypes = {peak_dtype(precision) for precision in precisions}
    peaks = {dtype: peak_rate(device, dtype) for dtype in dtypes}
    if torch.bfloat16 in peaks and torch.int8 in peaks and peaks[torch.int8].source == "measured":
        peaks[torch.int8] = peaks[torch.bfloat16]  # 8 bits are held to the same products, which vary
    return about_here(words, device), peaks


def apart(look: Callable[[], Answer]) -> Answer:
    """Call something in a process that ends with it: who touches a GPU keeps half a gigabyte of it for life."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(look).result()


def contenders_of(case: Case, checkout: Path | None, folder: Path) -> Sequence[Contender]:
    """List who runs a case: each tier of wanfast, diffusers, and the official code where a checkout is given."""

    def host(name: str, make: Any) -> Worker:
        return Worker(name, make, case.device, case.threads, folder)

    found = [Contender(name="diffusers", role="reference", host=host("diffusers", partial(DiffusersEngine, case)))]
    if checkout is not None:
        make = partial(OfficialEngine, case, checkout)
        found.append(Contender(name="official", role="reference", host=host("official", make)))
    for tier in case.tiers:
        name = f"wanfast {tier.name}"
        made = host(name, partial(WanfastEngine, case, tier))
        found.append(Contender(name=name, role="wanfast", host=made, tier=tier))
    return found


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"reference: needs {' and '.join(missing)}, which this Python does not have; pip install wanfast[bench]"
        )


def _refuse_failure(results: Sequence[Result]) -> None:
    if all(result.error is not None for result in results):
        raise MemoryBudgetError("no engine could run: " + "; ".join(result.error or "" for result in results))
