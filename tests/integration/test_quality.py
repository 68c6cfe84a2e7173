"""The gate: metrics aggregated once in Spark, judged by Great Expectations, failing with what was observed."""

from __future__ import annotations

import json
import logging
import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, lakehouse, quality
from pipeline.context import SQL
from pipeline.errors import ConfigError, ContractError, GateFailed

TINY = config.load("tiny")
DAY = date(2026, 3, 1)


def judged(metrics: dict[str, float], *expectations: dict[str, Any], loaded: config.Config = TINY) -> list[bool]:
    return [judgement.passed for judgement in quality.judge(metrics, expectations, loaded, "raw.item")]


# ---------------------------------------------------------------- judging metrics (no JVM)


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (1.0, {"min": 1}, True),
        (0.999, {"min": 1}, False),
        (0.0, {"max": 0}, True),
        (1e-9, {"max": 0}, False),
        (0.5, {"min": 0.2, "max": 0.6}, True),
        (0.1, {"min": 0.2, "max": 0.6}, False),
        (0.7, {"min": 0.2, "max": 0.6}, False),
        (-3.0, {"max": 0}, True),
        (float("nan"), {"min": 0}, False),
        (float("nan"), {"max": 0}, False),
        (float("inf"), {"min": 0}, False),
        (float("-inf"), {"max": 0}, False),
    ],
)
def test_a_metric_holds_within_its_bounds_and_never_when_it_is_no_number(value: float, bounds: dict[str, float], holds: bool) -> None:
    assert judged({"m": value, "other": 1.0}, {"metric": "m", **bounds}) == [holds]


def test_a_metric_that_is_absent_fails_unless_it_is_optional() -> None:
    assert judged({"m": 1.0}, {"metric": "absent", "min": 0}) == [False]
    assert judged({"m": 1.0}, {"metric": "absent", "min": 0, "optional": True}, {"metric": "m", "min": 0}) == [True]
    assert judged({"m": 5.0}, {"metric": "m", "max": 1, "optional": True}) == [False], "optional excuses absence, nothing else"
    assert judged({"m": float("nan")}, {"metric": "m", "max": 1, "optional": True}) == [False]


def test_several_expectations_on_one_metric_are_judged_apart() -> None:
    rules = ({"metric": "m", "min": 0}, {"metric": "m", "max": 1, "severity": "warn"}, {"metric": "m", "min": 0}, {"metric": "n", "min": 0, "max": 0})
    assert judged({"m": 2.0, "n": 0.0}, *rules) == [True, False, True, True]


def test_a_bound_may_be_a_setting_of_the_profile() -> None:
    rule = {"metric": "share", "max": "$ingest.max_rejected_share"}
    (found,) = quality.judge({"share": 0.04}, [rule], TINY, "raw.item")
    assert (found.maximum, found.passed) == (0.05, True)
    assert judged({"share": 0.04}, rule, loaded=config.load("tiny", ("ingest.max_rejected_share=0.03",))) == [False]
    assert judged({"size": 16.0}, {"metric": "size", "max": "$train_tokenizer.ada_sid.codebook_size"}) == [True]


@pytest.mark.parametrize("bound", ["$ingest.nothing", "$nothing.at_all", "$"])
def test_a_bound_that_names_no_setting_is_an_error_and_no_pass(bound: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judged({"m": 0.0}, {"metric": "m", "max": bound})
    assert caught.value.found == bound
    assert caught.value.where == "sql/raw/item/expectations.json"


def test_without_expectations_nothing_is_judged() -> None:
    assert judged({"m": 1.0}) == []
    assert judged({}, {"metric": "m", "min": 0}) == [False]


def test_a_judgement_reads_as_a_sentence() -> None:
    (found,) = quality.judge({"m": 0.125}, [{"metric": "m", "min": 0.5, "max": 1}], TINY, "raw.item")
    assert str(found) == "m >= 0.5 and <= 1 (observed 0.125)"
    (missing,) = quality.judge({}, [{"metric": "m", "max": 1}], TINY, "raw.item")
    assert str(missing) == "m <= 1 (observed missing)"


def test_a_judgement_names_the_setting_that_its_bound_comes_from() -> None:
    (found,) = quality.judge({"share": 0.5}, [{"metric": "share", "min": 0, "max": "$ingest.max_rejected_share"}], TINY, "raw.item")
    assert found.rule == "share >= 0 and <= 0.05 from ingest.max_rejected_share"
    assert str(found) == f"{found.rule} (observed 0.5)"


# ---------------------------------------------------------------- the shipped documents


@pytest.mark.parametrize("table", lakehouse.table_names())
def test_the_expectations_of_a_table_can_be_judged(table: str) -> None:
    contract = quality.read_expectations(table)
    assert contract["expect"], f"{table} is published without a gate"
    for rule in contract["expect"]:
        assert set(rule) <= {"metric", "min", "max", "severity", "optional"}, rule
        assert {"min", "max"} & set(rule), f"{table}: {rule} cannot fail"
        assert rule.get("severity", "fail") in ("fail", "warn")
        assert rule.get("min") is None or isinstance(rule["min"], str) or rule.get("max") is None or isinstance(rule["max"], str) or rule["min"] <= rule["max"]
    quality.judge(dict.fromkeys(contract["metrics"], 0.0), contract["expect"], TINY, table)  # every $section.key exists


@pytest.mark.parametrize("table", lakehouse.table_names())
def test_every_expected_metric_comes_from_the_document_or_is_named_by_a_job(table: str) -> None:
    contract = quality.read_expectations(table)
    elsewhere = {rule["metric"] for rule in contract["expect"]} - set(contract["metrics"])
    jobs = "\n".join(path.read_text(encoding="utf-8") for path in (SQL.parent / "jobs").glob("*.py"))
    assert {name for name in elsewhere if not re.search(rf"\b{re.escape(name)}\b", jobs)} == set()


# ---------------------------------------------------------------- auditing rows


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes sql/own/<name> with the expectations given, and returns the table's name."""
    made = iter(range(100))

    def make(content: Any) -> str:
        name = f"own.{tmp_path.name.rstrip('0123456789')}{next(made)}"
        folder = tmp_path / "sql" / Path(*name.split("."))
        folder.mkdir(parents=True)
        (folder / "table.sql").write_text("CREATE TABLE x (day DATE) USING iceberg\nPARTITIONED BY (day)\n")
        (folder / "expectations.json").write_text(json.dumps(content))
        return name

    quality.read_expectations.cache_clear()
    for module in (quality, lakehouse):
        monkeypatch.setattr(module, "SQL", tmp_path / "sql")
    yield make
    quality.read_expectations.cache_clear()


def events(spark: Any, *rows: tuple[date, str, float | None]) -> Any:
    return spark.createDataFrame(rows, "day date, kind string, value double")


def audit(frame: Any, table: str, **given: Any) -> quality.Audit:
    settings = {"dates": (DAY,), "equal": {}, "known": {}, "config": TINY, "branch": "audit_x_20260301_abc", "reason": "nightly", **given}
    return quality.audit(frame, table, **settings)


METRICS = {"rows": "count(1)", "missing": "count_if(value is null)", "mean": "avg(value)", "largest": "max(value)"}


@pytest.mark.spark
def test_a_failed_expectation_names_what_was_observed_where_and_what_to_type(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "missing", "max": 0}, {"metric": "rows", "min": 5}, {"metric": "mean", "min": 0}]})
    with pytest.raises(GateFailed) as caught:
        audit(events(spark, (DAY, "a", 1.0), (DAY, "b", None), (DAY, "c", None)), table)
    error = caught.value
    assert error.headline == f"2 expectation(s) on {table} do not hold; main is untouched"
    assert error.expected == "missing <= 0; rows >= 5"
    assert error.found == "missing <= 0 (observed 2); rows >= 5 (observed 3)"
    assert error.where == f"{table}, branch audit_x_20260301_abc (nightly)"
    assert error.next_command == "sid inspect audit_x_20260301_abc"


@pytest.mark.spark
def test_a_warning_is_logged_and_lets_the_rows_pass(spark: Any, own_table: Any, caplog: pytest.LogCaptureFixture) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "rows", "min": 5, "severity": "warn"}, {"metric": "missing", "max": 0}]})
    with caplog.at_level(logging.WARNING, logger="pipeline.quality"):
        found = audit(events(spark, (DAY, "a", 1.0)), table)
    assert [str(judgement) for judgement in found.failures("warn")] == ["rows >= 5 (observed 1)"]
    assert found.failures() == []
    assert "rows >= 5 (observed 1)" in caplog.text
    assert table in caplog.text


@pytest.mark.spark
def test_only_the_rows_of_the_dates_and_the_slice_are_counted(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "rows", "min": 0}]})
    other = date(2026, 2, 1)
    frame = events(spark, (DAY, "a", 1.0), (DAY, "b", 2.0), (DAY, "b", 4.0), (other, "b", 100.0))
    assert audit(frame, table).metrics == {"rows": 3.0, "missing": 0.0, "mean": 7 / 3, "largest": 4.0}
    assert audit(frame, table, equal={"kind": "b"}).metrics["mean"] == 3.0
    assert audit(frame, table, dates=(other, DAY)).metrics["rows"] == 4.0
    assert audit(frame, table, dates=()).metrics["rows"] == 4.0


@pytest.mark.spark
def test_an_aggregate_of_nothing_is_absent_and_fails_where_it_is_expected(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "mean", "min": 0}]})
    with pytest.raises(GateFailed, match="observed missing"):
        audit(events(spark), table)
    optional = own_table({"metrics": METRICS, "expect": [{"metric": "mean", "min": 0, "optional": True}]})
    assert "mean" not in audit(events(spark), optional).metrics


@pytest.mark.spark
def test_a_nan_in_the_rows_fails_its_expectation(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "mean", "min": 0}]})
    with pytest.raises(GateFailed, match="observed nan"):
        audit(events(spark, (DAY, "a", float("nan")), (DAY, "a", 1.0)), table)


@pytest.mark.spark
def test_what_the_job_knows_is_judged_with_what_the_rows_say(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": {"rows": "count(1)"}, "expect": [{"metric": "churn", "max": 0.1}]})
    frame = events(spark, (DAY, "a", 1.0))
    assert audit(frame, table, known={"churn": 0.05}).metrics == {"rows": 1.0, "churn": 0.05}
    with pytest.raises(GateFailed, match=r"observed 0\.2") as caught:
        audit(frame, table, known={"churn": 0.2})
    assert caught.value.metrics == {"rows": 1.0, "churn": 0.2}, "what was measured goes with the error"
    with pytest.raises(GateFailed, match="observed missing"):
        audit(frame, table)


@pytest.mark.spark
def test_looking_at_a_branch_judges_what_the_rows_can_answer_and_raises_nothing(spark: Any, own_table: Any) -> None:
    table = own_table({"metrics": METRICS, "expect": [{"metric": "rows", "min": 5}, {"metric": "known to the job", "max": 0}]})
    frame = events(spark, (DAY, "a", 1.0))
    found = quality.observe(frame, table, dates=(DAY,), config=TINY, known={})
    assert [(judgement.metric, judgement.observed, judgement.passed) for judgement in found] == [("rows", 1.0, False)]
    found = quality.observe(frame, table, dates=(DAY,), config=TINY, known={"rows": 9.0, "known to the job": 3.0})
    assert [(judgement.metric, judgement.observed, judgement.passed) for judgement in found] == [("rows", 9.0, True), ("known to the job", 3.0, False)]


@pytest.mark.spark
def test_looking_at_a_branch_of_a_table_without_dates_judges_all_its_rows(spark: Any) -> None:
    book = spark.createDataFrame([(1, 0, "level_0", 0, [1.0]), (1, 0, "level_0", 0, [2.0])], spark.table("lake.sid.codebook").schema)
    vectors = spark.createDataFrame([("e", "text", "h", [float("nan")])], spark.table("lake.feature.item_content_vector").schema)
    for table, frame in (("sid.codebook", book), ("feature.item_content_vector", vectors)):
        found = quality.observe(frame, table, dates=(DAY,), config=TINY, known={})
        assert [judgement.metric for judgement in found if not judgement.passed], f"{table}: a fault in its rows is seen"


def test_a_table_without_a_document_is_not_judged_and_a_strange_document_is_refused(own_table: Any) -> None:
    assert quality.read_expectations("own.nothing") == {"metrics": {}, "expect": []}
    with pytest.raises(ContractError, match="cannot read the expectations"):
        quality.read_expectations(own_table({"metrics": {}, "expectations": []}))


@pytest.mark.spark
def test_the_gate_of_a_real_table_stops_an_event_of_the_future(spark: Any) -> None:
    rows = [(DAY, "u", "i", datetime(2026, 3, 1, 23, 59), "click", 1.0, None), (DAY, "u", "i", datetime(2026, 3, 2), "click", 1.0, None)]
    frame = spark.createDataFrame(rows, spark.table("lake.raw.interaction").schema)
    with pytest.raises(GateFailed) as caught:
        audit(frame, "raw.interaction")
    assert caught.value.found == "future_events <= 0 (observed 1)"
    assert audit(frame.where("event_ts < '2026-03-02'"), "raw.interaction").metrics["rows"] == 1.0
