"""A frozen night with 2 % new or changed items against our own full rebuild: the first night of the same home, which codes everything."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import nights
from bench import Case

NUMBER, TITLE = 8, "nightly refresh"
TIME_SHARE, BYTES_SHARE = 0.15, 0.25  # targets


def cases(scale: str) -> Iterator[Case]:
    for items in nights.SIZES[scale]:
        rebuild, *frozen = nights.measured(items, nights.COUNT[scale])
        yield refresh(items, rebuild, frozen)


def refresh(items: int, rebuild: nights.Night, frozen: list[nights.Night]) -> Case:
    """Work time with the fits of a new generation left out of the rebuild: with them it is only slower."""
    share = statistics.median(night.bytes for night in frozen) / rebuild.bytes
    return Case(
        name=f"{items:,} items, {nights.NEW + nights.CHANGED:.0%} new or changed",
        ours=lambda: sorted((night.work() for night in frozen), key=lambda work: work.seconds)[len(frozen) // 2],
        peers={"full rebuild without its fits": lambda: rebuild.work(nights.FITS), "full rebuild": rebuild.work},
        judged=("full rebuild without its fits",),
        rounds=0,
        units=items,
        target=1 / TIME_SHARE,
        series="a frozen night over items",
        size=items,
        facts=lambda: {
            "bytes written": f"{share:.1%} of the rebuild's, target {BYTES_SHARE:.0%}: {'met' if share <= BYTES_SHARE else 'missed'}",
            "start-up and plan of the first night, s": rebuild.seconds["plan_night"],
            **{f"{name}, {what}": said for name, night in (("rebuild", rebuild), ("frozen", frozen[-1])) for what, said in nights.described(night).items()},
        },
    )
