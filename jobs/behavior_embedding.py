"""behavior_embedding: the rows that train_behavior_encoder left in its model, with the evidence behind them, as tonight's partition.

A night on which no row moved replaces its partition by nothing. Torch is not needed: the bundle is read as NumPy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.ingest import literal_path
from jobs.train_behavior_encoder import checked
from pipeline import config
from pipeline.context import Context
from pipeline.errors import ContractError
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from jobs.inputs import Inputs

TABLE = "feature.item_behavior_vector"
SCHEMA = pa.schema([("item_id", pa.string()), ("vector", pa.large_list(pa.float32())), ("norm", pa.float32())])


def run(inputs: Inputs, params: config.BehaviorEmbedding, ctx: Context) -> StageResult:
    """Tonight's rows of feature.item_behavior_vector; `norm_ratio` = largest norm over the generation's largest.

    Raises: ContractError for vectors that are not finite or do not match their items.
    """
    plan, outcome = ctx.plan(), ctx.outcome("train_behavior_encoder")
    outputs = outcome["outputs"]
    rows = bundle_rows(inputs.model(outputs["model_uri"])) if outputs.get("model_uri") else SCHEMA.empty_table()
    path = ctx.staging / "behavior_rows.parquet"
    pq.write_table(rows, path)
    assert inputs.spark is not None, "a Spark stage"
    frame = inputs.query(
        TABLE,
        {"behavior_row": inputs.spark.read.parquet(literal_path(path.absolute())), "item_popularity": inputs.frame("feature.item_popularity")},
        logical_date=ctx.logical_date,
        generation=plan.generation,
    )
    encoder = ctx.config.train_behavior_encoder
    cold = 0 if getattr(getattr(encoder, encoder.encoder), "cold_items", False) else frame.where("evidence_count = 0").count()
    metrics = {"unexpected_cold_rows": float(cold), "norm_ratio": norm_ratio(rows, outputs.get("richness_reference", {})), **outputs.get("gate", {})}
    write = Write(table=TABLE, frame=frame, dates=(ctx.logical_date,), metrics=metrics)
    return StageResult(writes=(write,), metrics={"rows": float(len(rows)), "norm_ratio": metrics["norm_ratio"]})


def bundle_rows(folder: Path) -> pa.Table:
    """(item_id, vector, norm) of a bundle, sorted by item_id, norms in float32.

    Raises: ContractError naming the first items whose vector is not finite, or a count of rows that does not match the items.
    """
    from safetensors.numpy import load_file

    vectors_MD = load_file(folder / "model.safetensors")["behavior_vectors"].astype(np.float32)
    item_ids = pa.array(json.loads((folder / "config.json").read_text(encoding="utf-8"))["item_ids"], pa.string())
    if len(item_ids) != len(vectors_MD):
        raise ContractError("the model's rows do not match its items", expected=f"{len(item_ids)} rows", found=str(len(vectors_MD)), where=str(folder))
    vectors_MD = checked(vectors_MD, item_ids, str(folder / "model.safetensors"), "sid run train_behavior_encoder --date D")
    width = vectors_MD.shape[1]
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(len(item_ids) + 1, dtype=np.int64) * width), pa.array(vectors_MD.ravel()))
    norms = pa.array(np.linalg.norm(vectors_MD, axis=1).astype(np.float32))
    return pa.Table.from_arrays([item_ids, lists, norms], schema=SCHEMA).sort_by("item_id")


def norm_ratio(rows: pa.Table, reference: dict[str, Any]) -> float:
    """Largest norm of the rows in units of the generation's largest; 0 without rows."""
    if not len(rows):
        return 0.0
    return float(np.max(rows["norm"].to_numpy())) / max(float(reference["max_norm"]), 1e-12)
