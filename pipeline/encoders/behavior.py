"""What a behaviour encoder is: event sequences in, one vector per item out, NOT normalised, and rows that are trained later against a frozen base.

The job knows encoders only through this protocol. Tensor suffixes: N items of the base, M moved items, R rows that could be made, D width, C content width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline import config
from pipeline.encoders import sasrec
from pipeline.encoders.sasrec import Champion, Sequences, TrainedEncoder

__all__ = ["BehaviorEncoder", "Champion", "MovedRows", "SasRec", "Sequences", "TrainedEncoder"]


@dataclass(frozen=True)
class MovedRows:
    """Rows of a frozen night in the base's own space.

    Args:
        vectors: behaviour vectors [R, D] of the moved items where `near` holds, in their order.
        near: whether the base says enough about the item to make a row, bool [M].
        curve: mean loss per step; empty where nothing is trained.
        metrics: rows_alone, row_cosine_to_start, mean_row_norm.
    """

    vectors: Tensor
    near: Tensor
    curve: list[float]
    metrics: dict[str, float]

    @classmethod
    def of(cls, vectors_RD: Tensor, start_RD: Tensor, near_M: Tensor, curve: list[float]) -> MovedRows:
        """The rows with what is measured of them."""
        metrics = {"rows_alone": float((~near_M).sum())}
        if len(vectors_RD):
            cosine_R = torch.nn.functional.cosine_similarity(vectors_RD, start_RD)
            metrics |= {"row_cosine_to_start": float(cosine_R.mean()), "mean_row_norm": float(vectors_RD.norm(dim=1).mean())}
        return cls(vectors_RD, near_M, curve, metrics)


class BehaviorEncoder(Protocol):
    """An encoder with its settings; everything it is given lies before the cutoff."""

    masks_history: bool  # whether validation leaves the user's history out of the ranking
    reads_text: bool  # whether `content` must be given
    cold_items: bool  # whether items with a text have a vector before they have n_min events
    local_rows: bool  # whether `train_rows` makes the same rows of the sequences alone that hold a moved item

    def __init__(self, params: Any) -> None: ...

    def begin_at(self, champion: Champion) -> bool:
        """Whether the next `train` begins at the champion; False where training can only begin anew, and the orthogonal map alone brings the space back.

        Raises: ContractError if the champion's network has other sizes.
        """
        ...

    def train(
        self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", what: str = "encoder", content: Tensor | None = None
    ) -> TrainedEncoder:
        """The trained encoder; its state is all that `train_rows` needs.

        Args:
            what: name of the progress bar.
            content: text vectors by item_index [N, C], zeros for an item without a text.
        """
        ...

    def train_rows(
        self, state: Mapping[str, Tensor], sequences: Sequences, moved_M: Tensor, seeds_M: Tensor, *, device: str = "cpu", content: Tensor | None = None
    ) -> MovedRows:
        """Rows of the moved items with everything else held at the base.

        Args:
            sequences: item_index >= N marks items that the base does not have.
            moved_M: item_index of the moved items, distinct.
            seeds_M: int64, one per moved item.
            content: as for `train`, for every item_index of the sequences and of moved_M.
        """
        ...

    def probe(self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", content: Tensor | None = None) -> dict[str, float]:
        """Further measurements of what the encoder reads, for a new generation; empty where it has none."""
        ...


class SasRec:
    """`encoders.sasrec` as a behaviour encoder."""

    masks_history, reads_text, cold_items, local_rows = False, False, False, True

    def __init__(self, params: config.SasRec) -> None:
        self.params = params
        self.champion: Champion | None = None

    def begin_at(self, champion: Champion) -> bool:
        """True: known items begin at the champion's rows, the blocks at its blocks."""
        self.champion = champion
        return True

    def train(
        self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", what: str = "sasrec", content: Tensor | None = None
    ) -> TrainedEncoder:
        """The input rows of the network at its best epoch."""
        return sasrec.train(sequences, num_items, self.params, seed=seed, device=device, what=what, champion=self.champion)

    def train_rows(
        self, state: Mapping[str, Tensor], sequences: Sequences, moved_M: Tensor, seeds_M: Tensor, *, device: str = "cpu", content: Tensor | None = None
    ) -> MovedRows:
        """Trained input rows; an item with nothing of the base near it waits for more events."""
        model = sasrec.restore(state, self.params)
        start, near_M = sasrec.initial_rows(model, sequences, moved_M)
        start = sasrec.Rows(start.inputs[near_M], start.outputs[near_M])
        rows_MD, curve = sasrec.train_rows(model.to(device), sequences, moved_M[near_M], start, seeds_M[near_M], self.params, sasrec.Contexts.of(state))
        return MovedRows.of(rows_MD, start.inputs, near_M, curve)

    def probe(self, sequences: Sequences, num_items: int, *, seed: int, device: str = "cpu", content: Tensor | None = None) -> dict[str, float]:
        """Nothing: SASRec reads no text."""
        return {}
