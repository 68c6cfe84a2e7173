"""The tokenizers by name. A new variant = one file + one line here; the settings are the config section of the same name."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import Tokenizer
from pipeline.tokenizers.das import Das
from pipeline.tokenizers.letter import Letter
from pipeline.tokenizers.mmq import Mmq
from pipeline.tokenizers.opq import Opq
from pipeline.tokenizers.random_codes import RandomCodes
from pipeline.tokenizers.rq_kmeans import RqKmeans
from pipeline.tokenizers.rq_vae import RqVae
from pipeline.tokenizers.unger import Unger


class Variant(Protocol):
    """A tokenizer class: made from the settings of its section, or from what a fitted one left."""

    def __call__(self, settings: Any) -> Tokenizer:
        """A tokenizer that is not fitted."""

    def load(self, config: dict[str, Any], state: dict[str, Tensor]) -> Tokenizer:
        """The tokenizer that gave `config` and `state`."""


TOKENIZERS: dict[str, Variant] = {
    "ada_sid": AdaSid,
    "rq_kmeans": RqKmeans,
    "rq_vae": RqVae,
    "letter": Letter,
    "opq": Opq,
    "random_codes": RandomCodes,
    "mmq": Mmq,
    "das": Das,
    "unger": Unger,
}


def named(name: str) -> Variant:
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
