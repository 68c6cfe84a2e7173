"""Where tensors are computed, and that the same numbers come out every time: the one place that asks whether there is an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def best_device() -> str:
    """`cuda` where there is such an accelerator, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Random numbers from the seed and deterministic kernels inside; the process's own state is put back after."""
    import torch

    switches: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        switches.fill_uninitialized_memory = False  # a tenth of the time; nothing here reads what it has not written
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            switches.fill_uninitialized_memory = filled
