"""Numbers that make shared code tuples unique: sorted arrays against a dictionary of tuples, which is what published tokenizers use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from bench import Case

from pipeline.tokenizers.collisions import disambiguate

NUMBER, TITLE = 6, "collision resolution"
COUNTS = {"quick": (10_000, 100_000), "normal": (10_000, 100_000, 1_000_000), "full": (10_000, 100_000, 1_000_000, 10_000_000)}
DICTIONARY_MOST = 1_000_000
LEVELS, SIZE, SHARED = 3, 256, 0.05


def cases(scale: str) -> Iterator[Case]:
    for count in COUNTS[scale]:
        yield resolution(count)


def resolution(count: int) -> Case:
    """Five of a hundred items repeat the tuple of another; rows come in the order of first sight, which is the order a dictionary numbers them in."""
    generator = np.random.default_rng(0)
    codes_NL = generator.integers(0, SIZE, (count, LEVELS))
    repeated = generator.random(count) < SHARED
    codes_NL[repeated] = codes_NL[generator.integers(0, count, int(repeated.sum()))]
    first_seen_N, existing_N = np.arange(count) // 1000, np.full(count, -1)
    item_id_N = pa.array(np.char.add("item", np.char.zfill(np.arange(count).astype(str), 9)))

    def by_dictionary() -> np.ndarray:
        """Numbers in the order of first sight."""
        taken: dict[tuple[int, ...], int] = {}
        numbers = []
        for codes in map(tuple, codes_NL.tolist()):
            numbers.append(taken.get(codes, 0))
            taken[codes] = numbers[-1] + 1
        return np.asarray(numbers)

    return Case(
        name=f"{count:,} items, {SHARED:.0%} repeated",
        ours=lambda: disambiguate(codes_NL, first_seen_N, item_id_N, existing_N),
        peers={"dictionary of tuples": by_dictionary} if count <= DICTIONARY_MOST else {},
        equal=lambda ours, theirs: "" if np.array_equal(ours, theirs) else "other numbers",
        units=count,
        seconds=0.2 * count / 1_000_000,
        series="collision resolution over items",
        size=count,
    )
