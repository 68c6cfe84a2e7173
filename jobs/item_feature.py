"""The night's thin manifest: per item its hashes, masks, counts, richness, alignment strength and where its behaviour row lies.

Under `frozen` only the rows trained tonight get new behaviour fields; all others are the parent's bit by bit, so that a new item moves no other.
Not here: vectors (readers join them by key) and fitting the richness reference (train_behavior_encoder).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jobs.content_inputs import MODALITIES
from jobs.plan_night import MANIFEST, last_revision
from pipeline import config, lakehouse
from pipeline.context import Context, Plan
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.richness import alignment_strength, richness
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

SHOWN = 100  # returned ids that the outcome names
TRAINED_DDL = "item_id string, evidence_count bigint, evidence_bucket int, richness float, strength float"


def run(inputs: Inputs, params: config.ItemFeature, ctx: Context) -> StageResult:
    """The night's partition of feature.item_feature.

    Raises: UpstreamMissing when the generation's richness reference is not there; ContractError when its content encoders are not the night's.
    """
    from pyspark.sql import functions as F

    plan = ctx.plan()
    encoders = content_encoders(ctx)
    recorded = recorded_generation(inputs, plan)
    check_encoders(recorded, encoders)
    reference, base_date = generation_reference(recorded, ctx, plan)
    popularity = inputs.frame("feature.item_popularity").where(F.col("logical_date") == F.lit(plan.logical_date))
    first_event = popularity.where("first_event_date IS NOT NULL").select("item_id", "first_event_date")
    views = {"item": inputs.frame("raw.item"), "source_file": inputs.frame("raw.source_file"), "first_event": first_event}
    items = inputs.query("raw.item", views, name="as_of", logical_date=plan.logical_date, catalogue=ctx.config.source.catalogue)
    parent = parent_rows(inputs, plan)
    keep_replaced(inputs, ctx)
    frame = inputs.query(
        "feature.item_feature",
        {
            "item": items,
            "item_popularity": popularity,
            "content_key": inputs.frame("feature.item_content_vector").select("encoder_id", "modality", "content_hash"),
            "trained": trained_rows(inputs.frame("feature.item_behavior_vector"), plan, reference),
            "parent": parent.where(F.lit(not plan.new_generation)),
        },
        logical_date=plan.logical_date,
        generation=plan.generation,
        text_encoder_id=encoders.get("text_encoder_id"),
        image_encoder_id=encoders.get("image_encoder_id"),
    ).persist()
    metrics, returned = measured(frame, parent, plan.logical_date, base_date), returned_as_others(frame, parent).persist()
    write = Write(table="feature.item_feature", frame=frame, dates=(plan.logical_date,), metrics={"returned_as_others": float(returned.count())})
    shown = [row.item_id for row in returned.orderBy("item_id").limit(SHOWN).collect()]
    return StageResult(writes=(write,), metrics=metrics, outputs={"returned_as_others": shown})


def returned_as_others(frame: DataFrame, parent: DataFrame) -> DataFrame:
    """item_id of those that were retired in the parent and are back tonight with other content: perhaps reused for another item.

    Their codes stay the old item's until the next behaviour row or generation, like any changed content; people should look at them.
    """
    from pyspark.sql import functions as F

    gone = parent.where(F.col("status") == "retired").select("item_id", F.col("content_hash").alias("content_before"))
    back = frame.where(F.col("status") == "live").join(gone, "item_id")
    return back.where(~F.col("content_hash").eqNullSafe(F.col("content_before"))).select("item_id")


def content_encoders(ctx: Context) -> Mapping[str, Any]:
    """text_encoder_id and image_encoder_id of the night: content_cre's answer, or content_embedding's in a run without that stage."""
    asked = ctx.config.content_cre.enabled or (ctx.staging / "content_cre.json").is_file()
    outputs: Mapping[str, Any] = ctx.outcome("content_cre" if asked else "content_embedding")["outputs"]
    return outputs


def recorded_generation(inputs: Inputs, plan: Plan) -> Mapping[str, Any] | None:
    """The row in sid.generation of the generation that the night goes on with or is refitted from; None for a cold night.

    Raises: UpstreamMissing when there is none.
    """
    if plan.start == "cold" or plan.parent is None:
        return None
    rows = inputs.frame("sid.generation").where(f"generation = {plan.parent.generation:d}").collect()
    if not rows:
        raise UpstreamMissing(
            f"generation {plan.parent.generation} is not recorded",
            expected="one row",
            found="none",
            where="sid.generation",
            next_command="sid run refresh --date D --set plan_night.policy=cold",
        )
    found: Mapping[str, Any] = rows[0].asDict()
    return found


def check_encoders(recorded: Mapping[str, Any] | None, encoders: Mapping[str, Any]) -> None:
    """Nothing, when content comes from the encoders of the recorded generation; a cold night chooses its own.

    Vectors of another encoder may have the same width, so that nothing later would notice. Where one side has no encoder there is nothing to compare.
    Raises: ContractError naming the setting.
    """
    if recorded is None:
        return
    for name in MODALITIES:
        wanted, found = recorded[f"{name}_encoder_id"], encoders.get(f"{name}_encoder_id")
        if wanted and found and found != wanted:
            raise ContractError(
                f"generation {recorded['generation']} was fitted to another {name} encoder",
                expected=wanted,
                found=found,
                where=f"[content_embedding] {name}_encoder and its settings",
                next_command="sid run refresh --date D --set plan_night.policy=cold  (or the encoder and settings of before)",
            )


def generation_reference(recorded: Mapping[str, Any] | None, ctx: Context, plan: Plan) -> tuple[Mapping[str, Any], date]:
    """The generation's frozen richness reference and the night that fitted it."""
    if plan.new_generation:
        return ctx.outcome("train_behavior_encoder")["outputs"]["richness_reference"], plan.logical_date
    assert recorded is not None, "a frozen night has a parent"
    return json.loads(recorded["richness_reference"]), recorded["logical_date"]


def keep_replaced(inputs: Inputs, ctx: Context) -> None:
    """Tag feature.item_feature with the date's last release before tonight's rows replace its manifest: whoever goes back to it copies from these rows.

    A tag that is there stays: it was set when the manifest was still on main.
    """
    last = last_revision([row.asDict() for row in inputs.frame("sid.release").select("tag", "logical_date", "revision").collect()], ctx.logical_date)
    if last is None:
        return
    assert inputs.spark is not None, "a Spark stage"
    with lakehouse.table_locks(ctx.home, ctx.config.lake, [MANIFEST]):
        found = lakehouse.references(inputs.spark, MANIFEST)
        if last["tag"] not in found:
            lakehouse.put_tag(inputs.spark, MANIFEST, last["tag"], found["main"])


def parent_rows(inputs: Inputs, plan: Plan) -> DataFrame:
    """The parent release's rows of feature.item_feature, at the snapshot the plan found them; none on the first night."""
    from pyspark.sql import functions as F

    if plan.parent is None:
        return inputs.frame(MANIFEST).limit(0)
    features = inputs.frame(MANIFEST, at=plan.parent.manifest)
    return features.where((F.col("logical_date") == F.lit(plan.parent.logical_date)) & (F.col("generation") == plan.parent.generation))


def trained_rows(vectors: DataFrame, plan: Plan, reference: Mapping[str, Any]) -> DataFrame:
    """Items whose behaviour row was trained tonight, with richness and strength through the generation's reference."""
    from pyspark.sql import functions as F

    tonight = vectors.where((F.col("logical_date") == F.lit(plan.logical_date)) & (F.col("generation") == plan.generation))
    return tonight.select("item_id", "evidence_count", "evidence_bucket", "norm").mapInArrow(richness_mapper(reference), TRAINED_DDL)


def richness_mapper(reference: Mapping[str, Any]) -> Callable[[Any], Iterator[pa.RecordBatch]]:
    """A mapInArrow function: (item_id, evidence_count, evidence_bucket, norm) -> the same without norm, with richness and strength as float32."""
    alpha, beta = float(reference["alpha"]), float(reference["beta"])

    def map_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """A batch with richness and strength per batch with norms."""
        for batch in batches:
            count_N, norm_N = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("evidence_count", "norm"))
            richness_N = richness(reference, count_N, norm_N)
            strength_N = alignment_strength(richness_N, alpha, beta)
            derived = [pa.array(np.asarray(value_N, np.float32)) for value_N in (richness_N, strength_N)]
            kept = [batch.column(name) for name in ("item_id", "evidence_count", "evidence_bucket")]
            yield pa.RecordBatch.from_arrays([*kept, *derived], ["item_id", "evidence_count", "evidence_bucket", "richness", "strength"])

    return map_batches


def measured(frame: DataFrame, parent: DataFrame, logical_date: date, base_date: date) -> dict[str, float]:
    """What MLflow shows of the manifest: items, shares with each modality, rows that moved, popularity mass on rows trained after the base.

    `moved_rows` had a behaviour row before and got another tonight; `unmasked_rows` got their first.
    """
    from pyspark.sql import functions as F

    def share(condition: Any) -> Any:
        """Share of the rows where the condition holds; 0 of none."""
        return F.coalesce(F.avg(condition.cast("double")), F.lit(0.0))

    before = parent.select("item_id", F.lit(True).alias("known"), F.col("behavior_date").alias("behavior_before"))
    trained, had = F.col("behavior_date") == F.lit(logical_date), F.col("behavior_before").isNotNull()
    post_base = F.sum(F.when(F.col("behavior_date") > F.lit(base_date), F.col("popularity")))
    numbers = {
        "items": F.count(F.lit(1)),
        "live_items": F.count_if(F.col("status") == "live"),
        "new_items": F.count_if(F.col("known").isNull()),
        "text_share": share(F.col("text_hash").isNotNull()),
        "image_share": share(F.col("image_hash").isNotNull()),
        "behavior_share": share(F.col("behavior_date").isNotNull()),
        "trained_rows": F.count_if(trained),
        "moved_rows": F.count_if(trained & had),
        "unmasked_rows": F.count_if(trained & ~had),
        "post_base_mass": F.coalesce(post_base / F.sum("popularity"), F.lit(0.0)),
        "mean_richness": F.avg(F.when(F.col("behavior_date").isNotNull(), F.col("richness"))),
        "mean_strength": F.avg(F.when(F.col("behavior_date").isNotNull(), F.col("strength"))),
    }
    row = frame.join(before, "item_id", "left").agg(*[number.cast("double").alias(name) for name, number in numbers.items()]).first()
    assert row is not None, "an aggregate has one row"
    return {name: value for name, value in row.asDict().items() if value is not None}
