"""What the reading commands say about releases: the list, the difference of two, one item with its neighbours.

Arrow tables in, plain dicts out; nothing is printed, opened or written here (jobs/cli.py does that).
Suffixes: N items, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.plan_night import parent_release, release_order
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.popularity import STRATA
from pipeline.release_file import matrix

MASKED = -1  # in the place of code K, whose number is another one in another generation
Row = dict[str, Any]
Titles = Callable[[list[str]], pa.Table]


def release_rows(releases: pa.Table) -> list[Row]:
    """Rows of sid.release by date and revision, each with `newest` (what consumers read) and `parent_superseded` (`stale_tags`)."""
    rows = sorted(releases.to_pylist(), key=release_order)
    newest, stale = newest_current(rows), stale_tags(rows)
    for row in rows:
        row["newest"] = newest is not None and row["tag"] == newest["tag"]
        row["parent_superseded"] = row["tag"] in stale
    return rows


def stale_tags(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Tags of current releases that were not made on the current revision of the latest earlier date, directly or further up the chain.

    They are whole and readable, but a rerun of their nights would give other rows: `sid backfill --cascade`.
    """
    stale: set[str] = set()
    for row in sorted((row for row in rows if row["status"] == "current"), key=lambda row: row["logical_date"]):
        parent = parent_release(rows, row["logical_date"])
        if row["parent_tag"] != (parent["tag"] if parent else None) or row["parent_tag"] in stale:
            stale.add(row["tag"])
    return stale


def newest_current(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The current row with the latest date: the release consumers read; None when nothing is current."""
    current = [row for row in rows if row["status"] == "current"]
    return max(current, key=release_order, default=None)


def resolve(releases: pa.Table, tag: str = "") -> Row:
    """The row of a tag, or of the newest current release when the tag is empty.

    Raises: UpstreamMissing when there is no such release, with the tags that exist.
    """
    rows = release_rows(releases)
    found = next((row for row in rows if (row["tag"] == tag if tag else row["newest"])), None)
    if found is None:
        known = ", ".join(row["tag"] for row in rows[-5:]) or "none"
        raise UpstreamMissing(
            f"no release {tag!r}" if tag else "no current release",
            expected=f"one of the last tags: {known}",
            found=tag or "nothing current",
            where="sid.release",
            next_command="sid releases",
        )
    return found


def diff_rows(old: pa.Table, new: pa.Table, old_sizes: Sequence[int], new_sizes: Sequence[int]) -> list[Row]:
    """Churn from release `old` to `new`: overall, by the old stratum, by position; then items that came and went.

    Args:
        old, new: rows of sid.item_sid of one release each.
        old_sizes, new_sizes: K per position of the release's generation; code K is a masked slot.
    Returns: rows with scope, name, items, changed, unmasked, churn, mass_churn. `changed` leaves out `unmasked`: items whose masked slot got its first code.
    Raises: ContractError when the two releases have another number of positions.
    """
    if len(old_sizes) != len(new_sizes):
        raise ContractError(
            "the releases have another number of positions",
            expected=f"{len(old_sizes)} positions in both",
            found=str(len(new_sizes)),
            where="sid.generation",
            next_command="sid releases",
        )
    pairs, before_NL, after_NL = _paired(old, new, len(new_sizes))
    before_NL, after_NL = np.where(before_NL == old_sizes, MASKED, before_NL), np.where(after_NL == new_sizes, MASKED, after_NL)
    mass_N = pairs["popularity"].to_numpy()
    stratum_N = pairs["popularity_stratum"].to_numpy(zero_copy_only=False)
    differs_NL = before_NL != after_NL
    unmasked_N = ((before_NL == MASKED) & (after_NL != MASKED)).any(axis=1)
    everything_N = np.ones(len(pairs), dtype=bool)
    changed_N = differs_NL.any(axis=1)
    rows = [_churn("overall", "all items", everything_N, changed_N, unmasked_N, mass_N)]
    rows += [_churn("stratum", stratum, stratum_N == stratum, changed_N, unmasked_N, mass_N) for stratum in STRATA]
    rows += [_churn("position", str(place), everything_N, differs_NL[:, place], unmasked_N, mass_N) for place in range(len(new_sizes))]
    came, gone = len(new) - len(pairs), len(old) - len(pairs)
    return [*rows, _count_row("new items", came), _count_row("gone items", gone)]


def show_item(release: pa.Table, item_id: str, codebook_sizes: Sequence[int], *, titles: Titles | None = None, top: int = 10) -> Row:
    """One item of a release: item_id, title, codes (None = masked), weights, disambiguator, stratum, and `neighbours` by shared codes.

    Args:
        release: rows of sid.item_sid of one release.
        titles: item ids -> table with item_id and title; asked for the items shown only, and an item without a row has title None.
        top: neighbours at most.
    Raises: UpstreamMissing when the release does not hold the item.
    """
    position = pc.index(release["item_id"], pa.scalar(item_id, release["item_id"].type)).as_py()
    if position < 0:
        raise UpstreamMissing(f"no item {item_id!r} in the release", expected="an item_id of the catalogue", found=item_id, where="sid.item_sid")
    row = release.slice(position, 1).to_pylist()[0]
    near = neighbours(release, position, codebook_sizes, top=top)
    title_of = _titles([item_id, *(other["item_id"] for other in near)], titles)
    shown = {
        name: row[name] for name in ("item_id", "weights", "disambiguator", "popularity", "popularity_stratum", "status", "first_seen", "changed_from_parent")
    }
    codes = [None if code == size else code for code, size in zip(row["codes"], codebook_sizes, strict=True)]
    return {**shown, "title": title_of.get(item_id), "codes": codes, "neighbours": [{**other, "title": title_of.get(other["item_id"])} for other in near]}


def neighbours(release: pa.Table, position: int, codebook_sizes: Sequence[int], *, top: int = 10) -> list[Row]:
    """Items that share most codes with the row at `position`: item_id, shared, positions; a slot that is masked or switched off in either never counts.

    Equal counts are ordered by the router weights of the shared slots, then popularity, then item_id; retired items are left out.
    """
    codes_NL, weights_NL = matrix(release["codes"], len(codebook_sizes)), matrix(release["weights"], len(codebook_sizes), "weights")
    same_NL = (codes_NL == codes_NL[position]) & (codes_NL != np.asarray(codebook_sizes)) & (weights_NL > 0) & (weights_NL[position] > 0)
    shared_N = same_NL.sum(axis=1)
    alive_N = pc.equal(release["status"], "live").to_numpy(zero_copy_only=False)
    candidates = np.flatnonzero((shared_N > 0) & alive_N & (np.arange(len(shared_N)) != position))
    order = pa.table(
        {
            "row": candidates,
            "shared": shared_N[candidates],
            "weight": np.round((same_NL * np.minimum(weights_NL, weights_NL[position])).sum(axis=1)[candidates], 6),
            "popularity": release["popularity"].to_numpy()[candidates],
            "item_id": release["item_id"].take(pa.array(candidates)),
        }
    ).sort_by([("shared", "descending"), ("weight", "descending"), ("popularity", "descending"), ("item_id", "ascending")])
    chosen = order.slice(0, top).to_pylist()
    return [{"item_id": row["item_id"], "shared": row["shared"], "positions": np.flatnonzero(same_NL[row["row"]]).tolist()} for row in chosen]


def _paired(old: pa.Table, new: pa.Table, width: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """(old rows of the items of both releases, their old codes, their new codes), in the order of item_id."""
    shared = old.filter(pc.is_in(old["item_id"], value_set=new["item_id"].combine_chunks())).sort_by("item_id")
    later = new.filter(pc.is_in(new["item_id"], value_set=old["item_id"].combine_chunks())).sort_by("item_id")
    return shared, matrix(shared["codes"], width), matrix(later["codes"], width)


def _churn(scope: str, name: str, inside_N: np.ndarray, changed_N: np.ndarray, unmasked_N: np.ndarray, mass_N: np.ndarray) -> Row:
    moved_N = inside_N & changed_N & ~unmasked_N
    items, mass = int(inside_N.sum()), float(mass_N[inside_N].sum())
    return {
        "scope": scope,
        "name": name,
        "items": items,
        "changed": int(moved_N.sum()),
        "unmasked": int((inside_N & changed_N & unmasked_N).sum()),
        "churn": moved_N.sum() / items if items else 0.0,
        "mass_churn": float(mass_N[moved_N].sum()) / mass if mass else 0.0,
    }


def _count_row(name: str, items: int) -> Row:
    return {"scope": "items", "name": name, "items": items, "changed": 0, "unmasked": 0, "churn": 0.0, "mass_churn": 0.0}


def _titles(item_ids: list[str], titles: Titles | None) -> dict[str, str | None]:
    if titles is None:
        return {}
    wanted = titles(item_ids)
    return dict(zip(wanted["item_id"].to_pylist(), wanted["title"].to_pylist(), strict=True))
