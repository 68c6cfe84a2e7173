"""train_retriever: a generative retriever on one pinned release, in torch and without a JVM: real, permuted and random codes, floors beside.

Trained on the users' sequences as of the evaluation release's cutoff; questions are the positive test rows of rank_example, which lie in files after it: the
history strictly before the event, the item that followed, over all live items of the release. The model to serve reads the served release and reports no
recall of its own when that is another one. The networks and their training are pipeline/retrievers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from jobs.behavior_inputs import basket_numbers
from jobs.train_ranker import Vocabulary, read_examples, vocabulary
from pipeline.config import TrainRetriever
from pipeline.context import Context, derive_seed
from pipeline.device import best_device
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.stages import FigureData, ModelBundle, StageResult

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.sasrec import Sequences
    from pipeline.evaluation import Packed
    from pipeline.retrievers.base import Catalogue
    from pipeline.retrievers.training import Fitted

logger = logging.getLogger(__name__)
ARMS = ("real", "permuted", "random")
FLOORS = ("popularity", "markov", "ease")
INVALID_SAMPLE = 200  # questions that the search without a constraint is measured on
EXAMPLE_ROWS = 2


@dataclass(frozen=True)
class Shelf:
    """Live items of a release in order of item_id: ids, codes, popularity, and the day of the release."""

    words: Vocabulary
    day: date
    item_ids: pa.Array
    catalogue: Catalogue
    popularity: NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """Test questions: history, item that followed, user, items that leave the ranking, stratum and events of the item at the cutoff.

    Args:
        left_out: positive test rows without an answerable question, by reason.
    """

    histories: Packed
    targets: NDArray[np.int64]
    users: NDArray[Any]
    seen: Packed
    stratum: NDArray[np.str_]
    evidence: NDArray[np.int64]
    left_out: dict[str, int]


def idle(inputs: Inputs, params: TrainRetriever, ctx: Context) -> StageResult | None:
    """`skipped` when switched off."""
    return None if params.enabled else StageResult(status="skipped", outputs={"note": "train_retriever.enabled is false"})


def run(inputs: Inputs, params: TrainRetriever, ctx: Context) -> StageResult:
    """The served model, and for every arm, floor and slice Recall and NDCG with paired intervals, when there is a release to test.

    `outputs`: retriever, evaluation_release (empty = nothing tested), served_release, codebook_digest, trie_digest, questions, left_out, history_masked, ties,
    invalid_beams, arms, differences, note.
    """
    unknown = [arm for arm in params.arms if arm not in ARMS]
    if unknown:
        raise ConfigError(f"unknown retriever arm {unknown[0]!r}", expected=", ".join(ARMS), found=unknown[0], where="section [train_retriever], key arms")
    drawn = ctx.outcome("rank_example")["outputs"]
    found: dict[str, Any] = {"table": {"arms": {}, "differences": []}}
    fits: dict[str, list[Fitted]] = {}
    if drawn["evaluation_release"]:
        shelf = read_shelf(inputs, drawn["evaluation_release"], ctx)
        fits, found = evaluated(inputs, shelf, read_examples(inputs, drawn), params, ctx)
    served = read_shelf(inputs, drawn["served_release"], ctx)
    model = served_fit(inputs, served, fits, params, ctx, tested=served.words.tag == drawn["evaluation_release"])
    outputs = {
        "retriever": params.retriever,
        "evaluation_release": drawn["evaluation_release"],
        "served_release": served.words.tag,
        "codebook_digest": served.words.codebook_digest,
        "trie_digest": model.table.digest(),
        "items": len(served.catalogue),
        "seeds": params.seeds,
        "history_masked": params.mask_history,
        "ties": "mid-rank",
        "note": drawn["note"],
        **{name: value for name, value in found.items() if name != "table"},
        **found["table"],
    }
    runs = fits or {"served": [model]}
    each = [(f"retriever/{arm}/seed_{seed}", fitted) for arm, fits_ in runs.items() for seed, fitted in enumerate(fits_)]
    curves = {f"{prefix}/{name}": list(values) for prefix, fitted in each for name, values in fitted.curves.items()}
    return StageResult(metrics=metrics_of(found), curves=curves, outputs=outputs, figures=figures_of(runs), model=bundle(model, served))


# ---------------------------------------------------------------- reading


def read_shelf(inputs: Inputs, tag: str, ctx: Context) -> Shelf:
    """The live items of a release.

    Raises: ContractError when a code lies outside its codebook or the release has no live item.
    """
    import pyarrow.compute as pc
    import torch

    from pipeline.ranker import item_codes
    from pipeline.retrievers.base import Catalogue

    words = vocabulary(inputs, tag)
    rows = inputs.release(tag)
    rows = rows.filter(pc.equal(rows["status"], "live")).sort_by("item_id")
    if not rows.num_rows:
        raise ContractError("the release has no live item", expected="live rows", found="none", where=f"sid.item_sid {tag}")
    ids = pc.cast(rows["item_id"], "string").combine_chunks()
    codes = item_codes(rows.set_column(rows.column_names.index("item_id"), "item_id", ids), ids, words.codebook_sizes)
    number_N = torch.from_numpy(rows["disambiguator"].to_numpy().astype("int64"))
    catalogue = Catalogue(
        codes_NL=torch.from_numpy(codes.codes[1:]),
        weights_NL=torch.from_numpy(codes.weights[1:]),
        number_N=number_N,
        codebook_sizes=words.codebook_sizes,
        numbers=max(ctx.config.assign_sid.max_disambiguator, int(number_N.max()) + 1),
    )
    return Shelf(words, rows["logical_date"][0].as_py(), ids, catalogue, rows["popularity"].to_numpy().astype("float64"))


def read_sequences(inputs: Inputs, shelf: Shelf) -> tuple[Sequences, pa.Array]:
    """(events of the release's items before its cutoff, oldest first and sorted by user; the users).

    Raises: UpstreamMissing when the night has no sequences.
    """
    import pyarrow as pa
    import torch

    from pipeline.encoders.sasrec import Sequences

    columns = ("user_id", "item_ids", "baskets")
    rows = inputs.arrow("feature.user_sequence", columns=columns, where=f"logical_date == '{shelf.day}'").sort_by("user_id")
    if not rows.num_rows:
        raise UpstreamMissing(
            "no sequences of the release's night",
            expected="rows",
            found="none",
            where=f"feature.user_sequence logical_date={shelf.day}",
            next_command=f"sid run user_sequence --date {shelf.day}",
        )
    packed = _packed(rows["item_ids"], shelf.item_ids)
    known_T = _places(rows["item_ids"], shelf.item_ids) >= 0
    baskets_T = basket_numbers(rows)[known_T]
    sequences = Sequences(torch.from_numpy(packed.offsets), torch.from_numpy(packed.items), torch.from_numpy(baskets_T))
    return sequences, pa.chunked_array(rows["user_id"]).combine_chunks()


def read_questions(examples: pa.Table, shelf: Shelf, sequences: Sequences, users: pa.Array, params: TrainRetriever, seed: int) -> Questions:
    """The positive test rows that can be asked: a known item after at least one known event, in an order that does not depend on files.

    Where the history leaves the ranking, an item out of it would tell itself and is not asked for.
    """
    import numpy as np
    import pyarrow.compute as pc

    from pipeline.evaluation import Packed

    order = [(name, "ascending") for name in ("event_ts", "user_id", "item_id")]
    rows = examples.filter(pc.and_(pc.equal(examples["split"], "test"), pc.equal(examples["label"], 1))).sort_by(order)
    histories, trained = _packed(rows["history"], shelf.item_ids), Packed(sequences.offsets.numpy(), sequences.items.numpy())
    target_B, user_B = _index(rows["item_id"], shelf.item_ids), _index(rows["user_id"], users)
    known_B, asked_B = target_B >= 0, histories.lengths() > 0
    had_B = known_B & asked_B & (_holds(histories, np.arange(len(target_B)), target_B) | _holds(trained, user_B, target_B)) & params.mask_history
    left_out = {"item_not_in_release": int((~known_B).sum()), "no_history": int((known_B & ~asked_B).sum()), "had_before": int(had_B.sum())}
    chosen = np.flatnonzero(known_B & asked_B & ~had_B)
    if params.max_questions and len(chosen) > params.max_questions:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, params.max_questions, replace=False))
    asking = _take(histories, chosen)
    return Questions(
        histories=asking,
        targets=target_B[chosen],
        users=np.asarray(rows["user_id"].to_pylist(), dtype=np.str_)[chosen],
        seen=_joined(asking, _take(trained, user_B[chosen])),
        stratum=np.asarray(rows["popularity_stratum"].to_pylist(), dtype=np.str_)[chosen],
        evidence=rows["evidence_count"].to_numpy().astype(np.int64)[chosen],
        left_out=left_out,
    )


def read_teacher(inputs: Inputs, shelf: Shelf, ctx: Context) -> Tensor:
    """What the summary of a history is distilled from, (N, D), as `unger.teacher_vectors`; zero where the night has none."""
    import torch

    from jobs.train_tokenizer import read_tokenizer, read_vectors
    from pipeline.tokenizers.base import items_from_arrow
    from pipeline.tokenizers.unger import teacher_vectors

    table = read_vectors(inputs, replace(ctx, logical_date=shelf.day))
    place_N = torch.from_numpy(_index(table["item_id"], shelf.item_ids))
    vectors_ND = teacher_vectors(read_tokenizer(inputs, shelf.words.generation), items_from_arrow(table))
    teacher_ND = torch.zeros(len(shelf.item_ids), vectors_ND.shape[1])
    teacher_ND[place_N[place_N >= 0]] = vectors_ND[place_N >= 0].float()
    return teacher_ND


def _index(values: Any, vocabulary: pa.Array) -> NDArray[np.int64]:
    """Place of each value in the vocabulary, -1 for one outside it."""
    import pyarrow.compute as pc

    found: NDArray[np.int64] = pc.fill_null(pc.index_in(pc.cast(values, "string"), value_set=vocabulary), -1).to_numpy(zero_copy_only=False).astype("int64")
    return found


def _places(lists: Any, vocabulary: pa.Array) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return _index(pc.list_flatten(lists), vocabulary)


def _packed(lists: Any, vocabulary: pa.Array) -> Packed:
    """Known items of each list, in order."""
    import numpy as np
    import pyarrow.compute as pc

    from pipeline.evaluation import Packed

    item_T = _places(lists, vocabulary)
    row_T = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.bincount(row_T[item_T >= 0], minlength=len(lists))
    return Packed(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), item_T[item_T >= 0])


def _take(packed: Packed, rows: NDArray[np.int64]) -> Packed:
    """The lists of those rows; an empty one for row -1."""
    import numpy as np

    from pipeline.evaluation import Packed

    start, length = packed.offsets[rows.clip(min=0)], np.where(rows >= 0, packed.lengths()[rows.clip(min=0)], 0)
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    return Packed(offsets, packed.items[np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length)])


def _holds(packed: Packed, rows: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the lists of those rows hold these items; no list has the row -1."""
    import numpy as np

    width = int(max(packed.items.max(initial=0), items.max(initial=0))) + 1
    return np.isin(rows * width + items, packed.rows() * width + packed.items) & (rows >= 0)


def _joined(a: Packed, b: Packed) -> Packed:
    """List by list, a's items and then b's."""
    import numpy as np

    from pipeline.evaluation import Packed

    rows, items = np.concatenate([a.rows(), b.rows()]), np.concatenate([a.items, b.items])
    return Packed(a.offsets + b.offsets, items[np.argsort(rows, kind="stable")])


# ---------------------------------------------------------------- training and testing


def evaluated(inputs: Inputs, shelf: Shelf, examples: pa.Table, params: TrainRetriever, ctx: Context) -> tuple[dict[str, list[Fitted]], dict[str, Any]]:
    """(fits by arm, what was found: questions, left_out, invalid_beams, validation, table)."""
    from pipeline import evaluation
    from pipeline.retrievers import training

    sequences, users = read_sequences(inputs, shelf)
    questions = read_questions(examples, shelf, sequences, users, params, _seed(ctx, "questions"))
    fits = train_arms(inputs, shelf, sequences, params, ctx)
    ranks = {arm: [ranked(run, questions, params) for run in runs] for arm, runs in fits.items()}
    if len(questions.targets):
        ranks |= floors(sequences, questions, len(shelf.catalogue), params)
    found: dict[str, Any] = {"questions": len(questions.targets), "left_out": questions.left_out}
    some = questions.histories.part(0, min(INVALID_SAMPLE, len(questions.histories)))
    shares = {arm: training.invalid_beams(runs[0].model, runs[0].table, some, params) for arm, runs in fits.items()}
    found["invalid_beams"] = {arm: share for arm, share in shares.items() if share == share}
    found["validation"] = {arm: dict(runs[0].metrics) for arm, runs in fits.items()}
    searched = bool(found["invalid_beams"])
    found["table"] = evaluation.retrieval_table(
        ranks if len(questions.targets) else {},
        questions.users,
        evaluation.strata(questions.stratum, questions.evidence),
        [(a, b) for a in fits for b in (*(arm for arm in fits if arm != a), *FLOORS) if a == "real" or (a, b) == ("permuted", "random")],
        ks=[k for k in evaluation.CUTOFFS if not searched or k <= params.beams],
    )
    return fits, found


def train_arms(inputs: Inputs, shelf: Shelf, sequences: Sequences, params: TrainRetriever, ctx: Context) -> dict[str, list[Fitted]]:
    """Every arm trained with every seed: arm -> fits by seed; the codes of the controls are one draw."""
    fits: dict[str, list[Fitted]] = {}
    for arm in params.arms:
        catalogue = arm_codes(shelf, arm, _seed(ctx, arm))
        fits[arm] = [_fit(inputs, shelf, catalogue, sequences, params, ctx, number) for number in range(params.seeds)]
        logger.info("retriever=%s arm=%s %s", params.retriever, arm, " ".join(f"{name}={value:.4g}" for name, value in fits[arm][0].metrics.items()))
    return fits


def arm_codes(shelf: Shelf, arm: str, seed: int) -> Catalogue:
    """The codes an arm reads: as released, dealt out anew within popularity deciles, or uniform."""
    import torch

    from pipeline.ranker import shuffled_within_deciles
    from pipeline.retrievers.base import random_codes

    if arm == "random":
        return random_codes(shelf.catalogue, seed)
    if arm == "permuted":
        source_N = shuffled_within_deciles(shelf.catalogue.usable_N.numpy(), shelf.popularity, seed)
        return shelf.catalogue.rearranged(torch.from_numpy(source_N))
    return shelf.catalogue


def _fit(inputs: Inputs, shelf: Shelf, catalogue: Catalogue, sequences: Sequences, params: TrainRetriever, ctx: Context, number: int) -> Fitted:

    from pipeline.retrievers import training

    teacher_ND = read_teacher(inputs, shelf, ctx) if params.distill_weight else None
    device = best_device()
    return training.fit(catalogue, sequences, params, seed=_seed(ctx, number), teacher_ND=teacher_ND, device=device, what=f"train_retriever {params.retriever}")


def ranked(run: Fitted, questions: Questions, params: TrainRetriever) -> NDArray[np.float64]:
    """Rank of every question's item under a trained arm."""
    from pipeline.retrievers import training

    seen = questions.seen if params.mask_history else None
    return training.ranks(run.model, run.table, questions.histories, questions.targets, params, seen)


def floors(sequences: Sequences, questions: Questions, num_items: int, params: TrainRetriever) -> dict[str, list[NDArray[np.float64]]]:
    """Ranks under popularity, first-order Markov and, up to `ease_up_to` items, EASE: fitted on the training events, asked the same questions."""
    from pipeline import evaluation

    found = evaluation.floor_ranks(
        questions.histories,
        questions.targets,
        num_items,
        mask_history=params.mask_history,
        ease=num_items <= params.ease_up_to,
        decay=params.ease_decay,
        fitted_on=evaluation.Packed(sequences.offsets.numpy(), sequences.items.numpy()),
        seen=questions.seen,
    )
    return {name: [ranks_B] for name, ranks_B in found.items()}


def served_fit(inputs: Inputs, served: Shelf, fits: dict[str, list[Fitted]], params: TrainRetriever, ctx: Context, *, tested: bool) -> Fitted:
    """The fit to serve: the tested one when its release is the served one, else one more on the served release and its sequences."""
    if tested and "real" in fits:
        return fits["real"][0]
    logger.info("training the retriever to serve release=%s", served.words.tag)
    sequences, _ = read_sequences(inputs, served)
    return _fit(inputs, served, served.catalogue, sequences, params, ctx, 0)


def _seed(ctx: Context, part: object) -> int:
    return derive_seed(ctx.config.seed, "retriever", part)


# ---------------------------------------------------------------- handing back


def bundle(model: Fitted, served: Shelf) -> ModelBundle:
    """The network, the table of allowed tokens of the release it read, and the digest of its codebook (checked when it is loaded)."""
    import numpy as np

    config = {
        "kind": "sid_retriever",
        "settings": model.settings.model_dump(mode="json"),
        "codebook_sizes": list(served.words.codebook_sizes),
        "numbers": served.catalogue.numbers,
        "sid_version": served.words.tag,
        "codebook_digest": served.words.codebook_digest,
        "generation": served.words.generation,
        "trie_digest": model.table.digest(),
    }
    tensors = {**model.state(), **{f"trie.{name}": tensor.cpu() for name, tensor in model.table.state().items()}}
    items = np.asarray(served.item_ids[:EXAMPLE_ROWS].to_pylist())
    example = {"user_id": np.asarray(["u"] * len(items)), "item_id": items}
    return ModelBundle(name="sid_retriever", tensors=tensors, config=config, example_input=example, example_output={"score": np.zeros(len(items), np.float32)})


def metrics_of(found: dict[str, Any]) -> dict[str, float]:
    """`retriever/<arm>/<slice>/<metric>`, `retriever/<a>_minus_<b>/<slice>/<metric>` and the share of invalid beams."""
    table = found["table"]
    measured = {
        f"retriever/{arm}/{name}/{metric}": value
        for arm, slices in table["arms"].items()
        for name, row in slices.items()
        for metric, value in row.items()
        if "@" in metric
    }
    measured |= {f"retriever/{row['a']}_minus_{row['b']}/{row['stratum']}/{row['metric']}": row["mean"] for row in table["differences"]}
    return measured | {f"retriever/{arm}/invalid_beams": share for arm, share in found.get("invalid_beams", {}).items()}


def figures_of(runs: dict[str, list[Fitted]]) -> dict[str, FigureData]:
    """Training loss of each arm's first seed."""
    return {"loss_curves": FigureData(kind="loss_curves", data={"curves": {arm: list(fits[0].curves["loss"]) for arm, fits in runs.items()}})}
