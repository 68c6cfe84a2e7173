"""Six views of an embedding, as one table: recall, separability, clusters, order of neighbours, one-to-one clusters, AUC; and the same for IDs made of it.

Source: SAIL-Embedding (arXiv 2510.12709), the six-way embedding evaluation; differs: the paper names the measures and prints few definitions, the
definitions below are ours. Each is measured against content pairs and against collaborative pairs of items that nothing was trained on; with adaptive
weights the sources are weighed against these pairs as well.
Pure functions. Tensor suffixes: N items, P pairs, Q pairs by chance, B rows, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from pipeline import evaluation
from pipeline.config import RqKmeans as Levels
from pipeline.config import TrainTokenizer
from pipeline.encoders.sail_pairs import PairSet
from pipeline.tokenizers.base import FitOptions, ItemBatch
from pipeline.tokenizers.fit import generator_for
from pipeline.tokenizers.metrics import collision_rate, tuple_ids
from pipeline.tokenizers.quantize import kmeans, nearest_centroid
from pipeline.tokenizers.rq_kmeans import RqKmeans

Table = dict[str, dict[str, float]]
K = 50  # Recall@K
NEIGHBOURS = 20
CHANCE_PAIRS = 20_000
SAMPLE = 500  # items whose neighbours are compared
RIVALS = 64  # candidates that Kendall's tau puts in order
MOST_PAIRS = 20_000  # held-out pairs of a source that are ranked


def recall(vectors_ND: Tensor, left_P: Tensor, right_P: Tensor, k: int = K) -> float:
    """Share of pairs, both directions, whose partner is among the k most similar of all items, the item itself left out; ties at mid-rank."""
    unit_ND = F.normalize(vectors_ND.float(), dim=1)
    asks_B, answers_B = torch.cat([left_P, right_P]), torch.cat([right_P, left_P])
    own = evaluation.Packed(np.arange(len(asks_B) + 1), asks_B.numpy())
    ranks_B = evaluation.ranks_in_chunks(lambda rows: unit_ND[asks_B[rows]] @ unit_ND.T, answers_B.numpy(), len(unit_ND), own)
    return float((ranks_B <= k).mean())


def cosines(vectors_ND: Tensor, left_P: Tensor, right_P: Tensor) -> NDArray[np.float64]:
    """Cosine of each pair, (P,)."""
    unit_ND = F.normalize(vectors_ND.float(), dim=1)
    return (unit_ND[left_P] * unit_ND[right_P]).sum(1).double().numpy()


def separability(positive_P: NDArray[np.float64], chance_Q: NDArray[np.float64]) -> float:
    """How far pairs stand from pairs by chance: the difference of their mean cosines over the root mean of their variances."""
    spread = np.sqrt((positive_P.var() + chance_Q.var()) / 2)
    return float((positive_P.mean() - chance_Q.mean()) / max(float(spread), 1e-12))


def mutual_information(a_N: Tensor, b_N: Tensor) -> float:
    """Normalised mutual information of two labellings in [0, 1], by the arithmetic mean of their entropies; 0 where both are constant."""
    a_N, b_N = a_N.unique(return_inverse=True)[1], b_N.unique(return_inverse=True)[1]
    size = int(b_N.max()) + 1
    joint = torch.bincount(a_N * size + b_N, minlength=(int(a_N.max()) + 1) * size).double().view(-1, size) / len(a_N)
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    shared = torch.where(joint > 0, joint * (joint.clamp(min=1e-300) / expected.clamp(min=1e-300)).log(), 0.0).sum()
    entropies = [-(share * share.clamp(min=1e-300).log()).sum() for share in (joint.sum(0), joint.sum(1))]
    total = float(sum(entropies))
    return float(2 * shared / total) if total > 1e-12 else 0.0


def kendall(a_BC: Tensor, b_BC: Tensor) -> float:
    """Mean over rows of Kendall's tau-a between two orders of the same candidates, in [-1, 1]: concordant less discordant pairs over all pairs."""
    sign_a = (a_BC[:, :, None] - a_BC[:, None, :]).sign()
    sign_b = (b_BC[:, :, None] - b_BC[:, None, :]).sign()
    count = a_BC.shape[1]
    return float((sign_a * sign_b).sum((1, 2)).double().mean() / (count * (count - 1)))


def bijective_hits(a_N: Tensor, b_N: Tensor) -> float:
    """Share of items in matched clusters, when the clusters of two labellings are matched one to one as well as can be."""
    size = int(max(a_N.max(), b_N.max())) + 1
    shared = torch.bincount(a_N * size + b_N, minlength=size * size).view(size, size).numpy()
    rows, columns = linear_sum_assignment(shared, maximize=True)
    return float(shared[rows, columns].sum() / len(a_N))


def six_ways(spaces: Mapping[str, Tensor], pairs: Sequence[PairSet], labels_N: Tensor, reference_ND: Tensor, *, clusters: int = 32, seed: int = 0) -> Table:
    """Space -> measure -> value; measures by kind of pairs end in /content and /collaborative and are absent without pairs of that kind.

    Args:
        spaces: name -> vectors (N, D) of the same items. pairs: held-out pair sets; sets of one kind count together.
        labels_N: class of each item, -1 = unknown. reference_ND: behaviour vectors, zero rows = none.
    """
    known_N = torch.nonzero((reference_ND != 0).any(1)).flatten()
    labelled_N = torch.nonzero(labels_N >= 0).flatten()
    chance = torch.randint(len(labels_N), (2, CHANCE_PAIRS), generator=generator_for(seed, "chance"))
    chance = chance[:, chance[0] != chance[1]]
    reference_N = _clusters(reference_ND[known_N], clusters, generator_for(seed, "reference")) if len(known_N) > NEIGHBOURS else None
    table: Table = {}
    for name, vectors_ND in spaces.items():
        row = _pair_measures(vectors_ND, pairs, chance, seed)
        if len(labelled_N) > 1:
            found_N = _clusters(vectors_ND[labelled_N], clusters, generator_for(seed, "clusters"))
            row["nmi/content"] = mutual_information(found_N, labels_N[labelled_N])
        if reference_N is not None:
            row |= _reference_measures(vectors_ND[known_N], reference_ND[known_N], reference_N, clusters, seed)
        table[name] = row
    return table


def _pair_measures(vectors_ND: Tensor, pairs: Sequence[PairSet], chance: Tensor, seed: int) -> dict[str, float]:
    """Recall, separability and AUC by kind of pairs."""
    found: dict[str, float] = {}
    chance_Q = cosines(vectors_ND, chance[0], chance[1])
    for kind in ("content", "collaborative"):
        group = [part for part in pairs if part.collaborative == (kind == "collaborative") and len(part)]
        if not group:
            continue
        left_P, right_P = (torch.cat([getattr(part, side) for part in group]) for side in ("left_P", "right_P"))
        rows = torch.randperm(len(left_P), generator=generator_for(seed, "pairs", kind))[:MOST_PAIRS]
        left_P, right_P = left_P[rows], right_P[rows]
        positive_P = cosines(vectors_ND, left_P, right_P)
        truth = np.concatenate([np.ones(len(positive_P)), np.zeros(len(chance_Q))])
        found |= {
            f"recall@{K}/{kind}": recall(vectors_ND, left_P, right_P),
            f"separability/{kind}": separability(positive_P, chance_Q),
            f"auc/{kind}": evaluation.auc(truth, np.concatenate([positive_P, chance_Q])),
        }
    return found


def _reference_measures(vectors_ND: Tensor, reference_ND: Tensor, reference_N: Tensor, clusters: int, seed: int) -> dict[str, float]:
    """Clusters, order of neighbours and one-to-one clusters against behaviour vectors of the same items."""
    own_N = _clusters(vectors_ND, clusters, generator_for(seed, "reference"))
    rows_B = torch.randperm(len(vectors_ND), generator=generator_for(seed, "rows"))[:SAMPLE]
    rivals_BC = torch.randint(len(vectors_ND), (len(rows_B), RIVALS), generator=generator_for(seed, "rivals"))
    orders = [torch.einsum("bd,bcd->bc", unit[rows_B], unit[rivals_BC]) for unit in (F.normalize(part, dim=1) for part in (vectors_ND, reference_ND))]
    return {
        "nmi/collaborative": mutual_information(own_N, reference_N),
        "kendall/collaborative": kendall(*orders),
        f"overlap@{NEIGHBOURS}/collaborative": float(evaluation.neighbor_overlap(vectors_ND, reference_ND, k=NEIGHBOURS, rows_B=rows_B).mean()),
        "bijective/collaborative": bijective_hits(own_N, reference_N),
    }


def _clusters(vectors_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    unit_ND = F.normalize(vectors_ND.float(), dim=1)
    return nearest_centroid(unit_ND, kmeans(unit_ND, min(size, len(unit_ND)), generator=generator, iterations=15))


def sids(vectors_ND: Tensor, sizes: Sequence[int], levels: int, *, seed: int) -> dict[str, Tensor]:
    """IDs of the vectors by clustering (`cluster_<size>`, (N, 1)) and by quantisation (`quantised`, (N, levels), code books of the smallest size).

    Source: SAIL-Embedding (arXiv 2510.12709): SIDs by both clustering and vector quantisation, with several code-book sizes.
    """
    nobody_N = torch.zeros(len(vectors_ND), dtype=torch.bool)
    items = ItemBatch(
        text_ND=vectors_ND, image_ND=None, behavior_ND=None, text_N=~nobody_N, image_N=nobody_N, behavior_N=nobody_N,
        richness_N=torch.zeros(len(vectors_ND)), strength_N=torch.zeros(len(vectors_ND)),
    )  # fmt: skip
    shapes = {f"cluster_{size}": (1, size) for size in sizes} | {"quantised": (levels, min(sizes))}
    found = {}
    for name, (depth, size) in shapes.items():
        tokenizer = RqKmeans(Levels(num_levels=depth, codebook_size=max(2, min(size, len(vectors_ND) // 2))))
        tokenizer.fit(items, FitOptions(seed=seed, settings=TrainTokenizer()))
        found[name] = tokenizer.encode(items).codes_NL
    return found


def sid_ways(codes: Mapping[str, Tensor], pairs: Sequence[PairSet], labels_N: Tensor) -> dict[str, float]:
    """`sid/<kind of ID>/<measure>`: share of held-out collaborative pairs of one first code over the share by chance, NMI of it with labels, collisions."""
    group = [part for part in pairs if part.collaborative and len(part)]
    found: dict[str, float] = {}
    for name, codes_NL in codes.items():
        first_N = codes_NL[:, 0]
        chance = float((torch.bincount(first_N).double() / len(first_N)).square().sum())
        if group:
            same_P = torch.cat([first_N[part.left_P] == first_N[part.right_P] for part in group])
            found[f"sid/{name}/lift"] = float(same_P.double().mean()) / max(chance, 1e-12)
        if bool((labels_N >= 0).any()):
            found[f"sid/{name}/nmi"] = mutual_information(first_N[labels_N >= 0], labels_N[labels_N >= 0])
        found[f"sid/{name}/collision_rate"] = collision_rate(codes_NL)
        found[f"sid/{name}/distinct"] = float(len(tuple_ids(codes_NL).unique()))
    return found


def figure_data(table: Table) -> dict[str, Any]:
    """The table as the data of figure `embedding_report`: columns, and space -> values with None where not measured."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    return {"columns": columns, "rows": {name: [row.get(column) for column in columns] for name, row in table.items()}}
