"""content_cre: the night's content in the space of the generation's content encoder, stored under an encoder id of its own beside the base vectors.

A cold generation takes the encoder that was trained tonight; a frozen night, a refit that is anchored or warm, and a night with the recipe switched off
take the encoder that the generation's vectors carry, so that one encoder id per modality holds for a release. Without one the base vectors serve.
A base vector that is projected once is never projected again: rows are keyed by encoder and content, as all content vectors are.
Not here: training (train_content_encoder), the adapters (pipeline/encoders/sail).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.assign_sid import list_array, model_files
from jobs.content_inputs import MODALITIES, base_encoders, recorded
from pipeline import config
from pipeline.context import Context
from pipeline.errors import ContractError
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

VECTORS, ENCODERS = "feature.item_content_vector", "feature.content_encoder"
MADE = "encoder_id string, modality string, content_hash string, vector array<float>"
Row = dict[str, Any]
_ENCODERS: dict[str, Any] = {}  # per worker process: model digest -> encoder


def idle(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult | None:
    """`skipped` when the generation reads base vectors, whose ids are then the night's."""
    if chosen(inputs, ctx)[0] is not None:
        return None
    base = base_encoders(ctx)
    return StageResult(status="skipped", outputs={f"{name}_encoder_id": base.get(name) for name in MODALITIES})


def run(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult:
    """The missing vectors, and the encoder's row when it is new.

    Outputs: text_encoder_id, image_encoder_id of the night (null = none).
    Raises: ContractError when the base vectors of the night are not those the encoder was trained on.
    """
    base = base_encoders(ctx)
    row, known = chosen(inputs, ctx)
    assert row is not None, "an idle night does not come here"
    check_base(row, base)
    covered = {name: base[name] for name in MODALITIES if row[f"{name}_encoder_id"]}
    missing = inputs.query(
        ENCODERS,
        {"item": inputs.frame("raw.item"), "vector": inputs.frame(VECTORS)},
        logical_date=ctx.logical_date,
        encoder_id=row["encoder_id"],
        **{f"{name}_encoder_id": covered.get(name, "") for name in MODALITIES},
    )
    assert inputs.spark is not None, "a Spark stage"
    model = inputs.spark.sparkContext.broadcast(model_files(inputs.model(row["model_uri"])))
    made = missing.mapInArrow(partial(encode_batches, model=model, encoder_id=row["encoder_id"]), MADE).localCheckpoint()
    count = made.count()
    writes = (Write(table=VECTORS, frame=made),) if count else ()
    if not known:
        writes = (*writes, Write(table=ENCODERS, frame=encoder_frame(inputs, row)))
    ids = {f"{name}_encoder_id": row["encoder_id"] if name in covered else base.get(name) for name in MODALITIES}
    return StageResult(writes=writes, metrics={"projected": float(count)}, outputs=ids)


def chosen(inputs: Inputs, ctx: Context) -> tuple[Row | None, bool]:
    """(the encoder's row or None, whether feature.content_encoder holds it already)."""
    plan = ctx.plan()
    encoders = inputs.arrow(ENCODERS).to_pylist()
    if plan.start == "cold" or plan.parent is None:
        trained = ctx.outcome("train_content_encoder")["outputs"]
        if not trained.get("model_uri"):
            return None, False
        known = recorded(encoders, (trained["encoder_id"],))
        fresh = {"encoder_id": trained["encoder_id"], "model_uri": trained["model_uri"], "width": int(trained["width"])}
        return known or fresh | {f"{name}_encoder_id": trained["base_encoders"].get(name) for name in MODALITIES}, known is not None
    generation = plan.parent.generation  # a frozen night's own; a refit begins at it
    rows = inputs.arrow("sid.generation", columns=("text_encoder_id", "image_encoder_id"), where=f"generation == {generation:d}").to_pylist()
    return (recorded(encoders, tuple(rows[0].values())) if rows else None), True


def check_base(row: Mapping[str, Any], base: Mapping[str, str]) -> None:
    """Nothing, when every base encoder of the content encoder is the night's.

    Raises: ContractError otherwise: its adapters mean nothing on other vectors.
    """
    for name in MODALITIES:
        wanted = row[f"{name}_encoder_id"]
        if wanted and base.get(name) != wanted:
            raise ContractError(
                "the generation's content encoder reads other base vectors",
                expected=wanted,
                found=base.get(name) or "none",
                where=f"[content_embedding] {name}_encoder",
                next_command="sid run refresh --date D --set plan_night.policy=cold",
            )


def encoder_frame(inputs: Inputs, row: Mapping[str, Any]) -> DataFrame:
    """The encoder's one row of feature.content_encoder."""
    assert inputs.spark is not None, "a Spark stage"
    target = inputs.frame(ENCODERS).schema
    return inputs.spark.createDataFrame([tuple(row[name] for name in target.names)], target)


# ---------------------------------------------------------------- in the workers


def encode_batches(batches: Iterator[pa.RecordBatch], model: Any, encoder_id: str) -> Iterator[pa.RecordBatch]:
    """Rows of MADE for base vectors (modality, content_hash, vector)."""
    for batch in batches:
        for modality in MODALITIES:
            rows = batch.filter(pc.equal(batch.column("modality"), modality))
            if rows.num_rows:
                yield encoded(rows, modality, _encoder(*model.value), encoder_id)


def encoded(rows: pa.RecordBatch, modality: str, encoder: Any, encoder_id: str) -> pa.RecordBatch:
    """Rows of MADE of one modality; the other modalities are not shown, and do not matter to it."""
    import torch

    from pipeline.encoders.sail import Content

    count = rows.num_rows
    matrix = rows.column("vector").flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(count, -1)
    vectors = {name: torch.zeros(count, width) for name, width in encoder.base_widths.items()} | {modality: torch.from_numpy(matrix)}
    shown = {name: torch.full((count,), name == modality) for name in vectors}
    answer = encoder.encode(Content(vectors=vectors, shown=shown)).vectors[modality]
    columns = [pa.array([encoder_id] * count), rows.column("modality"), rows.column("content_hash"), list_array(answer.numpy())]
    return pa.RecordBatch.from_arrays(columns, ["encoder_id", "modality", "content_hash", "vector"])


def _encoder(about: str, tensors: bytes) -> Any:
    """The encoder of a model, built once per worker process and model."""
    key = hashlib.sha256(about.encode() + tensors).hexdigest()
    if key not in _ENCODERS:
        import torch
        from safetensors.torch import load

        from pipeline.encoders.sail import Sail

        torch.set_num_threads(1)  # one worker per core; also one order of summation
        _ENCODERS[key] = Sail.load(json.loads(about), load(tensors))
    return _ENCODERS[key]
