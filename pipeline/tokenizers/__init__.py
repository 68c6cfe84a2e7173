"""Tokenizers: item vectors in, code tuples out. Tensors only: no file, table, network, MLflow or clock.

`TOKENIZERS` and `from_state` resolve on first use: whoever wants one module of the package loads that module alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tokenizers.registry import TOKENIZERS, from_state

__all__ = ["TOKENIZERS", "from_state"]


def __getattr__(name: str) -> Any:
    """The registry's `TOKENIZERS` and `from_state`.

    Raises: AttributeError for any other name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.tokenizers import registry

    return getattr(registry, name)
