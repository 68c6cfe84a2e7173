"""Numbered migrations: an old table gets the new columns, keeps its rows, and a kill between two steps is met."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from jobs.inputs import Inputs
from pipeline import lakehouse
from pipeline.config import Lake
from pipeline.context import Home
from pipeline.errors import ConfigError, ContractError

pytestmark = pytest.mark.spark
TABLE = "trial.thing"
PROPERTIES = "USING iceberg PARTITIONED BY (day) TBLPROPERTIES ('format-version' = '2')"
OLD = f"CREATE TABLE IF NOT EXISTS {TABLE} (day DATE COMMENT 'day', name STRING COMMENT 'name') {PROPERTIES}"
NEW = f"CREATE TABLE IF NOT EXISTS {TABLE} (day DATE, weight DOUBLE COMMENT 'kg', name STRING COMMENT 'name', tags ARRAY<STRING>, size INT) {PROPERTIES}"
FIRST = f"-- weights came with the scales\nALTER TABLE {TABLE} ADD COLUMN (weight DOUBLE COMMENT 'kg');\n"
SECOND = f"ALTER TABLE {TABLE} ADD COLUMNS (tags ARRAY<STRING>, size INT)"


@pytest.fixture
def folder(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table's folder below an sql root of its own, with the table as it was first."""
    path = tmp_path / "sql" / "trial" / "thing"
    (path / "migrations").mkdir(parents=True)
    (path / "table.sql").write_text(OLD)
    monkeypatch.setattr(lakehouse, "SQL", tmp_path / "sql")
    yield path
    spark.sql(f"DROP TABLE IF EXISTS lake.{TABLE} PURGE")
    spark.sql("DROP NAMESPACE IF EXISTS lake.trial")


def columns(spark: Any) -> dict[str, str]:
    return {field.name: field.dataType.simpleString() for field in spark.table(f"lake.{TABLE}").schema.fields}


def test_an_old_table_becomes_the_new_one_and_its_rows_stay_readable(spark: Any, lake_home: Home, folder: Path) -> None:
    lakehouse.create_tables(spark)
    spark.sql(f"INSERT INTO lake.{TABLE} VALUES (DATE'2026-01-01', 'a')")
    old = lakehouse.current_snapshot(lake_home, Lake(), TABLE)
    (folder / "table.sql").write_text(NEW)
    (folder / "migrations" / "001_weight.sql").write_text(FIRST)
    (folder / "migrations" / "002_tags_and_size.sql").write_text(SECOND)
    assert not lakehouse.is_ready(lake_home, Lake(), TABLE)
    lakehouse.create_tables(spark)
    assert lakehouse.is_ready(lake_home, Lake(), TABLE)
    assert lakehouse.migrate(spark, TABLE) == 0
    assert lakehouse.current_snapshot(lake_home, Lake(), TABLE) == old, "no row was rewritten"
    spark.sql(f"INSERT INTO lake.{TABLE} (day, name, weight, tags, size) VALUES (DATE'2026-01-02', 'b', 1.5, array('x'), 3)")
    rows = lakehouse.read_arrow(lake_home, Lake(), TABLE).sort_by("name").to_pylist()
    assert [(row["name"], row["weight"], row["tags"], row["size"]) for row in rows] == [("a", None, None, None), ("b", 1.5, ["x"], 3)]
    migrated = columns(spark)

    spark.sql(f"DROP TABLE lake.{TABLE} PURGE")
    lakehouse.create_tables(spark)
    assert columns(spark) == migrated, "a new table has the same columns"
    assert lakehouse.is_ready(lake_home, Lake(), TABLE)


def test_rows_that_were_pinned_before_a_migration_have_the_columns_of_now(spark: Any, lake_home: Home, folder: Path) -> None:
    """The night after it writes some tables from their own earlier rows; a frame without the new columns would be refused every time."""
    lakehouse.create_tables(spark)
    spark.sql(f"INSERT INTO lake.{TABLE} VALUES (DATE'2026-01-01', 'a')")
    inputs = Inputs(lake_home, Lake(), {TABLE: lakehouse.current_snapshot(lake_home, Lake(), TABLE)}, spark)
    (folder / "migrations" / "001_weight.sql").write_text(FIRST)
    (folder / "migrations" / "002_tags_and_size.sql").write_text(SECOND)
    lakehouse.create_tables(spark)
    frame = lakehouse.check_columns(inputs.frame(TABLE), spark, TABLE)
    assert [row.asDict() for row in frame.collect()] == [{"day": date(2026, 1, 1), "name": "a", "weight": None, "tags": None, "size": None}]


def test_a_kill_between_the_statement_and_its_note_is_met(spark: Any, folder: Path) -> None:
    lakehouse.create_tables(spark)
    (folder / "migrations" / "001_weight.sql").write_text(FIRST)
    spark.sql(f"ALTER TABLE lake.{TABLE} ADD COLUMNS (weight DOUBLE)")  # and here the process dies
    assert lakehouse.migrate(spark, TABLE) == 1
    assert columns(spark)["weight"] == "double"

    (folder / "migrations" / "002_tags_and_size.sql").write_text(SECOND)
    spark.sql(f"ALTER TABLE lake.{TABLE} ADD COLUMNS (size STRING)")
    with pytest.raises(ContractError, match="another type"):
        lakehouse.migrate(spark, TABLE)


def test_a_column_that_another_process_adds_at_the_same_moment_is_met(spark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog on a server has no locks: both processes found no column, the statement of one of them fails."""
    lakehouse.create_tables(spark)
    (folder / "migrations" / "001_weight.sql").write_text(FIRST)
    look, looks = lakehouse._columns, []

    def late(session: Any, table: str, wanted: Any) -> dict[str, str]:
        """What is there; after the first look the other process is through."""
        found = look(session, table, wanted)
        if not looks:
            spark.sql(f"ALTER TABLE lake.{TABLE} ADD COLUMNS (weight DOUBLE)")
        looks.append(found)
        return found

    monkeypatch.setattr(lakehouse, "_columns", late)
    assert lakehouse.migrate(spark, TABLE) == 1
    assert looks == [{}, {"weight": "double"}]
    assert columns(spark)["weight"] == "double"


def test_what_does_not_only_add_is_refused(spark: Any, folder: Path) -> None:
    lakehouse.create_tables(spark)
    before = columns(spark)
    start = f"ALTER TABLE {TABLE}"
    for text in (
        f"{start} DROP COLUMN name", f"{start} ADD COLUMNS (a INT NOT NULL)", "ALTER TABLE trial.other ADD COLUMNS (a INT)", f"DELETE FROM {TABLE}",
        f"{start} ADD COLUMNS (a INT); DROP TABLE {TABLE}", f"{start} ADD COLUMNS (a INT); DELETE FROM {TABLE} WHERE (name = 'a')", "",
    ):  # fmt: skip
        (folder / "migrations" / "001_bad.sql").write_text(text)
        with pytest.raises(ConfigError, match="not additive"):
            lakehouse.migrate(spark, TABLE)
    assert columns(spark) == before


def test_a_gap_in_the_numbers_is_refused(folder: Path) -> None:
    (folder / "migrations" / "001_weight.sql").write_text(FIRST)
    (folder / "migrations" / "003_more.sql").write_text(SECOND)
    with pytest.raises(ConfigError, match="numbered"):
        lakehouse.migrations(TABLE)
    assert [number for number, _ in lakehouse.migrations("trial.nothing")] == []
