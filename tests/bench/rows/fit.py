"""Residual k-means code books: ours against faiss.Kmeans level by level and MiniBatchKMeans, with the error they reach beside the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from bench import Case, peer
from torch import Tensor

from pipeline.tokenizers.quantize import kmeans, nearest_centroid
from rows.assign import embeddings

NUMBER, TITLE = 3, "residual k-means fit"
COUNTS = {"quick": 10_240, "normal": 50_000, "full": 200_000}
LEVELS, SIZE, ITERATIONS = 3, 256, 15
WORSE = 0.01  # share by which an error may be above the other's and still count as equal
Fit = Callable[[Tensor, int], Tensor]


def cases(scale: str) -> Iterator[Case]:
    points_ND = embeddings(COUNTS[scale])
    peers, notices = {}, []
    if peer("faiss") is None:
        notices.append("faiss-cpu is not installed")
    else:
        peers["faiss.Kmeans"] = partial(residual, points_ND, by_faiss)
    peers["MiniBatchKMeans"] = partial(residual, points_ND, by_sklearn)
    errors: dict[str, float] = {}

    def no_worse(mine: Tensor, theirs: Tensor) -> str:
        """Whether our error is at most a little above theirs; both are kept for the table."""
        errors["error, ours"] = error(points_ND, mine)
        errors[f"error, peer {len(errors)}"] = reached = error(points_ND, theirs)
        return f"its error is {reached:.4f}, ours {errors['error, ours']:.4f}" if errors["error, ours"] > (1 + WORSE) * reached else ""

    yield Case(
        name=f"{len(points_ND):,} x {points_ND.shape[1]}, {LEVELS} x {SIZE}, {ITERATIONS} iterations",
        ours=partial(residual, points_ND, ours),
        peers=peers,
        judged=("faiss.Kmeans",),
        equal=no_worse,
        units=len(points_ND),
        work=2.0 * len(points_ND) * points_ND.shape[1] * SIZE * LEVELS * (ITERATIONS + 1),
        limit="fp32",
        target=1.0,
        rounds=2,
        notices=tuple(notices),
        facts=lambda: {name: round(value, 4) for name, value in errors.items()},
    )
    yield Case(
        name=f"balanced beside plain, {len(points_ND):,} points",
        ours=partial(residual, points_ND, partial(ours, balanced=True)),
        peers={"plain": partial(residual, points_ND, ours)},
        target=1 / 1.5,
        rounds=2,
    )


def residual(points_ND: Tensor, fit: Fit) -> Tensor:
    """Code rows (L, K, D), each level fitted on what the levels before left over."""
    rest_ND, rows = points_ND, []
    for level in range(LEVELS):
        rows.append(fit(rest_ND, level))
        rest_ND = rest_ND - rows[-1][nearest_centroid(rest_ND, rows[-1])]
    return torch.stack(rows)


def error(points_ND: Tensor, codebook_LKD: Tensor) -> float:
    """Mean squared distance of the points to what their codes say."""
    rest_ND = points_ND
    for rows_KD in codebook_LKD:
        rest_ND = rest_ND - rows_KD[nearest_centroid(rest_ND, rows_KD)]
    return float(rest_ND.double().square().sum(1).mean())


def ours(rest_ND: Tensor, seed: int, *, balanced: bool = False) -> Tensor:
    return kmeans(rest_ND, SIZE, generator=torch.Generator().manual_seed(seed), iterations=ITERATIONS, balanced=balanced)


def by_faiss(rest_ND: Tensor, seed: int) -> Tensor:
    faiss: Any = peer("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    made = faiss.Kmeans(rest_ND.shape[1], SIZE, niter=ITERATIONS, seed=seed + 1, max_points_per_centroid=len(rest_ND), verbose=False)
    made.train(rest_ND.numpy())
    return torch.from_numpy(np.asarray(made.centroids))


def by_sklearn(rest_ND: Tensor, seed: int) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans

    made = MiniBatchKMeans(SIZE, batch_size=8192, init="random", n_init=1, max_iter=ITERATIONS, random_state=seed).fit(rest_ND.numpy())
    return torch.from_numpy(made.cluster_centers_.astype(np.float32))
