"""Does each phase of the content recipe (SAIL) keep its claim? One night's tables, the recipe with and without its distillations, measured on held items.

`content`: the three content phases alone; `seq`: with sequence-to-item distillation; `seq_id`: with ID-to-item distillation as well, the whole recipe. The
night must have run up to train_behavior_encoder, with pairs:
sid run STAGE --date D --profile tiny --set content_cre.enabled=true, STAGE one of plan_night .. train_behavior_encoder.
An item is the unit of the intervals; pairs and questions are about items that nothing was trained on. Legend: N items, P pairs, Q questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.behavior_inputs import read_history
from jobs.content_inputs import Shelf, base_encoders, read_pairs, read_shelf, read_teacher
from jobs.inputs import Inputs
from jobs.train_content_encoder import held_items
from pipeline import config, evaluation, intervals, lakehouse
from pipeline.context import Context, Home
from pipeline.encoders import sail, sail_pairs
from pipeline.encoders.sail_pairs import PairSet, Questions
from pipeline.stages import BY_NAME
from pipeline.tokenizers.base import History
from pipeline.tokenizers.fit import generator_for

ARMS = {"content": {"sequence_steps": 0, "identity_steps": 0}, "seq": {"identity_steps": 0}, "seq_id": {}}
PAIRS_AT, QUESTIONS_AT = 50, 10


def pair_hits(vectors_ND: Tensor, pairs: list[PairSet]) -> tuple[np.ndarray, np.ndarray]:
    """(whether each pair's partner is among the 50 nearest, both ways; the item that asks), (2 P,) each."""
    left_P, right_P = (torch.cat([getattr(part, side) for part in pairs]) for side in ("left_P", "right_P"))
    asks, answers = torch.cat([left_P, right_P]), torch.cat([right_P, left_P])
    unit_ND, own = F.normalize(vectors_ND, dim=1), evaluation.Packed(np.arange(len(asks) + 1), asks.numpy())
    ranks = evaluation.ranks_in_chunks(lambda rows: unit_ND[asks[rows]] @ unit_ND.T, answers.numpy(), len(unit_ND), own)
    return (ranks <= PAIRS_AT).astype(float), asks.numpy()


def question_hits(vectors_ND: Tensor, asked: Questions) -> tuple[np.ndarray, np.ndarray]:
    """(whether the item that came next is among the 10 nearest to the mean of its history, the item asked for), (Q,) each."""
    unit_ND = F.normalize(vectors_ND, dim=1)
    query_QD = F.normalize(sail.mean_vector(unit_ND[asked.rows_QT], asked.shown_QT), dim=1)
    ranks = evaluation.ranks_in_chunks(lambda rows: query_QD[rows] @ unit_ND.T, asked.target_Q.numpy(), len(unit_ND), None)
    return (ranks <= QUESTIONS_AT).astype(float), asked.target_Q.numpy()


def held_questions(history: History, known_N: Tensor, held_N: Tensor, params: config.ContentCre, seed: int) -> Questions:
    """Events of held items, each with the latest items before it."""
    asked = sail_pairs.questions(history, known_N, length=params.max_history, most=params.max_questions, generator=generator_for(seed, "bench questions"))
    return asked.take(held_N[asked.target_Q])


def measured(encoder: sail.Sail, shelf: Shelf, valid: list[PairSet], asked: Questions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Measure -> (hits, the items they belong to) of the fused vectors."""
    vectors_ND = encoder.encode(shelf.content).vectors["fused"]
    kinds = {kind: [part for part in valid if part.collaborative == (kind == "collaborative") and len(part)] for kind in ("content", "collaborative")}
    found = {f"recall@{PAIRS_AT}/{kind}": pair_hits(vectors_ND, pairs) for kind, pairs in kinds.items() if pairs}
    return found | {f"seq2item recall@{QUESTIONS_AT}": question_hits(vectors_ND, asked)}


def context(args: argparse.Namespace) -> tuple[Inputs, Context, config.ContentCre]:
    """The night's tables, its run and the recipe's settings."""
    settings = config.load(args.profile, tuple(args.set))
    home, day = Home(Path(args.home)), date.fromisoformat(args.date)
    ctx = Context(config=settings, home=home, stage="train_content_encoder", logical_date=day, run_id=args.run_id or f"cli__{settings.name}__{day}")
    snapshots = {table: lakehouse.current_snapshot(home, settings.lake, table) for table in BY_NAME["train_content_encoder"].inputs}
    return Inputs(home, settings.lake, snapshots), ctx, settings.content_cre


def main() -> None:
    """Prints one JSON line per arm and one per difference between neighbours in the list of arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True, help="SID_HOME of the night")
    parser.add_argument("--date", required=True)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--run-id", default="", help="run whose manifest and outcomes are read; empty = the command line's")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sources", nargs="*", help="sources that are learnt from; all are measured. `category words` leaves behaviour to the distillations")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs, ctx, params = context(args)
    shelf = read_shelf(inputs, ctx, base_encoders(ctx))
    pairs, history = read_pairs(inputs, ctx, shelf.item_ids), read_history(inputs, ctx, shelf.item_ids)
    teachers = {"behavior": read_teacher(inputs.model(ctx.outcome("train_behavior_encoder")["outputs"]["model_uri"]), shelf.item_ids)}
    hits: dict[str, dict[str, list[np.ndarray]]] = {arm: {} for arm in ARMS}
    units: dict[str, list[np.ndarray]] = {}
    for seed in range(args.seeds):
        held_N = held_items(len(shelf.content), params.held_share, seed)
        known_N = torch.stack(list(shelf.content.shown.values())).any(0)
        asked = held_questions(history, known_N, held_N & known_N, params, seed)
        valid = [sail_pairs.split(part, known_N & ~held_N, known_N & held_N)[1] for part in pairs]
        for number, (arm, changes) in enumerate(ARMS.items()):
            own = params.model_copy(update={**changes, "sources": args.sources or params.sources})
            given = sail.lessons(shelf.content, pairs, history, teachers, held_N, own, seed)
            encoder, _ = sail.Sail.fit(shelf.content, given, own, seed=seed)
            for name, (hit, item) in measured(encoder, shelf, valid, asked).items():
                hits[arm].setdefault(name, []).append(hit)
                if not number:
                    units.setdefault(name, []).append(item + seed * len(shelf.content))
    for arm, found in hits.items():
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        rows = {name: values.size for name, values in joined.items()}
        sys.stdout.write(json.dumps({"arm": arm, **{name: round(float(values.mean()), 4) for name, values in joined.items()}, "rows": rows}) + "\n")
    for one, other in (("seq", "content"), ("seq_id", "seq"), ("seq_id", "content")):
        for name, unit in units.items():
            gain = np.concatenate(hits[one][name]) - np.concatenate(hits[other][name])
            found = intervals.estimate(intervals.mean_effect(gain, np.concatenate(unit)))
            sys.stdout.write(f"{name} {one} - {other}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]\n")


if __name__ == "__main__":
    main()
