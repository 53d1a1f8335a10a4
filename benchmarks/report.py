"""Makes docs/benchmarks.md and its picture from benchmarks/results/*.json, and from nothing else.

python benchmarks/report.py
"""

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"

_HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from `benchmarks/results/*.json`; every number there was measured. Seconds are
medians. A ratio above 1 means that wanfast is faster than the peer, which ran in the same process, round by round.
Peaks are of a fresh process each.
"""
_RATIO = "_seconds_over_ours"
_BAR, _ROW, _LABEL = 60, 22, 330  # pixels: of one times, of a row, of the names


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every results file: content by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def make_page(results: dict[str, dict[str, Any]]) -> str:
    """Write the page."""
    lines = [_HEAD]
    if not any(content["machine_info"].get("gpu") for content in results.values()):
        lines += ["Nothing here was measured on a GPU.", ""]
    lines.append("![peer's seconds over wanfast's](benchmarks.svg)")
    for name, content in results.items():
        lines += ["", f"## {name}", "", _machine_line(content["machine_info"]), ""]
        if "how" in content:
            lines += [content["how"], ""]
        lines += [
            "| benchmark | seconds | peer | peer's seconds | peer / wanfast | peak MB | peer's peak MB | commit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(entry) for entry in content["benchmarks"]]
        others = [line for entry in content["benchmarks"] if (line := _other_line(entry)) is not None]
        if others:
            lines += ["", "Also noted:", "", *others]
    return "\n".join(lines) + "\n"


def make_picture(results: dict[str, dict[str, Any]]) -> str:
    """Draw the ratios as bars; the line is where both are equal."""
    ratios = [
        (entry["name"].removeprefix("test_"), ratio)
        for content in results.values()
        for entry in content["benchmarks"]
        if (ratio := _ratio(entry)) is not None
    ]
    longest = max((ratio for _, ratio in ratios), default=1.0)
    width, height = round(_LABEL + _BAR * longest + 60), _ROW * len(ratios) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (name, ratio) in enumerate(ratios):
        y = 5 + index * _ROW
        color = "#2a7f62" if ratio >= 1 else "#b5532a"
        parts += [
            f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{y + 3}" width="{_BAR * ratio:.0f}" height="{_ROW - 8}" fill="{color}"/>',
            f'<text x="{_LABEL + _BAR * ratio + 5:.0f}" y="{y + 14}">{ratio:.2f}</text>',
        ]
    parts.append(f'<path d="M {_LABEL + _BAR} 0 V {height}" stroke="black" stroke-dasharray="3 3"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _machine_line(machine: dict[str, Any]) -> str:
    cpu = machine["cpu"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "diffusers", "transformers") if machine.get(name)
    )
    gpu = machine.get("gpu") or "no GPU"
    return f"{cpu['brand_raw']}, {cpu['count']} cores, {gpu}; Python {machine['python_version']}, {versions}."


def _peer(entry: dict[str, Any]) -> str | None:
    keys = [key for key in entry["extra_info"] if key.endswith(_RATIO)]
    return keys[0].removesuffix(_RATIO) if keys else None


def _ratio(entry: dict[str, Any]) -> float | None:
    peer = _peer(entry)
    return None if peer is None else entry["extra_info"][f"{peer}{_RATIO}"]


def _row(entry: dict[str, Any]) -> str:
    told, peer = entry["extra_info"], _peer(entry)
    cells = [entry["name"].removeprefix("test_"), f"{entry['seconds']['median']:.4g}", peer or ""]
    cells += [str(told.get(f"{peer}_seconds", "")), str(told.get(f"{peer}{_RATIO}", ""))]
    cells += [_rounded(told.get("peak_mb")), _rounded(told.get(f"{peer}_peak_mb")), entry.get("commit", "")]
    return "| " + " | ".join(cells) + " |"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _other_line(entry: dict[str, Any]) -> str | None:
    """What a benchmark noted besides the columns of the table."""
    peer = _peer(entry)
    shown = {f"{peer}_seconds", f"{peer}{_RATIO}", "peak_mb", f"{peer}_peak_mb"}
    rest = {key: value for key, value in entry["extra_info"].items() if key not in shown}
    if not rest:
        return None
    return f"- {entry['name'].removeprefix('test_')}: " + ", ".join(f"{key} {value}" for key, value in rest.items())


def main() -> None:
    """Write the page and its picture."""
    results = load_results(ROOT / "benchmarks" / "results")
    PAGE.write_text(make_page(results))
    PICTURE.write_text(make_picture(results))


if __name__ == "__main__":
    main()
