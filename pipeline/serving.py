"""The script that MLflow keeps with a model and runs to serve it (models from code): rebuilt from JSON + safetensors, asked by column.

sidmill itself never imports it: `tracking.log_model` names this file and MLflow copies it beside the tensors.
A tokenizer answers codes and weights, a behaviour encoder answers the rows of items; other models are opened by their own stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model  # noqa: TID253 - MLflow itself runs this file
from mlflow.pyfunc.model import PythonModel  # noqa: TID253 - the same

Columns = dict[str, np.ndarray]


class SidModel(PythonModel):
    """A sidmill model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Read config.json and model.safetensors; nothing is unpickled."""
        from pipeline.tracking import read_bundle

        self.config, self.state = read_bundle(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Columns:
        """Answer columns for input columns.

        Args:
            model_input: a dict of arrays or a DataFrame; the annotation is the one that MLflow takes without further demands.
        Raises: ValueError for a model that is neither a tokenizer nor a behaviour encoder.
        """
        columns = {name: _column(model_input[name]) for name in model_input}
        if "tokenizer" in self.config:
            return tokenize(self.config, self.state, columns)
        if "item_ids" in self.config:
            return rows_of_items(self.config, self.state, columns["item_id"])
        raise ValueError("this model has no columns to answer: open model.safetensors and config.json with the stage that made it")


def tokenize(config: dict[str, Any], state: dict[str, Any], columns: Columns) -> Columns:
    """Codes (N, L) int64 and weights (N, L) float32 of N items.

    Args:
        columns: text / image / behavior (N, D) where the data set has them, a row of NaN = the item lacks it;
            richness and strength (N,) in [0, 1], zero when left out.
    """
    import torch

    from pipeline.tokenizers import from_state
    from pipeline.tokenizers.base import ItemBatch

    height = len(next(iter(columns.values())))
    fields: dict[str, Any] = {}
    for modality in ("text", "image", "behavior"):
        vectors = columns.get(modality)
        present = np.zeros(height, bool) if vectors is None else np.isfinite(vectors).all(axis=1)
        fields[f"{modality}_ND"] = torch.as_tensor(np.nan_to_num(vectors), dtype=torch.float32) if vectors is not None and present.any() else None
        fields[f"{modality}_N"] = torch.from_numpy(present)
    for name in ("richness", "strength"):
        fields[f"{name}_N"] = torch.as_tensor(columns.get(name, np.zeros(height)), dtype=torch.float32)
    with torch.no_grad():
        answer = from_state(config, state).encode(ItemBatch(**fields))
    return {"codes": answer.codes_NL.numpy(), "weights": answer.weights_NL.numpy()}


def rows_of_items(config: dict[str, Any], state: dict[str, Any], item_ids: np.ndarray) -> Columns:
    """Vectors (N, D) float32 of N items, a row of NaN for an item the encoder has no row for.

    Raises: ValueError if no tensor has one row per item.
    """
    known = np.asarray(config["item_ids"], dtype=str)
    tables = [tensor for _, tensor in sorted(state.items()) if tensor.ndim == 2 and len(tensor) == len(known)]
    if not tables:
        raise ValueError(f"no tensor of this model has one row for each of its {len(known)} items")
    table_ND = tables[0].float().numpy()
    order = np.argsort(known)
    wanted = np.asarray(item_ids, dtype=str)
    places = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    found = known[places] == wanted
    return {"vector": np.where(found[:, None], table_ND[places], np.float32(np.nan))}


def _column(values: Any) -> np.ndarray:
    """One array; a DataFrame's column of lists becomes a matrix."""
    array = np.asarray(values)
    return np.stack([np.asarray(row) for row in array]) if array.dtype == object and not isinstance(array.flat[0], str) else array


set_model(SidModel())
