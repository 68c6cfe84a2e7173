"""Peak memory of all processes of a night while it assigns, counts and releases; one JVM of 4 GiB is driver and executors, less than a layout with more."""

from __future__ import annotations

from collections.abc import Iterator

import nights
from bench import Case, Timed

NUMBER, TITLE = 12, "memory"
STAGES = ("item_popularity", "assign_sid", "publish_release")
MOST = 8 * 1024  # MB: a driver of 4 GiB and two executors of 2 GiB


def cases(scale: str) -> Iterator[Case]:
    for items in nights.SIZES[scale]:
        yield held(items, nights.measured(items, nights.COUNT[scale])[0])


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
