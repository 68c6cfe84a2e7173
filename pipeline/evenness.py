"""How evenly the codes of one position are used: counts in, numbers out, the same for tokenizers, gates and pictures.

NumPy alone, so that a Spark driver and a page need no torch. Suffix: K codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def dead_codes(counts_K: ArrayLike) -> int:
    """Number of codes without any item."""
    return int((np.asarray(counts_K) == 0).sum())


def entropy(counts_K: ArrayLike) -> float:
    """Entropy of code use in nats, in [0, ln K]; 0 without items."""
    count_K = np.asarray(counts_K, np.float64)
    share_U = count_K[count_K > 0] / max(count_K.sum(), 1.0)
    return float(-(share_U * np.log(share_U)).sum()) + 0.0


def perplexity(counts_K: ArrayLike) -> float:
    """exp(entropy): the number of equally used codes that would be as uneven; in [1, K]."""
    return float(np.exp(entropy(counts_K)))
