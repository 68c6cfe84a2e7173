"""Codes, router weights and disambiguators of the night, left on an audit branch for publish_release.

New generation: every item is encoded. Frozen: only items that are not in the parent, or whose behaviour row was trained tonight; all others keep codes,
weights and disambiguator of the parent bit by bit. On frozen and anchored nights an encoded item holds on to the parent's code until another one is nearer
by a margin, and the number of an unmoved item stays. A change of text or image alone moves no code under `frozen`: the new content counts from the item's
next behaviour row, or from the next generation. Retired items stay as tombstones, so that their numbers are never given away.
A tokenizer that codes users as well (DAS) gets `sid.user_sid` written beside: every user of the night anew, because a user is what was taken last.
Not here: fitting the tokenizer (train_tokenizer) and publishing (publish_release).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import evenness, lakehouse
from pipeline.config import AssignSid
from pipeline.context import Context, Plan
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.popularity import STRATA
from pipeline.stages import FigureData, StageResult, Write

if TYPE_CHECKING:
    from datetime import date
    from pathlib import Path

    from pyspark.sql import Column, DataFrame

    from jobs.inputs import Inputs

SAME_WORDS = ("", "anchored")  # nights whose codes mean what the parent's mean
FEW = 1_000_000  # items of a frozen night whose keys every task may hold: about 130 MB
WORTH_A_WORKER = 20_000  # items whose encoding takes as long as a worker that loads torch
OF_FEATURES = ("logical_date", "item_id", "popularity", "popularity_stratum", "status", "first_seen", "retired_at")  # what a release's row takes over
REFERENCES = ("text_encoder_id", "text_hash", "image_encoder_id", "image_hash", "behavior_date", "richness", "strength")  # what an encoded item is found by
FLAGS = ("live", "described", "shared", "known", "changed_from_parent", "unmasked", "encoded", "dangling", "bad_codes", "loud_mask", "parent_stratum")
Mapper = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]
CODES_SCHEMA = "item_id string, codes array<int>, weights array<float>, dangling boolean"
USERS_SCHEMA = "user_id string, codes array<int>, num_items int"
CODEBOOK_SCHEMA = "position int, slot string, code int, vector array<float>"
_TOKENIZERS: dict[str, Any] = {}  # per worker process: model digest -> tokenizer


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A generation as the assignment needs it: sizes and names of the positions, digest, where the model lies."""

    generation: int
    tokenizer: str
    codebook_sizes: tuple[int, ...]
    slots: tuple[str, ...]
    codebook_digest: str
    tokenizer_uri: str
    recorded: bool  # sid.generation has its row already


def run(inputs: Inputs, params: AssignSid, ctx: Context) -> StageResult:
    """The night's `sid.item_sid` on its audit branch and, for a new generation, its codebook and generation row."""
    from pyspark.sql import functions as F

    plan = ctx.plan()
    vocabulary = read_vocabulary(inputs, ctx, plan)
    features = inputs.frame("feature.item_feature").where(F.col("logical_date") == F.lit(plan.logical_date))
    parent = parent_rows(inputs, plan)
    items = beside_parent(features, parent, plan).persist()
    vectors = chosen_vectors(inputs, items, plan)
    model = broadcast_model(inputs, vocabulary)
    margin = params.hold_margin if plan.start in SAME_WORDS else None
    encoded = encode(vectors, partial(encode_batches, model=model, margin=margin), vocabulary.codebook_sizes)
    rows = with_groups(release_rows(items, encoded, plan), vocabulary.codebook_sizes).persist()
    sources = read_sources(features, parent, plan.logical_date)
    metrics, usage = measured(rows, vocabulary.codebook_sizes)
    metrics = {**metrics, **against_sources(metrics, sources, plan)}
    check_references(metrics)
    release = rows.select(*inputs.frame("sid.item_sid").columns)
    audited = Write(table="sid.item_sid", frame=release, dates=(plan.logical_date,), metrics=metrics, hold=True)
    return StageResult(
        writes=(*generation_writes(inputs, ctx, plan, vocabulary, sources, model), *user_writes(inputs, features, plan, model), audited),
        metrics=metrics,
        outputs=outputs(vocabulary, release, metrics),
        figures=figures(rows, vocabulary, metrics, usage),
    )


# ---------------------------------------------------------------- what is read


def read_vocabulary(inputs: Inputs, ctx: Context, plan: Plan) -> Vocabulary:
    """The generation of the night: its row in sid.generation, or what train_tokenizer has just fitted.

    Raises: UpstreamMissing when a frozen night's generation has no row; ContractError of `check_number`.
    """
    from pyspark.sql import functions as F

    found = inputs.frame("sid.generation").where(F.col("generation") == plan.generation).collect()
    known = _vocabulary(found[0].asDict(), plan.generation, recorded=True) if found else None
    if not plan.new_generation:
        if known is None:
            raise UpstreamMissing(
                f"generation {plan.generation} has no row", expected="one row", found="none", where="sid.generation", next_command="sid releases"
            )
        return known
    outcome = ctx.outcome("train_tokenizer")["outputs"]
    fitted = _vocabulary({**outcome, "tokenizer_uri": outcome["model_uri"]}, plan.generation, recorded=known is not None)
    if known is not None:
        check_number(found[0].asDict(), fitted, plan)
    return known or fitted


def check_number(row: Mapping[str, Any], fitted: Vocabulary, plan: Plan) -> None:
    """Nothing, when the generation on record is the one that was fitted.

    Raises: ContractError for another codebook under the number. Of another night (a backfill, say) that was planned before this one was recorded: planned
        again, this night gets a number of its own. Of the same inputs, which came out otherwise (another machine or number of threads) and would do so in
        every try: another seed takes another number.
    """
    if row["codebook_digest"] == fitted.codebook_digest:
        return
    again = f"sid run refresh --date {plan.logical_date}"
    if row["input_fingerprint"] != plan.input_fingerprint:
        raise ContractError(
            f"another night began generation {fitted.generation} while this one was fitted",
            expected="a number that no other vocabulary has",
            found=f"generation {fitted.generation} of the night {row['logical_date']}",
            where="sid.generation",
            next_command=f"{again}  (planned again it gets a number of its own)",
        )
    raise ContractError(
        f"generation {fitted.generation} exists with another codebook and is never rewritten",
        expected=f"codebook_digest {row['codebook_digest']}",
        found=fitted.codebook_digest,
        where="sid.generation",
        next_command=f"{again} --set seed={plan.seed + 1}  (or where it was fitted first: same machine and threads)",
    )


def _vocabulary(row: Mapping[str, Any], generation: int, *, recorded: bool) -> Vocabulary:
    return Vocabulary(
        generation=generation,
        tokenizer=row["tokenizer"],
        codebook_sizes=tuple(int(size) for size in row["codebook_sizes"]),
        slots=tuple(row["slots"]),
        codebook_digest=row["codebook_digest"],
        tokenizer_uri=row["tokenizer_uri"],
        recorded=recorded,
    )


def parent_rows(inputs: Inputs, plan: Plan) -> DataFrame:
    """Rows of the parent release at its own snapshot and date; no rows on the first night."""
    if plan.parent is None:
        return inputs.frame("sid.item_sid").limit(0)
    assert inputs.spark is not None, "a Spark stage"
    return lakehouse.read_release_frame(inputs.spark, plan.parent.snapshot_id, plan.parent.logical_date)


# ---------------------------------------------------------------- encoding


def beside_parent(features: DataFrame, parent: DataFrame, plan: Plan) -> DataFrame:
    """OF_FEATURES and REFERENCES of `features` with the parent_* columns (null = not in the parent) and `chosen` = to be encoded.

    All of a new generation; else those not in the parent or with a behaviour row trained tonight.
    """
    from pyspark.sql import functions as F

    before = parent.select(
        "item_id",
        F.col("codes").alias("parent_codes"),
        F.col("weights").alias("parent_weights"),
        F.col("disambiguator").alias("parent_number"),
        F.col("popularity_stratum").alias("parent_stratum"),
    )
    trained_tonight = F.col("behavior_date").eqNullSafe(F.lit(plan.logical_date))
    chosen = F.lit(plan.new_generation) | F.col("parent_codes").isNull() | trained_tonight
    return features.select(*OF_FEATURES, *REFERENCES).join(before, "item_id", "left").withColumn("chosen", chosen)


def chosen_vectors(inputs: Inputs, items: DataFrame, plan: Plan) -> DataFrame:
    """`item_vectors` of the chosen items of `beside_parent`; a frozen night shuffles only what they refer to and starts few workers."""
    from pyspark.sql import functions as F

    chosen = items.where("chosen").withColumnRenamed("parent_codes", "keep")
    content = inputs.frame("feature.item_content_vector")
    behavior = inputs.frame("feature.item_behavior_vector").where(F.col("logical_date") == F.lit(plan.logical_date))  # what is encoded was trained tonight
    if plan.new_generation:
        return item_vectors(chosen, content, behavior, plan.generation)
    count = chosen.count()
    if count <= FEW:
        content = content.join(F.broadcast(content_keys(chosen)), ["modality", "encoder_id", "content_hash"], "left_semi")
    return item_vectors(chosen, content, behavior, plan.generation).coalesce(1 + count // WORTH_A_WORKER)


def content_keys(items: DataFrame) -> DataFrame:
    """(modality, encoder_id, content_hash) of every content vector that the items refer to."""
    from pyspark.sql import functions as F

    text, image = (items.select(F.lit(name), f"{name}_encoder_id", f"{name}_hash") for name in ("text", "image"))
    return text.union(image).toDF("modality", "encoder_id", "content_hash").distinct()


def item_vectors(items: DataFrame, content: DataFrame, behavior: DataFrame, generation: int) -> DataFrame:
    """Per item: text, image, behavior (null = masked), richness, strength, `keep` if it is there, and `dangling` = a reference without its vector."""
    from pyspark.sql import functions as F

    def of(modality: str) -> DataFrame:
        """Its vectors, keyed as the items refer to them."""
        rows = content.where(F.col("modality") == modality)
        return rows.select(
            F.col("encoder_id").alias(f"{modality}_encoder_id"), F.col("content_hash").alias(f"{modality}_hash"), F.col("vector").alias(modality)
        )

    trained = behavior.where(F.col("generation") == generation).select(
        "item_id", F.col("logical_date").alias("behavior_date"), F.col("vector").alias("behavior")
    )
    joined = (
        items.join(of("text"), ["text_encoder_id", "text_hash"], "left")
        .join(of("image"), ["image_encoder_id", "image_hash"], "left")
        .join(trained, ["item_id", "behavior_date"], "left")
    )
    dangling = [
        F.col(reference).isNotNull() & F.col(vector).isNull()
        for reference, vector in (("text_hash", "text"), ("image_hash", "image"), ("behavior_date", "behavior"))
    ]
    kept = [name for name in ("keep",) if name in items.columns]
    return joined.select("item_id", "text", "image", "behavior", "richness", "strength", *kept, (dangling[0] | dangling[1] | dangling[2]).alias("dangling"))


def check_references(metrics: Mapping[str, float]) -> None:
    """Nothing, when every reference of item_feature had its vector.

    Raises: ContractError with the number of items whose vector is missing: they would be masked without a word.
    """
    if metrics["dangling"]:
        raise ContractError(
            "item_feature refers to vectors that do not exist",
            expected="a row of item_content_vector or item_behavior_vector per reference",
            found=f"none for {metrics['dangling']:.0f} item(s)",
            where="feature.item_feature",
            next_command="sid run item_feature --date D",
        )


def broadcast_model(inputs: Inputs, vocabulary: Vocabulary) -> Any:
    """The tokenizer's two files, broadcast: (config JSON, safetensors bytes). Executors need no shared folder; the driver loads no torch."""
    assert inputs.spark is not None, "a Spark stage"
    folder = inputs.model(vocabulary.tokenizer_uri)
    return inputs.spark.sparkContext.broadcast(model_files(folder))


def model_files(folder: Path) -> tuple[str, bytes]:
    """(config JSON, safetensors bytes) of a model folder."""
    return (folder / "config.json").read_text(encoding="utf-8"), (folder / "model.safetensors").read_bytes()


def encode(vectors: DataFrame, mapper: Mapper, codebook_sizes: tuple[int, ...]) -> DataFrame:
    """item_id, codes, weights, dangling per row of `vectors`; an item without any modality gets the reserved code K and weight 0 everywhere."""
    return vectors.mapInArrow(partial(around_masked, mapper=mapper, codebook_sizes=codebook_sizes), CODES_SCHEMA)


def around_masked(batches: Iterator[pa.RecordBatch], mapper: Mapper, codebook_sizes: tuple[int, ...]) -> Iterator[pa.RecordBatch]:
    """Record batches of CODES_SCHEMA, where the mapper sees only items with a modality: two passes would gather all vectors twice."""
    import pyarrow.compute as pc

    masked: list[pa.RecordBatch] = []

    def shown() -> Iterator[pa.RecordBatch]:
        """The items with a modality; the others are put aside. One stream, because a mapper looks for its model once a call."""
        for batch in batches:
            empty_N = reduce(pc.and_, (pc.is_null(batch.column(name)) for name in ("text", "image", "behavior")))
            masked.append(batch.select(["item_id", "dangling"]).filter(empty_N))
            yield batch.filter(pc.invert(empty_N))

    yield from mapper(shown())
    for rows in masked:
        codes_NL = np.tile(np.asarray(codebook_sizes, np.int32), (rows.num_rows, 1))
        columns = [rows.column("item_id"), list_array(codes_NL), list_array(np.zeros(codes_NL.shape, np.float32)), rows.column("dangling")]
        yield pa.RecordBatch.from_arrays(columns, names=["item_id", "codes", "weights", "dangling"])


def encode_batches(batches: Iterator[pa.RecordBatch], model: Any, margin: float | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of CODES_SCHEMA; runs in a Spark worker, which builds the tokenizer once.

    Args:
        margin: hold on to the codes of column `keep` within it; None = do not.
    """
    from pipeline.tokenizers.base import items_from_arrow

    tokenizer = _tokenizer(*model.value)
    for batch in batches:
        if batch.num_rows:
            keep = None if margin is None else kept_codes(batch.column("keep"), len(tokenizer.slots), margin)
            output = tokenizer.encode(items_from_arrow(batch), keep)  # in blocks of a fixed height: the company an item keeps moves no code
            codes, weights = list_array(output.codes_NL.numpy().astype(np.int32)), list_array(output.weights_NL.numpy().astype(np.float32))
            names = ["item_id", "codes", "weights", "dangling"]
            yield pa.RecordBatch.from_arrays([batch.column("item_id"), codes, weights, batch.column("dangling")], names=names)


def kept_codes(column: pa.ListArray, width: int, margin: float) -> Any:
    """The wish to keep a column of codes (`base.Keep`); an item without codes wishes for none."""
    import torch

    from pipeline.tokenizers.base import Keep

    known_N = column.is_valid().to_numpy(zero_copy_only=False)
    codes_NL = np.full((len(column), width), np.iinfo(np.int64).max)
    codes_NL[known_N] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return Keep(codes_NL=torch.from_numpy(codes_NL), margin=margin)


def list_array(values_NL: np.ndarray) -> pa.ListArray:
    """One list per row of a matrix."""
    rows, width = values_NL.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), pa.array(values_NL.reshape(-1)))


def codebook_batches(batches: Iterator[pa.RecordBatch], model: Any, slots: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """Record batches of CODEBOOK_SCHEMA, one per position; the incoming rows only start the worker."""
    for _ in batches:
        for position, codes_KD in enumerate(_tokenizer(*model.value).codebooks()):
            matrix_KD = codes_KD.detach().numpy().astype(np.float32)
            size = len(matrix_KD)
            yield pa.RecordBatch.from_arrays(
                [pa.array([position] * size, pa.int32()), pa.array([slots[position]] * size), pa.array(np.arange(size, dtype=np.int32)), list_array(matrix_KD)],
                names=["position", "slot", "code", "vector"],
            )


def _tokenizer(config: str, tensors: bytes) -> Any:
    """The tokenizer of a model, built once per worker process and model."""
    import json

    key = hashlib.sha256(config.encode() + tensors).hexdigest()
    if key not in _TOKENIZERS:
        import torch
        from safetensors.torch import load

        from pipeline.tokenizers import from_state

        torch.set_num_threads(1)  # one worker per core; also one order of summation
        _TOKENIZERS[key] = from_state(json.loads(config), load(tensors))
    return _TOKENIZERS[key]


# ---------------------------------------------------------------- users


def user_writes(inputs: Inputs, features: DataFrame, plan: Plan, model: Any) -> tuple[Write, ...]:
    """The night's `sid.user_sid`, published before the release's rows are held; nothing where the tokenizer codes items alone."""
    import json

    from pyspark.sql import functions as F

    about = json.loads(model.value[0])
    if not (sizes := about.get("user_codebook_sizes")):
        return ()
    live = features.where(F.col("status") == "live")
    nothing = inputs.frame("feature.item_behavior_vector").limit(0)  # users are coded from content alone
    vectors = item_vectors(live, inputs.frame("feature.item_content_vector"), nothing, plan.generation)
    sequences = inputs.frame("feature.user_sequence").where(F.col("logical_date") == F.lit(plan.logical_date))
    coded = taken_items(sequences, vectors, about["settings"]["max_history"]).mapInArrow(partial(user_batches, model=model), USERS_SCHEMA)
    rows = every_user(sequences, coded, tuple(sizes)).persist()
    good = (F.size("codes") == len(sizes)) & F.forall(F.zip_with("codes", _literals(sizes), lambda code, size: code.between(0, size)), lambda held: held)
    found = rows.agg(F.count_if(~F.coalesce(good, F.lit(False))).alias("bad"), F.count(F.lit(1)).alias("users")).collect()[0]
    known = {"codes_out_of_range": float(found["bad"]), "users_missing": float(sequences.count() - found["users"])}
    night = rows.select(F.lit(plan.logical_date).alias("logical_date"), "*", F.lit(plan.generation).cast("int").alias("generation"))
    return (Write(table="sid.user_sid", frame=night, dates=(plan.logical_date,), metrics=known),)


def taken_items(sequences: DataFrame, vectors: DataFrame, most: int) -> DataFrame:
    """user_id, item_id, text, image of those of each user's `most` latest live items that have content; a user's rows together, oldest first."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    events = sequences.select("user_id", F.posexplode("item_ids").alias("position", "item_id")).join(vectors.select("item_id", "text", "image"), "item_id")
    latest = events.withColumn("age", F.row_number().over(Window.partitionBy("user_id").orderBy(F.desc("position")))).where(F.col("age") <= most)
    kept = latest.where(F.col("text").isNotNull() | F.col("image").isNotNull())
    return kept.repartition("user_id").sortWithinPartitions("user_id", "position").select("user_id", "item_id", "text", "image")


def user_batches(batches: Iterator[pa.RecordBatch], model: Any) -> Iterator[pa.RecordBatch]:
    """Record batches of USERS_SCHEMA, one row per user of the rows of `taken_items`; runs in a Spark worker."""
    import torch

    from pipeline.tokenizers.base import History, items_from_arrow

    tokenizer = _tokenizer(*model.value)
    for rows in whole_users(batches):
        users = rows["user_id"].combine_chunks().dictionary_encode()
        length_U = np.bincount(users.indices.to_numpy())
        zeros, nothing = np.zeros(len(rows), np.float32), pa.nulls(len(rows), pa.list_(pa.float32()))
        columns = {name: rows[name] for name in ("item_id", "text", "image")}
        items = items_from_arrow(pa.table({**columns, "behavior": nothing, "richness": zeros, "strength": zeros}))
        history = History(index_T=torch.arange(len(rows)), offset_U=torch.from_numpy(np.append(0, np.cumsum(length_U))))
        codes = list_array(tokenizer.encode_users(items, history).codes_NL.numpy().astype(np.int32))
        yield pa.RecordBatch.from_arrays([users.dictionary, codes, pa.array(length_U.astype(np.int32))], names=["user_id", "codes", "num_items"])


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The rows in tables that split no user; a user's rows come together, but may cross the border of two batches."""
    import pyarrow.compute as pc

    carried: list[pa.Table] = []
    for batch in batches:
        if batch.num_rows:
            rows = pa.concat_tables([*carried, pa.Table.from_batches([batch])])
            last = pc.index(rows["user_id"], rows["user_id"][-1]).as_py()
            if last:
                yield rows.slice(0, last)
            carried = [rows.slice(last)]
    yield from carried


def every_user(sequences: DataFrame, coded: DataFrame, sizes: tuple[int, ...]) -> DataFrame:
    """USERS_SCHEMA per user; one who took nothing with content gets the reserved code K everywhere."""
    from pyspark.sql import functions as F

    rows = sequences.select("user_id").join(coded, "user_id", "left")
    return rows.select("user_id", F.coalesce("codes", _literals(sizes)).alias("codes"), F.coalesce("num_items", F.lit(0)).alias("num_items"))


def _literals(values: Iterable[int]) -> Column:
    from pyspark.sql import functions as F

    return F.array(*[F.lit(value) for value in values])


# ---------------------------------------------------------------- the release's rows


def release_rows(items: DataFrame, encoded: DataFrame, plan: Plan) -> DataFrame:
    """One row per item of `beside_parent`: the columns of sid.item_sid, and parent_codes, parent_stratum, encoded, dangling for the measurements.

    Only what was encoded is joined: an unmoved item has all it needs in its own row.
    """
    from pyspark.sql import functions as F

    kept = items.drop(*REFERENCES)
    fresh = encoded.select("item_id", "dangling", F.col("codes").alias("new_codes"), F.col("weights").alias("new_weights"))
    carry, same_words = F.lit(not plan.new_generation), F.lit(plan.start in SAME_WORDS)
    joined = (
        kept.where("chosen")
        .join(fresh, "item_id", "left")
        .unionByName(kept.where("NOT chosen"), allowMissingColumns=True)
        .withColumn("encoded", F.col("new_codes").isNotNull())
        .withColumn("codes", F.coalesce("new_codes", F.when(carry, F.col("parent_codes"))))
        .withColumn("weights", F.coalesce("new_weights", F.when(carry, F.col("parent_weights"))))
        .withColumn("existing", F.when(same_words & (F.col("codes") == F.col("parent_codes")), F.col("parent_number")))
        .withColumn("is_new", F.col("parent_codes").isNull())
        .withColumn("changed_from_parent", F.coalesce(F.col("codes") != F.col("parent_codes"), F.lit(False)))
        .withColumn("generation", F.lit(plan.generation).cast("int"))
    )
    return disambiguate_frame(joined).drop("existing", "new_codes", "new_weights", "parent_weights", "parent_number", "chosen")


def disambiguate_frame(rows: DataFrame) -> DataFrame:
    """`rows` with `disambiguator`: `existing` where it is set, else the next number of the code tuple by (first_seen, item_id).

    The same rule as tokenizers.collisions.disambiguate, as one window: the rows are shuffled by code tuple once, which the collision counts use again.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    same_codes = Window.partitionBy("codes")
    fresh_first = same_codes.orderBy(F.col("existing").isNotNull(), "first_seen", "item_id")
    largest = F.coalesce(F.max("existing").over(same_codes), F.lit(-1))
    return rows.withColumn("disambiguator", F.coalesce(F.col("existing"), largest + F.row_number().over(fresh_first)).cast("int"))


# ---------------------------------------------------------------- measuring


def measured(rows: DataFrame, codebook_sizes: tuple[int, ...]) -> tuple[dict[str, float], list[np.ndarray]]:
    """`measure`, where the workers run for the first time.

    Raises: ContractError with the worker's last line when the tokenizer refuses its input (e.g. a vector that is not finite).
    """
    from pyspark.errors import PythonException

    try:
        return measure(rows, codebook_sizes)
    except PythonException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        refusal = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
        raise ContractError(
            "the tokenizer refused its input", expected="finite vectors of the fitted widths", found=refusal, where="feature.item_feature"
        ) from error


def measure(rows: DataFrame, codebook_sizes: tuple[int, ...]) -> tuple[dict[str, float], list[np.ndarray]]:
    """(metrics of the gate, code counts per position over live items) of the rows of `with_groups`, in two aggregations.

    The first counts items and popularity per combination of FLAGS: some dozen groups, from which every share follows.
    """
    from pyspark.sql import functions as F

    counted = (F.count(F.lit(1)).alias("items"), F.sum("popularity").alias("mass"), F.max("disambiguator").alias("number"))
    facts = [row.asDict() for row in rows.groupBy(*FLAGS).agg(*counted).collect()]
    usage, changed_L = code_usage(rows, codebook_sizes)
    known = total(facts, "items", known=True)
    by_position = {f"churn_position_{position}": float(count / known) if known else 0.0 for position, count in enumerate(changed_L)}
    return {**collision_metrics(facts), **churn_metrics(facts), **by_position, **usage_metrics(usage)}, usage


def with_groups(rows: DataFrame, codebook_sizes: tuple[int, ...]) -> DataFrame:
    """`rows` with the boolean FLAGS that are measured, and group_size: live described items of the same codes.

    described: at least one slot is not masked; an item without any modality has no codes worth the name, so it counts in `masked_share`, not among
    the collisions. unmasked: the codes changed because a masked slot got its first code.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    sizes, length = _literals(codebook_sizes), len(codebook_sizes)
    in_range = F.forall(F.zip_with("codes", sizes, lambda code, size: code.between(0, size)), lambda good: F.coalesce(good, F.lit(False)))
    complete = (F.size("codes") == length) & (F.size("weights") == length)
    slots = F.arrays_zip(F.col("codes").alias("c"), F.col("weights").alias("w"), before(length).alias("p"), sizes.alias("k"))
    counted = (F.col("live") & F.col("described")).cast("int")

    def some(condition: Column) -> Column:
        """The condition, false where it is null."""
        return F.coalesce(condition, F.lit(False))

    return (
        rows.withColumn("live", F.col("status") == "live")
        .withColumn("described", some(F.exists(slots, lambda slot: slot.c < slot.k)))
        .withColumn("unmasked", F.col("changed_from_parent") & some(F.exists(slots, lambda slot: (slot.c < slot.k) & (slot.p == slot.k))))
        .withColumn("loud_mask", some(F.exists(slots, lambda slot: (slot.c == slot.k) & (slot.w != 0))))
        .withColumn("bad_codes", ~some(in_range & complete))
        .withColumn("dangling", some(F.col("dangling")))
        .withColumn("known", ~F.col("is_new"))
        .withColumn("group_size", F.sum(counted).over(Window.partitionBy("codes")))
        .withColumn("shared", F.col("live") & F.col("described") & (F.col("group_size") > 1))
    )


def before(length: int) -> Column:
    """The parent's codes; an array of nulls for an item that is not in the parent (arrays_zip with a null array would give null)."""
    from pyspark.sql import functions as F

    return F.coalesce("parent_codes", F.array(*[F.lit(None).cast("int")] * length))


def total(facts: Iterable[Mapping[str, Any]], what: str, **wanted: bool | str) -> float:
    """Sum of `items` or `mass` over the groups whose flags are as wanted."""
    return float(sum(fact[what] or 0 for fact in facts if all(fact[name] == value for name, value in wanted.items())))


def share(facts: list[dict[str, Any]], what: str, whole: Mapping[str, bool | str], **part: bool | str) -> float:
    """Share of the groups `whole` that are `part` as well; 0 of nothing."""
    everything = total(facts, what, **whole)
    return total(facts, what, **whole, **part) / everything if everything else 0.0


def collision_metrics(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Row counts, broken rows, collision_rate and shared_mass; `disambiguators` is the largest number of items on one code tuple."""
    live = {"live": True}
    return {
        "rows": total(facts, "items"),
        "live": total(facts, "items", live=True),
        "dangling": total(facts, "items", dangling=True),
        "codes_out_of_range": total(facts, "items", bad_codes=True),
        "masked_with_weight": total(facts, "items", loud_mask=True),
        "collision_rate": share(facts, "items", {**live, "described": True}, shared=True),
        "shared_mass": share(facts, "mass", live, shared=True),
        "masked_share": share(facts, "items", live, described=False),
        "disambiguators": float(max((fact["number"] + 1 for fact in facts if fact["described"] and fact["number"] is not None), default=0)),
    }


def churn_metrics(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Churn against the parent over the items of both: overall, by mass, by the parent's stratum; first unmaskings and re-encoded items apart."""
    known: dict[str, bool | str] = {"known": True}
    moved = {"changed_from_parent": True, "unmasked": False}
    return {
        "known": total(facts, "items", known=True),
        "new_items": total(facts, "items", known=False),
        "churn": share(facts, "items", known, **moved),
        "churn_mass": share(facts, "mass", known, **moved),
        "unmasked_share": share(facts, "items", known, unmasked=True),
        "reencoded": total(facts, "items", known=True, encoded=True),
        "reencoded_kept_share": share(facts, "items", {**known, "encoded": True}, changed_from_parent=False),
        **{f"churn_{stratum}": share(facts, "items", {**known, "parent_stratum": stratum}, **moved) for stratum in STRATA},
    }


def code_usage(rows: DataFrame, codebook_sizes: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """(live items per code, one array of length K per position, masked slots left out; items whose code changed per position)."""
    from pyspark.sql import functions as F

    slots = rows.select("live", F.posexplode(F.arrays_zip(F.col("codes").alias("c"), before(len(codebook_sizes)).alias("p"))).alias("position", "slot"))
    changed = F.sum(F.coalesce(F.col("slot.c") != F.col("slot.p"), F.lit(False)).cast("long")).alias("changed")
    used = slots.groupBy("position", F.col("slot.c").alias("code")).agg(F.sum(F.col("live").cast("long")).alias("items"), changed).collect()
    counts, changed_L = [np.zeros(size, dtype=np.int64) for size in codebook_sizes], np.zeros(len(codebook_sizes))
    for row in used:  # at most L * (K + 1) groups
        if row.position < len(counts):
            changed_L[row.position] += row.changed
            if row.code is not None and 0 <= row.code < len(counts[row.position]):
                counts[row.position][row.code] = row["items"]
    return counts, changed_L


def usage_metrics(usage: list[np.ndarray]) -> dict[str, float]:
    """Perplexity and dead codes per position as shares of min(K, items with the slot), and the worst position.

    A position that is masked for every item is left out of the worst (nothing can be said of it) and counted in `masked_positions`.
    """
    metrics: dict[str, float] = {}
    shares: list[float] = []
    dead: list[float] = []
    for position, counts_K in enumerate(usage):
        items = int(counts_K.sum())
        if items == 0:
            continue
        reachable = min(len(counts_K), items)
        perplexity = evenness.perplexity(counts_K)
        shares.append(perplexity / reachable)
        dead.append(1.0 - np.count_nonzero(counts_K) / reachable)
        metrics |= {f"perplexity_{position}": perplexity, f"dead_share_{position}": dead[-1]}
    worst = {"min_perplexity_share": min(shares, default=1.0), "max_dead_share": max(dead, default=0.0)}
    return {**metrics, **worst, "masked_positions": float(len(usage) - len(shares))}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Facts about the two tables a release is made of: items of the catalogue and of the parent, encoders of the night."""

    items: int
    parent_items: int
    text_encoder_id: str | None
    image_encoder_id: str | None


def read_sources(features: DataFrame, parent: DataFrame, logical_date: date) -> Sources:
    """The facts of the night.

    Raises: ContractError when the night's items come from more than one encoder of a modality.
    """
    from pyspark.sql import functions as F

    names = ("text_encoder_id", "image_encoder_id")
    found = features.agg(F.count(F.lit(1)).alias("items"), *[F.sort_array(F.collect_set(name)).alias(name) for name in names]).collect()[0]
    for name in names:
        if len(found[name]) > 1:
            raise ContractError(
                f"more than one {name} in one night", expected="one", found=", ".join(found[name]), where=f"feature.item_feature {logical_date}"
            )
    text, image = (found[name][0] if found[name] else None for name in names)
    return Sources(items=found["items"], parent_items=parent.count(), text_encoder_id=text, image_encoder_id=image)


def against_sources(metrics: Mapping[str, float], sources: Sources, plan: Plan) -> dict[str, float]:
    """Rows missing against the catalogue, items lost against the parent, and the churn that the budgets judge.

    One budget holds within a generation, one for an anchored refit; a cold or warm vocabulary changes codes by design, its churn is only reported.
    """
    judged = 0.0 if plan.new_generation else 1.0
    return {
        "rows_missing": sources.items - metrics["rows"],
        "items_lost": sources.parent_items - metrics["known"],
        "budget_churn": judged * metrics["churn"],
        "budget_churn_head": judged * metrics["churn_head"],
        "budget_churn_refit": metrics["churn"] if plan.start == "anchored" else 0.0,
    }


# ---------------------------------------------------------------- what goes out


def generation_writes(inputs: Inputs, ctx: Context, plan: Plan, vocabulary: Vocabulary, sources: Sources, model: Any) -> tuple[Write, ...]:
    """Codebook and generation row of a new generation, codebook first; nothing when the generation is on record.

    A codebook without its generation row is what a kill left between the two commits, perhaps of other inputs under the same number: it is replaced.
    """
    from pyspark.sql import functions as F

    if not plan.new_generation or vocabulary.recorded:
        return ()
    assert inputs.spark is not None, "a Spark stage"
    seed_row = inputs.spark.range(1, numPartitions=1)
    rows = seed_row.mapInArrow(partial(codebook_batches, model=model, slots=vocabulary.slots), CODEBOOK_SCHEMA)
    codebook = rows.withColumn("generation", F.lit(plan.generation).cast("int"))
    return (
        Write(table="sid.codebook", frame=codebook, slice={"generation": plan.generation}),
        Write(table="sid.generation", frame=generation_row(inputs, ctx, plan, vocabulary, sources)),
    )


def generation_row(inputs: Inputs, ctx: Context, plan: Plan, vocabulary: Vocabulary, sources: Sources) -> DataFrame:
    """The one row of sid.generation for a vocabulary fitted tonight."""
    assert inputs.spark is not None, "a Spark stage"
    encoder = ctx.outcome("train_behavior_encoder")["outputs"]
    row = {
        "generation": plan.generation,
        "logical_date": plan.logical_date,
        "tokenizer": vocabulary.tokenizer,
        "codebook_sizes": list(vocabulary.codebook_sizes),
        "slots": list(vocabulary.slots),
        "codebook_digest": vocabulary.codebook_digest,
        "encoder_uri": encoder["model_uri"],
        "tokenizer_uri": vocabulary.tokenizer_uri,
        "richness_reference": reference_json(encoder["richness_reference"]),
        "text_encoder_id": sources.text_encoder_id,
        "image_encoder_id": sources.image_encoder_id,
        "config_hash": plan.config_hash,
        "input_fingerprint": plan.input_fingerprint,
    }
    target = inputs.frame("sid.generation").schema
    return inputs.spark.createDataFrame([tuple(row[name] for name in target.names)], target)


def reference_json(reference: Any) -> str:
    """The richness reference as canonical JSON text."""
    import json

    return reference if isinstance(reference, str) else json.dumps(reference, sort_keys=True)


def outputs(vocabulary: Vocabulary, release: DataFrame, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What later stages read about the held branch."""
    return {
        "generation": vocabulary.generation,
        "codebook_digest": vocabulary.codebook_digest,
        "slots": list(vocabulary.slots),
        "codebook_sizes": list(vocabulary.codebook_sizes),
        "rows_digest": lakehouse.rows_digest(release),
        "items": int(metrics["rows"]),
        "metrics": dict(metrics),
    }


def figures(rows: DataFrame, vocabulary: Vocabulary, metrics: Mapping[str, float], usage: list[np.ndarray]) -> dict[str, FigureData]:
    """Code usage per position, churn, and collisions by popularity decile."""
    positions = range(len(vocabulary.slots))
    churn = {
        "overall": metrics["churn"],
        "by_stratum": {stratum: metrics[f"churn_{stratum}"] for stratum in STRATA},
        "by_position": {vocabulary.slots[position]: metrics[f"churn_position_{position}"] for position in positions},
    }
    return {
        "code_usage": FigureData(kind="code_usage", data={"slots": list(vocabulary.slots), "counts": [counts_K.tolist() for counts_K in usage]}),
        "churn": FigureData(kind="churn", data=churn),
        "collisions_by_decile": FigureData(kind="collisions_by_decile", data={"collision_rate": collisions_by_decile(rows)}),
    }


def collisions_by_decile(rows: DataFrame) -> list[float]:
    """Share of live described items that share their codes, per popularity decile, least popular first; ties may leave a decile empty (0)."""
    from pyspark.sql import functions as F

    judged = rows.where(F.col("live") & F.col("described"))
    cuts = judged.approxQuantile("popularity", [share / 10 for share in range(1, 10)], 0.001)
    decile = F.lit(0)
    for cut in cuts:
        decile = decile + (F.col("popularity") > cut).cast("int")
    found = judged.groupBy(decile.alias("decile")).agg(F.avg(F.col("shared").cast("int")).alias("rate")).collect()
    rates = {int(row.decile): float(row.rate) for row in found}
    return [rates.get(index, 0.0) for index in range(10)]
