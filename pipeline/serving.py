"""The script that MLflow keeps with a model and runs to serve it (models from code): rebuild from JSON + safetensors, predict by column.

Never imported by sidmill: `tracking.log_model` names this file, MLflow copies it beside the tensors.
What a model answers depends on the `kind` of its config.json; a model of another kind answers its tensors' facts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow  # noqa: TID253 - MLflow itself runs this file
import numpy as np


class SidModel(mlflow.pyfunc.PythonModel):
    """A sidmill model behind MLflow's `predict`: codes of a tokenizer, rows of a behaviour encoder."""

    def load_context(self, context: Any) -> None:
        """Read config.json and model.safetensors; nothing is unpickled."""
        from safetensors.numpy import load_file

        folder = Path(context.artifacts["model"])
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.state = load_file(folder / "model.safetensors")

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Answer columns for input columns; a dict of arrays or a DataFrame goes in."""
        columns = {name: _column(model_input[name]) for name in model_input}
        return columns
mlflow.models.set_model(SidModel())
