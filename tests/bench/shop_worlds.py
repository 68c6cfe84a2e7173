"""Does the adaptive alignment strength help where the truth is known? ADA-SID under five strengths, and residual k-means, on generated shops.

One world is one seed: pictures, texts, events, SASRec, richness and every fit are made anew in it; the arms of a world differ in the strength alone.
Purity@20: of the 20 items that share most codes with an item (weights multiplied per position; ties count by their expectation) the share of its cluster.
Not here: readers and rankers. Legend: N items, L positions, D width. Tail: at most the median events; poor: the same among items with behaviour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from sklearn.metrics import adjusted_mutual_info_score

from jobs.content_embedding import model_folder
from pipeline import richness
from pipeline.config import AdaSid, SasRec, Source, TrainBehaviorEncoder, TrainTokenizer
from pipeline.context import derive_seed
from pipeline.datasets.shop import Shop
from pipeline.encoders import CONTENT_ENCODERS, sasrec
from pipeline.encoders.base import EncoderOptions
from pipeline.encoders.image import decode_image
from pipeline.tokenizers.base import FitOptions, ItemBatch, TokenizerOutput
from pipeline.tokenizers.registry import named

BLOCK = 1024  # queries scored at once: a catalogue of 20,000 items would fill the memory otherwise
STRENGTHS = ("adaptive", "mean", "shuffled", "one", "zero")
METRICS = ("purity", "purity_tail", "purity_poor", "shared_purity", "shared_purity_tail", "shared_purity_poor", "ami", "shared_ami")
CELLS = pacsv.ConvertOptions(column_types=dict.fromkeys(("item_id", "text", "image_uri"), pa.string()), strings_can_be_null=True)  # empty = null


class Items(NamedTuple):
    """What a tokenizer sees of a world, and the truth beside it: cluster_N, leaf_N (cluster and sub-cluster), evidence count_N."""

    batch: ItemBatch
    cluster_N: np.ndarray
    leaf_N: np.ndarray
    count_N: np.ndarray
    facts: dict[str, float]


def build(args: argparse.Namespace, seed: int, folder: Path) -> Items:
    """The items of world `seed`, encoded, with richness by rank and items under n_min events masked."""
    sizes = {"items": args.items, "users": args.items // 2, "events_per_day": args.items * 4 // 3, "distinct_images": 144}
    quality = {"text_quality": args.quality, "image_quality": args.quality, "noise_tie": args.tie, "noise": args.noise, "zipf": args.zipf, "dirty_share": 0.0}
    source = Source(dataset="shop", options={**sizes, **quality, "seed": seed, "file_format": "parquet"})
    root = Path(Shop().prepare(source, folder, seed).image_root)
    truth = pq.read_table(root / "truth.parquet")
    items = pa.concat_tables([pacsv.read_csv(path, convert_options=CELLS) for path in sorted((root / "items").glob("*.csv"))])
    rows = pc.index_in(truth["item_id"], value_set=items["item_id"].combine_chunks())
    text_ND, _ = encoded("text", items["text"].take(rows), root)
    image_ND, image_N = encoded("image", items["image_uri"].take(rows), root)
    behavior_ND, count_N, found = behaviour(root, truth["item_id"], args, seed)
    seen_N, norm_N = count_N >= (params := TrainBehaviorEncoder()).n_min, behavior_ND.norm(dim=1).numpy()
    reference = richness.fit_reference("rank", count_N[seen_N], norm_N[seen_N], alpha=params.alpha, low_strength_share=params.low_strength_share)
    richness_N = np.where(seen_N, richness.richness(reference, count_N, norm_N), 0.0)
    strength_N = np.where(seen_N, richness.alignment_strength(richness_N, reference["alpha"], reference["beta"]), 0.0)
    vectors = {"text_ND": text_ND, "image_ND": image_ND, "behavior_ND": behavior_ND * torch.from_numpy(seen_N)[:, None]}
    masks = {"text_N": torch.ones_like(image_N), "image_N": image_N, "behavior_N": torch.from_numpy(seen_N)}
    batch = ItemBatch(**vectors, **masks, richness_N=torch.from_numpy(richness_N).float(), strength_N=torch.from_numpy(strength_N).float())
    cluster_N = truth["cluster"].to_numpy()
    found |= {"behavior_share": seen_N.mean(), "mean_strength": strength_N[seen_N].mean(), **raw_purity(batch, cluster_N, count_N)}
    return Items(batch, cluster_N, cluster_N * 100 + truth["sub_cluster"].to_numpy(), count_N, {name: float(value) for name, value in found.items()})


def encoded(modality: str, column: pa.ChunkedArray, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(unit vectors [N, D], which items have one [N]); each distinct text or picture is encoded once."""
    kind, size, batch = ("minilm", 32, 64) if modality == "text" else ("efficientnet_lite0", 112, 32)
    encoder = CONTENT_ENCODERS[modality][kind](model_folder(kind, ""), EncoderOptions(name=kind, batch=batch, size=size, normalize=True))
    content: Any = (distinct := pc.unique(column.drop_null())).to_pylist()
    if modality == "image":
        content = np.stack([decode_image((root / path).read_bytes(), 10**7, size) for path in content])
    vectors, place = torch.from_numpy(encoder.encode(content)), pc.index_in(column, value_set=distinct)
    return vectors[torch.from_numpy(place.fill_null(0).to_numpy().astype(np.int64))], torch.from_numpy(place.is_valid().to_numpy().copy())


def behaviour(root: Path, item_ids: pa.ChunkedArray, args: argparse.Namespace, seed: int) -> tuple[torch.Tensor, np.ndarray, dict[str, float]]:
    """(SASRec input rows [N, D], events per item [N], validation metrics)."""
    events = pq.read_table(root / "events").sort_by([("user_id", "ascending"), ("event_ts", "ascending"), ("item_id", "ascending")])
    item_T = pc.index_in(events["item_id"], value_set=item_ids.combine_chunks()).to_numpy().astype(np.int64)
    length_U = events.group_by("user_id").aggregate([("item_id", "count")]).sort_by("user_id")["item_id_count"].to_numpy()
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(length_U)]).astype(np.int64))
    params = SasRec(max_epochs=args.sasrec_epochs, batch_size=args.sasrec_batch, sampled_above=5000, tied=not args.two_tables)
    trained = sasrec.train(sasrec.Sequences(offsets, torch.from_numpy(item_T)), len(item_ids), params, seed=derive_seed(seed, "sasrec"))
    return trained.item_vectors, np.bincount(item_T, minlength=len(item_ids)), {f"sasrec_{name}": value for name, value in trained.metrics.items()}


def raw_purity(batch: ItemBatch, cluster_N: np.ndarray, count_N: np.ndarray) -> dict[str, float]:
    """Purity of the inputs themselves, by cosine, and behaviour's in the poorer and richer half of the items that have it: what there is to gain."""
    found = {}
    for name in ("text", "image", "behavior"):
        rows = batch.mask(name).numpy()
        unit_ND = torch.nn.functional.normalize(batch.vectors(name)[rows], dim=1)
        found[f"raw_purity/{name}"] = (purity_N := purity(partial(cosines, unit_ND=unit_ND), cluster_N[rows])).mean()
    poor_N = count_N[rows] <= np.median(count_N[rows])
    return found | {"raw_purity/behavior_poor": purity_N[poor_N].mean(), "raw_purity/behavior_rich": purity_N[~poor_N].mean()}


def purity(scores: Callable[[torch.Tensor], torch.Tensor], cluster_N: np.ndarray) -> np.ndarray:
    """Expected share of an item's 20 best-scored others that are of its cluster, [N]; ties at the edge are drawn at random, in expectation.

    scores: of a block of items (B,) against all, [B, N].
    """
    clusters = torch.tensor(cluster_N)
    found = []
    for block in torch.arange(len(clusters)).split(BLOCK):
        score_BN = (scores(block) * 1e5).round()
        score_BN[torch.arange(len(block)), block] = -torch.inf
        edge_B1, same_BN = score_BN.topk(20, dim=1).values[:, -1:], clusters[block, None] == clusters
        above_BN, tied_BN = score_BN > edge_B1, score_BN == edge_B1
        found.append((above_BN & same_BN).sum(1) + (20 - above_BN.sum(1)) * (tied_BN & same_BN).sum(1) / tied_BN.sum(1))
    return (torch.cat(found) / 20).numpy()


def cosines(block: torch.Tensor, *, unit_ND: torch.Tensor) -> torch.Tensor:
    """Cosines of a block of items with all, [B, N]."""
    return unit_ND[block] @ unit_ND.T


def shared_codes(block: torch.Tensor, *, codes_NL: torch.Tensor, weights_NL: torch.Tensor, ordered: bool) -> torch.Tensor:
    """Codes a block of items shares with all, per position, times both weights, [B, N]; `ordered` (residual) codes count to the first that differs."""
    score_BN, same_BN = torch.zeros(len(block), len(codes_NL)), torch.ones(len(block), len(codes_NL), dtype=torch.bool)
    for code_N, weight_N in zip(codes_NL.unbind(1), weights_NL.unbind(1), strict=True):
        same_BN = (code_N[block, None] == code_N) & (same_BN if ordered else True)
        score_BN += same_BN * weight_N[block, None] * weight_N
    return score_BN


def measured(made: TokenizerOutput, slots: tuple[str, ...], items: Items) -> dict[str, Any]:
    """Purity over all positions and over the shared ones for all, tail and poor items; mutual information with the sub-cluster per position."""
    count_N, seen_N = items.count_N, items.batch.behavior_N.numpy()
    groups = {"": count_N >= 0, "_tail": count_N <= np.median(count_N), "_poor": seen_N & (count_N <= np.median(count_N[seen_N]))}
    found: dict[str, Any] = {}
    by_slot: dict[str, float] = {}
    shared = [at for at, name in enumerate(slots) if name.startswith("shared")]
    for prefix, columns in (("", list(range(len(slots)))), ("shared_", shared)):
        if columns:
            ordered, weights_NL = slots[0].startswith("level"), made.weights_NL[:, columns]
            score = partial(shared_codes, codes_NL=made.codes_NL[:, columns], weights_NL=weights_NL, ordered=ordered)
            purity_N = purity(score, items.cluster_N)
            found |= {f"{prefix}purity{name}": float(purity_N[rows_N].mean()) for name, rows_N in groups.items()}
    for name, code_N in zip(slots, made.codes_NL.numpy().T, strict=True):
        rows = seen_N if name.startswith("behavior") else groups[""]
        by_slot[name] = float(adjusted_mutual_info_score(items.leaf_N[rows], code_N[rows]))
    found |= {"ami": float(np.mean(list(by_slot.values()))), "ami_by_slot": by_slot}
    return found | ({"shared_ami": float(np.mean([by_slot[slots[at]] for at in shared]))} if shared else {})


def run_world(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Facts of the world and the metrics of every arm."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        items = build(args, seed, Path(folder))
    arms = {}
    for arm in (*STRENGTHS, "rq_kmeans"):
        settings = TrainTokenizer(max_epochs=args.epochs, ada_sid=AdaSid(strength=arm if arm in STRENGTHS else "adaptive"))
        tokenizer = named(name := "ada_sid" if arm in STRENGTHS else arm)(getattr(settings, name))
        tokenizer.fit(items.batch, FitOptions(seed=derive_seed(seed, "tokenizer"), settings=settings))
        arms[arm] = measured(tokenizer.encode(items.batch), tokenizer.slots, items)
    return {"seed": seed, "seconds": time.perf_counter() - started, "facts": items.facts, "arms": arms}


def sign_flip(differences: list[float]) -> tuple[float, float]:
    """(mean difference, two-sided p): all 2^n choices of signs are enumerated, so p is exact and at least 2 / 2^n."""
    signs = 1 - 2 * np.indices((2,) * len(differences)).reshape(len(differences), -1)
    means = np.abs(np.array(differences) @ signs) / len(differences)
    return float(np.mean(differences)), float((means >= means[0] - 1e-12).mean())


def table(worlds: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """(markdown of means over worlds and paired differences of adaptive, the differences as JSON)."""
    lines, tests = [f"| arm | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"], {}
    for arm in worlds[0]["arms"]:
        cells = [f"{np.mean([world['arms'][arm][name] for world in worlds]):.4f}" if name in worlds[0]["arms"][arm] else "-" for name in METRICS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for other in STRENGTHS[1:]:
        tests[other] = {name: sign_flip([world["arms"]["adaptive"][name] - world["arms"][other][name] for world in worlds]) for name in METRICS}
        lines.append(f"| adaptive - {other} | {' | '.join(f'{mean:+.4f} (p={p:.3f})' for mean, p in tests[other].values())} |")
    return "\n".join(lines), tests


def main() -> None:
    """Run the worlds; rewrite the JSON after each, so that a stopped run leaves what it measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("worlds", 5), ("first", 0), ("items", 1500), ("epochs", 30), ("sasrec-epochs", 15), ("sasrec-batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--two-tables", action="store_true", help="SASRec with a table for input and one for output")
    parser.add_argument("--tie", choices=("rarity", "independent", "reversed"), default="rarity")
    parser.add_argument("--quality", type=float, default=0.9, help="share of items whose text, or picture, shows their own cluster")
    parser.add_argument("--noise", type=float, default=0.8, help="largest share of an item's events that go to random users")
    parser.add_argument("--zipf", type=float, default=0.9, help="exponent of popularity by rank: the higher, the poorer the tail")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    worlds: list[dict[str, Any]] = []
    for seed in range(args.first, args.first + args.worlds):
        worlds.append(run_world(args, seed))
        markdown, tests = table(worlds)
        document = {"options": {**vars(args), "out": args.out.name}, "worlds": worlds, "adaptive_minus": tests}
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"\nworld {seed}: {worlds[-1]['seconds']:.0f} s\n{markdown}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
