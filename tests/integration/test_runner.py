"""The runner on real stages: outcomes, gates, conflicts. What a kill leaves behind: tests/e2e/test_same_rows.py."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import launchers, plan_night, runner, views
from pipeline import config, lakehouse, tracking
from pipeline.context import Context, Home, read_json, write_json
from pipeline.datasets import dataset
from pipeline.errors import ContractError, GateFailed, PublishConflict, ResourceLost, SidError, StageFailed, UpstreamMissing
from pipeline.stages import BY_NAME, StageResult, Write

pytestmark = pytest.mark.spark
TINY = config.load("tiny")
TABLES = BY_NAME["ingest"].outputs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated shop, made once."""
    folder = tmp_path_factory.mktemp("data")
    dataset("shop").prepare(TINY.source, folder, TINY.seed)
    return folder


@pytest.fixture
def home(lake_home: Home, data: Path) -> Home:
    """The process's home with empty tables and the shop's files in it."""
    if not (lake_home.root / "data").exists():
        (lake_home.root / "data").symlink_to(data)
    return lake_home


def first_day(data: Path) -> date:
    return dataset("shop").prepare(TINY.source, data, TINY.seed).first_date


def run(home: Home, stage: str, day: date, run_id: str = "night", *overrides: str, **changes: Any) -> dict[str, Any]:
    """One stage through the runner, in this process."""
    return runner.run_stage(Context(config=config.load("tiny", overrides), home=home, stage=stage, logical_date=day, run_id=run_id, **changes))


def digests(home: Home) -> dict[str, str]:
    """Table -> digest of the rows ingest publishes, in any order; where a file lies is not part of its content."""
    return {table: _digest(home, table) for table in TABLES}


def _digest(home: Home, table: str) -> str:
    rows = lakehouse.read_arrow(home, TINY.lake, table)
    names = sorted(set(rows.column_names) - {"path"})
    lines = sorted(json.dumps(row, default=str, sort_keys=True) for row in rows.select(names).to_pylist())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def counts(home: Home) -> dict[str, int]:
    return {table: lakehouse.read_arrow(home, TINY.lake, table).num_rows for table in TABLES}


def references(home: Home) -> dict[str, set[str]]:
    """Table -> names of its branches and tags, without a JVM."""
    return {table: set(lakehouse.open_table(home, TINY.lake, table).metadata.refs) for table in TABLES}


# ---------------------------------------------------------------- tables that are not there yet, or behind


def test_stages_that_start_together_migrate_the_lake_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first night after an upgrade: whoever comes second finds under the lock that nothing is left to do."""
    made, both_looked = [], threading.Barrier(2)

    def slowly(session: Any) -> None:
        time.sleep(0.2)
        made.append(session)

    def a_session(ctx: Context) -> str:
        both_looked.wait(timeout=30)  # both have found the lake behind
        return "session"

    monkeypatch.setattr(runner, "_session", a_session)
    monkeypatch.setattr(runner, "_lake_ready", lambda stage, ctx: bool(made))
    monkeypatch.setattr(lakehouse, "create_tables", slowly)
    ctx = Context(config=TINY, home=Home(tmp_path), stage="user_sequence", logical_date=date(2026, 3, 2), run_id="night")
    with ThreadPoolExecutor(2) as pool:
        for started in [pool.submit(runner._make_ready, BY_NAME[name], ctx) for name in ("item_popularity", "user_sequence")]:
            started.result()
    assert made == ["session"]


# ---------------------------------------------------------------- a night, twice, and with another writer


def test_a_night_is_loaded_traceable_and_the_same_when_main_moves_under_it(spark: Any, home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = first_day(data)
    planned = run(home, "plan_night", day)
    assert (planned["status"], planned["outputs"]["tag"], planned["outputs"]["start"]) == ("done", f"d{day:%Y%m%d}", "cold")
    loaded = run(home, "ingest", day, reason="for the test")
    assert loaded["plan"] == planned["outputs"]["input_fingerprint"]
    _check_outcome(home, loaded)
    _check_traceable(spark, home, loaded)
    before = digests(home)

    again = run(home, "plan_night", day, "again")
    assert again["outputs"]["input_fingerprint"] == planned["outputs"]["input_fingerprint"], "what was loaded counts like what will be"

    publish, moved = lakehouse.publish, []

    def publish_late(session: Any, table: str, branch: str, tag: str = "", expect: int | None = None) -> int:
        if table == "raw.source_file" and not moved:  # three tables are published already
            moved.append(table)
            session.table(f"lake.{table}").limit(0).writeTo(f"lake.{table}").append()
        return publish(session, table, branch, tag, expect)

    monkeypatch.setattr(lakehouse, "publish", publish_late)
    outcome = run(home, "ingest", day, "again")
    assert moved == ["raw.source_file"]
    assert outcome["status"] == "done"
    assert digests(home) == before, "the same rows after a conflict and a second try"
    assert all(names == {"main"} for names in references(home).values()), "no audit branch is left"

    _check_sweep(spark, home, day)

    moved.clear()
    monkeypatch.setattr(runner, "TRIES", 1)
    with pytest.raises(PublishConflict):
        run(home, "ingest", day, "again", attempt=2)
    failed = read_json(home.folder("staging") / "again" / "ingest.json")
    assert (failed["status"], failed["retry"], failed["error"]["class"]) == ("failed", True, "PublishConflict")
    assert digests(home) == before


def test_rows_computed_from_a_table_that_moved_meanwhile_are_computed_again(spark: Any, home: Home, data: Path) -> None:
    """A list that is replaced whole, or holds copies of what it replaces, must not be written over what another run added since."""
    day, table = first_day(data), "raw.source_file"
    run(home, "plan_night", day)
    ctx = Context(config=TINY, home=home, stage="ingest", logical_date=day, run_id="night")
    pinned = runner._pinned(BY_NAME["ingest"], ctx)
    spark.table(f"lake.{table}").limit(0).writeTo(f"lake.{table}").append()  # another run's commit
    frame = spark.table(f"lake.{table}")
    for write in (Write(table=table, frame=frame, whole=True), Write(table=table, frame=frame, dates=(day,), copies=True)):
        with pytest.raises(PublishConflict, match="moved since the stage began"):
            runner._write_and_audit(spark, ctx, write, pinned, runner.Ledger())
    lakehouse.drop_branch(spark, table, ctx.branch)


def _check_sweep(spark: Any, home: Home, day: date) -> None:
    """A branch of an earlier try goes when the next one has nothing to write to that table."""
    ctx = Context(config=TINY, home=home, stage="ingest", logical_date=day, run_id="raced")
    for table in ("raw.interaction", "raw.item"):
        lakehouse.cut_branch(spark, table, ctx.branch)
    runner._sweep(spark, BY_NAME["ingest"], ctx, {"raw.item"})
    assert {table: ctx.branch in names for table, names in references(home).items()} == {table: table == "raw.item" for table in TABLES}
    lakehouse.drop_branch(spark, "raw.item", ctx.branch)


def _check_outcome(home: Home, outcome: dict[str, Any]) -> None:
    assert read_json(home.folder("staging") / "night" / "ingest.json") == json.loads(json.dumps(outcome, default=str))
    assert outcome["status"] == "done"
    assert outcome["seconds"] > 0
    assert set(outcome["snapshots"]) == set(TABLES)
    rows = counts(home)
    assert rows["raw.interaction"] > 200
    assert rows["raw.item"] > 100
    assert rows["raw.rejected_row"] > 0
    assert rows["raw.source_file"] == 2
    assert outcome["metrics"]["rows_in"] == outcome["metrics"]["rows_accepted"] + outcome["metrics"]["rows_rejected"]
    assert outcome["metrics"]["raw.interaction/rows"] == rows["raw.interaction"]


def _check_traceable(spark: Any, home: Home, outcome: dict[str, Any]) -> None:
    for table, snapshot in outcome["snapshots"].items():
        assert lakehouse.current_snapshot(home, TINY.lake, table) == snapshot
        (row,) = spark.table(f"lake.{table}.snapshots").where(f"snapshot_id = {snapshot}").select("summary").collect()
        said = row.summary
        assert (said["sid.stage"], said["sid.run_id"], said["sid.reason"]) == ("ingest", "night", "for the test")
        assert said["sid.config_hash"] == TINY.digest()


# ---------------------------------------------------------------- the gate


def test_a_gate_that_fails_leaves_main_untouched_and_the_branch_for_inspection(spark: Any, home: Home, data: Path) -> None:
    day, strict = first_day(data), "ingest.max_rejected_share=0.0"
    run(home, "plan_night", day, "night", strict)
    with pytest.raises(GateFailed) as caught:
        run(home, "ingest", day, "night", strict)
    assert "rejected_share <= 0 from ingest.max_rejected_share (observed 0.0" in caught.value.found
    assert counts(home) == dict.fromkeys(TABLES, 0)
    failed = read_json(home.folder("staging") / "night" / "ingest.json")
    assert (failed["status"], failed["retry"], failed["error"]["class"], failed["snapshots"]) == ("failed", False, "GateFailed", {})
    branch = caught.value.next_command.removeprefix("sid inspect ")
    assert branch in references(home)["raw.source_file"]

    reasons = {name.removeprefix("rejected/"): value for name, value in failed["metrics"].items() if name.startswith("rejected/")}
    assert failed["metrics"]["rows_rejected"] > 0
    assert failed["metrics"]["raw.item/retired_share"] == 0, "what only the job could measure was judged, too"

    looked = views.branch((home, config.load("tiny", (strict,))), branch)
    broken = {row["check"]: row["observed"] for row in looked if not row["holds"]}
    assert broken["rejected_share <= 0 from ingest.max_rejected_share"] == failed["metrics"]["raw.source_file/rejected_share"] > 0
    assert {row["table"]: row["observed"] for row in looked if row["check"] == "rows on main"}["raw.source_file"] == 0
    assert {row["check"].partition(",")[0].removeprefix("refused as "): row["observed"] for row in looked if "refused as" in row["check"]} == reasons
    shown = next(row["check"] for row in looked if row["check"].startswith("retired_share"))
    assert shown == "retired_share <= 0.05 from ingest.max_retired_share", "a metric of the job"
    write_json(home.folder("staging") / "night" / "ingest.json", {**failed, "branch": "another"})
    again = views.branch((home, config.load("tiny", (strict,))), branch)
    assert {row["check"] for row in looked} - {row["check"] for row in again} == {shown}, "without the document the rows are measured again"
    write_json(home.folder("staging") / "night" / "ingest.json", failed)

    with pytest.raises(UpstreamMissing, match="ingest failed"):
        Context(config=TINY, home=home, stage="item_popularity", logical_date=day, run_id="night").outcome("ingest")


def test_rows_that_came_after_the_audit_are_not_published(spark: Any, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    table, day = "feature.item_day_stat", date(2026, 1, 5)
    frame = spark.createDataFrame([(day, day, "i1", 1, "sha")], spark.table(f"lake.{table}").schema)
    ctx = Context(config=TINY, home=home, stage="item_popularity", logical_date=day, run_id="night")

    def audit(*args: Any, **kwargs: Any) -> Any:
        lakehouse.append(frame, table, ctx.branch, {})  # a try that was given up for dead writes on
        return SimpleNamespace(metrics={})

    monkeypatch.setattr(runner.quality, "audit", audit)
    with pytest.raises(PublishConflict, match="moved since it was audited"):
        runner._write_all(spark, ctx, (Write(table=table, frame=frame, dates=(day,)),), {}, runner.Ledger())
    assert spark.table(f"lake.{table}").count() == 0


# ---------------------------------------------------------------- outcomes without rows


def test_a_date_before_the_data_is_refused_and_written_down(home: Home, data: Path) -> None:
    day = first_day(data) - timedelta(days=1)
    with pytest.raises(ContractError, match="before the data"):
        run(home, "plan_night", day)
    failed = read_json(home.folder("staging") / "night" / "plan_night.json")
    assert (failed["status"], failed["retry"], failed["error"]["class"]) == ("failed", False, "ContractError")


def test_a_stage_without_a_manifest_and_one_with_another_nights_do_not_start(home: Home, data: Path) -> None:
    day = first_day(data)
    with pytest.raises(UpstreamMissing, match="plan_night"):
        run(home, "ingest", day)
    run(home, "plan_night", day)
    with pytest.raises(ContractError, match="another date"):
        run(home, "ingest", day + timedelta(days=1))
    assert counts(home) == dict.fromkeys(TABLES, 0)


def test_a_night_that_is_published_already_writes_nothing(home: Home, data: Path) -> None:
    day = first_day(data)
    planned = run(home, "plan_night", day)
    path = home.folder("staging") / "night" / "plan_night.json"
    write_json(path, {**read_json(path), "outputs": {**planned["outputs"], "reuse": "d20260101"}})
    for stage in ("ingest", "train_tokenizer", "publish_release"):
        outcome = run(home, stage, day)
        assert (outcome["status"], outcome["outputs"], outcome["snapshots"]) == ("reused", {"tag": "d20260101"}, {})
    assert counts(home) == dict.fromkeys(TABLES, 0)


def test_a_stage_without_work_starts_no_process_and_no_session(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = first_day(data)
    planned = run(home, "plan_night", day)
    monkeypatch.setattr(launchers, "_run", lambda commands, ctx: {"started": commands})
    monkeypatch.setattr(runner, "_session", lambda ctx: pytest.fail(f"{ctx.stage} asked for a session"))

    def launched(stage: str, kind: str = "submit") -> dict[str, Any]:
        overrides = (f"launch.kind={kind}", "launch.image=sidmill:1.2.3", "launch.volume_claim=home")
        ctx = Context(config=config.load("tiny", overrides), home=home, stage=stage, logical_date=day, run_id="night")
        return launchers.launch(ctx, launchers.Request(profile="tiny", overrides=overrides))

    assert launched("content_pair")["status"] == "skipped", "no content encoder is trained in this profile"
    assert "started" in launched("item_popularity")
    assert "started" in launched("content_cre"), "what it waits for has not ended: the stage itself writes that down"
    assert "started" in launched("content_pair", "kubernetes"), "the launcher of a Job may not reach the lake"
    path = home.folder("staging") / "night" / "plan_night.json"
    write_json(path, {**read_json(path), "outputs": {**planned["outputs"], "reuse": "d20260101"}})
    assert {launched(stage, kind)["status"] for stage in ("ingest", "train_tokenizer", "gate_drift") for kind in ("submit", "torchrun")} == {"reused"}


def test_a_table_that_was_not_declared_is_not_written(spark: Any, home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import maintain

    frame = spark.table("lake.raw.source_file")
    monkeypatch.setattr(maintain, "run", lambda inputs, params, ctx: StageResult(writes=(Write(table="raw.source_file", frame=frame),)))
    with pytest.raises(ContractError, match="did not declare"):
        run(home, "maintain", first_day(data))
    assert references(home)["raw.source_file"] == {"main"}


def test_an_old_success_does_not_outlive_a_defect(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from jobs import maintain

    day = first_day(data)
    path = home.folder("staging") / "night" / "maintain.json"
    assert run(home, "maintain", day, params=(("dry_run", "true"),))["status"] == "skipped"
    assert path.is_file()
    monkeypatch.setattr(maintain, "run", lambda inputs, params, ctx: 1 / 0)
    with pytest.raises(StageFailed, match="ZeroDivisionError: division by zero") as caught:
        run(home, "maintain", day)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "1 / 0" in caplog.text, "the traceback is in the log"
    failed = read_json(path)
    assert (failed["status"], failed["retry"], failed["error"]["class"]) == ("failed", False, "StageFailed")
    assert caught.value.next_command == failed["error"]["next_command"] == f"sid run maintain --date {day} --run-id night"
    assert "FAILED" in {found.status for found in tracking.runs_of(home, "night")}, "MLflow knows of it"


def test_a_full_disk_may_be_tried_again_even_when_the_failure_cannot_be_written_down(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import maintain

    def full(*given: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(maintain, "run", full)
    with pytest.raises(ResourceLost, match="No space left"):
        run(home, "maintain", first_day(data))
    assert read_json(home.folder("staging") / "night" / "maintain.json")["retry"] is True
    monkeypatch.setattr(runner, "write_json", full)
    with pytest.raises(ResourceLost, match="No space left"):
        run(home, "maintain", first_day(data))


def test_only_a_conflict_is_called_one(spark: Any, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata file that cannot be written is no conflict; main that moved is one."""
    table, folder = "raw.item", home.folder("lake") / "raw" / "item" / "metadata"
    for branch in ("fill", "late"):
        lakehouse.cut_branch(spark, table, branch)
        spark.table(f"lake.{table}").limit(0).writeTo(f"lake.{table}.branch_{branch}").append()
    moved_away = folder.with_name("elsewhere")
    monkeypatch.setattr(lakehouse, "references", lambda session, name: {})
    folder.rename(moved_away)
    folder.write_text("a file where the folder was: nothing can be written below it")
    try:
        with pytest.raises(Exception) as caught:  # whatever Java says
            lakehouse.publish(spark, table, "fill")
    finally:
        folder.unlink()
        moved_away.rename(folder)
    assert not isinstance(caught.value, PublishConflict)
    monkeypatch.undo()
    lakehouse.publish(spark, table, "fill")
    with pytest.raises(PublishConflict):
        lakehouse.publish(spark, table, "late")
    lakehouse.drop_branch(spark, table, "late")


def test_under_torchrun_the_first_process_speaks_for_all(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peers end by a closed connection, after it has said why it left, or begin when it has ended."""
    day = first_day(data) - timedelta(days=1)
    with pytest.raises(ContractError, match="before the data"):
        run(home, "plan_night", day)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(plan_night, "run", lambda *args: 1 / 0)
    with pytest.raises(StageFailed) as caught:
        run(home, "plan_night", day)
    assert caught.value.next_command == f"sid run plan_night --date {day} --run-id night"
    assert read_json(home.folder("staging") / "night" / "plan_night.json")["error"]["class"] == "ContractError"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (PublishConflict("main moved"), "sid run assign_sid --date 2026-03-02 --run-id night"),
        (ResourceLost("the catalog cannot be reached"), "sid run assign_sid --date 2026-03-02 --run-id night"),
        (ContractError("a file lacks columns"), ""),
        (UpstreamMissing("no file", next_command="sid run ingest --date 2026-03-01"), "sid run ingest --date 2026-03-01"),
    ],
)
def test_an_error_that_another_try_may_mend_names_the_stage_where_it_names_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: SidError, shown: str
) -> None:
    monkeypatch.setattr(runner, "_track", lambda *given: None)
    ctx = Context(config=TINY, home=Home(tmp_path), stage="assign_sid", logical_date=date(2026, 3, 2), run_id="night")
    runner._failed(BY_NAME["assign_sid"], ctx, 0.0, runner.Ledger(), {}, error)
    assert error.next_command == read_json(ctx.staging / "assign_sid.json")["error"]["next_command"] == shown


def test_a_plan_that_reuses_a_release_does_not_replace_the_one_it_was_made_by(tmp_path: Path) -> None:
    ctx = Context(config=TINY, home=Home(tmp_path), stage="plan_night", logical_date=date(2026, 3, 2), run_id="night")
    facts = {"tag": "d20260302", "revision": 1, "generation": 1, "start": "", "reason": "frozen", "parent": None, "files": [], "input_fingerprint": "f"}
    outputs = {**facts, "logical_date": "2026-03-02", "config_hash": "c", "seed": 1}
    for seconds, reuse in ((1.0, ""), (2.0, "d20260302")):
        outcome = {"status": "done", "seconds": seconds, "outputs": {**outputs, "reuse": reuse}}
        write_json(ctx.staging / "plan_night.json", outcome)
        runner._remember(BY_NAME["plan_night"], ctx, outcome)
    assert read_json(ctx.home.folder("reports") / "d20260302" / "plan_night.json")["seconds"] == 1.0


@pytest.mark.parametrize(
    ("run_id", "given", "shown"),
    [
        ("cli__tiny__2026-03-02", "sid run assign_sid --date D", "sid run assign_sid --date 2026-03-02"),
        ("night 1", "sid run assign_sid --date D", "sid run assign_sid --date 2026-03-02 --run-id 'night 1'"),
        ("night", "sid run ingest --date 2026-03-01", "sid run ingest --date 2026-03-01"),
        ("night", "sid run refresh --date D --set plan_night.policy=cold", "sid run refresh --date 2026-03-02 --set plan_night.policy=cold"),
        ("night", "sid run train_ranker --date D", "sid run train_ranker --date 2026-03-02"),
        ("night", "sid repair", "sid repair"),
    ],
)
def test_the_next_command_is_completed_with_the_date_and_the_run(tmp_path: Path, run_id: str, given: str, shown: str) -> None:
    ctx = Context(config=TINY, home=Home(tmp_path), stage="publish_release", logical_date=date(2026, 3, 2), run_id=run_id)
    assert runner.completed(given, ctx) == shown
    assert runner.completed(shown, ctx) == shown


@pytest.mark.parametrize(
    ("run_id", "given", "shown"),
    [
        ("night", "sid run rank_example --date D", "sid run rank_example --date 2026-03-02 --run-id night --param release=d20260301"),
        ("cli__tiny__2026-03-02", "sid run train_ranker --date 2026-03-02", "sid run train_ranker --date 2026-03-02 --param release=d20260301"),
        ("night", "sid run item_popularity --date 2026-03-02", "sid run item_popularity --date 2026-03-02"),
    ],
)
def test_the_next_command_of_a_reader_names_the_release_it_was_given(tmp_path: Path, run_id: str, given: str, shown: str) -> None:
    """Without it a typed retry of a pinned run would draw for the newest release."""
    day, params = date(2026, 3, 2), (("release", "d20260301"),)
    ctx = Context(config=TINY, home=Home(tmp_path), stage="train_ranker", logical_date=day, run_id=run_id, params=params)
    assert runner.completed(given, ctx) == shown
    assert runner.completed(shown, ctx) == shown
