"""Rollback through the real runner: one commit, pinned readers, the next night's parent, a kill before the alias; pins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import date
from typing import Any

import pytest

from jobs import derived, item_feature, pins, plan_night, report_page, runner, views
from jobs.inputs import Inputs
from pipeline import config, lakehouse, tracking
from pipeline.context import ROOT, Context, Home, read_json
from pipeline.errors import ContractError, UpstreamMissing

pytestmark = pytest.mark.spark
TINY = config.load("tiny")
D1, D2, D3, D4 = (date(2026, 1, day) for day in (5, 6, 7, 8))


def back(home: Home, tag: str, day: date) -> dict[str, Any]:
    """The stage, as the command and the DAG launch it."""
    ctx = Context(config=TINY, home=home, stage="rollback", logical_date=day, run_id=f"rollback__{tag}", reason="a bad file", params=(("release", tag),))
    return runner.run_stage(ctx)


def next_night(home: Home, day: date) -> Any:
    """The manifest of the next night, as plan_night makes it from sid.release."""
    releases = lakehouse.read_releases(home, TINY.lake).to_pylist()
    ctx = Context(config=TINY, home=home, stage="plan_night", logical_date=day, run_id="next")
    return plan_night.make_plan(ctx, TINY.plan_night, (), [], releases, [{"generation": 1, "input_fingerprint": "x"}], [row["tag"] for row in releases])


@pytest.mark.usefixtures("without_mlflow")
def test_one_commit_restores_a_release_and_no_reader_of_a_tag_notices(spark: Any, lake_home: Home, shelf: Any) -> None:
    for day in (D1, D2, D3):
        shelf.release(day)
    shelf.rows[0]["status"] = "superseded"
    shelf.release(D1, revision=2)  # a backfill of the first day, published last
    shelf.save()
    tags = [row["tag"] for row in shelf.rows]
    read = {tag: lakehouse.read_release(lake_home, TINY.lake, tag) for tag in tags}
    references = lakehouse.references(spark, "sid.item_sid")
    snapshots = spark.table("lake.sid.release.snapshots").count()
    assert [row["becomes"] for row in views.rollback((lake_home, TINY), "d20260106")] == ["withdrawn"]
    assert shelf.status()["d20260107"] == "current", "looking changes nothing"

    done = back(lake_home, "d20260106", D2)
    assert shelf.status() == {"d20260105": "superseded", "d20260105_r2": "current", "d20260106": "current", "d20260107": "withdrawn"}
    assert done["outputs"]["is_current_newest"]
    assert done["outputs"]["changes"] == [{"tag": "d20260107", "was": "current", "becomes": "withdrawn"}]
    assert spark.table("lake.sid.release.snapshots").count() == snapshots + 1
    assert lakehouse.references(spark, "sid.item_sid") == references
    assert all(lakehouse.read_release(lake_home, TINY.lake, tag).equals(read[tag]) for tag in tags)
    said = spark.table("lake.sid.release.snapshots").orderBy("committed_at").collect()[-1].summary
    assert (said["sid.stage"], said["sid.reason"]) == ("rollback", "a bad file")

    again = back(lake_home, "d20260106", D2)
    assert (again["status"], again["outputs"]["is_current_newest"]) == ("reused", True)
    assert spark.table("lake.sid.release.snapshots").count() == snapshots + 1
    with pytest.raises(ContractError, match="d20260107") as caught:
        back(lake_home, "d20260107", D3)
    assert caught.value.expected == "one of: d20260106, d20260105_r2, d20260105"

    assert next_night(lake_home, D4).parent.tag == "d20260106"
    redone = next_night(lake_home, D3)
    assert (redone.tag, redone.parent.tag, redone.reuse) == ("d20260107_r2", "d20260106", ""), "a withdrawn night is made again, under a new tag"


def manifest(shelf: Any, day: date, bucket: int) -> None:
    """The night's item_feature behind a release of the shelf; `bucket` tells the rows of two revisions apart."""
    shelf.put(
        plan_night.MANIFEST,
        [(day, f"i{row:02d}", 1, "c", "h", None, "enc", None, day, 8, bucket, 0.5, bucket / 10, 1.0, "head", "live", day, None) for row in range(6)],
        [day],
    )


def buckets(spark: Any, home: Home, parent: Any, at: int | None) -> list[set[int]]:
    """Evidence buckets of the parent's rows as item_feature and as train_behavior_encoder read them."""
    plan = next_night(home, D2).model_copy(update={"parent": parent.model_copy(update={"manifest": at})})
    inputs = Inputs(home, TINY.lake, {plan_night.MANIFEST: lakehouse.current_snapshot(home, TINY.lake, plan_night.MANIFEST)}, spark)
    rows = item_feature.parent_rows(inputs, plan).collect()
    arrow = inputs.arrow(plan_night.MANIFEST, columns=("evidence_bucket",), where=f"logical_date == '{D1}' and generation == 1", at=at)
    return [{row.evidence_bucket for row in rows}, set(arrow["evidence_bucket"].to_pylist())]


def strengths(lake: tuple[Home, config.Config], release: dict[str, Any]) -> list[float] | None:
    """Lower edges of the filled bins of the report's strength figure; None when there is no figure."""
    found = report_page.lake_figures(lake, release, lakehouse.read_release(lake[0], lake[1].lake, release["tag"]), {"slots": ["text_0", "text_1"]})
    data = found[0]["data"] if found else None
    return data and [round(edge, 2) for edge, items in zip(data["edges"], data["counts"]["head"], strict=False) if items]


@pytest.mark.usefixtures("without_mlflow")
def test_the_night_after_a_rollback_copies_from_the_manifest_of_the_restored_revision(
    spark: Any, lake_home: Home, shelf: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lake, second = (lake_home, TINY), "d20260105_r2"
    manifest(shelf, D1, bucket=3)
    first = shelf.release(D1)
    shelf.save()
    assert plan_night.manifest_of(lake, shelf.rows, first) == lakehouse.snapshot(spark, plan_night.MANIFEST), "main, and no tag, on a night as any other"
    again = Context(config=TINY, home=lake_home, stage="item_feature", logical_date=D1, run_id="again")
    for _ in range(2):  # a killed try, then another
        item_feature.keep_replaced(Inputs(lake_home, TINY.lake, {"sid.release": None}, spark), again)
        manifest(shelf, D1, bucket=5)
    shelf.rows[0]["status"] = "superseded"
    shelf.release(D1, revision=2)
    shelf.save()

    def unreachable(*args: Any) -> None:
        raise UpstreamMissing("MLflow cannot be reached")

    monkeypatch.setattr(derived, "align", unreachable)
    done = back(lake_home, first, D1)
    assert (done["status"], shelf.status()) == ("done", {first: "current", second: "withdrawn"})
    assert "took effect" in caplog.text
    assert read_json(lake_home.run_folder(f"rollback__{first}") / "rollback.json")["outputs"]["changes"] == done["outputs"]["changes"]

    releases, parent = lakehouse.read_releases(lake_home, TINY.lake).to_pylist(), next_night(lake_home, D2).parent
    assert parent.tag == first
    assert buckets(spark, lake_home, parent, plan_night.manifest_of(lake, releases, first)) == [{3}, {3}]
    assert buckets(spark, lake_home, parent, plan_night.manifest_of(lake, releases, second)) == [{5}, {5}], "main is the last revision's"

    assert [strengths(lake, row) for row in releases] == [[0.3], [0.5]], "the page of a release shows its own"

    lakehouse.drop_references(spark, plan_night.MANIFEST, tags=[first])  # a lake of before
    assert plan_night.manifest_of(lake, releases, first) is None
    assert [strengths(lake, row) for row in releases] == [None, [0.5]]
    lakehouse.delete_partitions(spark, plan_night.MANIFEST, [D1], {})
    assert plan_night.manifest_of(lake, releases, second) is None


def test_a_kill_before_the_alias_is_repaired(spark: Any, lake_home: Home, shelf: Any, tmp_path: Any) -> None:
    shelf.release(D1)
    shelf.release(D2, generation=2)
    shelf.save()
    generations = [
        (number, D1, "opq", [4], ["a"], f"c{number}", "none", f"models:/sid_tokenizer/{number}", "{}", None, None, "h", f"f{number}") for number in (1, 2)
    ]
    shelf.put("sid.generation", generations)
    with tracking._session(lake_home) as client:
        client.create_registered_model("sid_tokenizer")
        for _ in generations:
            client.create_model_version("sid_tokenizer", source=str(tmp_path))
    tracking.set_alias(lake_home, "sid_tokenizer", "2", "current")

    words = ["rollback", "--to", "d20260105", "--reason", "a bad vocabulary", "--profile", "tiny"]
    given = {**os.environ, "SID_HOME": str(lake_home.root), "SID_KILL_AT": "rollback:before_alias"}
    killed = subprocess.run([sys.executable, "-m", "jobs.cli", *words], env=given, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert shelf.status() == {"d20260105": "current", "d20260106": "withdrawn"}, "the row is the truth"
    assert tracking.alias_target(lake_home, "sid_tokenizer", "current") == "models:/sid_tokenizer/2"

    (row,) = [row for row in views.repair((lake_home, TINY), dry_run=False) if row["model"] == "sid_tokenizer"]
    assert row["moved"]
    assert tracking.alias_target(lake_home, "sid_tokenizer", "current") == "models:/sid_tokenizer/1"


def test_a_rollback_to_a_vocabulary_that_mlflow_lost_stands(spark: Any, lake_home: Home, shelf: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its row is committed, so every retry would end alike; what is left to do is said."""
    first = shelf.release(D1)
    shelf.release(D2, generation=2)
    shelf.save()
    uris = ["models:/lost_tokenizer/1", "models:/lost_tokenizer/2"]
    shelf.put(
        "sid.generation",
        [(number, D1, "opq", [4], ["a"], f"c{number}", "none", uri, "{}", None, None, "h", f"f{number}") for number, uri in enumerate(uris, 1)],
    )
    done = back(lake_home, first, D1)
    assert done["status"] == "done"
    assert shelf.status() == {first: "current", "d20260106": "withdrawn"}
    assert "type `sid repair`: no model at models:/lost_tokenizer/1" in caplog.text


def test_pins_are_counted_shown_and_let_go(spark: Any, lake_home: Home, shelf: Any) -> None:
    lake = (lake_home, TINY)
    with pytest.raises(ContractError, match="none"):
        pins.pin(lake, "d20260105", "ranking")
    tag, other = shelf.release(D1), shelf.release(D2)
    shelf.save()
    assert pins.pin(lake, tag, "ranking") == pins.pin(lake, tag, "ranking") == [{"tag": tag, "pinned_by": ["ranking"]}]
    assert pins.pin(lake, tag, "ads") == [{"tag": tag, "pinned_by": ["ads", "ranking"]}]
    assert lakehouse.references(spark, "sid.item_sid")[f"pin_{tag}__ads"] == shelf.rows[0]["snapshot_id"]
    shown = {row["tag"]: (row["pinned_by"], row["expired"]) for row in views.releases(lake)}
    assert shown == {tag: (["ads", "ranking"], False), other: ([], False)}
    pins.pin(lake, tag, "ads", release=True)
    assert pins.pin(lake, tag, "ads", release=True) == [{"tag": tag, "pinned_by": ["ranking"]}], "one name lets go for itself only"
    with pytest.raises(ContractError, match="cannot be pinned") as caught:
        pins.pin(lake, "d20260109", "ranking")
    assert caught.value.expected == f"one of: {tag}, {other}"
