"""Lineage: where a table lies by OpenLineage's rules, what counts as written, and the provider's own type where it is installed."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import lineage

OUTCOME: dict[str, Any] = {
    "read": {"raw.item": 11, "sid.release": None},
    "snapshots": {"feature.item_feature": 21},
    "outputs": {"held": {"sid.item_sid": {"snapshot_id": 22, "branch": "audit"}}},
}


@pytest.mark.parametrize(
    ("warehouse", "namespace", "name"),
    [
        ("/srv/lake", "file", "/srv/lake/sid/item_sid"),
        ("file:///srv/lake/", "file", "/srv/lake/sid/item_sid"),
        ("s3://bucket/lake", "s3://bucket", "lake/sid/item_sid"),
        ("s3://bucket", "s3://bucket", "sid/item_sid"),
    ],
)
def test_a_table_is_named_by_the_place_of_its_files(warehouse: str, namespace: str, name: str) -> None:
    assert lineage.place(warehouse, "sid.item_sid") == (namespace, name)


def test_rows_held_on_an_audit_branch_count_as_written() -> None:
    assert lineage.written(OUTCOME) == {"feature.item_feature": 21, "sid.item_sid": 22}


def test_the_provider_gets_every_table_at_its_snapshot() -> None:
    pytest.importorskip("airflow.providers.openlineage", reason="the extra `lineage` is not installed")
    found = lineage.facets(OUTCOME, "/srv/lake")
    sides = [{item.name.rpartition("/lake/")[2]: item.facets["version"].datasetVersion for item in side} for side in (found.inputs, found.outputs)]
    assert sides == [{"raw/item": "11"}, {"feature/item_feature": "21", "sid/item_sid": "22"}], "an empty table has no snapshot to name"
    assert {item.facets["symlinks"].identifiers[0].name for item in found.outputs} == {"feature.item_feature", "sid.item_sid"}
