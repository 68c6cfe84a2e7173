"""Does SASRec stand above what needs no network? Next-item ranks beside popularity, first-order Markov and EASE on a data set of a study page.

Split, questions, masking and floors are the study's (`sid study`), a floor that a study of this SID_HOME has ranked is read; the encoder is the page's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from jobs import study as command
from jobs.study_cells import Job, questions, train_sequences
from jobs.study_data import World, read_world
from pipeline import evaluation, intervals, study
from pipeline.config import SasRec
from pipeline.context import Home
from pipeline.encoders import sasrec
from pipeline.study import FLOORS


def answered(world: World, asked: evaluation.Packed, targets_Q: np.ndarray, params: SasRec, *, seed: int, mask_history: bool) -> np.ndarray:
    """Ranks of the targets by a SASRec that learnt the training events, float64 (Q,); its best epoch goes to stderr."""
    trained = sasrec.train(train_sequences(world), world.num_items, params, seed=seed)
    sys.stderr.write(f"seed={seed} {json.dumps({name: round(value, 4) for name, value in trained.metrics.items()})}\n")
    rows_Q, stop_Q = torch.arange(len(asked)), torch.from_numpy(asked.offsets[1:])
    start_Q = torch.maximum(stop_Q - params.max_length, torch.from_numpy(asked.offsets[:-1]))
    histories = sasrec.Sequences(torch.from_numpy(asked.offsets), torch.from_numpy(asked.items))
    asks = sasrec.Holdout(rows_Q, start_Q, stop_Q, torch.from_numpy(targets_Q))
    return sasrec.answer(sasrec.restore(trained.state, params), histories, asks, mask_history=mask_history)


def main() -> None:
    """Prints one JSON line per arm and slice and one interval per floor and slice; users are the unit of the intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True, help="SID_HOME")
    parser.add_argument("--page", default="study-cpu")
    parser.add_argument("--data", default="beauty", help="a data set of the page")
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the page")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    todo = command.plan(args.page, sets=args.set, only=f"^{args.data}/floors$", home=Home(Path(args.home)))
    (floor,) = todo.cells
    command.run_cell(todo, floor)
    data, found = todo.page.data[args.data], todo.store.arrays(floor.key)
    world = read_world(data, args.data, 0, todo.home)
    asked = questions(Job(todo.page, floor, world, todo.store, todo.part))
    params = study.encoder_settings(todo.page, study.inputs_of(todo.page, next(iter(todo.page.arms)), args.data)).sasrec
    masked = todo.page.train_retriever.mask_history
    ranks = {name: found[f"rank/{name}"][None] for name in FLOORS if f"rank/{name}" in found}
    ranks["sasrec"] = np.stack([answered(world, asked.histories, asked.targets, params, seed=seed, mask_history=masked) for seed in range(args.seeds)])
    for part in ("all", *({"all_with_ties"} & asked.masks.keys())):
        inside = asked.masks[part]
        for name, ranks_SQ in ranks.items():
            made = {each: round(value, 4) for each, value in evaluation.ranking_metrics(ranks_SQ[:, inside], (10, 50)).items()}
            sys.stdout.write(json.dumps({"arm": name, "slice": part, "questions": int(inside.sum()), **made}) + "\n")
        for name in [each for each in ranks if each != "sasrec"]:
            gain_SQ = (evaluation.recall_at(ranks["sasrec"], 10) - evaluation.recall_at(ranks[name], 10))[:, inside]
            found = intervals.estimate(intervals.mean_effect(gain_SQ, asked.users[inside]))
            sys.stdout.write(f"{part} recall@10 sasrec - {name}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]\n")


if __name__ == "__main__":
    main()
