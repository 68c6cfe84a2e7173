"""What the reading commands show: plain rows from the lake and MLflow, through PyIceberg (only `branch` needs Spark)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import derived, pins
from jobs.inputs import newest_observations
from jobs.releases import diff_rows, release_rows, resolve, show_item
from pipeline import lakehouse, tracking
from pipeline.config import Config
from pipeline.context import ROOT, Context, Home, read_json
from pipeline.errors import UpstreamMissing
from pipeline.lakehouse import History

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

Place = tuple[Home, Config]
Row = dict[str, Any]
REFUSED = "raw.rejected_row"
EXAMPLE = 200  # characters shown of a refused row


def releases(lake: Place) -> list[Row]:
    """Rows of sid.release by date and revision, with `pinned_by` (names that hold it) and `expired` (its rows were swept away)."""
    home, config = lake
    tags = pins.held_tags(home, config)
    holders = pins.by_release(tags)
    return [
        {**row, "pinned_by": holders.get(row["tag"], []), "expired": row["tag"] not in tags} for row in release_rows(lakehouse.read_releases(home, config.lake))
    ]


def item(lake: Place, item_id: str, tag: str = "") -> Row:
    """One item of a release with title, its positions (slot, code, weight) and its neighbours by shared codes."""
    home, config = lake
    release = resolve(lakehouse.read_releases(home, config.lake), tag)
    vocabulary = generation(lake, release["generation"])
    rows = lakehouse.read_release(home, config.lake, release["tag"])
    found = show_item(rows, item_id, vocabulary["codebook_sizes"], titles=lambda item_ids: titles(lake, release["logical_date"], item_ids))
    codes = zip(vocabulary["slots"], found["codes"], found["weights"], strict=True)
    return {**found, "release": release["tag"], "positions": [{"position": slot, "code": code, "weight": weight} for slot, code, weight in codes]}


def diff(lake: Place, old: str, new: str) -> list[Row]:
    """Churn between two releases, by scope: all, stratum, position."""
    home, config = lake
    releases = lakehouse.read_releases(home, config.lake)
    sizes = [generation(lake, resolve(releases, tag)["generation"])["codebook_sizes"] for tag in (old, new)]  # an unknown tag fails here, with the known ones
    return diff_rows(lakehouse.read_release(home, config.lake, old), lakehouse.read_release(home, config.lake, new), *sizes)


def branch(lake: Place, name: str) -> list[Row]:
    """Rows of each table that has the branch, on it and on main; each expectation with what the gate observed; refused rows by reason, with an example.

    A stage's outcome says what was measured; without one the rows are measured again, and what only the job knew (churn, collisions) is not shown.
    Raises: UpstreamMissing when no table has such a branch.
    """
    from pipeline import quality
    from pipeline import spark as gate

    home, config = lake
    histories = lakehouse.histories(home, config.lake)
    found = [table for table, history in histories.items() if name in {*history.branches, *history.tags}]
    if not found:
        known_names = {other for history in histories.values() for other in history.branches if other.startswith("audit_")}
        there = ", ".join(sorted(known_names)) or "none is left: every night was published"
        raise UpstreamMissing(
            f"no branch {name!r}", expected=f"an audit branch that was not published ({there})", found=name, where="lake", next_command="sid releases"
        )
    spark = gate.session(home, config.lake, config.launch)
    days = re.search(r"_(\d{4})(\d{2})(\d{2})_", name)
    dates = [date(*map(int, days.groups()))] if days else []
    measured = _measured(home, name)
    rows: list[Row] = []
    for table in found:
        frame, main = lakehouse.read_branch(spark, table, name), lakehouse.read_frame(spark, table, None)
        rows.append({"table": table, "check": "rows on the branch", "observed": frame.count(), "holds": True})
        rows.append({"table": table, "check": "rows on main", "observed": main.count(), "holds": True})
        known = {metric.removeprefix(f"{table}/"): value for metric, value in measured.items() if metric.startswith(f"{table}/")}
        for judgement in quality.observe(frame, table, dates=dates, config=config, known=known):
            rows.append({"table": table, "check": judgement.rule, "observed": judgement.observed, "holds": judgement.passed})
        rows += _refused(frame, main, _changed_days(lake, table, histories[table], name)) if table == REFUSED else []
    return rows


def _measured(home: Home, branch: str) -> dict[str, float]:
    """Metrics of the stage that wrote the branch, from its outcome; none when its staging folder is gone."""
    stage = re.match(r"audit_([a-z_]+)_\d{8}_", branch)
    outcomes = map(read_json, sorted(home.folder("staging").glob(f"*/{stage.group(1)}.json"))) if stage else iter(())
    return next((outcome["metrics"] for outcome in outcomes if outcome.get("branch") == branch), {})


def _changed_days(lake: Place, table: str, history: History, branch: str) -> list[date]:
    """Days in which the branch has files that main does not have: an ingest also replaces days before its own."""
    home, config = lake
    there, main = (lakehouse.files_at(home, config.lake, table, [history.branches[name]]) for name in (branch, "main"))
    return sorted({date.fromisoformat(file.partition[0]) for path, file in there.items() if path not in main})


def _refused(frame: DataFrame, main: DataFrame, days: Sequence[date]) -> list[Row]:
    """Rows of the branch that main does not have, which all lie in these days, counted by reason, each with one of them."""
    from pyspark.sql import functions as F

    new, old = (one.where(F.col("logical_date").isin([F.lit(day) for day in days])) for one in (frame, main))
    counts = new.exceptAll(old).groupBy("reason").agg(F.count(F.lit(1)).alias("rows"), F.min("row").alias("row")).orderBy("reason").collect()
    return [
        {"table": REFUSED, "check": f"refused as {count.reason}, e.g. {str(count.row)[:EXAMPLE]}", "observed": count.rows, "holds": True} for count in counts
    ]


def repair(lake: Place, *, dry_run: bool) -> list[Row]:
    """What was derived from sid.release and where it was brought in line; buffered records are flushed too."""
    home, config = lake
    flushed = 0 if dry_run else sum(tracking.flush(home, folder) for folder in sorted(home.folder("staging").iterdir()) if folder.is_dir())
    return [{"model": "(buffered runs)", "alias": "", "points_at": "", "should_be": "", "moved": flushed}, *derived.align(home, config, dry_run=dry_run)]


def rollback(lake: Place, tag: str) -> list[Row]:
    """tag, was, becomes of every release that a rollback to `tag` would change.

    Raises: ContractError when the release cannot be restored.
    """
    from jobs.rollback import changes, restorable

    home, config = lake
    rows = lakehouse.read_releases(home, config.lake).to_pylist()
    return list(changes(rows, restorable(rows, tag, pins.held_tags(home, config))))


def maintain(ctx: Context) -> list[Row]:
    """What `sid maintain` would take away; nothing is changed and no run is recorded."""
    from jobs.maintain import survey
    from pipeline import spark as gate

    spark = gate.session(ctx.home, ctx.config.lake, ctx.config.launch)
    return survey(spark, ctx.config.maintain, ctx).rows()


def generation(lake: Place, number: int) -> Row:
    """The row of sid.generation.

    Raises: UpstreamMissing when there is none.
    """
    home, config = lake
    rows = lakehouse.read_arrow(home, config.lake, "sid.generation", where=f"generation == {int(number)}").to_pylist()
    if not rows:
        raise UpstreamMissing(f"generation {number} is not in the lake", expected="a row of sid.generation", found=str(number), where="sid.generation")
    return rows[0]


def titles(lake: Place, day: date, item_ids: Sequence[str] | None = None) -> pa.Table:
    """item_id, title, image_uri: the newest catalogue observation up to a day of each item, or of the named ones."""
    home, config = lake
    columns, among = ("item_id", "title", "image_uri", "file_date"), None if item_ids is None else {"item_id": item_ids}
    return newest_observations(lakehouse.read_arrow(home, config.lake, "raw.item", columns=columns, where=f"file_date <= '{day}'", among=among))


def lineage(lake: Place, tag: str) -> list[Row]:
    """The release's snapshot, the run that wrote it, and the tables and snapshots that run and its siblings read and wrote."""
    home, config = lake
    release = resolve(lakehouse.read_releases(home, config.lake), tag)
    # Not by the snapshot's id, which a publish that met another writer changes: the key goes with the rows.
    key = lakehouse.origin(home, config.lake, "sid.item_sid", release["snapshot_id"]).get("sid.record_key", "")
    run = tracking.run_of_record(home, key) if key else None
    rows: list[Row] = []
    for sibling in tracking.runs_of(home, run.run_id) if run else []:
        sides = tracking.tables_of_run(home, sibling.mlflow_run_id)
        for side, tables in sides.items():
            rows += [
                {"stage": sibling.stage, "side": side, "table": table, "snapshot": snapshot, "mlflow_run": sibling.mlflow_run_id}
                for table, snapshot in tables.items()
            ]
    return rows


# ---------------------------------------------------------------- equations


def equations() -> list[Row]:
    """Every module, function or class whose docstring names a source: source, where, differs."""
    rows: list[Row] = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        rows += [_equation(path, name, text) for name, text in _docstrings(path) if "Source:" in text]
    return rows


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", ""), text


def _equation(path: Path, name: str, text: str) -> Row:
    said = re.sub(r"\s+", " ", re.split(r"\n\s*\n|\s(?:Args|Raises|Legend|Suffixes|Tensor suffixes):\s", text.split("Source:", 1)[1])[0]).strip()
    source, _, differs = said.partition("differs:")
    return {"source": source.strip(" ;"), "function": f"{path.relative_to(ROOT)}:{name}".removesuffix(":"), "differs": differs.strip()}
