"""Where does adaptive alignment start and stop paying? A picture of what shop_worlds.py measured, one panel per property of the world.

`python tests/bench/shop_plot.py docs/figures/shop_worlds.svg A.json B.json ...`: files that differ in one option share a panel, dots worlds, lines means.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {
    "tie": "behaviour noise grows with",
    "noise": "largest share of random events",
    "quality": "share of right texts and pictures",
    "zipf": "exponent of popularity",
}
METRICS = {"purity_tail": "the tail,\nall positions", "shared_purity_poor": "little-known items,\nshared positions"}
CONTROLS = {"mean": "w at its mean", "shuffled": "w of another item", "one": "w = 1", "zero": "no alignment"}


def by_value(documents: Sequence[dict[str, Any]], name: str) -> dict[Any, list[dict[str, Any]]]:
    """Worlds by the option's value, of the files that agree with the commonest value in every other option."""
    usual = {key: max(values := [found["options"][key] for found in documents], key=values.count) for key in PANELS}
    worlds: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for found in documents:
        if all(found["options"][key] == value for key, value in usual.items() if key != name):
            worlds[found["options"][name]] += found["worlds"]
    return dict(sorted(worlds.items()))


def panel(axes: Axes, worlds: dict[Any, list[dict[str, Any]]], metric: str) -> None:
    """Adaptive strength minus each control, over the values of one option."""
    places = list(range(len(worlds))) if isinstance(next(iter(worlds)), str) else list(worlds)
    width = 0.012 * (max(places) - min(places) or 1)
    for number, (arm, label) in enumerate(CONTROLS.items()):
        gains = [[100 * (found["arms"]["adaptive"][metric] - found["arms"][arm][metric]) for found in among] for among in worlds.values()]
        at = [place + width * (number - 1.5) for place in places]
        axes.plot(at, [np.mean(values) for values in gains], marker="_", markersize=9, linewidth=1.2, color=f"C{number}", label=label)
        for place, values in zip(at, gains, strict=True):
            axes.plot([place] * len(values), values, ".", markersize=4, alpha=0.5, color=f"C{number}")
    axes.axhline(0, linewidth=0.8, color="gray")
    axes.set_xticks(places, [str(value) for value in worlds])


def draw(documents: Sequence[dict[str, Any]]) -> Figure:
    """A row per metric, a column per option that takes several values."""
    columns = {name: worlds for name in PANELS if len(worlds := by_value(documents, name)) > 1}
    figure = Figure(figsize=(3.1 * len(columns), 5.2), layout="constrained")
    grid = figure.subplots(len(METRICS), len(columns), sharey="row", squeeze=False)
    for row, (metric, label) in zip(grid, METRICS.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, (name, worlds) in zip(row, columns.items(), strict=True):
            panel(axes, worlds, metric)
            axes.set_xlabel(PANELS[name])
    figure.supylabel("adaptive minus control, purity@20 in points", fontsize="medium")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(CONTROLS), frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    figure = draw([json.loads(path.read_text(encoding="utf-8")) for path in args.files])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sidmill"}):  # the same numbers give the same file
        figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
