"""Draws the logs of the trainings as curves, one SVG, without any plotting library.

Usage: python plot.py RUN_FOLDER losses.svg
"""

import argparse
import csv
import math
from pathlib import Path

CURVES = {
    "vae": "fit",
    "base": "loss",
    "high_noise": "loss",
    "low_noise": "loss",
    "i2v_high_noise": "loss",
    "i2v_low_noise": "loss",
    "lora_high_noise": "loss",
    "lora_low_noise": "loss",
    "vae22": "fit",
    "ti2v": "loss",
    "ti2v_refined": "loss",
}
_COLUMNS = 4
_WIDTH, _HEIGHT, _MARGIN = 360, 240, 48
_TICKS = 5


def panel(name: str, column: str, rows: list[tuple[float, float]], number: int) -> str:
    """One curve with its axes: the value, logarithmic, over steps."""
    steps, values = [step for step, _ in rows], [max(value, 1e-9) for _, value in rows]
    low, high = math.log10(min(values)), math.log10(max(values))
    high += 1e-9 if high == low else 0

    def place(step: float, value: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - _MARGIN - 12) * step / max(steps)
        y = 28 + (_HEIGHT - 28 - _MARGIN) * (high - math.log10(value)) / (high - low)
        return x, y

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*row) for row in zip(steps, values, strict=True)))
    marks = []
    for tick in range(_TICKS):
        value, step = 10 ** (low + (high - low) * tick / (_TICKS - 1)), max(steps) * tick / (_TICKS - 1)
        y, x = place(0, value)[1], place(step, values[0])[0]
        marks.append(f'<text x="{_MARGIN - 4}" y="{y + 3:.1f}" text-anchor="end">{value:.3g}</text>')
        marks.append(f'<line x1="{_MARGIN}" x2="{_WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        marks.append(f'<text x="{x:.1f}" y="{_HEIGHT - _MARGIN + 14}" text-anchor="middle">{step:.0f}</text>')
    left, top = _WIDTH * (number % _COLUMNS), _HEIGHT * (number // _COLUMNS)
    return (
        f'<g transform="translate({left} {top})"><text x="{_MARGIN}" y="16" font-weight="bold">{name}: {column}</text>'
        f'{"".join(marks)}<polyline points="{points}" fill="none" stroke="#1f5fbf" stroke-width="1.5"/>'
        f'<text x="{_WIDTH // 2}" y="{_HEIGHT - _MARGIN + 30}" text-anchor="middle">step</text></g>'
    )


def draw(folder: Path) -> str:
    """The SVG of all logs that a folder has."""
    panels = []
    for name, column in CURVES.items():
        path = folder / f"{name}.csv"
        if path.exists():
            with path.open(newline="") as file:
                values = [(float(row["step"]), float(row[column])) for row in csv.DictReader(file)]
            panels.append(panel(name, column, values, len(panels)))
    rows = math.ceil(len(panels) / _COLUMNS)
    size = f'width="{_WIDTH * min(len(panels), _COLUMNS)}" height="{_HEIGHT * rows}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.write_text(draw(options.folder))


if __name__ == "__main__":
    main()
