"""A benchmark's report as a page."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wanfast.bench.report import STAGES

KINDS = {"different": "WRONG", "failed": "FAILED", "slower": "SLOWER", "unsteady": "UNSTEADY", "note": "note"}


def make_markdown(report: Mapping[str, Any]) -> str:
    """Write the page of a report, which holds all of its numbers but the single runs'."""
    parts = [
        _head(report),
        _findings(report["findings"]),
        _speed(report),
        _stages(report["engines"]),
        _resources(report["engines"]),
        _meanings(report),
    ]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    case, machine, versions = report["case"], report["machine"], report["versions"]
    yield f"# {_text(case['model'])}, {case['width']}x{case['height']}, {case['num_frames']} frames"
    yield ""
    told = [f"{_text(lora['file'])} at {lora['strength']:g}" for lora in case.get("loras", ())]
    loras = f", with the LoRAs of every engine {', '.join(told)}" if told else ""
    guidance = ", ".join(f"{value:g} ({name})" for name, value in case["guidance"].items())
    yield (
        f"{case['steps']} steps, {case['forwards']} forwards of {case['tokens']} tokens, {case['solver']}, shift"
        f" {case['shift']:g}, guidance {guidance}, seed {case['seed']}; weights: {case['weights']}{loras}."
        f" Warm runs of each engine: {case['runs']}, in turn: {', '.join(case['order'])}."
    )
    if case["speed_only"]:
        yield ""
        yield "**Speed only**: random weights make no picture, so nothing is said of the video, nor of host memory."
    yield ""
    gpu = machine["gpu"]
    card = "no GPU" if gpu is None else f"{gpu['name']}, driver {gpu['driver']}, power limit {gpu['power_limit']}"
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    yield (
        f"{_text(machine['cpu'] or machine['system'])}, {machine['cores']} cores, {case['threads']} threads; {card};"
        f" device {case['device']}. {known}; commit {report['commit'] or 'not known'}; {report['date']}."
    )
    yield ""
    yield "`" + " ".join(shlex.join(report["command"]).split()).replace("`", "'") + "`"


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for finding in findings:
        where = " ".join(filter(None, (finding["engine"], finding["stage"])))
        yield f"- **{KINDS[finding['kind']]}** {where + ': ' if where else ''}{_text(finding['says'])}"


def _speed(report: Mapping[str, Any]) -> Iterator[str]:
    engines, case = report["engines"], report["case"]
    references = [engine for engine in engines if engine["role"] == "reference"]
    base = _median(references[0], "total") if references else None
    columns = ["engine", "precision", "forwards", "cold, s", "warm, s", "s / forward", "TFLOPS", "of peak"]
    columns += [f"{engine['name']} / this" for engine in references[:1]]
    for reference in references:
        columns += [f"PSNR to {reference['name']}, dB", "SSIM", "worst pixel"]
    yield from _row(columns)
    yield from _row(["---"] * len(columns))
    for engine in engines:
        total, forward = _median(engine, "total"), engine["seconds_per_forward"]
        cells = [engine["name"], engine["precision"] + (f", {engine['preset']}" if engine["preset"] else "")]
        cells += [str(engine["forwards"]), _cold_total(engine), _number(total), _number(forward and forward["median"])]
        cells += [_number(engine["tflops"]), _percent(engine["share_of_peak"])]
        if references:
            cells.append(_number(base / total if base is not None and total is not None else None))
        for reference in references:
            cells += _difference(engine, reference["name"], case["speed_only"])
        yield from _row(cells)
    yield ""
    peaks = {(engine["peak"]["of"], engine["peak"]["source"], engine["peak"]["flops"]) for engine in engines}
    for of, source, flops in sorted(peaks):
        yield f"Peak: {flops / 1e12:.4g} TFLOPS, {source}: {of}."
    yield "Cold is load and total of the first run, warm the median of the others' totals."
    yield "TFLOPS count every forward in full, whatever an engine skips of it."


def _difference(engine: Mapping[str, Any], to: str, is_speed_only: bool) -> list[str]:
    if is_speed_only:
        return ["not told", "", ""]
    found = next((item for item in engine["differences"] if item["to"] == to), None)
    if found is None:
        return ["", "", ""]
    psnr = "identical" if found["identical"] else f"{found['psnr']:.1f}"
    return [psnr, f"{found['ssim']:.5f}", f"{found['worst_pixel']}/255"]


def _stages(engines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Seconds of each stage: cold, then the warm median and, in brackets, the lowest and highest of several runs."
    yield ""
    names = [engine["name"] for engine in engines]
    yield from _row(["stage", *(f"{name}, {kind}" for name in names for kind in ("cold", "warm"))])
    yield from _row(["---"] * (1 + 2 * len(names)))
    for stage in STAGES:
        cells = [cell for engine in engines for cell in _stage_cells(engine, stage)]
        if any(cells):
            yield from _row([stage, *cells])


def _stage_cells(engine: Mapping[str, Any], stage: str) -> list[str]:
    cold, warm = (engine["cold"] or {}).get(stage), engine["warm"].get(stage)
    if warm is None:
        return [_number(cold), ""]
    spread = "" if warm["min"] == warm["max"] else f" ({warm['min']:.4g} to {warm['max']:.4g})"
    return [_number(cold), _number(warm["median"]) + spread]


def _resources(engines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = ["engine", "copied, GB", "stall, s", "RAM, GB: imports", "peak"]
    columns += ["VRAM, GB: tensors", "allocator", "card", "W", "weights"]
    yield from _row(columns)
    yield from _row(["---"] * len(columns))
    for engine in engines:
        memory, power = engine["memory"], engine["power"]
        cells = [engine["name"], _gigabytes(engine["copied_bytes"]), _number(engine["stall_seconds"])]
        kinds = ("ram_before", "ram", "vram_allocated", "vram_reserved", "vram_device")
        cells += [_gigabytes(memory[kind]) for kind in kinds]
        cells += ["" if power is None else f"{power['mean_watts']:.0f} ({power['source']})", engine["placement"] or ""]
        yield from _row(cells)
    yield ""
    yield (
        "Peaks over all runs. RAM: resident pages of the engine's own process, mapped files included. Card: all that is"
        " in use there, other processes included, sampled. Copied and stall: of one warm run's transformer blocks."
    )


def _meanings(report: Mapping[str, Any]) -> Iterator[str]:
    told = report["definitions"]
    yield f"- **cold**: {told['cold']}."
    yield f"- **warm**: {told['warm']}."
    yield from (f"- tier {kind}: {meaning}." for kind, meaning in told.get("tiers", {}).items())
    used = {stage for engine in report["engines"] for stage in (*engine["warm"], *(engine["cold"] or ()))}
    yield from (f"- {stage}: {meaning}." for stage, meaning in told["stages"].items() if stage in used)


def _cold_total(engine: Mapping[str, Any]) -> str:
    cold = engine["cold"]
    return "" if cold is None else _number(cold["load"] + cold["total"])


def _median(engine: Mapping[str, Any], stage: str) -> float | None:
    spread = engine["warm"].get(stage)
    return None if spread is None else float(spread["median"])


def _row(cells: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join(_text(cell) for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3g}"


def _text(value: str) -> str:
    """Keep what a prompt or a file name holds from being read as a table or a line of its own."""
    return " ".join(value.split()).replace("|", "\\|").replace("`", "'")
