"""The lake on real Iceberg tables: branches, replacement, the one publish commit, digests and reading without a JVM."""

from __future__ import annotations

from datetime import date

import pytest

from pipeline import lakehouse
from pipeline.config import Lake
from pipeline.errors import ContractError, PublishConflict, UpstreamMissing

pytestmark = pytest.mark.spark
TABLE = "feature.item_day_stat"
D1, D2 = date(2026, 1, 1), date(2026, 1, 2)


def rows(spark, day: date, counts: dict[str, int]):
    data = [(day, day, item, count, "sha") for item, count in counts.items()]
    return spark.createDataFrame(data, "logical_date date, event_date date, item_id string, events long, source_sha256 string")


def put(spark, day: date, counts: dict[str, int], branch: str, tag: str = "") -> int:
    lakehouse.cut_branch(spark, TABLE, branch)
    lakehouse.replace(rows(spark, day, counts), TABLE, branch, dates=[day], equal={}, properties={"run": "r"})
    return lakehouse.publish(spark, TABLE, branch, tag)


def main(spark) -> dict[tuple[date, str], int]:
    return {(row.logical_date, row.item_id): row.events for row in spark.table(f"lake.{TABLE}").collect()}


def test_partition_replaced_by_rows_then_by_nothing_then_by_rows(spark, lake_home):
    put(spark, D1, {"a": 1, "b": 2}, "audit_1")
    put(spark, D2, {"c": 3}, "audit_2")
    put(spark, D1, {}, "audit_3")
    assert main(spark) == {(D2, "c"): 3}
    put(spark, D1, {"a": 9}, "audit_4")
    assert main(spark) == {(D1, "a"): 9, (D2, "c"): 3}


def test_main_is_untouched_until_publish_and_the_branch_is_gone_after(spark, lake_home):
    lakehouse.cut_branch(spark, TABLE, "audit_x")
    lakehouse.replace(rows(spark, D1, {"a": 1}), TABLE, "audit_x", dates=[D1], equal={}, properties={})
    assert main(spark) == {}
    assert lakehouse.read_branch(spark, TABLE, "audit_x").count() == 1
    found = lakehouse.publish(spark, TABLE, "audit_x", "d20260101")
    assert lakehouse.references(spark, TABLE) == {"main": found, "d20260101": found}


def test_two_branches_of_one_main_never_lose_a_day(spark, lake_home):
    for branch, day in (("audit_a", D1), ("audit_b", D2)):
        lakehouse.cut_branch(spark, TABLE, branch)
        lakehouse.replace(rows(spark, day, {"a": 1}), TABLE, branch, dates=[day], equal={}, properties={})
    lakehouse.publish(spark, TABLE, "audit_a")
    before = lakehouse.references(spark, TABLE)
    with pytest.raises(PublishConflict):
        lakehouse.publish(spark, TABLE, "audit_b", "tag_b")
    assert lakehouse.references(spark, TABLE) == before
    put(spark, D2, {"a": 1}, "audit_b")
    assert set(main(spark)) == {(D1, "a"), (D2, "a")}


def test_only_the_audited_snapshot_is_published(spark, lake_home):
    base = lakehouse.cut_branch(spark, TABLE, "audit_x")
    lakehouse.replace(rows(spark, D1, {"a": 1}), TABLE, "audit_x", dates=[D1], equal={}, properties={})
    audited = lakehouse.snapshot(spark, TABLE, "audit_x")
    lakehouse.cut_branch(spark, TABLE, "audit_x")  # another try of the same run: the name now shows main, which publishes without a word
    with pytest.raises(PublishConflict, match="moved since it was audited"):
        lakehouse.publish(spark, TABLE, "audit_x", "d20260101", expect=audited)
    assert lakehouse.references(spark, TABLE) == {"main": base, "audit_x": base}
    lakehouse.append(rows(spark, D1, {}), TABLE, "audit_x", {})
    appended = lakehouse.snapshot(spark, TABLE, "audit_x")
    assert appended != base, "an empty write is a snapshot of its own"
    lakehouse.replace(rows(spark, D1, {}), TABLE, "audit_x", dates=[D1], equal={}, properties={})
    assert lakehouse.snapshot(spark, TABLE, "audit_x") not in (base, appended)


def test_a_tag_beside_a_release_may_be_put_elsewhere(spark, lake_home):
    first, second = put(spark, D1, {"a": 1}, "audit_1"), put(spark, D1, {"a": 2}, "audit_2")
    for snapshot_id in (first, second, second):
        lakehouse.put_tag(spark, TABLE, "d20260101", snapshot_id)
        assert lakehouse.references(spark, TABLE)["d20260101"] == snapshot_id


def test_a_change_of_references_that_meets_another_commit_may_be_tried_again(spark, lake_home, monkeypatch):
    """On a catalog server nothing keeps a night from publishing while housekeeping drops a tag, or while somebody pins one."""
    first, check, second = put(spark, D1, {"a": 1}, "audit_1", "d20260101"), lakehouse._checked_reference, []

    def meanwhile(name: str) -> str:
        monkeypatch.setattr(lakehouse, "_checked_reference", check)
        second.append(put(spark, D2, {"b": 2}, "audit_2"))
        return name

    monkeypatch.setattr(lakehouse, "_checked_reference", meanwhile)
    with pytest.raises(PublishConflict, match="while it was changed"):
        lakehouse.drop_references(spark, TABLE, tags=["d20260101"])
    assert lakehouse.references(spark, TABLE) == {"main": second[0], "d20260101": first}
    lakehouse.drop_references(spark, TABLE, tags=["d20260101"])
    assert lakehouse.references(spark, TABLE) == {"main": second[0]}


def test_an_existing_tag_is_never_moved(spark, lake_home):
    first = put(spark, D1, {"a": 1}, "audit_1", "d20260101")
    with pytest.raises(ContractError, match="never moved"):
        put(spark, D1, {"a": 2}, "audit_2", "d20260101")
    assert lakehouse.references(spark, TABLE)["d20260101"] == first
    assert main(spark) == {(D1, "a"): 1}


def test_a_row_of_another_date_is_refused(spark, lake_home):
    lakehouse.cut_branch(spark, TABLE, "audit_x")
    with pytest.raises(ContractError, match="another date"):
        lakehouse.replace(rows(spark, D2, {"a": 1}), TABLE, "audit_x", dates=[D1], equal={}, properties={})
    assert main(spark) == {}


def test_a_frame_without_the_declared_columns_is_refused(spark, lake_home):
    with pytest.raises(ContractError, match="source_sha256: missing"):
        lakehouse.check_columns(rows(spark, D1, {"a": 1}).drop("source_sha256"), spark, TABLE)


def test_digest_ignores_order_and_files_but_no_value(spark, lake_home):
    frame = rows(spark, D1, {"a": 1, "b": 2, "c": 3})
    assert lakehouse.rows_digest(frame) == lakehouse.rows_digest(frame.orderBy("events", ascending=False).repartition(3))
    assert lakehouse.rows_digest(frame) != lakehouse.rows_digest(rows(spark, D1, {"a": 1, "b": 2, "c": 4}))


def test_reading_without_a_jvm_sees_the_newest_metadata_even_with_a_stale_hint(spark, lake_home):
    put(spark, D1, {"a": 1}, "audit_1")
    pinned = lakehouse.current_snapshot(lake_home, Lake(), TABLE)
    put(spark, D2, {"b": 2}, "audit_2")
    (lake_home.folder("lake") / "feature/item_day_stat/metadata/version-hint.text").write_text("1")
    assert sorted(lakehouse.read_arrow(lake_home, Lake(), TABLE)["item_id"].to_pylist()) == ["a", "b"]
    assert lakehouse.read_arrow(lake_home, Lake(), TABLE, snapshot_id=pinned)["item_id"].to_pylist() == ["a"]


def test_an_unknown_release_names_the_known_ones(spark, lake_home):
    with pytest.raises(UpstreamMissing, match="no release"):
        lakehouse.read_release(lake_home, Lake(), "d20260101")
