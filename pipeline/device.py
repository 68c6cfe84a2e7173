"""Where tensors are computed, and that the same numbers come out every time: the one place that asks whether there is an accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FIXED_WORKSPACE = ":4096:8"  # cuBLAS adds up in one order only with a workspace of its own per stream
SHARE = 0.4  # of the accelerator's free memory that a data set may take: training holds about as much again


def best_device() -> str:
    """`cuda` where there is such an accelerator, else `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", FIXED_WORKSPACE)  # read at the first matrix product, so before it
    return "cuda"


def device_name() -> str:
    """What `best_device` is called by its maker; `cpu` without an accelerator."""
    import torch

    return torch.cuda.get_device_name() if best_device() == "cuda" else "cpu"


@cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (AMX or AVX-512 BF16)."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def fits(size: int, device: torch.device) -> bool:
    """Whether data of `size` bytes should be kept on the device: always on a CPU, where it is anyway, else within `SHARE` of the free memory."""
    import torch

    return device.type == "cpu" or size <= SHARE * torch.cuda.mem_get_info(device)[0]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; an accelerator fetches it when its queue comes to it, and nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A queue of its own on an accelerator, on which steps can be recorded; a CPU has none."""
    import torch

    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Random numbers from the seed and deterministic kernels inside; the process's own state is put back after.

    On an accelerator an operation without a deterministic kernel warns and is run; attention takes its plain form, the fused backward adds in any order.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    switches: Any = torch.utils.deterministic
    accelerator = best_device() != "cpu"
    before, filled = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        if accelerator:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=accelerator)
        switches.fill_uninitialized_memory = False  # a tenth of the time; nothing here reads what it has not written
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            switches.fill_uninitialized_memory = filled
