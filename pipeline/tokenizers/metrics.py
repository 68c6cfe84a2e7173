"""Numbers about codes and reconstructions, each defined once: every tokenizer and study uses these (evenness of use: pipeline/evenness.py).

Not here: anything that needs a reader of the codes (pipeline/evaluation.py). Suffixes: N items, L positions, K codes, D width.
The reserved code K (masked position) never counts as a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline import evenness
from pipeline.tokenizers import collisions

BLOCK = 1 << 20  # rows looked at in float64 at once


def code_counts(codes_N: Tensor, size: int) -> Tensor:
    """Items per code of one position, (K,) int64; masked items (code = `size`) are left out.

    Raises: ValueError for a code outside [0, size].
    """
    if len(codes_N) and (int(codes_N.min()) < 0 or int(codes_N.max()) > size):
        raise ValueError(f"codes lie in [0, {size}], found [{int(codes_N.min())}, {int(codes_N.max())}]")
    return torch.bincount(codes_N, minlength=size + 1)[:size]


def utilisation(counts_K: Tensor, *, at_least: int = 2) -> float:
    """Share of codes with at least `at_least` items: a code that a single item holds groups nothing."""
    return float((counts_K >= at_least).double().mean())


def dead_codes(counts_K: Tensor) -> int:
    """Number of codes without any item."""
    return evenness.dead_codes(counts_K.cpu().numpy())


def entropy(counts_K: Tensor) -> float:
    """Entropy of code use in nats, in [0, ln K]; 0 without items."""
    return evenness.entropy(counts_K.cpu().numpy())


def perplexity(counts_K: Tensor) -> float:
    """exp(entropy): the number of equally used codes that would be as uneven; in [1, K]."""
    return evenness.perplexity(counts_K.cpu().numpy())


def gini(counts_K: Tensor) -> float:
    """Gini coefficient of code use in [0, 1): 0 = all codes hold equally many items."""
    ordered_K = counts_K.double().sort().values
    total, size = float(ordered_K.sum()), len(ordered_K)
    if total == 0.0:
        return 0.0
    rank_K = torch.arange(1, size + 1, dtype=torch.float64, device=ordered_K.device)
    return float((2 * rank_K - size - 1) @ ordered_K) / (size * total)


def tuple_ids(codes_NL: Tensor) -> Tensor:
    """One integer in [0, number of distinct tuples) per item, equal exactly where all codes are equal, (N,)."""
    return torch.from_numpy(collisions.group_ids(codes_NL.cpu().numpy()))


def collision_rate(codes_NL: Tensor) -> float:
    """Share of items whose code tuple some other item has too, before disambiguation; 0 without items."""
    return float((collisions.group_sizes(codes_NL.cpu().numpy()) > 1).mean()) if len(codes_NL) else 0.0


def nmse(target_ND: Tensor, estimate_ND: Tensor, mask_N: Tensor | None = None) -> float:
    """Squared error over the squared distance to the mean, on the items of the mask: 1 = no better than the mean, 0 = exact.

    Returns: nan without items or without variance.
    """
    shown_N = torch.ones(len(target_ND), dtype=torch.bool, device=target_ND.device) if mask_N is None else mask_N

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of both."""
        for target_BD, estimate_BD, mask_B in zip(target_ND.split(BLOCK), estimate_ND.split(BLOCK), shown_N.split(BLOCK), strict=True):
            yield target_BD[mask_B], estimate_BD[mask_B]

    return nmse_of(pairs)


def nmse_of(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> float:
    """`nmse` of rows that come in blocks of (target, estimate), so that a large catalogue needs no second copy of itself in float64.

    Args:
        pairs: makes the blocks; called twice, because the mean comes before the distances to it.
    """
    sums, count = [], 0
    for target_BD, _ in pairs():
        sums.append(target_BD.double().sum(0))
        count += len(target_BD)
    if not count:
        return float("nan")
    mean_D = torch.stack(sums).sum(0) / count
    errors, spreads = [], []
    for target_BD, estimate_BD in pairs():
        target_BD, estimate_BD = target_BD.double(), estimate_BD.double()
        spreads.append((target_BD - mean_D).square().sum())
        errors.append((target_BD - estimate_BD).square().sum())
    spread = torch.stack(spreads).sum()
    return float(torch.stack(errors).sum() / spread) if float(spread) > 0 else float("nan")


def code_use(codes_NL: Tensor, sizes: Sequence[int], slots: Sequence[str]) -> dict[str, float]:
    """Utilisation, perplexity, entropy, Gini and dead codes per position, their means or sums, and the collision rate."""
    found: dict[str, float] = {}
    measures = {"utilisation": utilisation, "perplexity": perplexity, "entropy": entropy, "gini": gini, "dead_codes": dead_codes}
    for codes_N, size, slot in zip(codes_NL.unbind(1), sizes, slots, strict=True):
        counts_K = code_counts(codes_N, size)
        found.update({f"{name}/{slot}": float(measure(counts_K)) for name, measure in measures.items()})
    for name in measures:
        values = [found[f"{name}/{slot}"] for slot in slots]
        found[name] = sum(values) / (1 if name == "dead_codes" else len(values))
    found["collision_rate"] = collision_rate(codes_NL)
    return found
