"""Encoders by name: content encoders (texts or pictures in, vectors out) and behaviour encoders (event sequences in, item vectors out).

A new encoder is one file beside this one and one line below. Importing this package loads no torch, because the Spark driver names encoders with it;
the behaviour encoders are torch modules and are therefore imported when their dict is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.encoders.base import ContentEncoder, Modality
from pipeline.encoders.image import EfficientNetLite0, VisionModel
from pipeline.encoders.text import MiniLM, TextModel

if TYPE_CHECKING:
    from pipeline.encoders.behavior import BehaviorEncoder

    BEHAVIOR_ENCODERS: Mapping[str, type[BehaviorEncoder]]

CONTENT_ENCODERS: Mapping[Modality, Mapping[str, type[ContentEncoder]]] = {
    "text": {"minilm": MiniLM, "hf": TextModel},
    "image": {"efficientnet_lite0": EfficientNetLite0, "hf": VisionModel},
}

__all__ = ["BEHAVIOR_ENCODERS", "CONTENT_ENCODERS"]


def __getattr__(name: str) -> Any:
    """`BEHAVIOR_ENCODERS`, made on first use."""
    if name != "BEHAVIOR_ENCODERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.encoders.alpharec import AlphaRec
    from pipeline.encoders.behavior import SasRec
    from pipeline.encoders.bpr_mf import BprMf
    from pipeline.encoders.lightgcn import LightGcn
    from pipeline.encoders.ngcf import Ngcf

    encoders: Mapping[str, type[BehaviorEncoder]] = {"sasrec": SasRec, "bpr_mf": BprMf, "ngcf": Ngcf, "lightgcn": LightGcn, "alpharec": AlphaRec}
    return encoders
