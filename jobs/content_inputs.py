"""What train_content_encoder and content_cre read: the catalogue's base vectors, pair sets, sequences and teachers, and a content encoder as it was logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.behavior_inputs import flat, sorted_unique, strings
from jobs.inputs import newest_observations
from pipeline.context import Context
from pipeline.errors import UpstreamMissing
from pipeline.tracking import read_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.sail import Content
    from pipeline.encoders.sail_pairs import PairSet

MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Shelf:
    """Items sorted by id, their base vectors, and their category by number (-1 = unknown)."""

    item_ids: pa.Array
    content: Content
    labels: Tensor


def base_encoders(ctx: Context) -> dict[str, str]:
    """Modality -> encoder id of the night's base vectors, without modalities that have none."""
    outputs = ctx.outcome("content_embedding")["outputs"]
    return {name: outputs[f"{name}_encoder_id"] for name in MODALITIES if outputs.get(f"{name}_encoder_id")}


def read_shelf(inputs: Inputs, ctx: Context, encoders: Mapping[str, str]) -> Shelf:
    """The newest version of every item as of the night, with the base vectors that it has.

    Raises: UpstreamMissing when no item has a vector.
    """
    import torch

    from pipeline.encoders.sail import Content

    columns = ("file_date", "item_id", "text_hash", "image_hash", "category")
    newest = newest_observations(inputs.arrow("raw.item", columns=columns, where=f"file_date <= '{ctx.logical_date}'"))
    found = {name: _vectors(inputs, encoder, name, strings(newest[f"{name}_hash"])) for name, encoder in encoders.items()}
    found = {name: parts for name, parts in found.items() if bool(parts[1].any())}
    if not found:
        raise UpstreamMissing(
            "no item has a vector",
            expected=f"vectors of {', '.join(encoders.values()) or 'an encoder'}",
            found="none",
            where="feature.item_content_vector",
            next_command=f"sid run content_embedding --date {ctx.logical_date}",
        )
    category = strings(newest["category"])
    labels = pc.fill_null(pc.index_in(category, value_set=sorted_unique(category.drop_null())), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    content = Content(vectors={name: parts[0] for name, parts in found.items()}, shown={name: parts[1] for name, parts in found.items()})
    return Shelf(strings(newest["item_id"]), content, torch.from_numpy(labels))


def _vectors(inputs: Inputs, encoder: str, modality: str, hashes: pa.Array) -> tuple[Tensor, Tensor]:
    """(vectors (N, D), zeros where the item has none; which have one (N,))."""
    import torch

    stored = inputs.arrow("feature.item_content_vector", columns=("content_hash", "vector"), where=f"encoder_id == '{encoder}' and modality == '{modality}'")
    place = pc.index_in(hashes, value_set=strings(stored["content_hash"]), skip_nulls=True)
    shown = pc.is_valid(place).to_numpy(zero_copy_only=False)
    matrix = flat(stored["vector"]).to_numpy(zero_copy_only=False).astype(np.float32).reshape(max(len(stored), 1), -1)
    vectors = np.zeros((len(hashes), matrix.shape[1]), np.float32)
    vectors[shown] = matrix[pc.drop_null(place).to_numpy().astype(np.int64)]
    return torch.from_numpy(vectors), torch.from_numpy(shown.copy())


def read_pairs(inputs: Inputs, ctx: Context, item_ids: pa.Array) -> list[PairSet]:
    """The night's pair sets as rows of the items, by name of the source, in an order that does not depend on files.

    Raises: UpstreamMissing when the night has none.
    """
    rows = inputs.arrow("feature.content_pair", where=f"logical_date == '{ctx.logical_date}'").sort_by(
        [(name, "ascending") for name in ("left_id", "right_id")]
    )
    if not len(rows):
        raise UpstreamMissing(
            "the night has no pairs to learn from",
            expected="pairs",
            found="none",
            where=f"feature.content_pair logical_date={ctx.logical_date}",
            next_command=f"sid run content_pair --date {ctx.logical_date}",
        )
    return [_pair_set(rows.filter(pc.equal(rows["source"], name)), name, item_ids) for name in sorted(pc.unique(rows["source"]).to_pylist())]


def _pair_set(rows: pa.Table, name: str, item_ids: pa.Array) -> PairSet:
    import torch

    from pipeline.encoders.sail_pairs import PairSet

    places = [pc.index_in(strings(rows[side]), value_set=item_ids) for side in ("left_id", "right_id")]
    known = pc.and_(*(pc.is_valid(place) for place in places))
    left_P, right_P = (torch.from_numpy(place.filter(known).to_numpy().astype(np.int64)) for place in places)
    grade_P = torch.from_numpy(flat(rows["grade"]).filter(known).to_numpy().astype(np.float32))
    return PairSet(name=name, collaborative=bool(rows["collaborative"][0].as_py()), left_P=left_P, right_P=right_P, grade_P=grade_P)


def read_teacher(folder: Path, item_ids: pa.Array) -> tuple[Tensor, Tensor]:
    """(behaviour vectors (N, D) of the items, zeros where there is none; which have one (N,)) of a logged behaviour encoder."""
    import torch

    about, tensors = read_bundle(folder)
    vectors_MD = tensors["behavior_vectors"]
    place = pc.index_in(item_ids, value_set=pa.array(about["item_ids"], pa.large_string()))
    shown_N = torch.from_numpy(pc.is_valid(place).to_numpy(zero_copy_only=False).copy())
    rows = torch.from_numpy(pc.fill_null(place, 0).to_numpy(zero_copy_only=False).astype(np.int64))
    return vectors_MD[rows] * shown_N[:, None], shown_N


def recorded(encoders: list[dict[str, Any]], ids: tuple[str | None, ...]) -> dict[str, Any] | None:
    """The row of feature.content_encoder that one of a generation's encoder ids names; None when the generation reads base vectors."""
    return next((row for row in encoders if row["encoder_id"] in ids), None)
