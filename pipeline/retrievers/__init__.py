"""Readers of semantic IDs that find items: histories of items as code tuples in, a ranking of the catalogue out.

A new retriever is one file beside this one, one line below and one section in [train_retriever].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.config import TrainRetriever
from pipeline.errors import ConfigError
from pipeline.retrievers.base import Catalogue
from pipeline.retrievers.discrec import discrec
from pipeline.retrievers.parallel import Parallel
from pipeline.retrievers.sequential import Sequential
from pipeline.retrievers.tiger import Tiger, TigerSettings

AnyRetriever = Parallel | Tiger | Sequential  # `every_position`: one pass predicts the item after every event, else only the one after the last


def _tiger_settings(settings: TrainRetriever) -> TigerSettings:
    return TigerSettings(settings.tiger, settings.max_history, settings.router_share, settings.weighted_inputs)


RETRIEVERS: Mapping[str, Callable[[Catalogue, TrainRetriever], AnyRetriever]] = {
    "parallel": lambda catalogue, settings: Parallel(
        catalogue, settings.parallel, length=settings.max_history, share=settings.router_share, weighted=settings.weighted_inputs
    ),
    "tiger": lambda catalogue, settings: Tiger(catalogue, _tiger_settings(settings)),
    "discrec": lambda catalogue, settings: discrec(catalogue, _tiger_settings(settings), settings.discrec),
    "sequential": lambda catalogue, settings: Sequential(
        catalogue, settings.sequential, length=settings.max_history, share=settings.router_share, weighted=settings.weighted_inputs
    ),
}


def build(catalogue: Catalogue, settings: TrainRetriever) -> AnyRetriever:
    """The configured retriever, untrained, over a catalogue.

    Raises: ConfigError for a name that is not registered.
    """
    if settings.retriever not in RETRIEVERS:
        raise ConfigError("no such retriever", expected=" | ".join(RETRIEVERS), found=settings.retriever, where="section [train_retriever], key retriever")
    return RETRIEVERS[settings.retriever](catalogue, settings)
