"""Housekeeping that never touches what a reader may hold: what goes is listed first (`survey`), then taken away (`carry_out`).

Live releases: published at most `release_days` ago, the newest current one, the first of each generation, and pinned ones. Their tags stay, and so does
everything a tag, a branch or a young snapshot shows. Below the oldest release that lives by its age, the derived tables lose the days of no live release,
unless they were written lately: a backfill makes an old night's tables before its release.
Order: references, snapshots, orphan files, folders; then days and small files, whose bytes are freed by a later run: the snapshot that was main when the
run began, which a running stage may have pinned, is still there when it ends. Ages count back from the end of the run's date.
Never: `sid.item_sid` is written once in its final layout and not compacted; raw tables, codebooks, generations, releases and day counts lose no row.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import pins
from jobs.plan_night import MANIFEST, check_come, release_order
from jobs.releases import newest_current
from pipeline import lakehouse, tracking
from pipeline.config import Maintain
from pipeline.context import RELEASE_TAG, Context
from pipeline.lakehouse import History, StoredFile
from pipeline.stages import StageResult

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from jobs.inputs import Inputs

logger = logging.getLogger(__name__)
SIDS = "sid.item_sid"
NEVER_COMPACTED = frozenset({SIDS})
# A day of these serves its release only.
BY_DAY = (SIDS, "sid.user_sid", "feature.item_popularity", "feature.user_sequence", "feature.item_feature", "feature.content_pair", "rank.rank_example")
TRAINED = "feature.item_behavior_vector"  # a day of it serves every later night that refers to it
SMALL_BYTES = int(0.75 * 512 * 2**20)  # Iceberg joins files below three quarters of its target size
FOLDERS = {"staging": "staging folder", "models": "fetched model"}  # folder of the home -> what the listing calls an entry of it
NAMED = 20  # names a row of the listing holds at most
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What goes from one table.

    Args:
        branches, tags: name -> snapshot id it pointed at when it was looked at; one that moved since then stays.
        freed, orphans: path -> bytes of files that no kept snapshot shows, and of files that no snapshot knows.
        days: days of main that go, with the bytes that become free when the last snapshot showing them has gone.
        small: number of files to be joined.
    """

    table: str
    branches: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, int] = field(default_factory=dict)
    snapshots: tuple[int, ...] = ()
    freed: Mapping[str, int] = field(default_factory=dict)
    orphans: Mapping[str, int] = field(default_factory=dict)
    days: tuple[date, ...] = ()
    day_bytes: int = 0
    small: int = 0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything that goes: by table, and folders of the home with their bytes."""

    sweeps: tuple[Sweep, ...]
    folders: Mapping[Path, int]
    older: datetime
    known: frozenset[str] = frozenset()  # tags of the releases that were looked at

    @property
    def freed(self) -> int:
        """Bytes that are free when the run ends: files no kept snapshot shows, orphans, folders."""
        return sum(sum(sweep.freed.values()) + sum(sweep.orphans.values()) for sweep in self.sweeps) + sum(self.folders.values())

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind and table: what, table, count, frees_now and frees_later in bytes, and the first names."""
        rows = [row for sweep in self.sweeps for row in _rows(sweep)]
        for parent, what in FOLDERS.items():
            if mine := {path.name: size for path, size in self.folders.items() if path.parent.name == parent}:
                rows.append(_row(what, "", list(mine), now=sum(mine.values())))
        return rows


def run(inputs: Inputs, params: Maintain, ctx: Context) -> StageResult:
    """The listing in `outputs`, and what was done as metrics; with the run parameter dry_run=true nothing is done (status `skipped`).

    Raises: ContractError for a date that has not come yet.
    """
    spark = inputs.spark
    assert spark is not None, "a Spark stage"
    found = survey(spark, params, ctx)
    outputs = {"rows": found.rows(), "freed_bytes": found.freed}
    if ctx.param("dry_run") == "true":
        return StageResult(outputs=outputs, metrics={"freed_bytes": float(found.freed)}, status="skipped")
    return StageResult(outputs=outputs, metrics=carry_out(spark, found, params, ctx))


# ---------------------------------------------------------------- which releases live (pure)


def first_of_generations(releases: Sequence[Row]) -> set[str]:
    """Tags of the first release of each generation that was not withdrawn: gate_drift counts new evidence from its night on, whose counts stay with it."""
    standing = [row for row in releases if row["status"] != "withdrawn"]
    ordered = sorted(standing, key=release_order, reverse=True)
    return set({row["generation"]: row["tag"] for row in ordered}.values())


def live_releases(releases: Sequence[Row], published: Mapping[str, datetime], pinned: Iterable[str], limit: datetime) -> tuple[set[str], set[str]]:
    """(tags that live by their age, all live tags).

    Args:
        published: tag -> instant its snapshot was committed; a backfilled release is as young as its publication.
        limit: what was published earlier lives only for another reason.
    """
    known = {row["tag"] for row in releases}
    young = {tag for tag in known if tag in published and published[tag] >= limit}
    newest = newest_current(releases)
    kept = {newest["tag"]} if newest is not None else set()
    return young, (young | kept | first_of_generations(releases) | set(pinned)) & set(published)


def published_at(sids: History) -> dict[str, datetime]:
    """Tag of a release -> instant its snapshot of sid.item_sid was committed."""
    return {tag: sids.committed[at] for tag, at in sids.tags.items() if RELEASE_TAG.fullmatch(tag)}


def dropped_tags(releases: Sequence[Row], published: Mapping[str, datetime], live: set[str], bare_limit: datetime) -> list[str]:
    """Tags of releases that do not live any more, and tags that no release names and that were made before `bare_limit`; sorted."""
    known = {row["tag"] for row in releases}
    return sorted(tag for tag, at in published.items() if tag not in live and (tag in known or at < bare_limit))


def dropped_days(stored: Iterable[date], releases: Sequence[Row], young: set[str], live: set[str]) -> list[date]:
    """Days of a derived table that serve no live release and lie below the oldest release that lives by its age; sorted."""
    oldest = min((row["logical_date"] for row in releases if row["tag"] in young), default=None)
    if oldest is None:  # nothing published lately: keep what is there rather than guess
        return []
    serving = {row["logical_date"] for row in releases if row["tag"] in live}
    return sorted(day for day in set(stored) if day < oldest and day not in serving)


def changed_days(files: Iterable[StoredFile], history: History, limit: datetime) -> set[date]:
    """Days with a file that was added at or after `limit`."""
    young = {one for one, at in history.committed.items() if at >= limit}
    return {date.fromisoformat(file.partition[0]) for file in files if file.added in young}


def kept_snapshots(history: History, dropped: Iterable[str], limit: datetime) -> set[int]:
    """Snapshots that stay: where a kept branch or tag points, and what was committed at or after `limit`."""
    gone = set(dropped)
    heads = {at for name, at in {**history.branches, **history.tags}.items() if name not in gone}
    return heads | {one for one, at in history.committed.items() if at >= limit}


def stale_branches(history: History, limit: datetime) -> dict[str, int]:
    """Audit branch -> its snapshot, of those last written before `limit`.

    One that shows what main shows holds nothing, and may have been cut a moment ago by a stage that is still computing: it stays.
    """
    main = history.branches.get("main")
    return {name: at for name, at in sorted(history.branches.items()) if name.startswith("audit_") and at != main and history.committed[at] < limit}


def small_files(files: Iterable[StoredFile], from_files: int) -> list[StoredFile]:
    """Files of partitions with at least `from_files` small ones."""
    small = [file for file in files if file.bytes < SMALL_BYTES]
    counts = Counter(file.partition for file in small)
    return [file for file in small if counts[file.partition] >= from_files]


# ---------------------------------------------------------------- looking


def survey(spark: SparkSession, params: Maintain, ctx: Context) -> Survey:
    """What would go, and the bytes that are really freed; nothing is changed.

    Raises: ContractError for a date that has not come yet: everything would look old.
    """
    check_come(ctx.logical_date)
    home, lake = ctx.home, ctx.config.lake
    releases = lakehouse.read_releases(home, lake).to_pylist()
    histories = lakehouse.histories(home, lake)
    sids = histories.get(SIDS, History(committed={}, branches={}, tags={}))
    published = published_at(sids)
    young, live = _living(ctx, params, releases, sids)
    tags = dropped_tags(releases, published, live, _ago(ctx, params.keep_branches_days))
    doomed = {SIDS: tags}
    if MANIFEST in histories:  # a tag there holds the manifest of the release of its name
        doomed[MANIFEST] = sorted(tag for tag in histories[MANIFEST].tags if RELEASE_TAG.fullmatch(tag) and tag not in live)
    sweeps = [_sweep(spark, params, ctx, table, history, doomed.get(table, [])) for table, history in histories.items()]
    days = retention(spark, ctx, releases, young, live, histories)
    return Survey(
        sweeps=tuple(_with_days(ctx, sweep, histories[sweep.table], days.get(sweep.table, [])) for sweep in sweeps),
        folders=stale_folders(ctx, params.keep_staging_days),
        older=_ago(ctx, params.keep_snapshots_days),
        known=frozenset(row["tag"] for row in releases),
    )


def _living(ctx: Context, params: Maintain, releases: Sequence[Row], sids: History) -> tuple[set[str], set[str]]:
    """`live_releases` by the profile's age."""
    return live_releases(releases, published_at(sids), pins.by_release(sids.tags), _ago(ctx, params.release_days))


def _sweep(spark: SparkSession, params: Maintain, ctx: Context, table: str, history: History, tags: Sequence[str]) -> Sweep:
    branches = stale_branches(history, _ago(ctx, params.keep_branches_days))
    kept = kept_snapshots(history, [*branches, *tags], _ago(ctx, params.keep_snapshots_days))
    gone = tuple(sorted(set(history.committed) - kept))
    freed: dict[str, int] = {}
    if gone:
        held = lakehouse.files_at(ctx.home, ctx.config.lake, table, kept)
        freed = {path: file.bytes for path, file in lakehouse.files_at(ctx.home, ctx.config.lake, table, gone).items() if path not in held}
    orphans = lakehouse.remove_orphans(spark, table, dry_run=True)
    small = [] if table in NEVER_COMPACTED else small_files(_main_files(ctx, table, history).values(), params.compact_from_files)
    return Sweep(
        table=table,
        branches=branches,
        tags={tag: history.tags[tag] for tag in tags},
        snapshots=gone,
        freed=freed,
        orphans=orphans,
        small=len(small),
    )


def retention(
    spark: SparkSession, ctx: Context, releases: Sequence[Row], young: set[str], live: set[str], histories: Mapping[str, History]
) -> dict[str, list[date]]:
    """Table -> days of main that go. A day of behaviour vectors stays while a feature row that stays, on main or under a live tag, refers to it."""
    from pyspark.sql import functions as F

    limit = _ago(ctx, ctx.config.maintain.keep_snapshots_days)
    files = {table: _main_files(ctx, table, histories[table]).values() for table in (*BY_DAY, TRAINED) if table in histories}
    changed = {table: changed_days(stored, histories[table], limit) for table, stored in files.items()}
    found = {table: dropped_days(set(_stored_days(stored)) - changed[table], releases, young, live) for table, stored in files.items()}
    if found.get(TRAINED):
        manifest = spark.table(f"{lakehouse.CATALOG}.{MANIFEST}")
        staying = manifest.where(~F.col("logical_date").isin([F.lit(day) for day in found.get(MANIFEST, [])]))
        tagged = [(row["logical_date"], histories[MANIFEST].tags[row["tag"]]) for row in releases if row["tag"] in live & histories[MANIFEST].tags.keys()]
        replaced = [lakehouse.read_frame(spark, MANIFEST, at).where(F.col("logical_date") == F.lit(day)) for day, at in tagged]
        needed = {row.behavior_date for frame in (staying, *replaced) for row in frame.select("behavior_date").distinct().collect()}
        found[TRAINED] = [day for day in found[TRAINED] if day not in needed]
    return {table: gone for table, gone in found.items() if gone}


def stale_folders(ctx: Context, days: int) -> dict[Path, int]:
    """Folder -> bytes of runs that changed nothing for `days` and of fetched models that nobody read for as long.

    A run whose records have not reached MLflow stays, as does one that works meanwhile; a model that is read again is fetched again.
    """
    limit = _ago(ctx, days).timestamp()
    found: dict[Path, int] = {}
    for folder in sorted(path for parent in FOLDERS for path in (ctx.home.root / parent).glob("*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            states = [path.lstat() for path in (folder, *folder.rglob("*"))]
        except FileNotFoundError:  # a run put a document in its place while the folder was listed
            continue
        waiting = [path for path in folder.glob(f"mlflow/*/{tracking.RECORD}") if not path.with_name(tracking.FLUSHED).is_file()]
        if not waiting and max(state.st_mtime for state in states) < limit:
            found[folder] = sum(state.st_size for state in states[1:])
    return found


def _with_days(ctx: Context, sweep: Sweep, history: History, days: Sequence[date]) -> Sweep:
    names = {str(day) for day in days}
    stored = _main_files(ctx, sweep.table, history).values() if days else ()
    return replace(sweep, days=tuple(days), day_bytes=sum(file.bytes for file in stored if file.partition[0] in names))


def _main_files(ctx: Context, table: str, history: History) -> dict[str, StoredFile]:
    return lakehouse.files_at(ctx.home, ctx.config.lake, table, [history.branches["main"]]) if "main" in history.branches else {}


def _stored_days(files: Iterable[StoredFile]) -> list[date]:
    return [date.fromisoformat(name) for name in {file.partition[0] for file in files}]


def _ago(ctx: Context, days: int) -> datetime:
    return ctx.cutoff - timedelta(days=days)


# ---------------------------------------------------------------- doing


def carry_out(spark: SparkSession, found: Survey, params: Maintain, ctx: Context) -> dict[str, float]:
    """What was done, in numbers; each step is one commit, so a killed run is simply run again."""
    metrics = Counter({"freed_bytes": found.freed, "folders": len(found.folders)})
    for sweep in found.sweeps:
        with lakehouse.table_locks(ctx.home, ctx.config.lake, [sweep.table]):
            releases, live = _live_now(ctx, params) if sweep.tags or sweep.days else ([], set())
            metrics.update(_clean(spark, sweep, live, found.older))
            metrics.update(_tidy(spark, sweep, _still_dropped(ctx, sweep, releases, live, found), params, ctx))
    for folder in found.folders.keys() & stale_folders(ctx, params.keep_staging_days):  # the others were taken up again since they were looked at
        _forget(folder)
    logger.info("maintained %s", " ".join(f"{name}={value}" for name, value in sorted(metrics.items())))
    return {name: float(value) for name, value in metrics.items()}


def _live_now(ctx: Context, params: Maintain) -> tuple[list[Row], set[str]]:
    """(releases, tags that live) by now: a rollback or a pin since the survey may need what it found dead."""
    releases = lakehouse.read_releases(ctx.home, ctx.config.lake).to_pylist()
    return releases, _living(ctx, params, releases, lakehouse.history(ctx.home, ctx.config.lake, SIDS))[1]


def _forget(folder: Path) -> None:
    """Remove a folder of the home so that a kill leaves neither half of it under its name nor what looks like a record that MLflow has not seen."""
    for record in folder.glob(f"mlflow/*/{tracking.RECORD}"):
        record.unlink()
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))  # what a kill leaves of it grows stale itself
    folder.rename(scratch / folder.name)
    shutil.rmtree(scratch)


def _clean(spark: SparkSession, sweep: Sweep, live: Container[str], older: datetime) -> dict[str, int]:
    """References first: a snapshot can only be expired when nothing points at it."""
    if sweep.branches or sweep.tags:
        now = lakehouse.references(spark, sweep.table)
        branches, tags = ([name for name, at in group.items() if now.get(name) == at and name not in live] for group in (sweep.branches, sweep.tags))
        lakehouse.drop_references(spark, sweep.table, branches=branches, tags=tags)
    deleted = lakehouse.expire_snapshots(spark, sweep.table, older) if sweep.snapshots else 0
    orphans = lakehouse.remove_orphans(spark, sweep.table, dry_run=False) if sweep.orphans else {}
    return {"branches": len(sweep.branches), "tags": len(sweep.tags), "snapshots": len(sweep.snapshots), "files_deleted": deleted, "orphans": len(orphans)}


def _still_dropped(ctx: Context, sweep: Sweep, releases: Sequence[Row], live: Container[str], found: Survey) -> list[date]:
    """The days to drop that nobody wrote, or published, restored or pinned a release of, since they were looked at."""
    if not sweep.days:
        return []
    history = lakehouse.history(ctx.home, ctx.config.lake, sweep.table)
    serving = {row["logical_date"] for row in releases if row["tag"] in live or row["tag"] not in found.known}
    return sorted(set(sweep.days) - changed_days(_main_files(ctx, sweep.table, history).values(), history, found.older) - serving)


def _tidy(spark: SparkSession, sweep: Sweep, days: Sequence[date], params: Maintain, ctx: Context) -> dict[str, int]:
    """Last, so that the files these steps leave behind outlive the stages that read them now."""
    if days:
        lakehouse.delete_partitions(spark, sweep.table, days, {"sid.stage": ctx.stage, "sid.run_id": ctx.run_id, "sid.reason": ctx.reason})
    joined = lakehouse.compact(spark, sweep.table, params.compact_from_files) if sweep.small else 0
    return {"days": len(days), "files_compacted": joined}


# ---------------------------------------------------------------- the listing


def _rows(sweep: Sweep) -> list[dict[str, Any]]:
    named = [f"{len(sweep.freed)} data file(s)"] if sweep.freed else []
    rows = [
        _row("audit branch", sweep.table, list(sweep.branches)),
        _row("tag", sweep.table, list(sweep.tags)),
        _row("snapshot", sweep.table, named, count=len(sweep.snapshots), now=sum(sweep.freed.values())),
        _row("orphan file", sweep.table, [path.rsplit("/", 1)[-1] for path in sweep.orphans], now=sum(sweep.orphans.values())),
        _row("day", sweep.table, [str(day) for day in sweep.days], later=sweep.day_bytes),
        _row("small file", sweep.table, [], count=sweep.small),  # joined, not freed: the same bytes are written again
    ]
    return [row for row in rows if row["count"]]


def _row(what: str, table: str, names: Sequence[str], *, count: int | None = None, now: int = 0, later: int = 0) -> dict[str, Any]:
    counted = len(names) if count is None else count
    return {"what": what, "table": table, "count": counted, "frees_now": now, "frees_later": later, "names": list(names[:NAMED])}
