"""Fix the night before anything is loaded: parent release, generation, files by digest, seed, fingerprint.

Every later stage of the night reads this manifest, so a retry a day later still makes the same night.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, Literal

from jobs import pins
from pipeline import lakehouse
from pipeline.config import Config, PlanNight
from pipeline.context import Context, Home, Plan, PlannedFile, Release
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.stages import StageResult, group

if TYPE_CHECKING:
    from jobs.inputs import Inputs
    from pipeline.datasets.base import Kind, SourceSpec

logger = logging.getLogger(__name__)
LEDGER, RAW = "raw.source_file", ("raw.interaction", "raw.item", "raw.rejected_row")
MANIFEST = "feature.item_feature"
SHARED = ("item_id", "status", "popularity")  # columns that a release has from its manifest
READERS = tuple(stage.section for stage in group("consumers"))  # settings of models that read releases change no release
Row = Mapping[str, Any]


def run(inputs: Inputs, params: PlanNight, ctx: Context) -> StageResult:
    """The night's manifest in `outputs`.

    Raises: ContractError for a date before the data or one that has not come yet, or a parent whose rows or manifest are gone;
        UpstreamMissing for open days without a file, or with half an ingest, with the command for each.
    """
    from pipeline.datasets import dataset

    check_come(ctx.logical_date)
    source = ctx.config.source
    spec = dataset(source.dataset).prepare(source, ctx.home.folder("data"), ctx.config.seed)
    ledger = inputs.arrow(LEDGER, where=f"file_date <= '{ctx.logical_date}'").to_pylist()
    files = planned(spec, ctx, ledger)
    halves = half_ingests(ctx.home, ctx.config)
    check_finished(halves, files, ctx.logical_date)
    releases, held = inputs.arrow("sid.release").to_pylist(), pins.held_tags(ctx.home, ctx.config)
    lake = (ctx.home, ctx.config)
    given = (ctx, params, files, ledger, releases, inputs.arrow("sid.generation").to_pylist())
    plan = make_plan(*given, held)
    if plan.reuse and (ctx.logical_date in halves or manifest_of(lake, releases, plan.reuse) is None):
        plan = make_plan(*given, held=())  # the night is made again: its rows in raw are half another file's, or later nights could not be built on it
    if plan.parent is not None and not plan.reuse:
        check_held(plan.parent.tag, held)
        manifest = manifest_of(lake, releases, plan.parent.tag)
        check_manifest(plan, manifest)
        plan = plan.model_copy(update={"parent": plan.parent.model_copy(update={"manifest": manifest})})
    logger.info(
        "planned date=%s tag=%s generation=%d begins=%s parent=%s files=%d reuse=%s",
        plan.logical_date,
        plan.tag,
        plan.generation,
        plan.start or "no",
        plan.parent.tag if plan.parent else "-",
        len(files),
        plan.reuse or "-",
    )
    metrics = {"planned_files": float(len(files)), "new_generation": float(plan.new_generation), "reused": float(bool(plan.reuse))}
    return StageResult(outputs=plan.model_dump(mode="json"), metrics=metrics)


def check_come(day: date) -> None:
    """Nothing, when the day has begun in UTC: one that has not is a mistyped year, and its release would be the newest for all consumers.

    Raises: ContractError.
    """
    today = datetime.now(UTC).date()
    if day > today:
        raise ContractError("the date has not come yet", expected=f"{today} or earlier", found=str(day), where="--date")


def planned(spec: SourceSpec, ctx: Context, ledger: Sequence[Row]) -> tuple[PlannedFile, ...]:
    """Files the night reads: those of its own date, of days the ledger lacks, and of days that were empty and now have a file.

    A file that was loaded and is gone (archived) keeps its rows and is not planned: a day is emptied by an empty file.
    Raises: UpstreamMissing naming every open day without a file, or when no day has one.
    """
    from pipeline.datasets import base

    loaded = {row["file_date"] for row in ledger}
    spec = dataclasses.replace(spec, first_date=min(loaded | ({spec.first_date} if spec.first_date else set()), default=None))  # files may be archived
    known = {(row["file_date"], row["kind"]): row["status"] for row in ledger}
    wanted = [
        (day, kind) for day in base.days(ctx.config.source, spec, ctx.logical_date) for kind in spec.kinds if _pending(spec, known, day, kind, ctx.logical_date)
    ]
    files = tuple(_quiet_delta(spec, base.planned_file(spec, ctx.config.source, day, kind)) for day, kind in wanted)
    missing = [file for file in files if file.status == "missing"]
    if missing:
        days = sorted({file.file_date for file in missing})
        raise UpstreamMissing(
            f"{len(days)} open day(s) have no file",
            expected=", ".join(file.path for file in missing[:3]),
            found=f"nothing for {', '.join(map(str, days[:5]))}{' ...' if len(days) > 5 else ''}",
            where=f"data set {ctx.config.source.dataset}",
            next_command="; ".join(f"sid run ingest --date {day}" for day in days[:3]) + "  (or name closed days in source.closed_dates)",
        )
    return files


def half_ingests(home: Home, config: Config) -> set[date]:
    """Dates whose ingest was killed while it published; one that is still at it is waited for, where tables have locks."""
    found = unfinished({table: lakehouse.main_commits(home, config.lake, table) for table in (LEDGER, *RAW)})
    if found:
        with lakehouse.table_locks(home, config.lake, (LEDGER, *RAW)):
            found = unfinished({table: lakehouse.main_commits(home, config.lake, table) for table in (LEDGER, *RAW)})
    return found


def unfinished(commits: Mapping[str, Sequence[lakehouse.Commit]]) -> set[date]:
    """Dates whose ingest published rows but not its marker, the ledger: killed there, or still at it.

    A whole ingest of the date or of a later one ends that: a later night was let through because its files replaced those rows (`check_finished`).
    One of an earlier date, a backfill, replaced nothing of them.

    Args:
        commits: of main of the ledger and the raw tables, newest first; one try of ingest says the same `sid.record_key` everywhere.
    """
    ledger = commits[LEDGER]
    oldest = ledger[-1].at if ledger else 0  # what the ledger knew before is forgotten, so older rows count as finished
    marked = {commit.origin.get("sid.record_key"): commit.at for commit in reversed(ledger)}
    halves: set[date] = set()
    for table in RAW:
        whole = date.min
        for commit in commits[table]:
            if commit.origin.get("sid.stage") != "ingest" or "sid.logical_date" not in commit.origin:
                continue
            day = date.fromisoformat(commit.origin["sid.logical_date"])
            if marked.get(commit.origin.get("sid.record_key"), oldest) >= commit.at:
                whole = max(whole, day)
            elif day > whole:
                halves.add(day)
    return halves


def check_finished(halves: Collection[date], files: Iterable[PlannedFile], logical_date: date) -> None:
    """Nothing, unless an ingest up to the date is half published and tonight's files do not replace its rows: new events would be read with old items.

    Raises: UpstreamMissing naming the dates; an ingest that is still running ends by itself.
    """
    left = sorted({day for day in halves if day <= logical_date} - {file.file_date for file in files})
    if left:
        raise UpstreamMissing(
            "an ingest was interrupted while it published",
            expected=f"rows and ledger of one run for {', '.join(map(str, left))}",
            found="rows that the ledger does not know",
            where=", ".join((*RAW, LEDGER)),
            next_command="; ".join(f"sid run ingest --date {day}" for day in left) + "  (with the day's file in its place)",
        )


def make_plan(
    ctx: Context,
    params: PlanNight,
    files: tuple[PlannedFile, ...],
    ledger: Sequence[Row],
    releases: Sequence[Row],
    generations: Sequence[Row],
    held: Container[str],
) -> Plan:
    """The manifest as a pure function of what the lake and the files say.

    Args:
        held: tags of sid.item_sid; a release whose rows were swept away is not reused.
    """
    today = [row for row in releases if row["logical_date"] == ctx.logical_date]
    parent = parent_release(releases, ctx.logical_date)
    start, reason = begins(params, parent)
    fingerprint = _fingerprint(ctx.config, ctx.logical_date, files, ledger, parent, start)
    whole = [row for row in today if row["status"] == "current" and row["drift"] and row["tag"] in held]
    same = next((row for row in whole if row["input_fingerprint"] == fingerprint), None)
    revision = max((row["revision"] for row in today), default=0) + 1
    return Plan(
        logical_date=ctx.logical_date,
        tag=same["tag"] if same else tag_name(ctx.logical_date, revision),
        revision=same["revision"] if same else revision,
        generation=_generation(generations, fingerprint) if start or parent is None else parent["generation"],
        start=start,
        reason=reason,
        parent=Release(**{name: parent[name] for name in Release.model_fields if name in parent}) if parent else None,
        files=files,
        input_fingerprint=fingerprint,
        config_hash=ctx.config.digest(),
        seed=ctx.config.seed,
        reuse=same["tag"] if same else "",
    )


def check_held(tag: str, held: Container[str]) -> None:
    """Nothing, when the parent's rows are still there.

    Args:
        held: tags of sid.item_sid.
    Raises: ContractError for a release that has expired.
    """
    if tag not in held:
        raise ContractError(
            "the parent release has expired, so nothing can be built on it",
            expected=f"tag {tag} on sid.item_sid",
            found="swept away by `sid maintain`",
            where="sid.release",
            next_command="sid releases  (choose a later date, or begin anew with --set plan_night.policy=cold on a date without earlier releases)",
        )


def check_manifest(plan: Plan, manifest: int | None) -> None:
    """Nothing, when a night that copies from its parent finds the parent's manifest.

    Raises: ContractError naming the night that makes it again: other behaviour rows than those behind the parent's codes would be copied without a word.
    """
    if plan.parent is not None and manifest is None and not plan.new_generation:
        day = plan.parent.logical_date
        raise ContractError(
            f"the manifest that {plan.parent.tag} was made from is gone, so nothing can be copied from it",
            expected=f"the items of {plan.parent.tag} with generation {plan.parent.generation} on {day}",
            found="other rows: another revision or an unfinished night replaced them, or the day was swept away",
            where=MANIFEST,
            next_command=f"sid backfill --start {day} --end {day} --reason 'manifest of {plan.parent.tag}'",
        )


def manifest_of(lake: tuple[Home, Config], releases: Sequence[Row], tag: str) -> int | None:
    """Snapshot of feature.item_feature that shows the rows a release was made from; None when they are gone.

    Main shows those of a date's last revision. Before a date is made again jobs/item_feature.py tags what it replaces with that revision's name.
    """
    home, config = lake
    row = next(row for row in releases if row["tag"] == tag)
    last = last_revision(releases, row["logical_date"])
    history = lakehouse.history(home, config.lake, MANIFEST)
    snapshot_id = history.tags.get(tag, history.branches.get("main") if last is not None and last["tag"] == tag else None)
    if snapshot_id is None:
        return None
    where = f"logical_date == '{row['logical_date']}' and generation == {row['generation']:d}"
    manifest = lakehouse.read_arrow(home, config.lake, MANIFEST, snapshot_id=snapshot_id, columns=SHARED, where=where)
    release = lakehouse.read_release(home, config.lake, tag, SHARED)
    return snapshot_id if manifest.select(SHARED).sort_by("item_id").equals(release.select(SHARED)) else None


def last_revision(releases: Iterable[Row], day: date) -> Row | None:
    """The release of a date that was published last, whatever became of it; None for a date without one."""
    return max((row for row in releases if row["logical_date"] == day), key=lambda row: row["revision"], default=None)


def begins(params: PlanNight, parent: Row | None) -> tuple[Literal["", "cold", "warm", "anchored"], str]:
    """(how a new generation begins tonight, empty = the parent's goes on; why)."""
    if parent is None:
        return "cold", "first release"
    if params.policy != "frozen":
        return params.policy, f"policy {params.policy}"
    if parent["refit_due"] and params.refit_when_due:
        return params.refit, f"refit due, {params.refit}"
    return "", "frozen" if parent["drift"] else "frozen, though nobody measured the drift of the parent (gate_drift did not end)"


def parent_release(releases: Iterable[Row], day: date) -> Row | None:
    """The current revision of the latest earlier date that is not withdrawn; None for the first night."""
    earlier = [row for row in releases if row["logical_date"] < day and row["status"] == "current"]
    return max(earlier, key=release_order, default=None)


def release_order(row: Row) -> tuple[date, int]:
    """What releases are sorted by: date, then revision."""
    return row["logical_date"], row["revision"]


def tag_name(day: date, revision: int) -> str:
    """`d20261120`, `d20261120_r2`, ..."""
    return f"d{day:%Y%m%d}" + (f"_r{revision}" if revision > 1 else "")


def _pending(spec: SourceSpec, known: Mapping[tuple[date, str], str], day: date, kind: Kind, logical_date: date) -> bool:
    status, there = known.get((day, kind)), spec.path(day, kind).is_file()
    if status == "loaded":
        return day == logical_date and there
    return status is None or day == logical_date or there


def _quiet_delta(spec: SourceSpec, file: PlannedFile) -> PlannedFile:
    """A delta catalogue says nothing on days without new items, so its absent file is no gap."""
    if file.kind == "items" and spec.catalogue == "delta" and file.status == "missing":
        return file.model_copy(update={"status": "declared_empty"})
    return file


def _generation(generations: Sequence[Row], fingerprint: str) -> int:
    """The generation already fitted from the same inputs (a night that was killed), else the next number."""
    same = [row["generation"] for row in generations if row["input_fingerprint"] == fingerprint]
    return int(same[0]) if same else max((int(row["generation"]) for row in generations), default=0) + 1


def _fingerprint(config: Config, day: date, files: Iterable[PlannedFile], ledger: Iterable[Row], parent: Row | None, start: str) -> str:
    """Digest of everything the night is a function of: data as of the cutoff, parent, policy, configuration and seed."""
    digests = {f"{row['file_date']}/{row['kind']}": row["sha256"] for row in ledger}
    digests.update({f"{file.file_date}/{file.kind}": file.sha256 for file in files})
    content = {
        "day": str(day),
        "files": digests,
        "parent": parent["rows_digest"] if parent else "",
        "start": start,
        "config": config.digest(without=READERS),
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
