"""Numbers for tests of equations: the same seed gives the same draw."""

from __future__ import annotations

import numpy as np
import torch


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(row: torch.Tensor) -> np.ndarray:
    """The row at length 1."""
    return (row / row.norm()).numpy()
