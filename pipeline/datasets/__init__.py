"""Data sets: one file each plus one line in DATASETS; `base` holds what they share."""

from __future__ import annotations

from pipeline.datasets.base import Dataset
from pipeline.datasets.folder import Folder
from pipeline.datasets.movielens import MovieLens
from pipeline.datasets.online_retail import OnlineRetail
from pipeline.datasets.shop import Shop
from pipeline.errors import ConfigError

DATASETS: dict[str, type[Dataset]] = {"movielens": MovieLens, "online_retail": OnlineRetail, "folder": Folder, "shop": Shop}


def dataset(name: str) -> Dataset:
    """The data set of that name.

    Raises: ConfigError for an unknown name.
    """
    if name not in DATASETS:
        raise ConfigError("an unknown data set", expected=", ".join(DATASETS), found=name, where="source.dataset")
    return DATASETS[name]()
