"""Keeping a vocabulary's words across a refit: the champion a refit begins at, and the matching of its codes to the champion's.

The pull of code rows is in the training loop (fit.py) and in k-means (quantize.py); holding on to codes is `quantize.hold_on`.
Suffixes: N items, L positions, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pipeline.errors import ContractError

if TYPE_CHECKING:
    from pipeline.tokenizers.base import FitOptions, Networked, Start, Tokenizer

N = TypeVar("N", bound=nn.Module)
T = TypeVar("T", bound="Tokenizer")


def champion(start: Start, variant: type[T], settings: Any, raw_widths: Mapping[str, int]) -> T:
    """The champion as a tokenizer of `variant`, if a refit with these settings and vectors can begin at it.

    Raises: ContractError for another variant, other settings or other widths of the vectors: such a change needs the policy `cold`.
    """
    found, tokenizer = start.tokenizer.config(), start.tokenizer
    wanted = {"variant": variant.__name__, "settings": settings.model_dump(), "widths": dict(raw_widths)}
    known = type(settings)(**found["settings"]).model_dump() if isinstance(tokenizer, variant) else {}  # a setting that came later was at its default then
    has = {"variant": type(tokenizer).__name__, "settings": known, "widths": dict(found["raw_widths"])}
    if not isinstance(tokenizer, variant) or has != wanted:
        unlike = next(name for name in wanted if wanted[name] != has[name])
        raise ContractError(
            "a refit cannot begin at this champion",
            expected=f"{unlike} {wanted[unlike]}",
            found=f"{has[unlike]}",
            where="plan_night.policy or plan_night.refit",
            next_command="sid run refresh --date D --set plan_night.policy=cold",
        )
    return tokenizer


def begin(tokenizer: Networked[Any, N], fit_inputs: Callable[[N], None], options: FitOptions, raw_widths: Mapping[str, int]) -> N:
    """A network ready to be trained: built from the seed and fitted to its inputs, or with the champion's state.

    Args:
        tokenizer: the variant that asks.
    Raises: ContractError as `champion`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        network: N = tokenizer.build(tokenizer.settings, raw_widths)  # type: ignore[assignment]
        if options.start is None:
            fit_inputs(network)
        else:
            variant: type[Any] = type(tokenizer)
            network.load_state_dict(champion(options.start, variant, tokenizer.settings, raw_widths).fitted.state_dict())
    return network


def match_codes(old_NL: Tensor, new_NL: Tensor, sizes: Sequence[int], mass_N: Tensor | None = None) -> list[Tensor]:
    """Per position the order of codes, (K,) int64, under which most items (or most of `mass_N`) keep their code: old name -> new code.

    An optimal assignment per position; codes that no item uses fill what is left in ascending order of cost ties.

    Args:
        old_NL / new_NL: codes of the same items under champion and refit; K and above = masked, not counted.
    """
    mass_N = torch.ones(len(old_NL), dtype=torch.float64) if mass_N is None else mass_N.double()
    return [_match(old_N, new_N, size, mass_N) for old_N, new_N, size in zip(old_NL.unbind(1), new_NL.unbind(1), sizes, strict=True)]


def _match(old_N: Tensor, new_N: Tensor, size: int, mass_N: Tensor) -> Tensor:
    seen_N = (old_N < size) & (new_N < size)
    shared = torch.zeros(size * size, dtype=torch.float64).index_add_(0, old_N[seen_N] * size + new_N[seen_N], mass_N[seen_N])
    staying = shared.view(size, size) + torch.eye(size, dtype=torch.float64) * 1e-9  # among equals a code keeps its number
    return torch.from_numpy(linear_sum_assignment(staying.numpy(), maximize=True)[1])
