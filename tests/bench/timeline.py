"""The time line of a home as a bar chart, text or SVG, from what its stages left in staging/: `python tests/bench/timeline.py HOME [--svg FILE]`.

A stage's file is written when it ends and says how many seconds it took; what lies between two stages is the scheduler's and the tracking server's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from pipeline.context import read_json

COLUMNS = 60  # characters of the text chart
ROW, LEFT, WIDE = 18, 260, 700  # pixels of the SVG
COLOUR = {"spark": "#4c78a8", "torch": "#f58518", "python": "#54a24b"}


@dataclass(frozen=True, order=True)
class Bar:
    """One stage: seconds since the first stage began, seconds taken, its run, name and engine."""

    start: float
    seconds: float
    run: str
    stage: str
    engine: str


def bars(home: Path) -> list[Bar]:
    """Every stage that ended, in order of time."""
    from pipeline.stages import BY_NAME

    ended = [(path, read_json(path)) for path in home.glob("staging/*/*.json") if path.stem in BY_NAME]
    found = sorted((path.stat().st_mtime - said["seconds"], said["seconds"], path.parent.name, path.stem) for path, said in ended)
    return [Bar(start - found[0][0], seconds, run, stage, BY_NAME[stage].engine) for start, seconds, run, stage in found]


def text(chart: list[Bar]) -> str:
    """One line a stage: its bar, its name, its seconds."""
    scale = COLUMNS / max(bar.start + bar.seconds for bar in chart)
    lines, run = [], ""
    for bar in chart:
        if bar.run != run:
            run = bar.run
            lines.append(run)
        drawn = " " * int(bar.start * scale) + "#" * max(1, round(bar.seconds * scale))
        lines.append(f"{drawn:<{COLUMNS + 1}} {bar.stage:<22} {bar.seconds:6.1f} s")
    return "\n".join(lines) + "\n"


def svg(chart: list[Bar]) -> str:
    """The same as a picture, coloured by engine."""
    scale = WIDE / max(bar.start + bar.seconds for bar in chart)
    height = ROW * (len(chart) + 2)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + 90}" height="{height}" font-family="sans-serif" font-size="12">']
    for number, (engine, colour) in enumerate(COLOUR.items()):
        parts.append(f'<text x="{LEFT + 80 * number}" y="{ROW - 4}" fill="{colour}">{engine}</text>')
    for number, bar in enumerate(chart, 1):
        top, left, wide = number * ROW, LEFT + bar.start * scale, max(1.0, bar.seconds * scale)
        parts.append(f'<text x="4" y="{top + 13}">{escape(bar.stage)}</text>')
        parts.append(f'<rect x="{left:.1f}" y="{top + 3}" width="{wide:.1f}" height="{ROW - 6}" fill="{COLOUR[bar.engine]}"/>')
        parts.append(f'<text x="{left + wide + 4:.1f}" y="{top + 13}">{bar.seconds:.1f} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Print the chart, or write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    chart = bars(args.home)
    if not chart:
        sys.exit(f"no stage has ended in {args.home}")
    if args.svg:
        args.svg.write_text(svg(chart), encoding="utf-8")
    sys.stdout.write(text(chart))


if __name__ == "__main__":
    main()
