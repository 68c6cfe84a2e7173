"""Which behaviour encoder on the graph finds the films a user rated last? Popularity, BPR-MF, LightGCN, NGCF and AlphaRec on MovieLens-100K.

Each user's last events by (timestamp, item_id) are questions, one row each; everything is fitted on the events before them, validation included.
Full ranking with the history masked; an item that nobody had before is a target all the same. An arm `dealt_alpharec` reads the texts of other films.
`--cold` instead takes a share of the films out of training and ranks those alone, `--pairs` times one epoch on a random graph.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.content_embedding import model_folder
from pipeline import config, evaluation, intervals
from pipeline.datasets.movielens import film_rows, read_films, read_origin, read_ratings
from pipeline.encoders import CONTENT_ENCODERS, alpharec, bpr_mf, graph, lightgcn, ngcf
from pipeline.encoders.base import EncoderOptions
from pipeline.encoders.sasrec import Holdout, Sequences

SECTIONS = {"bpr_mf": config.BprMf, "lightgcn": config.LightGcn, "ngcf": config.Ngcf, "alpharec": config.AlphaRec}
NETWORKS = {"bpr_mf": bpr_mf.Network, "lightgcn": lightgcn.Network, "ngcf": ngcf.Network}


def read(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """(each user's items by time, each item's text)."""
    origin = read_origin(path)
    ratings, films = read_ratings(origin), film_rows(read_films(origin))
    names = films["item_id"].to_pylist()
    index = {name: number for number, name in enumerate(names)}
    item = np.asarray([index[name] for name in ratings["item_id"].to_pylist()])
    _, user = np.unique(ratings["user_id"].to_pylist(), return_inverse=True)
    order = np.lexsort((np.asarray(names)[item], ratings["seconds"].to_numpy(), user))
    return np.split(item[order], np.flatnonzero(np.diff(user[order])) + 1), films["text"].to_pylist()


def packed(lists: list[np.ndarray]) -> Sequences:
    return Sequences(torch.from_numpy(np.cumsum([0] + [part.size for part in lists])), torch.from_numpy(np.concatenate(lists)))


def make(name: str, params: Any, content: Tensor, edges: graph.Edges) -> graph.GraphNetwork:
    """The untrained network of an arm."""
    if name == "alpharec":
        return alpharec.Network(content, params)
    return NETWORKS[name](edges.num_users, edges.num_items, params)


def trained(name: str, settings: dict[str, Any], seed: int, train: Sequences, content: Tensor) -> graph.Fitted:
    """One trained arm; what it cost goes to stderr."""
    dealt, name = name.startswith("dealt_"), name.removeprefix("dealt_")
    content = content[torch.randperm(len(content), generator=torch.Generator().manual_seed(seed))] if dealt else content
    params, started = SECTIONS[name](**settings), time.process_time()
    fitted = graph.fit(lambda edges: make(name, params, content, edges), train, content.shape[0], params, seed=seed, device="cpu", what=name)
    facts = {key: round(value, 4) for key, value in fitted.metrics.items() if key in ("best_epoch", "epochs", "valid_recall@20", "valid_ndcg@10")}
    sys.stderr.write(f"{name} {settings} seed={seed} {facts} cpu={time.process_time() - started:.0f}s\n")
    return fitted


def several(name: str, settings: dict[str, Any], args: argparse.Namespace, train: Sequences, content: Tensor) -> list[graph.Fitted]:
    """One trained arm per seed; of several step sizes the one that validates best with the first seed (the same grid for every arm)."""
    grid = [{**settings, "learning_rate": rate} for rate in args.rates] or [settings]
    firsts = [trained(name, each, 0, train, content) for each in grid]
    best = max(range(len(grid)), key=lambda at: firsts[at].metrics["valid_ndcg@10"])
    sys.stderr.write(f"{name} chosen={grid[best]}\n")
    return [firsts[best], *(trained(name, grid[best], seed, train, content) for seed in range(1, args.seeds))]


def texts_of(texts: list[str]) -> Tensor:
    """MiniLM's vectors of the texts (N, C)."""
    options = EncoderOptions(name="minilm", batch=64, size=64, normalize=True)
    return torch.from_numpy(CONTENT_ENCODERS["text"]["minilm"](model_folder("minilm", ""), options).encode(texts))


def compare(args: argparse.Namespace) -> None:
    """Prints one JSON line per arm and one per pair of neighbours in the list of arms."""
    lists, texts = read(Path(args.path))
    train, last = packed([part[: -args.last] for part in lists]), np.concatenate([part[-args.last :] for part in lists])
    users = torch.arange(len(lists)).repeat_interleave(args.last)
    questions = Holdout(users, torch.zeros_like(users), torch.zeros_like(users), torch.from_numpy(last))
    content = texts_of(texts)
    popularity = np.bincount(train.items.numpy(), minlength=len(texts)).astype(np.float32)
    history = evaluation.Packed(train.users(users).offsets.numpy(), train.users(users).items.numpy())
    ranks = {"popularity": evaluation.ranks_in_chunks(lambda rows: torch.from_numpy(popularity).repeat(rows.stop - rows.start, 1), last, len(texts), history)}
    for text in args.arms:
        name, _, settings = text.partition(":")
        fitted = several(name, json.loads(settings or "{}"), args, train, content)
        ranks[text] = np.stack([graph.answer(each.network, train, questions) for each in fitted])
    for text, found in ranks.items():
        sys.stdout.write(json.dumps({"arm": text, **{m: round(v, 4) for m, v in evaluation.ranking_metrics(found, (20,)).items()}}) + "\n")
    names = list(ranks)
    for one, other in zip(names[1:], names, strict=False):
        gain = (evaluation.recall_at(ranks[one], 20) - args.times * evaluation.recall_at(ranks[other], 20)).reshape(-1, users.numel())
        say(f"{one} - {args.times:g} * {other}" if args.times != 1 else f"{one} - {other}", intervals.estimate(intervals.mean_effect(gain, users.numpy())))


def say(what: str, found: intervals.Estimate) -> None:
    sys.stdout.write(f"recall@20 {what}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]\n")


def cold(args: argparse.Namespace) -> None:
    """Prints recall@20 among films that training never saw, one JSON line and two intervals per seed."""
    lists, texts = read(Path(args.path))
    content = texts_of(texts)
    for seed in range(args.seeds):
        cold_world(args, lists, content, np.random.default_rng(seed).random(len(texts)) < args.cold, seed)


def cold_world(args: argparse.Namespace, lists: list[np.ndarray], content: Tensor, cold_N: np.ndarray, seed: int) -> None:
    """AlphaRec beside chance and beside the popularity that the cold films were to have; a user's text is the mean of its other films."""
    films, asked = np.flatnonzero(cold_N), [(user, part[cold_N[part]]) for user, part in enumerate(lists) if (~cold_N[part]).any()]
    user_Q = np.repeat([user for user, _ in asked], [part.size for _, part in asked])
    place_Q = np.searchsorted(films, np.concatenate([part for _, part in asked]))
    fitted = trained("alpharec", json.loads(args.arms[0] or "{}"), seed, packed([part[~cold_N[part]] for part in lists]), content)
    users_UD, items_ND = (torch.nn.functional.normalize(part, dim=1) for part in fitted.final())
    ranks_Q = evaluation.ranks_in_chunks(lambda rows: users_UD[user_Q[rows]] @ items_ND[films].T, place_Q, films.size)
    count_C = torch.from_numpy(np.bincount(place_Q, minlength=films.size).astype(np.float32))
    later_Q = evaluation.ranks_in_chunks(lambda rows: count_C.repeat(rows.stop - rows.start, 1), place_Q, films.size)
    hits_Q, other_Q, chance = evaluation.recall_at(ranks_Q, 20), evaluation.recall_at(later_Q, 20), min(1.0, 20 / films.size)
    facts = {"seed": seed, "films": int(films.size), "questions": int(place_Q.size), "chance": round(chance, 4)}
    sys.stdout.write(json.dumps({**facts, "alpharec": round(float(hits_Q.mean()), 4), "popularity in hindsight": round(float(other_Q.mean()), 4)}) + "\n")
    say("alpharec - chance", intervals.estimate(intervals.mean_effect(hits_Q - chance, user_Q)))
    say("alpharec - popularity in hindsight", intervals.estimate(intervals.mean_effect(hits_Q - other_Q, user_Q)))


def clock(args: argparse.Namespace) -> None:
    """Prints the seconds of one epoch on a random graph."""
    rng = np.random.default_rng(0)
    num_users, num_items = args.pairs // 30, args.pairs // 25
    item = (num_items * rng.random(args.pairs * 11 // 10) ** 2).astype(np.int64)  # the first items are the popular ones
    keys = rng.permutation(np.unique(rng.integers(0, num_users, item.size) * num_items + item))[: args.pairs]
    edges = graph.Edges(torch.from_numpy(np.sort(keys)), num_users, num_items)
    for text in args.arms:
        name, _, settings = text.partition(":")
        params = SECTIONS[name](**json.loads(settings or "{}"))
        network = make(name, params, torch.randn(num_items, 384), edges)
        network.attach(edges)
        optimizer = torch.optim.Adam(network.parameters(), lr=params.learning_rate)
        started = time.perf_counter(), time.process_time()
        graph._epoch(network, optimizer, params)
        sizes = {"pairs": int(keys.size), "users": num_users, "items": num_items}
        spent = {"wall_s": time.perf_counter() - started[0], "cpu_s": time.process_time() - started[1]}
        sys.stdout.write(json.dumps({"arm": text, **sizes, **{key: round(value, 1) for key, value in spent.items()}}) + "\n")


def main() -> None:
    """Reads the arguments and runs one of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="", help="MovieLens-100K: folder, zip or recbole wheel")
    parser.add_argument("--last", type=int, default=10, help="events of each user that are asked for")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="step sizes that every arm tries; validation chooses")
    parser.add_argument("--times", type=float, default=1.0, help="an arm is compared with so many times its neighbour's recall")
    parser.add_argument("--cold", type=float, default=0.0, help="share of the films that training never sees; the one arm is AlphaRec's settings, JSON")
    parser.add_argument("--pairs", type=int, default=0, help="time one epoch on a random graph of so many pairs instead")
    parser.add_argument("arms", nargs="+", help='an encoder, or an encoder with settings: lightgcn:{"learning_rate": 0.002}')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.pairs:
        clock(args)
    elif args.cold:
        cold(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
