"""What a backfill is: nights of a range in date order, the stages of each, and with `cascade` every later release rebuilt on the repaired ones.

Plain functions over what the ledger, the files and sid.release say; `sid backfill` runs the steps through the launchers like any night.
Stages before the behaviour vectors have no memory, so their order does not matter; releases are a chain and are made oldest first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jobs.releases import release_rows
from pipeline import lakehouse
from pipeline.config import Config
from pipeline.context import Home, PlannedFile
from pipeline.datasets import base, dataset
from pipeline.errors import ConfigError, UpstreamMissing
from pipeline.stages import BY_NAME, Stage, group

BEGINS = "plan_night"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One night of a backfill.

    Args:
        why: requested | cascade.
        files: day files that differ from the ledger, as "kind date: was -> is".
        release: the date's current release before the backfill, empty without one.
    """

    night: date
    why: str
    stages: tuple[Stage, ...]
    files: tuple[str, ...] = ()
    release: str = ""

    def partitions(self) -> tuple[str, ...]:
        """Partitions the step may replace, as "table date"; tables without a date are named alone."""
        tables = dict.fromkeys(table for stage in self.stages for table in stage.outputs)  # two stages may write one table
        return tuple(f"{table} {self.night}" if _by_date(table) else table for table in tables)


def _by_date(table: str) -> bool:
    return lakehouse.partition_columns(table)[:1] in (("logical_date",), ("file_date",))


def steps(home: Home, config: Config, nights: Sequence[date], stages: str, *, cascade: bool) -> list[Step]:
    """The steps of a backfill of those nights, oldest first.

    Args:
        stages: comma-separated stage names; empty = the whole refresh.
    Raises: ConfigError for an unknown stage, or for `cascade` without the whole refresh.
    """
    chosen = chosen_stages(stages)
    if cascade and len(chosen) != len(group("refresh")):
        raise ConfigError("a cascade rebuilds releases", expected="all stages of the refresh", found=stages, where="--stages")
    spec = dataset(config.source.dataset).prepare(config.source, home.folder("data"), config.seed)
    releases = release_rows(lakehouse.read_releases(home, config.lake))
    ledger = ledger_rows(home, config)
    current = {row["logical_date"]: row["tag"] for row in releases if row["status"] == "current"}
    later = sorted(day for day in current if day > max(nights)) if cascade else []
    requested = [
        Step(night=day, why="requested", stages=chosen, files=changed_files(spec, config, ledger, day), release=current.get(day, "")) for day in sorted(nights)
    ]
    return requested + [Step(night=day, why="cascade", stages=chosen, release=current[day]) for day in later]


def chosen_stages(names: str) -> tuple[Stage, ...]:
    """The named refresh stages in the order of the refresh, plan_night always first; all of them when nothing is named.

    Raises: ConfigError for a name that is no stage of the refresh.
    """
    refresh = group("refresh")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in BY_NAME or BY_NAME[name] not in refresh:
            raise ConfigError(f"no stage {name!r} in the refresh", expected=", ".join(stage.name for stage in refresh), found=name, where="--stages")
    return tuple(stage for stage in refresh if not wanted or stage.name in (BEGINS, *wanted))


def changed_files(spec: base.SourceSpec, config: Config, ledger: Iterable[Row], day: date) -> tuple[str, ...]:
    """Day files whose digest or status differs from the ledger's, in words."""
    known = {row["kind"]: row for row in ledger if row["file_date"] == day}
    found = (base.planned_file(spec, config.source, day, kind) for kind in spec.kinds)
    return tuple(
        f"{file.kind} {day}: {_digest(known.get(file.kind))} -> {file.sha256[:8] or _without_file(file, known.get(file.kind))}"
        for file in found
        if file.sha256 != (known[file.kind]["sha256"] or "" if file.kind in known else None)
    )


def _without_file(file: PlannedFile, row: Row | None) -> str:
    return "no file, its rows stay" if row is not None and row["status"] == "loaded" else str(file.status)


def _digest(row: Row | None) -> str:
    return "not loaded" if row is None else (row["sha256"] or "")[:8] or str(row["status"])


def ledger_rows(home: Home, config: Config) -> list[dict[str, Any]]:
    """Rows of raw.source_file; none for a lake that is not there yet."""
    try:
        rows: list[dict[str, Any]] = lakehouse.read_arrow(home, config.lake, "raw.source_file").to_pylist()
    except UpstreamMissing:
        return []
    return rows


def described(step: Step) -> dict[str, Any]:
    """The step as a row of the dry run: night, why, changed files, stages, partitions it may replace, release it may supersede."""
    return {
        "night": step.night,
        "why": step.why,
        "changed_files": list(step.files) or ["none"],
        "stages": [stage.name for stage in step.stages],
        "partitions": list(step.partitions()),
        "release": step.release or "-",
    }


def result(step: Step, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The step as a row of the summary: night, seconds, the release before and after."""
    tag = next((outcome["outputs"].get("tag", "") for outcome in outcomes if outcome["stage"] == "publish_release"), "")
    reused = all(outcome["status"] in ("reused", "skipped") for outcome in outcomes if outcome["stage"] != BEGINS)
    return {
        "night": step.night,
        "why": step.why,
        "seconds": round(sum(outcome["seconds"] for outcome in outcomes), 1),
        "before": step.release or "-",
        "after": tag or "-",
        "note": "reused" if reused else "",
    }


def run_id(config: Config, night: date, reason: str) -> str:
    """Identity of a backfill's night: the same for the same words, so that a rerun continues what a kill left."""
    return f"backfill__{config.name}__{night}__{hashlib.sha256(reason.encode()).hexdigest()[:8]}"
