"""What train_behavior_encoder reads: the night's items and sequences, the texts' vectors, and a generation's encoder as it was logged.

Not here: training (pipeline/encoders), what is written (train_behavior_encoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.inputs import newest_observations
from pipeline.context import Context
from pipeline.errors import ConfigError, UpstreamMissing
from pipeline.tracking import read_bundle

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.behavior import Sequences
    from pipeline.tokenizers.base import History


@dataclass(frozen=True)
class Items:
    """The night's items, sorted by id: events so far and stratum."""

    item_ids: pa.Array
    counts: NDArray[np.int64]
    strata: pa.Array


@dataclass(frozen=True)
class Night(Items):
    """The night's items and its sequences of two events or more, sorted by user: all of them, or those that hold one of some items."""

    sequences: pa.Table

    def events(self) -> pa.Array:
        """Item of every event, users end to end."""
        return strings(self.sequences["item_ids"])


@dataclass(frozen=True)
class Content:
    """Text vectors of items: row number `places[n]` of `vectors` [K, C] belongs to `item_ids[n]`."""

    item_ids: pa.Array
    places: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def of(self, item_ids: pa.Array) -> Tensor:
        """Vectors of the items [N, C], zeros for one without a text."""
        import torch

        row_N = pc.index_in(item_ids, value_set=self.item_ids)
        has_N = pc.is_valid(row_N).to_numpy(zero_copy_only=False)
        found = np.zeros((len(item_ids), self.vectors.shape[1]), np.float32)
        found[has_N] = self.vectors[self.places[pc.drop_null(row_N).to_numpy().astype(np.int64)]]
        return torch.from_numpy(found)

    def has(self, item_ids: pa.Array) -> NDArray[np.bool_]:
        """Which items have a text, [N]."""
        return pc.is_in(item_ids, value_set=self.item_ids).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Base:
    """A generation's encoder as it was logged, and the night that fitted it."""

    born: date
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def vocabulary(self) -> pa.Array:
        """Items of the network's tables, in row order."""
        return unpack_ids(self.tensors["vocabulary_bytes"].numpy(), self.tensors["vocabulary_offsets"].numpy())


def read_items(inputs: Inputs, ctx: Context) -> Items:
    """The night's items in an order that does not depend on files."""
    columns = ("item_id", "evidence_count", "popularity_stratum")
    rows = inputs.arrow("feature.item_popularity", columns=columns, where=f"logical_date == '{ctx.logical_date}'").sort_by("item_id")
    return Items(strings(rows["item_id"]), rows["evidence_count"].to_numpy().astype(np.int64), strings(rows["popularity_stratum"]))


def read_night(inputs: Inputs, ctx: Context, items: Items, holding: pa.Array | None = None) -> Night:
    """The items with their sequences, in an order that does not depend on files.

    Args:
        holding: items one of which a sequence must hold; None = all sequences.
    Raises: UpstreamMissing when no user has two events.
    """
    where = f"logical_date == '{ctx.logical_date}' and num_events >= 2"
    if not len(inputs.arrow("feature.user_sequence", columns=("num_events",), where=where)):
        raise UpstreamMissing(
            "no user has two events to learn an order from",
            expected="sequences",
            found="none",
            where=f"feature.user_sequence logical_date={ctx.logical_date}",
            next_command=f"sid run user_sequence --date {ctx.logical_date}",
        )
    among = {} if holding is None else {"item_ids": holding.to_pylist()}
    rows = inputs.arrow("feature.user_sequence", columns=("user_id", "item_ids", "baskets"), where=where, **among)
    return Night(**vars(items), sequences=rows.sort_by("user_id"))


def read_content(inputs: Inputs, ctx: Context) -> Content:
    """Vectors of the newest text of every item, as of the night.

    Raises: ConfigError when texts are not encoded, UpstreamMissing when no text has a vector.
    """
    encoder = ctx.outcome("content_embedding")["outputs"].get("text_encoder_id")
    if not encoder:
        raise ConfigError("the behaviour encoder reads texts", expected="a text encoder", found="none", where="[content_embedding] text_encoder")
    newest = newest_observations(inputs.arrow("raw.item", columns=("file_date", "item_id", "text_hash"), where=f"file_date <= '{ctx.logical_date}'"))
    stored = inputs.arrow("feature.item_content_vector", columns=("content_hash", "vector"), where=f"encoder_id == '{encoder}' and modality == 'text'")
    place = pc.index_in(strings(newest["text_hash"]), value_set=strings(stored["content_hash"]), skip_nulls=True)
    known = pc.is_valid(place)
    if not pc.any(known).as_py():
        raise UpstreamMissing(
            "no text has a vector",
            expected=f"vectors of {encoder}",
            found="none",
            where="feature.item_content_vector",
            next_command=f"sid run content_embedding --date {ctx.logical_date}",
        )
    vectors = flat(stored["vector"]).to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(stored), -1)
    return Content(strings(newest["item_id"]).filter(known), place.filter(known).to_numpy().astype(np.int64), vectors)


def indexed(night: Night, vocabulary: pa.Array, others: pa.Array | None = None) -> tuple[Sequences, pa.Array]:
    """(sequences by item_index, the items beyond the vocabulary in the order of their indices N, N + 1, ...).

    Args:
        others: items that need an index though they may have no event.
    """
    import torch

    from pipeline.encoders.behavior import Sequences

    events = night.events()
    found = pc.index_in(events, value_set=vocabulary)
    beyond = events.filter(pc.is_null(found))
    if others is not None:
        beyond = pa.concat_arrays([beyond, others.filter(pc.invert(pc.is_in(others, value_set=vocabulary)))])
    beyond = sorted_unique(beyond)
    extra = pc.add(pc.index_in(events, value_set=beyond), len(vocabulary))
    items_T = torch.from_numpy(pc.coalesce(found, extra).to_numpy(zero_copy_only=False).astype(np.int64))
    lengths = pc.list_value_length(night.sequences["item_ids"]).to_numpy()
    baskets_T = torch.from_numpy(basket_numbers(night.sequences))
    return Sequences(torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)), items_T, baskets_T), beyond


def read_base(inputs: Inputs, generation: int) -> Base | None:
    """The encoder of a generation; None when sid.generation does not hold it."""
    rows = inputs.arrow("sid.generation", columns=("generation", "logical_date", "encoder_uri"), where=f"generation == {generation:d}").to_pylist()
    if not rows:
        return None
    return Base(rows[0]["logical_date"], *read_bundle(inputs.model(rows[0]["encoder_uri"])))


def read_history(inputs: Inputs, ctx: Context, item_ids: pa.Array) -> History:
    """Users' sequences of the night as rows of the items; events of items that are not among them are left out."""
    import torch

    from pipeline.tokenizers.base import History

    rows = inputs.arrow("feature.user_sequence", columns=("user_id", "item_ids", "baskets"), where=f"logical_date == '{ctx.logical_date}'").sort_by("user_id")
    place_T = pc.index_in(strings(rows["item_ids"]), value_set=item_ids)
    known_T = pc.is_valid(place_T).to_numpy(zero_copy_only=False)
    user_T = pc.list_parent_indices(rows["item_ids"]).to_numpy()[known_T]
    basket_T = basket_numbers(rows)[known_T]
    offset_U = np.concatenate([[0], np.cumsum(np.bincount(user_T, minlength=len(rows)))]).astype(np.int64)
    index_T = torch.from_numpy(pc.drop_null(place_T).to_numpy().astype(np.int64))
    return History(index_T=index_T, offset_U=torch.from_numpy(offset_U), basket_T=torch.from_numpy(basket_T))


def pack_ids(item_ids: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(UTF-8 bytes end to end, offsets [N + 1]): item ids as tensors."""
    fresh = item_ids.cast(pa.large_string()).take(pa.array(np.arange(len(item_ids))))  # buffers that begin at 0
    offsets = np.frombuffer(fresh.buffers()[1], np.int64)[: len(item_ids) + 1].copy()
    characters = fresh.buffers()[2]
    return (np.frombuffer(characters, np.uint8)[: offsets[-1]].copy() if characters else np.zeros(0, np.uint8)), offsets


def unpack_ids(characters: NDArray[np.uint8], offsets: NDArray[np.int64]) -> pa.Array:
    """The item ids that `pack_ids` packed."""
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets.tobytes()), pa.py_buffer(characters.tobytes()))


def strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column, or the values of a list column, as one array of large strings."""
    return flat(column).cast(pa.large_string())


def basket_numbers(sequences: pa.Table) -> NDArray[np.int64]:
    """The number of each event's basket, the users' events end to end."""
    return flat(sequences["baskets"]).to_numpy(zero_copy_only=False).astype(np.int64)


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array; a list column gives its values."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return column


def sorted_unique(values: pa.Array) -> pa.Array:
    """The distinct values, ascending."""
    found = pc.unique(values)
    return found.take(pc.array_sort_indices(found))
