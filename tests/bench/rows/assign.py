"""Codes of 768-wide vectors, 3 levels of 256: one matrix product with an exact second look, against faiss, vector-quantize-pytorch and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench import Case, peer
from torch import Tensor

from pipeline import config
from pipeline.tokenizers.ada_sid import AdaSid, Network
from pipeline.tokenizers.base import ItemBatch
from pipeline.tokenizers.quantize import kmeans, nearest_centroid, residual_codes
from pipeline.tokenizers.residual import ResidualSearch
from pipeline.tokenizers.rq_kmeans import RqKmeans

NUMBER, TITLE = 1, "assign SIDs"
WIDTH, LEVELS, SIZE = 768, 3, 256
COUNTS = {"quick": (20_000,), "normal": (20_000, 200_000), "full": (20_000, 200_000, 1_000_000)}
MOST = 100_000  # above, only the best peer is asked
SAMPLE = 32_768  # points the code books are fitted on
BATCH = 8_192  # rows per call of peers that would need the whole matrix of distances


def embeddings(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Unit vectors like a text encoder's (N, D): clusters in a 64-wide subspace, a common direction, noise in all axes."""
    generator = torch.Generator().manual_seed(seed)
    axes, common, centres = (torch.randn(*shape, generator=generator) for shape in ((64, width), (width,), (2_000, 64)))
    blocks = []
    for start in range(0, count, 100_000):
        rows = min(100_000, count - start)
        inside = centres[torch.randint(len(centres), (rows,), generator=generator)] + 0.5 * torch.randn(rows, 64, generator=generator)
        blocks.append(F.normalize(inside @ axes / 8 + 0.3 * torch.randn(rows, width, generator=generator) + 0.5 * common, dim=1))
    return torch.cat(blocks)


def codebooks(points_ND: Tensor) -> Tensor:
    """Code rows of a residual k-means of a few rounds, (L, K, D)."""
    rest_ND, rows = points_ND[:SAMPLE], []
    for level in range(LEVELS):
        rows.append(kmeans(rest_ND, SIZE, generator=torch.Generator().manual_seed(level), iterations=4))
        rest_ND = rest_ND - rows[-1][nearest_centroid(rest_ND, rows[-1])]
    return torch.stack(rows)


def same_codes(points_ND: Tensor, codebook_LKD: Tensor) -> Callable[[Any, Any], str]:
    """Whether two sets of codes are equal; a difference is none where both rows are equally near in float64 up to float32 rounding."""

    def compare(ours: Tensor, theirs: Tensor) -> str:
        """What is wrong, nothing when they are equal."""
        other = (ours != theirs).any(1).nonzero()[:, 0]
        if not len(other):
            return ""
        errors = [(points_ND[other].double() - _sum(codes[other], codebook_LKD).double()).square().sum(1) for codes in (ours, theirs)]
        wrong = int(((errors[0] - errors[1]).abs() > 1e-4 * errors[0]).sum())
        return f"{wrong} of {len(ours)} codes differ by more than rounding" if wrong > len(ours) // 100_000 else ""

    return compare


def _sum(codes_NL: Tensor, codebook_LKD: Tensor) -> Tensor:
    return torch.stack([rows_KD[codes_N] for rows_KD, codes_N in zip(codebook_LKD, codes_NL.T, strict=True)]).sum(0)


def cases(scale: str) -> Iterator[Case]:
    for count in COUNTS[scale]:
        points_ND = embeddings(count)
        codebook_LKD = codebooks(points_ND)
        yield kernel(points_ND, codebook_LKD, big=count > MOST)
        if count <= MOST:
            yield tokenizer(points_ND, codebook_LKD)
    yield parallel_form(COUNTS[scale][0] // 4)


def kernel(points_ND: Tensor, codebook_LKD: Tensor, *, big: bool) -> Case:
    """Our search against every peer that is there; many vectors only against the best one."""
    search = ResidualSearch(codebook_LKD)
    peers: dict[str, Callable[[], Any]] = {"ours, float32": partial(ResidualSearch(codebook_LKD, bfloat16=False).codes, points_ND)}
    notices, found = [], faiss_ways(points_ND, codebook_LKD)
    if not found:
        notices.append("faiss-cpu is not installed")
    if big:
        found = {name: work for name, work in found.items() if "LUT" in name}
    else:
        found |= torch_way(points_ND, codebook_LKD) | sklearn_way(points_ND, codebook_LKD)
        if "vector-quantize-pytorch" not in found:
            notices.append("vector-quantize-pytorch is not installed")
    return Case(
        name=f"{len(points_ND):,} x {WIDTH}, {LEVELS} x {SIZE}",
        ours=partial(search.codes, points_ND),
        peers=peers | found,
        judged=tuple(found),
        equal=same_codes(points_ND, codebook_LKD),
        units=len(points_ND),
        work=2.0 * len(points_ND) * WIDTH * LEVELS * SIZE,
        limit="bf16" if search.bfloat16 else "fp32",
        target=2.0 if search.bfloat16 else 1.1,
        series="assigning over vectors",
        size=len(points_ND),
        notices=tuple(notices),
        facts=lambda: {"bfloat16": search.bfloat16, "levels scored again": f"{again_share(points_ND, codebook_LKD):.1%}"},
    )


def again_share(points_ND: Tensor, codebook_LKD: Tensor) -> float:
    """Share of (point, level) that needed the second look, on a sample."""
    search = ResidualSearch(codebook_LKD)
    search.codes(points_ND[:BATCH])
    return search.in_doubt / (LEVELS * len(points_ND[:BATCH]))


def tokenizer(points_ND: Tensor, codebook_LKD: Tensor) -> Case:
    """The whole of `RqKmeans.encode`, as a night runs it, beside the float32 walk it replaced, in the same blocks."""
    made = RqKmeans(config.RqKmeans(num_levels=LEVELS, codebook_size=SIZE))
    made.widths, made.codebook_LKD = {"text": WIDTH}, codebook_LKD
    count = len(points_ND)
    yes_N, no_N, zeros_N = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool), torch.zeros(count)
    items = ItemBatch(text_ND=points_ND, image_ND=None, behavior_ND=None, text_N=yes_N, image_N=no_N, behavior_N=no_N, richness_N=zeros_N, strength_N=zeros_N)

    def walk() -> Tensor:
        """Codes in float32, level by level."""
        return torch.cat([residual_codes(F.normalize(block_BD, dim=1), codebook_LKD)[0] for block_BD in points_ND.split(1024)])

    return Case(
        name=f"RqKmeans.encode, {count:,} items",
        ours=lambda: made.encode(items).codes_NL,
        peers={"float32 walk, level by level": walk},
        equal=same_codes(points_ND, codebook_LKD),
        units=count,
        work=2.0 * count * WIDTH * LEVELS * SIZE,
        limit="bf16" if ResidualSearch(codebook_LKD).bfloat16 else "fp32",  # what `encode` searches with
    )


def parallel_form(count: int) -> Case:
    """ADA-SID's own form: network and parallel look-up from 768 + 1280 + 64 wide vectors; no peer has it, float operations are counted from its layers."""
    widths = {"text": 768, "image": 1280, "behavior": 64}
    settings = config.AdaSid()
    torch.manual_seed(0)
    network = Network(settings, widths).eval()
    vectors = {f"{name}_ND": embeddings(count, width, seed=index) for index, (name, width) in enumerate(widths.items())}
    yes_N = torch.ones(count, dtype=torch.bool)
    items = ItemBatch(**vectors, text_N=yes_N, image_N=yes_N, behavior_N=yes_N, richness_N=torch.rand(count), strength_N=torch.rand(count))
    network.fit_inputs(items.take(slice(0, 20_000)))
    made = AdaSid(settings)
    made.network = network
    return Case(
        name=f"AdaSid.encode, {count:,} items, 768 + 1280 + 64",
        ours=lambda: made.encode(items).codes_NL,
        units=count,
        work=count * counted_flops(lambda: made.encode(items.take(slice(0, 1024)))) / 1024,
        limit="fp32",
    )


def counted_flops(work: Callable[[], Any]) -> float:
    """Float operations of the matrix products of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def faiss_ways(points_ND: Tensor, codebook_LKD: Tensor) -> dict[str, Callable[[], Tensor]]:
    """faiss with its look-up tables, and one flat index per level."""
    faiss = peer("faiss")
    if faiss is None:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    points = points_ND.numpy()
    quantizer = faiss.ResidualQuantizer(WIDTH, LEVELS, SIZE.bit_length() - 1)
    faiss.copy_array_to_vector(np.ascontiguousarray(codebook_LKD.numpy().reshape(-1)), quantizer.codebooks)
    quantizer.is_trained, quantizer.max_beam_size, quantizer.use_beam_LUT = True, 1, 1
    quantizer.compute_codebook_tables()
    flats = [faiss.IndexFlatL2(WIDTH) for _ in range(LEVELS)]
    for flat, rows_KD in zip(flats, codebook_LKD.numpy(), strict=True):
        flat.add(rows_KD)

    def by_flat() -> Tensor:
        """Codes by one exhaustive search per level."""
        rest, codes = points, []
        for flat, rows_KD in zip(flats, codebook_LKD.numpy(), strict=True):
            codes.append(flat.search(rest, 1)[1][:, 0])
            rest = rest - rows_KD[codes[-1]]
        return torch.from_numpy(np.stack(codes, 1))

    return {"faiss ResidualQuantizer, LUT": lambda: torch.from_numpy(quantizer.compute_codes(points).astype(np.int64)), "faiss IndexFlatL2": by_flat}


def torch_way(points_ND: Tensor, codebook_LKD: Tensor) -> dict[str, Callable[[], Tensor]]:
    """vector-quantize-pytorch's ResidualVQ in evaluation."""
    package = peer("vector_quantize_pytorch")
    if package is None:
        return {}
    model = package.ResidualVQ(dim=WIDTH, num_quantizers=LEVELS, codebook_size=SIZE).eval()
    for layer, rows_KD in zip(model.layers, codebook_LKD, strict=True):
        layer._codebook.embed.data.copy_(rows_KD[None])
        layer._codebook.initted.fill_(True)

    @torch.no_grad()
    def work() -> Tensor:
        return torch.cat([model(block_BD[None])[1][0] for block_BD in points_ND.split(BATCH)])

    return {"vector-quantize-pytorch": work}


def sklearn_way(points_ND: Tensor, codebook_LKD: Tensor) -> dict[str, Callable[[], Tensor]]:
    """scikit-learn's nearest row, level by level."""
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    points = points_ND.numpy()

    def work() -> Tensor:
        rest, codes = points, []
        with threadpool_limits(torch.get_num_threads()):
            for rows_KD in codebook_LKD.numpy():
                codes.append(pairwise_distances_argmin(rest, rows_KD))
                rest = rest - rows_KD[codes[-1]]
        return torch.from_numpy(np.stack(codes, 1).astype(np.int64))

    return {"scikit-learn": work}
