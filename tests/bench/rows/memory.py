"""Peak memory of all processes of a night while it assigns, counts and releases; one JVM of 4 GiB is driver and executors, less than a layout with more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import nights
from bench import Case, Timed

NUMBER, TITLE = 12, "memory"
SIZES = {"quick": (2_000,), "normal": (20_000, 200_000), "full": (200_000, 1_000_000)}
STAGES = ("item_popularity", "assign_sid", "publish_release")
MOST = 8 * 1024  # MB: a driver of 4 GiB and two executors of 2 GiB


def cases(scale: str) -> Iterator[Case]:
    for items in SIZES[scale]:
        with tempfile.TemporaryDirectory() as folder:
            (night,) = nights.run(Path(folder), items, 1)
            yield held(items, night)


def held(items: int, night: nights.Night) -> Case:
    """The stages' seconds together, and the peak of each."""
    peak = max(night.peak[stage] for stage in STAGES)
    return Case(
        name=f"{items:,} items, {', '.join(STAGES)}",
        ours=lambda: Timed(sum(night.seconds[stage] for stage in STAGES)),
        rounds=0,
        units=items,
        series="popularity, assignment and release over items",
        size=items,
        facts=lambda: {
            "peak of all processes, MB": ", ".join(f"{stage} {night.peak[stage]:,.0f}" for stage in STAGES),
            "the whole night, MB": f"{max(night.peak.values()):,.0f}",
            "within 4 GiB + 2 x 2 GiB": "met" if peak <= MOST else "missed",
        },
    )
