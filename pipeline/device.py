"""Where tensors are computed: the one place that asks whether there is an accelerator."""

from __future__ import annotations


def best_device() -> str:
    """`cuda` where there is such an accelerator, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
