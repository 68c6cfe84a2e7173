"""Networks of the ranker: one file and one line below per variant; `pipeline/ranker.py` trains, evaluates and loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pipeline.errors import ConfigError
from pipeline.rankers.base import ItemTable, Network, Widths
from pipeline.rankers.dcnv2 import DcnV2
from pipeline.rankers.din import din
from pipeline.rankers.ppnet import PpNet

HEADS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "din": lambda settings: din(settings["dim"], settings["hidden_dims"]),
    "ppnet": lambda settings: PpNet(settings["dim"], settings["hidden_dims"], settings["gate_dim"]),
    "dcnv2": lambda settings: DcnV2(settings["dim"], settings["hidden_dims"], settings["cross_layers"], settings["cross_rank"]),
}
DEFAULTS: Mapping[str, Any] = {"model": "din", "pooling": "concat"}  # what checkpoints from before there was a choice leave unsaid


def network(settings: Mapping[str, Any], table: ItemTable, widths: Widths, *, num_users: int) -> Network:
    """The network of settings (model, dim, hidden_dims, pooling and the model's own), untrained.

    Raises: ConfigError for an unknown model.
    """
    chosen = {**DEFAULTS, **settings}
    if chosen["model"] not in HEADS:
        raise ConfigError("no such ranker", expected=" | ".join(HEADS), found=str(chosen["model"]), where="section [train_ranker], key model")
    head = HEADS[chosen["model"]]
    return Network(table, widths, num_users=num_users, dim=chosen["dim"], make_head=lambda: head(chosen), pooling=chosen["pooling"])
