"""What a stage read and wrote, as OpenLineage events carry it: tables by the place where their files lie, each at its snapshot.

Airflow's OpenLineage provider asks `StageOperator` for it, when that provider is installed and configured; without it the same facts stand in the
snapshots' properties and in MLflow, for `sid show --lineage`. Not here: sending anything (the provider does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import Dataset


def written(outcome: Mapping[str, Any]) -> dict[str, int]:
    """Table -> snapshot of everything a stage wrote, published or still held on its audit branch."""
    return {**outcome["snapshots"], **{table: held["snapshot_id"] for table, held in outcome["outputs"].get("held", {}).items()}}


def place(warehouse: str, table: str) -> tuple[str, str]:
    """(namespace, name) of a table by OpenLineage's naming rules, e.g. (s3://bucket, lake/sid/item_sid) or (file, /srv/lake/sid/item_sid)."""
    scheme, _, rest = warehouse.removeprefix("file://").rpartition("://")
    folder = f"{rest.rstrip('/')}/{table.replace('.', '/')}"
    if not scheme:
        return "file", folder
    bucket, _, name = folder.partition("/")
    return f"{scheme}://{bucket}", name


def facets(outcome: Mapping[str, Any], warehouse: str) -> OperatorLineage:
    """Inputs and outputs of a finished stage, each table with its snapshot as version and its catalog name beside its place."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    read = {table: snapshot for table, snapshot in outcome["read"].items() if snapshot is not None}  # a table without a snapshot is empty
    return OperatorLineage(
        inputs=[_dataset(warehouse, *item) for item in sorted(read.items())], outputs=[_dataset(warehouse, *item) for item in sorted(written(outcome).items())]
    )


def _dataset(warehouse: str, table: str, snapshot: int) -> Dataset:
    from openlineage.client.event_v2 import Dataset
    from openlineage.client.generated.dataset_version_dataset import DatasetVersionDatasetFacet
    from openlineage.client.generated.symlinks_dataset import Identifier, SymlinksDatasetFacet

    namespace, name = place(warehouse, table)
    known_as = Identifier(namespace=namespace, name=table, type="TABLE")
    return Dataset(
        namespace=namespace,
        name=name,
        facets={"version": DatasetVersionDatasetFacet(datasetVersion=str(snapshot)), "symlinks": SymlinksDatasetFacet(identifiers=[known_as])},
    )
