"""The work of one cell of a study: item vectors, codes, floors, and what a reader makes of an arm's codes; results are arrays and JSON in a store.

Each function reads the world and the arrays of the cells before it, so a cell gives the same result in any process.
Not here: which cells there are (pipeline/study.py), when they run (jobs/study.py), how data sets are split (jobs/study_data.py).
Legend: N items, Q questions, B rows of rankers, L positions, K codes, D width, M items with a behaviour vector.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.study_data import Asked, World, packed
from pipeline import richness, study
from pipeline.config import TrainBehaviorEncoder, TrainRanker, TrainRetriever
from pipeline.context import derive_seed
from pipeline.device import best_device
from pipeline.study import Cell, Page, Part

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoders.sasrec import Sequences
    from pipeline.evaluation import Packed
    from pipeline.ranker import ItemCodes, RankRows
    from pipeline.retrievers.base import Catalogue
    from pipeline.tokenizers.base import ItemBatch, Tokenizer

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
Wanted = Callable[[NDArray[np.int64]], NDArray[np.bool_]]  # rows of items (B,) -> which items each of them wants, (B, N)
NEIGHBOURS, LISTED = 20, 10  # items of purity@20, and of the lists whose share of head items is counted
ROWS = 1024  # items whose neighbours are looked at together: the scores of a whole catalogue would fill the memory
INVALID_SAMPLE = 1000  # questions that the search without a constraint is measured on
RANK_HISTORY = 20  # latest events of a history that rankers read
REDRAWS = 20  # rounds in which negatives that the user has are drawn again
TEXT_AXES, CATEGORY_AXES, TEXT_TOKENS, IMAGE_PIXELS = 128, 64, 64, 112
RIDGE = 1e-3


@dataclass(frozen=True)
class Store:
    """The folder that keeps results by key: cells/<key>.json and arrays/<key>.safetensors."""

    root: Path

    def arrays(self, key: str) -> Arrays:
        """The arrays of a finished cell."""
        from safetensors.numpy import load_file

        return dict(load_file(self.root / "arrays" / f"{key}.safetensors"))

    def keep(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the arrays so that a reader sees all of them or none."""
        from safetensors.numpy import save_file

        folder = self.root / "arrays"
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f".{key}.{os.getpid()}"
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, half)
        half.replace(folder / f"{key}.safetensors")


@dataclass(frozen=True)
class Job:
    """What a cell's work is given."""

    page: Page
    cell: Cell
    world: World
    store: Store
    part: Part

    def seed(self, *parts: object) -> int:
        """A seed of the study for a purpose."""
        return derive_seed(self.page.seed, self.cell.data, self.cell.world, *parts)


def work(job: Job) -> dict[str, Any]:
    """The cell's numbers as JSON (metrics, curves, facts); its arrays are in the store."""
    return {"features": features, "floors": floors, "codes": codes, "read": read}[job.cell.kind](job)


# ---------------------------------------------------------------- item vectors


def features(job: Job) -> dict[str, Any]:
    """Vectors and masks of all items, training counts, and the split-half overlap of the neighbours that behaviour gives."""
    import torch

    from jobs.train_behavior_encoder import chosen, split_half_overlap

    recipe, params, world = job.page.inputs[job.cell.inputs], study.encoder_settings(job.page, job.cell.inputs), job.world
    text_ND, text_N = text_vectors(job, recipe.text)
    image_ND, image_N = image_vectors(job, recipe.image)
    known, sequences = world.num_known, train_sequences(world)
    encoder = chosen(params)
    content = torch.from_numpy(text_ND[:known]) if encoder.reads_text else None
    seed = job.seed("encoder", job.cell.seed)
    trained = encoder.train(sequences, known, seed=seed, device=best_device(), what=params.encoder, content=content)
    warm_N = world.count_N >= params.n_min
    vector_ND = np.zeros((world.num_items, trained.item_vectors.shape[1]), np.float32)
    vector_ND[:known] = trained.item_vectors.numpy()
    warm_M = np.flatnonzero(warm_N)
    overlap_N = np.full(world.num_items, np.nan)
    if params.measure_reliability:
        overlap_N[warm_M] = split_half_overlap(sequences, known, warm_M, params, seed, content)
    arrays: Arrays = {"text_ND": text_ND, "text_N": text_N, "image_ND": image_ND, "image_N": image_N, "behavior_ND": vector_ND * warm_N[:, None]}
    arrays |= {"behavior_N": warm_N, "count_N": world.count_N, "overlap_N": overlap_N}
    metrics, histograms = richness_facts(params, world, vector_ND, warm_M, overlap_N)
    kinds: Arrays = {f"richness/{kind}": richness_of(arrays, {**_how(params), "richness": kind})[0] for kind in known_kinds(overlap_N)}
    job.store.keep(job.cell.key, {**arrays, **kinds})
    curves = {f"encoder/{name}": list(values) for name, values in trained.curves.items()}
    return {"metrics": {**{f"encoder/{name}": value for name, value in trained.metrics.items()}, **metrics}, "curves": curves, "strength": histograms}


def known_kinds(overlap_N: Floats) -> list[str]:
    """Kinds of richness that can be computed: `reliability` only where the overlap was measured."""
    return [kind for kind in richness.KINDS if kind != "reliability" or np.isfinite(overlap_N).any()]


def _how(params: TrainBehaviorEncoder) -> dict[str, Any]:
    return {name: getattr(params, name) for name in study.FREE_OF_VECTORS}


def richness_facts(
    params: TrainBehaviorEncoder, world: World, vector_ND: NDArray[np.float32], warm_M: NDArray[np.int64], overlap_N: Floats
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics of every kind of richness, kind -> histogram of the alignment strength by stratum)."""
    from jobs.train_behavior_encoder import fit_richness

    norms_M, overlap_M = np.linalg.norm(vector_ND[warm_M], axis=1), overlap_N[warm_M]
    metrics: dict[str, float] = {"behavior_share": float(len(warm_M) / world.num_items)}
    histograms = {}
    measured = overlap_M if np.isfinite(overlap_M).any() else None
    for kind in known_kinds(overlap_N):
        own = params.model_copy(update={"richness": kind})
        _, found, figure = fit_richness(own, world.count_N[warm_M], norms_M, measured, world.stratum_N[warm_M])
        histograms[kind] = dict(figure.data)
        metrics |= {f"{name}/{kind}": found[name] for name in ("beta", "low_strength_share", "high_strength_share", "mean_strength")}
        metrics |= {name: value for name, value in found.items() if name.startswith(("richness_spearman/", "spearman_", "split_half", "kappa"))}
    return metrics, histograms


def text_vectors(job: Job, kind: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(vectors (N, D), which items have a text); encoded once per list of texts."""
    texts = job.world.catalogue.texts
    has_N = np.array([bool(text) for text in texts]) & (kind != "none")
    if not has_N.any():
        return np.zeros((len(texts), 1), np.float32), np.zeros(len(texts), dtype=bool)
    make = {"minilm": partial(_minilm, texts), "tfidf": partial(tfidf, texts, job.world.catalogue.known_N, TEXT_AXES)}[kind]
    return _cached(job, [kind, texts], make) * has_N[:, None], has_N


def _cached(job: Job, content: Any, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """The vectors of some content, made once per store."""
    key = "content-" + hashlib.sha256(json.dumps([content, job.world.num_known]).encode()).hexdigest()[:16]
    if not (job.store.root / "arrays" / f"{key}.safetensors").is_file():
        job.store.keep(key, {"vectors": make()})
    return job.store.arrays(key)["vectors"]


def _minilm(texts: Sequence[str]) -> NDArray[np.float32]:
    from jobs.content_embedding import model_folder
    from pipeline.encoders import CONTENT_ENCODERS
    from pipeline.encoders.base import EncoderOptions

    encoder = CONTENT_ENCODERS["text"]["minilm"](model_folder("minilm", ""), EncoderOptions(name="minilm", batch=64, size=TEXT_TOKENS, normalize=True))
    return np.asarray(encoder.encode(list(texts)), dtype=np.float32)


def tfidf(texts: Sequence[str], known_N: NDArray[np.bool_], width: int, *, separator: str = "") -> NDArray[np.float32]:
    """Unit vectors (N, D) of the texts' main directions by TF-IDF, fitted on known items; all zero for a text without a known word.

    Args:
        separator: what stands between words; empty = words as scikit-learn finds them.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = {"analyzer": lambda text: [word for word in text.split(separator) if word]} if separator else {}
    counter = TfidfVectorizer(min_df=2, **words).fit(np.asarray(texts, dtype=object)[known_N])
    matrix = counter.transform(texts)
    axes = TruncatedSVD(min(width, matrix.shape[1] - 1), random_state=0).fit(matrix[known_N])
    vectors_ND = axes.transform(matrix).astype(np.float32)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True).clip(1e-9)


def image_vectors(job: Job, kind: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(vectors (N, D), which items have one) of the second content: pictures, or category words where the data set has none."""
    catalogue = job.world.catalogue
    nothing = np.zeros((job.world.num_items, 1), np.float32), np.zeros(job.world.num_items, dtype=bool)
    if kind == "categories" and any(catalogue.categories):
        vectors_ND = _cached(job, ["categories", catalogue.categories], lambda: tfidf(catalogue.categories, catalogue.known_N, CATEGORY_AXES, separator="|"))
        return vectors_ND, np.abs(vectors_ND).sum(1) > 0
    if kind == "efficientnet_lite0" and any(catalogue.pictures):
        has_N = np.array([bool(path) for path in catalogue.pictures])
        return _cached(job, ["efficientnet_lite0", catalogue.pictures], lambda: _pictures(catalogue.pictures)) * has_N[:, None], has_N
    return nothing


def _pictures(paths: Sequence[str]) -> NDArray[np.float32]:
    """EfficientNet vectors (N, D); each distinct picture is encoded once, an item without one gets another's."""
    from jobs.content_embedding import model_folder
    from pipeline.encoders import CONTENT_ENCODERS
    from pipeline.encoders.base import EncoderOptions
    from pipeline.encoders.image import decode_image

    distinct, place_N = np.unique([path or max(paths) for path in paths], return_inverse=True)
    options = EncoderOptions(name="efficientnet_lite0", batch=32, size=IMAGE_PIXELS, normalize=True)
    encoder = CONTENT_ENCODERS["image"]["efficientnet_lite0"](model_folder("efficientnet_lite0", ""), options)
    pixels: Any = np.stack([decode_image(Path(path).read_bytes(), 10**7, IMAGE_PIXELS) for path in distinct.tolist()])  # type: ignore[misc]
    return np.asarray(encoder.encode(pixels), dtype=np.float32)[place_N]


def train_sequences(world: World) -> Sequences:
    """The training events of every user."""
    import torch

    from pipeline.encoders.sasrec import Sequences

    offsets, items, baskets = world.train()
    return Sequences(torch.from_numpy(offsets), torch.from_numpy(items), None if baskets is None else torch.from_numpy(baskets))


# ---------------------------------------------------------------- codes


def codes(job: Job) -> dict[str, Any]:
    """Codes and weights of every item by the arm's tokenizer, which is fitted on known items, and their numbers by stratum."""
    spec, world = json.loads(job.cell.spec), job.world
    items = item_batch(job.store.arrays(job.cell.needs[0]), spec["richness"])
    given, seed = narrowed(items, job.page.arms[job.cell.arm].reads), job.seed("tokenizer", job.cell.seed)
    arrays: Arrays = {}
    fitted: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    if spec["tokenizer"] == "plain":
        codes_NL, weights_NL, sizes, slots = plain_codes(job, given, seed)
    else:
        tokenizer, fitted, curves = _fitted(job, spec["tokenizer"], given, seed)
        made = tokenizer.encode(given)
        codes_NL, weights_NL, sizes, slots = made.codes_NL, made.weights_NL, tokenizer.codebook_sizes, tokenizer.slots
        if spec["tokenizer"] == "unger":
            arrays, facts = integrated(tokenizer, given)
            fitted |= facts
    arrays |= {"codes_NL": codes_NL.numpy().astype(np.int64), "weights_NL": weights_NL.numpy().astype(np.float32)}
    job.store.keep(job.cell.key, arrays)
    metrics = {**fitted, **code_numbers(codes_NL, weights_NL, sizes, slots, items, world)}
    return {"metrics": metrics, "curves": curves, "sizes": list(sizes), "slots": list(slots)}


def richness_of(arrays: Arrays, how: Mapping[str, Any]) -> tuple[Floats, Floats]:
    """(richness N, alignment strength w) of every item through the reference of the items with behaviour; 0 for the others."""
    warm_N, count_N, norm_N = arrays["behavior_N"], arrays["count_N"], np.linalg.norm(arrays["behavior_ND"], axis=1)
    measured = arrays["overlap_N"][warm_N] if np.isfinite(arrays["overlap_N"]).any() else None
    constants = {name: how[name] for name in ("alpha", "low_strength_share", "beta")}
    reference = richness.fit_reference(how["richness"], count_N[warm_N], norm_N[warm_N], measured, **constants)
    richness_N = np.where(warm_N, richness.richness(reference, count_N, norm_N), 0.0)
    return richness_N, np.where(warm_N, richness.alignment_strength(richness_N, reference["alpha"], reference["beta"]), 0.0)


def item_batch(arrays: Arrays, how: Mapping[str, Any]) -> ItemBatch:
    """The items as tokenizers read them; a modality that no item has is absent."""
    import torch

    from pipeline.tokenizers.base import ItemBatch

    richness_N, strength_N = richness_of(arrays, how)
    masks = {f"{name}_N": torch.from_numpy(arrays[f"{name}_N"]) for name in ("text", "image", "behavior")}
    vectors = {f"{name}_ND": torch.from_numpy(arrays[f"{name}_ND"]) if arrays[f"{name}_N"].any() else None for name in ("text", "image", "behavior")}
    scalars = {"richness_N": richness_N, "strength_N": strength_N, "popularity_N": arrays["count_N"]}
    return ItemBatch(**vectors, **masks, **{name: torch.from_numpy(value).float() for name, value in scalars.items()})  # type: ignore[arg-type]


def narrowed(items: ItemBatch, reads: Sequence[str]) -> ItemBatch:
    """The items with those modalities alone; all of them where none is named."""
    import torch

    away = [name for name in items.widths() if reads and name not in reads]
    nobody_N = torch.zeros(len(items), dtype=torch.bool)
    return items.changed({**{f"{name}_ND": None for name in away}, **{f"{name}_N": nobody_N for name in away}})


def integrated(tokenizer: Tokenizer, items: ItemBatch) -> tuple[Arrays, dict[str, float]]:
    """(UNGER's vectors as a teacher of readers, `overlap/<vectors>_<side>`: share of the 20 neighbours that behaviour or content gives by itself).

    `integrated` should stand nearer to behaviour than `concat`, the unit-norm modalities side by side that the method argues against.
    """
    from pipeline import evaluation
    from pipeline.tokenizers.rq_kmeans import concatenate
    from pipeline.tokenizers.unger import teacher_vectors

    teacher_ND, widths = teacher_vectors(tokenizer, items), items.widths()
    rows = items.behavior_N & (items.text_N | items.image_N)
    content_ND = concatenate(items, {name: width for name, width in widths.items() if name != "behavior"})
    sides = {"behavior": concatenate(items, {"behavior": widths["behavior"]}), "content": content_ND}
    vectors = {"integrated": teacher_ND, "concat": concatenate(items, widths)}
    found = {
        f"overlap/{name}_{side}": float(evaluation.neighbor_overlap(made_ND[rows].float(), side_ND[rows].float(), k=NEIGHBOURS).mean())
        for name, made_ND in vectors.items()
        for side, side_ND in sides.items()
    }
    return {"teacher_ND": teacher_ND.numpy()}, found


def _fitted(job: Job, name: str, items: ItemBatch, seed: int) -> tuple[Tokenizer, dict[str, float], dict[str, list[float]]]:
    """(a registered tokenizer fitted on the known items, its metrics, its curves)."""
    from pipeline.log import progress
    from pipeline.tokenizers.base import FitOptions, History
    from pipeline.tokenizers.registry import named

    settings = study.tokenizer_settings(job.page, job.cell.arm, job.cell.data)
    tokenizer = named(name)(getattr(settings, name))
    history = None
    if tokenizer.needs_history:
        events = train_sequences(job.world)
        history = History(index_T=events.items, offset_U=events.offsets, basket_T=events.baskets)
    report = tokenizer.fit(items.take(slice(0, job.world.num_known)), FitOptions(seed=seed, settings=settings, progress=progress, history=history))
    curves = {each: list(values) for each, values in report.curves.items() if each in ("loss/total", "held_out/score")}
    return tokenizer, {f"fit/{each}": value for each, value in report.metrics.items()}, curves


def plain_codes(job: Job, items: ItemBatch, seed: int) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[str, ...]]:
    """(codes, weights, sizes, slots) of the plain control: k-means per slot, as many slots per modality as ADA-SID's section says.

    Shared slots see all unit-norm modalities side by side; the slots of one modality see its principal axes, dealt out so that they carry equal variance.
    """
    import torch

    from pipeline.tokenizers.fit import generator_for
    from pipeline.tokenizers.prior import BehaviorPrior
    from pipeline.tokenizers.quantize import kmeans, nearest_centroid
    from pipeline.tokenizers.rq_kmeans import concatenate

    ada = study.tokenizer_settings(job.page, job.cell.arm, job.cell.data).ada_sid
    widths = items.widths()
    known_N = torch.arange(len(items)) < job.world.num_known
    if ada.behavior_prior != "none":
        prior = BehaviorPrior(widths)
        prior.fit(items.take(known_N))
        items = prior.apply_to(items, shrink=ada.behavior_prior == "poor")
    parts = [(f"shared_{at}", concatenate(items, widths), items.text_N | items.image_N | items.behavior_N) for at in range(ada.num_shared)]
    for name, count in (("text", ada.num_text), ("image", ada.num_image), ("behavior", ada.num_behavior)):
        if name in widths and count:
            parts += [(f"{name}_{at}", part_ND, items.mask(name)) for at, part_ND in enumerate(_sub_spaces(items, name, count, known_N))]
    columns = []
    for slot, points_ND, mask_N in parts:
        centroids_KD = kmeans(points_ND[mask_N & known_N], ada.codebook_size, generator=generator_for(seed, slot))
        columns.append(torch.where(mask_N, nearest_centroid(points_ND, centroids_KD), ada.codebook_size))
    codes_NL = torch.stack(columns, 1)
    return codes_NL, (codes_NL < ada.codebook_size).float(), (ada.codebook_size,) * len(parts), tuple(slot for slot, _, _ in parts)


def _sub_spaces(items: ItemBatch, name: str, count: int, known_N: Tensor) -> list[Tensor]:
    """The modality's vectors in `count` sub-spaces of principal axes with about equal variance."""
    from pipeline.tokenizers.quantize import deal_axes, principal_axes

    vectors_ND, mask_N = items.known(name), items.mask(name)
    mean_D, axes_DW = principal_axes(vectors_ND[mask_N & known_N].float(), vectors_ND.shape[1])
    turned_NW = (vectors_ND.float() - mean_D) @ axes_DW
    return [turned_NW[:, part].contiguous() for part in deal_axes(turned_NW[mask_N & known_N].var(0, correction=0), count)]


def code_numbers(codes_NL: Tensor, weights_NL: Tensor, sizes: Sequence[int], slots: Sequence[str], items: ItemBatch, world: World) -> dict[str, float]:
    """Use of codes, reconstruction by one common read-out, closed gates by stratum, and purity where the truth is known."""
    import torch

    from pipeline.tokenizers import metrics

    used = metrics.code_use(codes_NL, sizes, slots)
    found = {name: used[name] for name in ("utilisation", "perplexity", "entropy", "gini", "dead_codes", "collision_rate")}
    groups = {"": np.ones(world.num_items, dtype=bool), "/tail": world.stratum_N == "tail", "/head": world.stratum_N == "head"}
    groups["/cold"] = world.count_N <= 4
    found |= readout_nmse(codes_NL, sizes, items, groups)
    behavior = [at for at, slot in enumerate(slots) if slot.startswith("behavior")]
    if behavior:
        off_N = (weights_NL[:, behavior] == 0).float().mean(1)
        for name, rows_N in groups.items():
            if (chosen_N := torch.from_numpy(rows_N) & items.behavior_N).any():
                found[f"closed_share{name}"] = float(off_N[chosen_N].mean())
    cluster_N, order = world.catalogue.cluster_N, is_ordered(slots)
    asked: list[tuple[Wanted, int]] = [(lambda rows: groups["/head"][None].repeat(len(rows), 0), LISTED)]
    if cluster_N.min() >= 0:
        asked.append((lambda rows: cluster_N[rows, None] == cluster_N, NEIGHBOURS))
    head_N, *purity = nearest_shares(codes_NL, weights_NL, asked, order)
    found[f"head_share@{LISTED}"] = float(head_N.mean())
    return found | {f"purity{name}": float(purity_N[rows_N].mean()) for purity_N in purity for name, rows_N in groups.items() if rows_N.any()}


def is_ordered(slots: Sequence[str]) -> bool:
    """Whether a code means something only after the codes before it (residual tokenizers)."""
    return slots[0].startswith("level")


def readout_nmse(codes_NL: Tensor, sizes: Sequence[int], items: ItemBatch, groups: Mapping[str, NDArray[np.bool_]]) -> dict[str, float]:
    """`nmse/<modality>[/tail ...]`: squared error over variance of the best additive decoder from codes (ridge), the same for every tokenizer.

    Fitted on the items that it is measured on: more codes fit more of any vectors, so it compares tokenizers of as many codes.
    """
    import torch
    import torch.nn.functional as F

    columns = [F.one_hot(code_N, size + 1) for code_N, size in zip(codes_NL.unbind(1), sizes, strict=True)]
    design_NX = torch.cat([*columns, torch.ones(len(codes_NL), 1, dtype=torch.int64)], 1).double()
    found = {}
    for name in items.widths():
        vectors, mask_N = items.known(name), items.mask(name)
        rows_RX, target_RD = design_NX[mask_N], F.normalize(vectors[mask_N].double(), dim=1)
        gram_XX = rows_RX.T @ rows_RX + RIDGE * torch.eye(rows_RX.shape[1], dtype=torch.float64)
        error_R = (target_RD - rows_RX @ torch.linalg.solve(gram_XX, rows_RX.T @ target_RD)).square().sum(1)
        variance = (target_RD - target_RD.mean(0)).square().sum(1).mean()
        for group, rows_N in groups.items():
            if (inside_R := torch.from_numpy(rows_N)[mask_N]).any():
                found[f"nmse/{name}{group}"] = float(error_R[inside_R].mean() / variance)
    return found


def shared_codes(a_QL: Tensor, a_weight_QL: Tensor, b_NL: Tensor, b_weight_NL: Tensor, *, ordered: bool) -> Tensor:
    """Codes that two items share, position by position, times both weights, (Q, N); `ordered` codes count up to the first that differs."""
    import torch

    score_QN = torch.zeros(len(a_QL), len(b_NL))
    same_QN = torch.ones(len(a_QL), len(b_NL), dtype=torch.bool)
    for at in range(a_QL.shape[1]):  # over positions, never over items
        same_QN = (a_QL[:, at, None] == b_NL[:, at]) & (same_QN if ordered else True)
        score_QN += same_QN * a_weight_QL[:, at, None] * b_weight_NL[:, at]
    return score_QN


def nearest_shares(codes_NL: Tensor, weights_NL: Tensor, asked: Sequence[tuple[Wanted, int]], ordered: bool) -> list[Floats]:
    """Per (wanted, count) asked: expected share of wanted items among the `count` others that share most codes with an item, (N,).

    The scores of a catalogue are made once for all that is asked of them.
    """
    import torch

    shares: list[list[Tensor]] = [[] for _ in asked]
    for rows_B in torch.arange(len(codes_NL)).split(ROWS):
        score_BN = shared_codes(codes_NL[rows_B], weights_NL[rows_B], codes_NL, weights_NL, ordered=ordered)
        score_BN = (score_BN * 1e5).round().scatter_(1, rows_B[:, None], -torch.inf)
        for found, (wanted, count) in zip(shares, asked, strict=True):
            found.append(_wanted_share(score_BN, torch.from_numpy(wanted(rows_B.numpy())), min(count, len(codes_NL) - 1)))
    return [torch.cat(found).numpy().astype(np.float64) for found in shares]


def _wanted_share(score_BN: Tensor, wanted_BN: Tensor, count: int) -> Tensor:
    """Share of wanted items among the `count` best of each row (B,); ties at the edge are drawn, in expectation."""
    edge_B1 = score_BN.topk(count, dim=1).values[:, -1:]
    above_BN, tied_BN = score_BN > edge_B1, score_BN == edge_B1
    hits_B = (above_BN & wanted_BN).sum(1) + (count - above_BN.sum(1)) * (tied_BN & wanted_BN).sum(1) / tied_BN.sum(1)
    return hits_B / count


# ---------------------------------------------------------------- questions and floors


@dataclass(frozen=True)
class Questions:
    """Questions of a part as readers need them, and their slices by name."""

    histories: Packed
    targets: NDArray[np.int64]
    users: NDArray[np.int64]
    masks: dict[str, NDArray[np.bool_]]


def questions(job: Job) -> Questions:
    """What retrievers are asked: answers that are new to the user and not tied decide, the others stand in slices of their own (`set_apart`)."""
    from pipeline.evaluation import Packed, strata

    world = job.world
    asked = world.asked(job.part, job.page.data[job.cell.data].max_questions, job.seed("questions"))
    target_Q = world.item_T[asked.at_Q]
    masks = set_apart(strata(world.stratum_N[target_Q], world.count_N[target_Q]), asked.tied_Q, world.had(asked))
    histories = Packed(*packed(world.item_T, asked.start_Q, asked.stop_Q))
    return Questions(histories, target_Q, world.user_T[asked.at_Q], masks)


def set_apart(masks: Mapping[str, NDArray[np.bool_]], tied_B: NDArray[np.bool_], had_B: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """The slices without tied answers and without those that the user has had; `all_with_ties` and `all_with_repeats` hold one kind of them too.

    An answer out of the user's own history tells itself: where the history is masked all of it leaves the ranking but the answer, and no negative of a
    ranker is the user's own. The examples of the pipeline are an item's first time, too (sql/rank/rank_example/next_basket.sql).
    """
    kept = {name: mask & ~tied_B & ~had_B for name, mask in masks.items()}
    kinds = {"all_with_ties": (tied_B, had_B), "all_with_repeats": (had_B, tied_B)}
    kept |= {name: masks["all"] & ~other_B for name, (own_B, other_B) in kinds.items() if own_B.any()}
    return {name: mask for name, mask in kept.items() if mask.any()}


def floors(job: Job) -> dict[str, Any]:
    """Ranks of the floors, and for every reader the users and slices of its rows; all of them the same for every arm."""
    from pipeline import evaluation

    world, settings = job.world, job.page.train_retriever
    asked = questions(job)
    offsets, items, _ = world.train()
    ranks = evaluation.floor_ranks(
        asked.histories,
        asked.targets,
        world.num_items,
        mask_history=settings.mask_history,
        ease=world.num_items <= settings.ease_up_to,
        decay=settings.ease_decay,
        fitted_on=evaluation.Packed(offsets, items),
    )
    arrays: Arrays = {"user_Q": asked.users, **{f"mask/{name}": mask for name, mask in asked.masks.items()}}
    arrays |= {f"rank/{name}": ranks_Q for name, ranks_Q in ranks.items()}
    facts: dict[str, Any] = {"items": world.num_items, "known_items": world.num_known, "users": len(world.offset_U) - 1, "events": len(world.item_T)}
    facts |= {
        "train_events": len(items),
        "cold_items": int((world.count_N == 0).sum()),
        "questions": len(asked.targets),
        "history_masked": settings.mask_history,
    }
    if any(reader.kind == "ranker" for reader in job.page.readers.values()):
        every = world.asked(job.part, 0, 0)
        rows = rank_rows(job, every, final=True, history=RANK_HISTORY)
        arrays |= {"label_B": rows.label, "person_B": rows.person}
        arrays |= {f"row_mask/{name}": mask for name, mask in row_masks(world, every, rows).items()}
        facts |= {"ranker_rows": len(rows), "ranker_digest": hashlib.sha256(rows.target.tobytes() + rows.label.tobytes()).hexdigest()[:12]}
    job.store.keep(job.cell.key, arrays)
    return {"metrics": {}, "facts": facts, "table": {name: rank_table(ranks_Q, asked.masks, 10**9) for name, ranks_Q in ranks.items()}}


def rank_table(ranks_Q: Floats, masks: Mapping[str, NDArray[np.bool_]], deepest: int) -> dict[str, dict[str, float]]:
    """Slice -> recall@k, ndcg@k and rows, k up to `deepest`."""
    from pipeline import evaluation

    ks = [k for k in evaluation.CUTOFFS if k <= deepest]
    return {name: {**evaluation.ranking_metrics(ranks_Q[mask], ks), "rows": float(mask.sum())} for name, mask in masks.items() if mask.any()}


# ---------------------------------------------------------------- readers


def read(job: Job) -> dict[str, Any]:
    """The reader's ranks or scores on the part's questions, with a table by slice."""
    kind = job.page.readers[job.cell.reader].kind
    return {"retriever": _retrieved, "neighbours": _neighboured, "ranker": _ranked}[kind](job)


def read_codes(job: Job) -> tuple[Catalogue, tuple[str, ...]]:
    """(the arm's codes as the arm hands them to readers, names of the positions)."""
    import torch

    from pipeline.ranker import shuffled_within_deciles
    from pipeline.retrievers.base import Catalogue, numbered

    arm, arrays = job.page.arms[job.cell.arm], job.store.arrays(job.cell.needs[1])
    about = json.loads((job.store.root / "cells" / f"{job.cell.needs[1]}.json").read_text(encoding="utf-8"))
    codes_NL, weights_NL = torch.from_numpy(arrays["codes_NL"]), torch.from_numpy(arrays["weights_NL"])
    number_N = numbered(codes_NL)
    catalogue = Catalogue(codes_NL, weights_NL, number_N, tuple(about["sizes"]), int(number_N.max()) + 1)
    catalogue = replace(catalogue, weights_NL=weights_as(catalogue, arm.weights, job.seed("weights", job.cell.seed)))
    if arm.codes == "permuted":
        source_N = shuffled_within_deciles(catalogue.usable_N.numpy(), job.world.count_N.astype(np.float64), job.seed("permute", job.cell.seed))
        catalogue = catalogue.rearranged(torch.from_numpy(source_N))
    return catalogue, tuple(about["slots"])


def weights_as(catalogue: Catalogue, how: str, seed: int) -> Tensor:
    """Router weights (N, L) as a control hands them on: `mean` of the position, `shuffled` over the items that show it, or `one`; 0 stays where masked."""
    import torch

    weights_NL, present_NL = catalogue.weights_NL, catalogue.present_NL
    if how == "own":
        return weights_NL
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for weight_N, present_N in zip(weights_NL.unbind(1), present_NL.unbind(1), strict=True):
        rows = torch.nonzero(present_N).flatten()
        own = weight_N[rows]
        new = {"mean": own.mean().expand_as(own), "one": torch.ones_like(own), "shuffled": own[torch.randperm(len(own), generator=generator)]}[how]
        columns.append(torch.zeros_like(weight_N).index_copy(0, rows, new))
    return torch.stack(columns, 1)


def _retrieved(job: Job) -> dict[str, Any]:
    import torch

    from pipeline.retrievers import training

    settings = study.reader_settings(job.page, job.cell.reader)
    assert isinstance(settings, TrainRetriever)
    catalogue, _ = read_codes(job)
    teacher = _teacher(job) if settings.distill_weight else None
    fitted = training.fit(
        catalogue, train_sequences(job.world), settings, seed=job.seed("reader", job.cell.seed), teacher_ND=teacher, device=best_device(), what=job.cell.name
    )
    asked = questions(job)
    seen = asked.histories if settings.mask_history else None
    with torch.no_grad():
        ranks_Q = training.ranks(fitted.model, fitted.table, asked.histories, asked.targets, settings, seen)
    job.store.keep(job.cell.key, {"rank_Q": ranks_Q})
    some = asked.histories.part(0, min(INVALID_SAMPLE, len(asked.histories)))
    deepest = 10**9 if settings.retriever == "parallel" else settings.beams
    metrics = {f"reader/{name}": value for name, value in fitted.metrics.items()}
    capped = fitted.metrics["best_epoch"] >= settings.max_epochs
    curves = {name: list(values) for name, values in fitted.curves.items() if name in ("loss", "valid_ndcg@50")}
    table = rank_table(ranks_Q, asked.masks, deepest)
    if not math.isnan(share := training.invalid_beams(fitted.model, fitted.table, some, settings)):
        table["all"]["invalid_beams"] = share
    return {"metrics": metrics, "curves": curves, "capped": bool(capped), "deepest": deepest, "table": table}


def _teacher(job: Job) -> Tensor:
    """UNGER's integrated vectors where the codes are UNGER's, else the unit-norm modalities side by side."""
    import torch

    from pipeline.tokenizers.rq_kmeans import concatenate

    own = job.store.arrays(job.cell.needs[1]).get("teacher_ND")
    if own is not None:
        return torch.from_numpy(own)
    arrays = job.store.arrays(job.cell.needs[0])
    items = item_batch(arrays, _how(study.encoder_settings(job.page, job.cell.inputs)))
    return concatenate(items, items.widths()).float()


def _neighboured(job: Job) -> dict[str, Any]:
    """Items ranked by the codes they share with the last item of the history."""
    import torch

    from pipeline import evaluation

    catalogue, slots = read_codes(job)
    asked, codes_NL, weights_NL = questions(job), catalogue.codes_NL, catalogue.weights_NL
    last_Q = torch.from_numpy(asked.histories.items[asked.histories.offsets[1:] - 1])
    ordered = is_ordered(slots)

    def score(rows: slice) -> Tensor:
        """Score of every item for these questions [B, N]."""
        return shared_codes(codes_NL[last_Q[rows]], weights_NL[last_Q[rows]], codes_NL, weights_NL, ordered=ordered)

    seen = asked.histories if job.page.train_retriever.mask_history else None
    ranks_Q = evaluation.ranks_in_chunks(score, asked.targets, len(catalogue), seen)
    job.store.keep(job.cell.key, {"rank_Q": ranks_Q})
    return {"metrics": {}, "capped": False, "deepest": 10**9, "table": rank_table(ranks_Q, asked.masks, 10**9)}


def _ranked(job: Job) -> dict[str, Any]:
    from pipeline import evaluation, ranker

    params = study.reader_settings(job.page, job.cell.reader)
    assert isinstance(params, TrainRanker)
    world, settings = job.world, job.page.data[job.cell.data]
    asked = world.asked(job.part, 0, 0)
    train = rank_rows(job, world.learned(settings.rank_events), final=False, history=RANK_HISTORY)
    test = rank_rows(job, asked, final=True, history=RANK_HISTORY)
    has_codes = bool(job.cell.needs)
    data = ranker.RankData(
        train=train,
        test=test,
        items=tuple(world.catalogue.item_ids.tolist()),
        users=tuple(map(str, range(len(world.offset_U) - 1))),
        codes=_item_codes(read_codes(job)[0]) if has_codes else _no_codes(world.num_items),
        popularity=np.append(0, world.count_N).astype(np.float32),
    )
    arm = job.page.readers[job.cell.reader].item if has_codes else "id"
    fitted = ranker.fit(data, arm, params, job.seed("reader", job.cell.seed))
    score_B = fitted.scores_test.astype(np.float64)
    job.store.keep(job.cell.key, {"score_B": score_B})
    table = {}
    for name, mask in row_masks(world, asked, test).items():
        gauc, covered = evaluation.gauc(test.label[mask], score_B[mask], test.person[mask])
        loss = evaluation.logloss(test.label[mask], 1 / (1 + np.exp(-score_B[mask])))
        table[name] = {"auc": evaluation.auc(test.label[mask], score_B[mask]), "gauc": gauc, "covered": covered, "logloss": loss, "rows": float(mask.sum())}
    return {"metrics": {"reader/train_rows": float(len(train))}, "curves": {"loss": list(fitted.curves["train_loss"])}, "capped": False, "table": table}


def _item_codes(catalogue: Catalogue) -> ItemCodes:
    """The catalogue with a padding row before it."""
    from pipeline.ranker import ItemCodes

    sizes = np.asarray(catalogue.codebook_sizes)
    codes_NL = np.concatenate([sizes[None], catalogue.codes_NL.numpy()])
    weights_NL = np.concatenate([np.zeros((1, len(sizes)), np.float32), catalogue.weights_NL.numpy()])
    return ItemCodes(codes_NL, weights_NL, catalogue.codebook_sizes)


def _no_codes(num_items: int) -> ItemCodes:
    from pipeline.ranker import ItemCodes

    return ItemCodes(np.ones((num_items + 1, 1), np.int64), np.zeros((num_items + 1, 1), np.float32), (1,))


def rank_rows(job: Job, asked: Asked, *, final: bool, history: int) -> RankRows:
    """Labelled rows of rankers: ratings as they are, or each answer among negatives of its own popularity stratum that its user never took.

    Args:
        final: rows of the tested part; training rows know nothing of what users take later.
        history: latest events of a history.
    """
    from pipeline.ranker import RankRows

    world, settings = job.world, job.page.data[job.cell.data]
    target_B, row_B = world.item_T[asked.at_Q], np.arange(len(asked.at_Q))
    value_B = world.value_T[asked.at_Q]
    label_B = (value_B >= settings.threshold).astype(np.float32)
    if len(value_B) and np.isnan(value_B).all():
        wrong_B = negatives(world, asked, settings.negatives, job.seed("negatives", final), final=final)
        target_B = np.concatenate([target_B, wrong_B])
        label_B = np.concatenate([np.ones(len(row_B)), np.zeros(len(wrong_B))]).astype(np.float32)
        row_B = question_of_rows(len(row_B), settings.negatives)
    user_B = world.user_T[asked.at_Q][row_B]
    taught = np.unique(world.user_T[world.learned(settings.rank_events).at_Q])
    return RankRows(
        user=np.where(np.isin(user_B, taught), user_B + 1, 0),
        person=user_B,
        target=target_B + 1,
        history=_histories(world, asked, history)[row_B],
        label=label_B,
        stratum=world.stratum_N[target_B],
        evidence=world.count_N[target_B],
    )


def question_of_rows(questions: int, drawn: int) -> NDArray[np.int64]:
    """The question of every row of `rank_rows`: the answers first, then `drawn` negatives of each, (B,)."""
    at_Q = np.arange(questions)
    return np.concatenate([at_Q, np.repeat(at_Q, drawn)])


def row_masks(world: World, asked: Asked, rows: RankRows) -> dict[str, NDArray[np.bool_]]:
    """Slice -> mask of rankers' rows, empty ones left out.

    Negatives are items that training knows, so a question whose answer it has never seen is in no slice: that an item is new would tell the answer.
    Tied answers and those that the user has had stand in slices of their own, as for retrievers (`set_apart`). Ratings are judged as they are.
    """
    from pipeline.evaluation import strata

    masks, count = strata(rows.stratum, rows.evidence), len(asked.at_Q)
    if len(rows) == count:
        return masks
    question_B = question_of_rows(count, len(rows) // max(count, 1) - 1)
    known_B = (world.item_T[asked.at_Q] < world.num_known)[question_B]
    return set_apart({name: mask & known_B for name, mask in masks.items()}, asked.tied_Q[question_B], world.had(asked)[question_B])


def negatives(world: World, asked: Asked, count: int, seed: int, *, final: bool) -> NDArray[np.int64]:
    """`count` items per question, each question's together: known, of the answer's stratum, drawn again while they are the user's own."""
    stratum_N = world.stratum_N[: world.num_known]
    order_N = np.argsort(stratum_N, kind="stable")
    names, first, size = np.unique(stratum_N[order_N], return_index=True, return_counts=True)
    place_B = np.repeat(np.searchsorted(names, world.stratum_N[world.item_T[asked.at_Q]]).clip(max=len(names) - 1), count)
    user_B = np.repeat(world.user_T[asked.at_Q], count)
    own_T = np.ones(len(world.part_T), dtype=bool) if final else world.part_T == 0
    own = np.unique(world.user_T[own_T] * world.num_items + world.item_T[own_T])
    generator = np.random.default_rng(seed)

    def draw(place: NDArray[np.int64]) -> NDArray[np.int64]:
        """An item of each of these strata, uniform within it."""
        return order_N[first[place] + (generator.random(len(place)) * size[place]).astype(np.int64)]

    drawn_B = draw(place_B)
    for _ in range(REDRAWS):
        bad = np.flatnonzero(np.isin(user_B * world.num_items + drawn_B, own))
        if not len(bad):
            break
        drawn_B[bad] = draw(place_B[bad])
    return drawn_B


def _histories(world: World, asked: Asked, length: int) -> NDArray[np.int64]:
    """The latest events before each question as item rows from 1, 0 = padding, (Q, T)."""
    start_Q = np.maximum(asked.start_Q, asked.stop_Q - length)
    at_QT = start_Q[:, None] + np.arange(length)
    return np.where(at_QT < asked.stop_Q[:, None], world.item_T[at_QT.clip(max=len(world.item_T) - 1)] + 1, 0)
