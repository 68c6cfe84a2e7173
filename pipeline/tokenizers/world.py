"""The processes of a training run as one: a loss summed over their rows, features gathered with their gradient, parameters kept equal.

One process is the special case of size 1 in which nothing is communicated. Process groups are set up by whoever starts the processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all processes, in process order; backward hands each process the gradient of its own rows, summed over processes."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, height: int, start: int) -> Tensor:
        """Rows (B, D) of this process, which begin at `start` of everyone's (height, D); returns everyone's."""
        ctx.rows = slice(start, start + len(rows_BD))
        everyone_CD = rows_BD.new_zeros((height, *rows_BD.shape[1:]))
        everyone_CD[ctx.rows] = rows_BD
        dist.all_reduce(everyone_CD)
        return everyone_CD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient (B, D) of this process's rows, from every process's loss."""
        total_CD = gradients[0].contiguous().clone()
        dist.all_reduce(total_CD)
        return total_CD[ctx.rows], None, None


class World:
    """The processes that train together; each holds a consecutive part of every batch.

    Losses are written as sums over this process's rows divided by counts over all processes, so gradients are added, not averaged:
    P processes then take the step that one process takes on the whole batch, up to the order of float additions.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0
        self._bounds = [0, 0]

    def shard(self, batch: Tensor) -> Tensor:
        """Consecutive rows of a batch, those of this process; fixes the layout that `gather` and `first_row` refer to."""
        parts = batch.tensor_split(self.size)
        start = sum(len(part) for part in parts[: self.rank])
        self._bounds = [start, len(batch)]
        return parts[self.rank]

    def first_row(self) -> int:
        """Row of the whole batch that is this process's row 0."""
        return self._bounds[0]

    def gather(self, rows_BD: Tensor) -> Tensor:
        """The rows of all processes, (C, D), with gradient."""
        if self.size == 1:
            return rows_BD
        gathered: Tensor = _Gather.apply(rows_BD, self._bounds[1], self._bounds[0])
        return gathered

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes, without gradient."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value_B: Tensor, mask_B: Tensor) -> Tensor:
        """The share of this process in the mean over the masked rows of all processes; 0 without rows. The shares of all processes add up to the mean."""
        count = self.total(mask_B.sum().to(value_B.dtype)).clamp(min=1)
        return torch.where(mask_B, value_B, torch.zeros_like(value_B)).sum() / count

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over processes; a parameter that got none has a gradient of zero."""
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of process 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)
