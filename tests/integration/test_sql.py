"""Rows in -> rows out of every query under sql/, from tests/sql_cases/<namespace>.<table>.json.

A case names its views (schema and rows as JSON), its parameters and the rows it expects, whatever their order.
`query` names another file of the table's folder than query.sql, or several in a row: each is a view for the next.
"""

import json
from datetime import date, datetime
from pathlib import Path

import pytest

from pipeline import config, quality
from pipeline.context import SQL

CASES = [
    pytest.param(path.stem, case, id=f"{path.stem}: {case['name']}")
    for path in sorted((Path(__file__).parent.parent / "sql_cases").glob("*.json"))
    for case in json.loads(path.read_text(encoding="utf-8"))
]
CLOCKLESS = ("rand(", "current_date", "current_timestamp", "now(", "uuid(", "insert ", "merge ")


def frame_of(spark, view):
    from pyspark.sql import functions as F

    rows = spark.createDataFrame([(json.dumps(row),) for row in view["rows"]], "row string")
    return rows.select(F.from_json("row", view["schema"]).alias("row")).select("row.*")


def rows_of(frame):
    from pyspark.sql import functions as F

    texts = frame.select(F.to_json(F.struct(*frame.columns), {"ignoreNullFields": "false"}).alias("row")).collect()
    return sorted((json.loads(text.row) for text in texts), key=json.dumps)


def parameter(name, value):
    return {"logical_date": date.fromisoformat, "added_up": date.fromisoformat, "cutoff": datetime.fromisoformat}.get(name, lambda text: text)(value)


@pytest.mark.spark
@pytest.mark.parametrize(("table", "case"), CASES)
def test_rows_in_rows_out(spark, table, case):
    for name, view in case["views"].items():
        frame_of(spark, view).createOrReplaceTempView(name)
    given = {key: parameter(key, value) for key, value in case["params"].items()}
    for name in case.get("query", "query").split(", "):
        found = spark.sql((SQL / table.replace(".", "/") / f"{name}.sql").read_text(encoding="utf-8"), args=given)
        found.createOrReplaceTempView(name)
    assert rows_of(found) == sorted((dict(row) for row in case["expect"]), key=json.dumps)


@pytest.mark.spark
def test_a_basket_is_not_ordered_by_item_id(spark):
    """If an order of ids decided what comes next, every basket below would come out ascending."""
    rows = [("2011-01-04", f"u{user}", f"item{number}", "2011-01-04 10:00:00", f"s{user}") for user in range(20) for number in range(5)]
    frame = spark.createDataFrame(rows, "file_date string, user_id string, item_id string, event_ts string, session_id string")
    frame.selectExpr("date(file_date) file_date", "user_id", "item_id", "timestamp(event_ts) event_ts", "session_id").createOrReplaceTempView("interaction")
    text = (SQL / "feature" / "user_sequence" / "query.sql").read_text(encoding="utf-8")
    args = {
        "logical_date": date(2011, 1, 4),
        "cutoff": datetime.fromisoformat("2011-01-05T00:00:00+00:00"),
        "order_by": "basket",
        "max_events": 50,
        "inputs_sha256": "s",
    }
    found = spark.sql(text, args=args).collect()
    ascending = sum(row.item_ids == sorted(row.item_ids) for row in found)
    assert len(found) == 20
    assert ascending <= 3
    assert all(row.baskets == [0] * 5 for row in found)
    assert [row.item_ids for row in spark.sql(text, args=args).orderBy("user_id").collect()] == [row.item_ids for row in sorted(found, key=lambda r: r.user_id)]


@pytest.mark.spark
@pytest.mark.parametrize(("events", "refused"), [([2**31 - 1], set()), ([2**31 - 1, 1], {"out_of_range"}), ([5 * 10**9], {"more_than_a_sum_holds"})])
def test_a_popularity_whose_sum_wrapped_is_refused(spark, events, refused):
    """BIGINT wraps in silence: once around it is negative, twice around it looks like a popularity."""
    rows = [{"logical_date": "2011-01-04", "event_date": "2011-01-04", "item_id": "a", "events": count} for count in events]
    frame_of(spark, {"schema": "logical_date date, event_date date, item_id string, events bigint", "rows": rows}).createOrReplaceTempView("item_day_stat")
    frame_of(spark, {"schema": "item_id string", "rows": []}).createOrReplaceTempView("listed")
    frame_of(spark, {"schema": "item_id string, evidence_count bigint, first_event_date date", "rows": []}).createOrReplaceTempView("before")
    numbers = {"window_days": 4, "half_life_days": 1.0, "head_share": 0.25, "tail_share": 0.5, "inputs_sha256": "s"}
    given = {"logical_date": date(2011, 1, 4), "added_up": date(1900, 1, 1), **numbers}
    for name in ("scored", "query"):
        found = spark.sql((SQL / "feature" / "item_popularity" / f"{name}.sql").read_text(encoding="utf-8"), args=given)
        found.createOrReplaceTempView(name)
    judged = quality.observe(found, "feature.item_popularity", dates=[date(2011, 1, 4)], config=config.load("tiny"), known={})
    assert {judgement.metric for judgement in judged if not judgement.passed} == refused


@pytest.mark.parametrize("path", sorted(SQL.glob("*/*/*.sql")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_queries_only_select_and_know_no_clock(path):
    if path.name == "table.sql":
        assert path.read_text(encoding="utf-8").count("CREATE TABLE") == 1
        return
    text = "\n".join(line.split("--")[0] for line in path.read_text(encoding="utf-8").lower().splitlines())
    assert not [word for word in CLOCKLESS if word in text]
