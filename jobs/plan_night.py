"""Fix the night before anything is loaded: parent release, generation, files by digest, seed, fingerprint.

Every later stage of the night reads this manifest, so a retry a day later still makes the same night.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from jobs import pins
from pipeline.config import Config, PlanNight
from pipeline.context import Context, Plan, PlannedFile, Release
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.stages import StageResult, group

if TYPE_CHECKING:
    from jobs.inputs import Inputs
    from pipeline.datasets.base import Kind, SourceSpec

logger = logging.getLogger(__name__)
READERS = tuple(stage.section for stage in group("consumers"))  # settings of models that read releases change no release
Row = Mapping[str, Any]


def run(inputs: Inputs, params: PlanNight, ctx: Context) -> StageResult:
    """The night's manifest in `outputs`.

    Raises: ContractError for a date before the data; UpstreamMissing for open days without a file, with the command for each.
    """
    from pipeline.datasets import dataset

    source = ctx.config.source
    spec = dataset(source.dataset).prepare(source, ctx.home.folder("data"), ctx.config.seed)
    ledger = inputs.arrow("raw.source_file", where=f"file_date <= '{ctx.logical_date}'").to_pylist()
    files = planned(spec, ctx, ledger)
    plan = make_plan(ctx, params, files, ledger, inputs.arrow("sid.release").to_pylist(), inputs.arrow("sid.generation").to_pylist())
    if plan.parent is not None and not plan.reuse:
        check_held(plan.parent.tag, pins.held_tags(ctx.home, ctx.config))
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


def planned(spec: SourceSpec, ctx: Context, ledger: Sequence[Row]) -> tuple[PlannedFile, ...]:
    """Files the night reads: those of its own date, of days the ledger lacks, and of days that were empty and now have a file.

    Raises: UpstreamMissing naming every open day without a file.
    """
    from pipeline.datasets import base

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


def make_plan(
    ctx: Context, params: PlanNight, files: tuple[PlannedFile, ...], ledger: Sequence[Row], releases: Sequence[Row], generations: Sequence[Row]
) -> Plan:
    """The manifest as a pure function of what the lake and the files say."""
    today = [row for row in releases if row["logical_date"] == ctx.logical_date]
    parent = parent_release(releases, ctx.logical_date)
    start, reason = begins(params, parent)
    fingerprint = _fingerprint(ctx.config, ctx.logical_date, files, ledger, parent, start)
    same = next((row for row in today if row["input_fingerprint"] == fingerprint and row["status"] == "current" and row["drift"]), None)
    revision = max((row["revision"] for row in today), default=0) + 1
    return Plan(
        logical_date=ctx.logical_date,
        tag=same["tag"] if same else tag_name(ctx.logical_date, revision),
        revision=same["revision"] if same else revision,
        generation=_generation(generations, fingerprint) if start or parent is None else parent["generation"],
        start=start,
        reason=reason,
        parent=Release(**{name: parent[name] for name in Release.model_fields}) if parent else None,
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


def begins(params: PlanNight, parent: Row | None) -> tuple[Literal["", "cold", "warm", "anchored"], str]:
    """(how a new generation begins tonight, empty = the parent's goes on; why)."""
    if parent is None:
        return "cold", "first release"
    if params.policy != "frozen":
        return params.policy, f"policy {params.policy}"
    if parent["refit_due"] and params.refit_when_due:
        return params.refit, f"refit due, {params.refit}"
    return "", "frozen"


def parent_release(releases: Iterable[Row], day: date) -> Row | None:
    """The current revision of the latest earlier date that is not withdrawn; None for the first night."""
    earlier = [row for row in releases if row["logical_date"] < day and row["status"] == "current"]
    return max(earlier, key=lambda row: (row["logical_date"], row["revision"]), default=None)


def tag_name(day: date, revision: int) -> str:
    """`d20261120`, `d20261120_r2`, ..."""
    return f"d{day:%Y%m%d}" + (f"_r{revision}" if revision > 1 else "")


def _pending(spec: SourceSpec, known: Mapping[tuple[date, str], str], day: date, kind: Kind, logical_date: date) -> bool:
    status = known.get((day, kind))
    return status is None or day == logical_date or (status != "loaded" and spec.path(day, kind).is_file())


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
