"""The tokenizers by name. A new variant = one file + one line here; the settings are the config section of the same name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import Tokenizer
from pipeline.tokenizers.rq_kmeans import RqKmeans

TOKENIZERS: dict[str, type[AdaSid] | type[RqKmeans]] = {"ada_sid": AdaSid, "rq_kmeans": RqKmeans}


def named(name: str) -> type[AdaSid] | type[RqKmeans]:
    """The tokenizer class of that name.

    Raises: ConfigError for a name that is not registered.
    """
    if name not in TOKENIZERS:
        raise ConfigError("no such tokenizer", expected=" | ".join(TOKENIZERS), found=name, where="train_tokenizer.tokenizer")
    return TOKENIZERS[name]


def from_state(config: dict[str, Any], state: dict[str, Tensor]) -> Tokenizer:
    """A fitted tokenizer from its `config()` and `state()`.

    Raises: ConfigError for an unregistered name; RuntimeError if tensors and config do not belong together.
    """
    return named(config["tokenizer"]).load(config, state)
