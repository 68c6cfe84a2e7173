"""How near does a row that is trained against a frozen base come to the row that training everything gave the item, and what does it cost?

The base is SASRec of a study page on the training events of a data set. Some of its items then start like new ones, from the mean of what stands beside
them, and are trained as on a frozen night; their base rows do not compete with them. `--windows 2 --length 50` and the like set the constants of
`encoders.sasrec`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.study_cells import train_sequences
from jobs.study_data import read_world
from pipeline import study
from pipeline.context import Home
from pipeline.encoders import sasrec

RARE = 20  # events


def neighbours(rows_MD: Tensor, table_ND: Tensor, moved_M: Tensor) -> Tensor:
    """The 20 base items nearest by cosine, the item itself left out [M, 20]."""
    near_MN = F.normalize(rows_MD, dim=1) @ F.normalize(table_ND, dim=1).T
    return near_MN.scatter(1, moved_M[:, None], -2.0).topk(20, dim=1).indices


def as_new(model: sasrec.SasRec, sequences: sasrec.Sequences, moved_M: Tensor) -> sasrec.Rows:
    """Where the moved items would start had the base never seen them: the names of the base are one further, so that they are free."""
    apart = model.num_items + torch.arange(moved_M.numel())
    name_N = torch.arange(model.num_items)
    name_N[moved_M] = apart
    return sasrec.initial_rows(model, sasrec.Sequences(sequences.offsets, name_N[sequences.items], sequences.baskets), apart)[0]


def main() -> None:
    """Prints one JSON line for the start and one for the trained rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True, help="SID_HOME")
    parser.add_argument("--page", default="study-gpu")
    parser.add_argument("--data", default="retail", help="a data set of the page")
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the page")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--windows", type=int, default=sasrec.ROW_WINDOWS)
    parser.add_argument("--length", type=int, default=sasrec.ROW_LENGTH)
    parser.add_argument("--negatives", type=int, default=sasrec.ROW_NEGATIVES)
    parser.add_argument("--contexts", type=int, default=sasrec.STEP_CONTEXTS, help="of a base with one table, in a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    page, home = study.load(args.page, args.set), Home(Path(args.home))
    world = read_world(page.data[args.data], args.data, 0, home)
    params = study.encoder_settings(page, study.inputs_of(page, next(iter(page.arms)), args.data)).sasrec
    sequences = train_sequences(world)
    state = sasrec.train(sequences, world.num_known, params, seed=0).state
    base, contexts = sasrec.restore(state, params), sasrec.Contexts.of(state)
    count_N = torch.bincount(sequences.items, minlength=world.num_known)
    enough = torch.nonzero(count_N >= 4).flatten()
    moved_M = enough[torch.randperm(enough.numel(), generator=torch.Generator().manual_seed(0))[: args.items]].sort().values
    start = as_new(base, sequences, moved_M)
    sasrec.ROW_WINDOWS, sasrec.ROW_LENGTH, sasrec.ROW_NEGATIVES, sasrec.STEP_CONTEXTS = args.windows, args.length, args.negatives, args.contexts
    began = time.process_time()
    trained_MD, _ = sasrec.train_rows(base, sequences, moved_M, start, moved_M, params, contexts)
    spent, table_ND = time.process_time() - began, base.input_table()
    own_MD, rare_M = table_ND[moved_M], count_N[moved_M] < RARE
    own_near = neighbours(own_MD, table_ND, moved_M)
    for name, rows_MD in (("start", start.inputs), ("trained", trained_MD)):
        shared_M = (neighbours(rows_MD, table_ND, moved_M)[:, :, None] == own_near[:, None, :]).any(2).float().mean(1)
        facts = {
            "cosine": F.cosine_similarity(rows_MD, own_MD).mean(),
            "neighbours_shared": shared_M.mean(),
            "neighbours_shared_rare": shared_M[rare_M].mean(),
            "length": rows_MD.norm(dim=1).mean() / own_MD.norm(dim=1).mean(),
        }
        cost = {"cpu_s": round(spent, 1)} if name == "trained" else {}
        sys.stdout.write(json.dumps({"rows": name, "items": int(moved_M.numel()), **{k: round(float(v), 4) for k, v in facts.items()}, **cost}) + "\n")


if __name__ == "__main__":
    main()
