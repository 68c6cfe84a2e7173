"""The ranker that reads semantic IDs: examples as arrays, arms, training, evaluation, the checkpoint.

Not here: the networks (pipeline/rankers), reading tables (jobs/train_ranker.py), drawing examples (jobs/rank_example.py), metrics (pipeline/evaluation.py).
Tensor suffixes: B batch, N item rows (row 0 = padding), T history, L positions, K codes, D width, U distinct items of a batch, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import evaluation, intervals
from pipeline.config import TrainRanker
from pipeline.context import derive_seed
from pipeline.device import best_device
from pipeline.errors import ConfigError, ContractError, VersionMismatch
from pipeline.rankers import network
from pipeline.rankers.base import ItemTable, Network, Widths, equal_budget
from pipeline.release_file import matrix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

WEIGHT_DECAY = 1e-5  # per unit of learning rate it is tiny; it only keeps rows of rare items near zero
PREFIX_BUCKETS = 4  # hashed prefixes per position, in units of its codebook size
SHAPE = ("model", "dim", "hidden_dims", "weights", "prefix_ngrams", "pooling", "gate_dim", "cross_layers", "cross_rank")  # settings that rebuild a network
DIFFERENCES = (("id_sid", "id"), ("id_sid", "id_permuted"))


# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What an item is to one arm: its own id row, code tokens from one source, or only its popularity.

    codes: "" (none) | release | permuted | other (of a second release).
    """

    uses_id: bool = False
    codes: str = ""
    popularity: bool = False


ARMS: Mapping[str, Arm] = {
    "id": Arm(uses_id=True),
    "id_sid": Arm(uses_id=True, codes="release"),
    "id_permuted": Arm(uses_id=True, codes="permuted"),
    "sid": Arm(codes="release"),
    "permuted": Arm(codes="permuted"),
    "id_other": Arm(uses_id=True, codes="other"),
    "popularity": Arm(popularity=True),
}


def arm_of(name: str) -> Arm:
    """The arm of that name.

    Raises: ConfigError for an unknown name.
    """
    if name not in ARMS:
        raise ConfigError(f"unknown ranker arm {name!r}", expected=", ".join(ARMS), found=name, where="section [train_ranker], key arms")
    return ARMS[name]


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class RankRows:
    """Labelled rows as arrays, all of length R.

    Args:
        user: row of the user table, 0 for a user that training has not seen.
        person: number of the user among all of the rows, seen or not: who is resampled and grouped.
        target / history: item rows (R,) and (R, T); histories are padded with 0 on the right.
        label: 1.0 | 0.0.
        stratum / evidence: head | torso | tail and events of the target at the cutoff.
    """

    user: Ints
    person: Ints
    target: Ints
    history: Ints
    label: Floats
    stratum: npt.NDArray[np.str_]
    evidence: Ints

    def __len__(self) -> int:
        """Number of rows R."""
        return len(self.label)


@dataclass(frozen=True)
class ItemCodes:
    """Codes and router weights per item row (N, L), row 0 = padding; a row of masked codes (K, weight 0) is an item without a SID."""

    codes: Ints
    weights: Floats
    codebook_sizes: tuple[int, ...]


@dataclass(frozen=True)
class RankData:
    """Everything one evaluation trains and tests on.

    Args:
        items: item_id of row 1, 2, ... (row 0 is padding); the release's items first, then items new since.
        users: user_id of row 1, 2, ...; row 0 is a user not seen in training.
        popularity: (N,) decayed events, 0 for items the release does not know.
        other: codes of a second release over the same rows, for the arm id_other.
    """

    train: RankRows
    test: RankRows
    items: tuple[str, ...]
    users: tuple[str, ...]
    codes: ItemCodes
    popularity: Floats
    other: ItemCodes | None = None


def rank_data(examples: pa.Table, release: pa.Table, codebook_sizes: Sequence[int], other: tuple[pa.Table, Sequence[int]] | None = None) -> RankData:
    """Arrays of the examples of one release, in an order that does not depend on files.

    Args:
        examples: rows of rank.rank_example of one logical date.
        release: rows of that release (item_id, codes, weights, popularity).
        codebook_sizes: K per position.
        other: (item_id, codes, weights) of a second release, and its K per position.
    Raises: ContractError when the codes do not fit the codebook sizes.
    """
    examples, release = _plain(examples), _plain(release)
    rows = examples.sort_by([(name, "ascending") for name in ("event_ts", "user_id", "item_id", "label")])
    known = release.sort_by("item_id")
    items = _vocabulary(rows, known["item_id"])
    users = pc.unique(rows.filter(pc.equal(rows["split"], "train"))["user_id"]).sort()
    popularity = np.zeros(len(items) + 1, dtype=np.float32)
    popularity[1 : 1 + known.num_rows] = known["popularity"].to_numpy()
    return RankData(
        train=_rows(rows.filter(pc.equal(rows["split"], "train")), items, users),
        test=_rows(rows.filter(pc.equal(rows["split"], "test")), items, users),
        items=tuple(items.to_pylist()),
        users=tuple(users.to_pylist()),
        codes=item_codes(known, items, codebook_sizes),
        popularity=popularity,
        other=None if other is None else item_codes(_plain(other[0]), items, other[1]),
    )


def item_codes(rows: pa.Table, items: pa.Array, codebook_sizes: Sequence[int]) -> ItemCodes:
    """Codes and weights of `items` (N = len(items) + 1 rows, row 0 padding); items without a row get masked slots.

    Raises: ContractError when a row has another number of positions or a code outside 0..K.
    """
    sizes = np.asarray(codebook_sizes, dtype=np.int64)
    position = pc.index_in(rows["item_id"].combine_chunks(), value_set=items)
    inside = pc.is_valid(position)
    rows, index = rows.filter(inside), pc.drop_null(position).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    codes_NL = np.tile(sizes, (len(items) + 1, 1))
    weights_NL = np.zeros(codes_NL.shape, dtype=np.float32)
    codes_NL[index] = matrix(rows["codes"], len(sizes))
    weights_NL[index] = matrix(rows["weights"], len(sizes), "weights")
    if (codes_NL < 0).any() or (codes_NL > sizes).any():
        raise ContractError("a code lies outside its codebook", expected=f"0..K with K = {sizes.tolist()}", found=str(codes_NL.max(axis=0)), where="codes")
    return ItemCodes(codes_NL, weights_NL, tuple(int(size) for size in sizes))


def permute_within_deciles(codes: ItemCodes, popularity_N: Floats, seed: int) -> ItemCodes:
    """The codes with (codes, weights) moved together between items of one popularity decile; items without a SID stay out.

    Deciles are by rank of popularity, ties in item order. What is left of a gain is capacity and popularity, not meaning.
    """
    source = shuffled_within_deciles((codes.codes != np.asarray(codes.codebook_sizes)).any(axis=1), popularity_N, seed)
    return replace(codes, codes=codes.codes[source], weights=codes.weights[source])


def shuffled_within_deciles(has_sid_N: npt.NDArray[np.bool_], popularity_N: npt.NDArray[Any], seed: int) -> Ints:
    """Row (N,) that each row's codes shall come from: another one of its decile of popularity, or itself for an item without a SID."""
    has_sid = np.flatnonzero(has_sid_N)
    ranked = has_sid[np.argsort(popularity_N[has_sid], kind="stable")]
    decile = np.arange(len(ranked)) * 10 // max(len(ranked), 1)
    draw = np.random.default_rng(seed).random(len(ranked))
    source = np.arange(len(has_sid_N))
    source[ranked] = ranked[np.lexsort((draw, decile))]
    return source


def _plain(table: pa.Table) -> pa.Table:
    """The table with 32-bit offsets throughout: readers differ in whether they hand out large strings and lists."""
    kinds = {"user_id": pa.string(), "item_id": pa.string(), "history": pa.list_(pa.string()), "codes": pa.list_(pa.int64()), "weights": pa.list_(pa.float32())}
    for name in kinds.keys() & set(table.column_names):
        table = table.set_column(table.column_names.index(name), name, pc.cast(table[name], kinds[name]))
    return table


def _vocabulary(rows: pa.Table, known: pa.ChunkedArray) -> pa.Array:
    seen = pa.chunked_array([*rows["item_id"].chunks, *(chunk.flatten() for chunk in rows["history"].chunks)], type=pa.string())
    new = pc.unique(seen.filter(pc.invert(pc.is_in(seen, value_set=known)))).sort()
    return pa.concat_arrays([known.combine_chunks(), new])


def _rows(rows: pa.Table, items: pa.Array, users: pa.Array) -> RankRows:
    return RankRows(
        user=_index(rows["user_id"], users),
        person=np.asarray(rows["user_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64),
        target=_index(rows["item_id"], items),
        history=_histories(rows["history"], items),
        label=rows["label"].to_numpy().astype(np.float32),
        stratum=np.asarray(rows["popularity_stratum"].to_pylist(), dtype=np.str_),
        evidence=rows["evidence_count"].to_numpy().astype(np.int64),
    )


def _index(values: pa.ChunkedArray, vocabulary: pa.Array) -> Ints:
    """1-based row of each value, 0 for a value outside the vocabulary."""
    return pc.fill_null(pc.index_in(values, value_set=vocabulary), -1).to_numpy().astype(np.int64) + 1


def _histories(column: pa.ChunkedArray, items: pa.Array) -> Ints:
    """(R, T) item rows, oldest first, padded with 0 on the right."""
    lists = column.combine_chunks()
    length = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    padded = np.zeros((len(lists), max(int(length.max(initial=0)), 1)), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < length[:, None]] = _index(pa.chunked_array([lists.flatten()]), items)
    return padded


# ---------------------------------------------------------------- tokens of an item


def position_tokens(codes: ItemCodes) -> tuple[Ints, int]:
    """Row of one shared token table per (item, position), and the table's number of rows; masked slots are row 0.

    Each position has K rows of its own: row 1 + sum of the sizes before it + code.
    """
    sizes = np.asarray(codes.codebook_sizes)
    start = 1 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.where(codes.codes == sizes, 0, codes.codes + start), int(1 + sizes.sum())


def prefix_tokens(codes: ItemCodes) -> tuple[Ints, int]:
    """Row of one shared token table per (item, prefix length), and its number of rows: the first code as it is, longer prefixes hashed.

    A prefix that reaches a masked slot is row 0. The hash depends on the codes alone, so a new item moves no other's token.
    Source: prefix n-grams, arXiv 2504.02137; differs: polynomial hash into PREFIX_BUCKETS x K rows per length.
    """
    sizes = np.asarray(codes.codebook_sizes)
    buckets = np.concatenate([sizes[:1], PREFIX_BUCKETS * sizes[1:]])
    start = 1 + np.concatenate([[0], np.cumsum(buckets)[:-1]])
    tokens = np.empty_like(codes.codes)
    state = np.zeros(len(tokens), dtype=np.uint64)
    for position, code_N in enumerate(codes.codes.T.astype(np.uint64)):  # over positions, never over items
        state = _mix(state * np.uint64(0x9E3779B97F4A7C15) + code_N + np.uint64(1))
        tokens[:, position] = code_N.astype(np.int64) if position == 0 else (state % np.uint64(buckets[position])).astype(np.int64)
    masked = np.logical_or.accumulate(codes.codes == sizes, axis=1)
    return np.where(masked, 0, tokens + start), int(1 + buckets.sum())


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return state ^ (state >> np.uint64(27))


def item_table(data: RankData, arm: str, params: TrainRanker, seed: int) -> ItemTable:
    """The item features of one arm.

    Raises: ConfigError for an unknown arm, or for id_other without a second release.
    """
    kind = arm_of(arm)
    id_N, id_rows = _trained_rows(data.train, len(data.items) + 1)
    return _table(kind, _codes_of(data, kind, seed), data.popularity, id_N, id_rows, weights=params.weights, prefix_ngrams=params.prefix_ngrams)


def _table(kind: Arm, codes: ItemCodes | None, popularity_N: Floats, id_N: Ints, id_rows: int, *, weights: bool, prefix_ngrams: bool) -> ItemTable:
    dense = [np.log1p(popularity_N)[:, None]] if kind.popularity else []
    token_NL, token_rows = np.zeros((len(id_N), 0), dtype=np.int64), 1
    factor_NL = np.zeros((len(id_N), 0), dtype=np.float32)
    if codes is not None:
        token_NL, token_rows = (prefix_tokens if prefix_ngrams else position_tokens)(codes)
        factor_NL = codes.weights if weights else np.ones_like(codes.weights)
        dense += [codes.weights] if weights else []
    dense_NF = np.concatenate([np.zeros((len(id_N), 0)), *dense], axis=1).astype(np.float32)
    return ItemTable(id_N if kind.uses_id else np.zeros_like(id_N), token_NL, factor_NL, dense_NF, id_rows if kind.uses_id else 1, token_rows)


def _trained_rows(train: RankRows, num_rows: int) -> tuple[Ints, int]:
    """Dense id rows of the items that training sees; all others share the zero row, an untrained row would only be noise."""
    seen = np.zeros(num_rows, dtype=bool)
    seen[train.target] = True
    seen[train.history.ravel()] = True
    seen[0] = False
    return np.where(seen, np.cumsum(seen), 0), int(seen.sum()) + 1


def _codes_of(data: RankData, kind: Arm, seed: int) -> ItemCodes | None:
    if kind.codes == "other":
        if data.other is None:
            raise ConfigError("arm id_other needs a second release", expected="its tag", found="none", where="section [train_ranker], key other_release")
        return data.other
    if kind.codes == "permuted":
        return permute_within_deciles(data.codes, data.popularity, derive_seed(seed, "permute"))
    return data.codes if kind.codes else None


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class RankerFit:
    """One trained arm: test scores (logits, R), training loss per epoch, parameters, and what rebuilds the network."""

    scores_test: Floats
    curves: Mapping[str, list[float]]
    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


def fit(data: RankData, arm: str, params: TrainRanker, seed: int) -> RankerFit:
    """The arm trained on `data.train` and its logits on `data.test`; test labels are never read.

    Same data, arm, parameters and seed give the same parameters, bit for bit, on one kind of machine and thread count.
    Raises: ConfigError for an arm that cannot be built, ContractError without training rows.
    """
    if not len(data.train):
        raise ContractError("no training rows", expected="rows with split = train", found="none", where="rank.rank_example")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        table = item_table(data, arm, params, seed)
        widths = equal_budget(table, budget=_id_budget(data, params.dim), dim=params.dim)
        model = network(params.model_dump(), table, widths, num_users=len(data.users)).to(best_device())
    losses = _train(model, data.train, params, seed)
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    config = _checkpoint_config(data, arm, params, table, widths)
    return RankerFit(scores(model, data.test, params.batch_size), {"train_loss": losses}, state, config)


def scores(model: Network, rows: RankRows, batch_size: int) -> Floats:
    """Logits (R,) of the rows."""
    model.eval()
    with torch.no_grad():
        parts = [model(*_tensors(rows, slice(start, start + 8 * batch_size))).cpu() for start in range(0, len(rows), 8 * batch_size)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def _train(model: Network, rows: RankRows, params: TrainRanker, seed: int) -> list[float]:
    """Mean training loss per epoch; the batches are slices of one seeded permutation per epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, weight_decay=WEIGHT_DECAY)
    generator = np.random.default_rng(derive_seed(seed, "order"))
    model.train()
    losses = []
    for _ in range(params.max_epochs):
        order = generator.permutation(len(rows))
        total = torch.zeros((), device=best_device())
        for start in range(0, len(order), params.batch_size):
            batch = order[start : start + params.batch_size]
            label_B = torch.from_numpy(rows.label[batch]).to(best_device())
            loss = F.binary_cross_entropy_with_logits(model(*_tensors(rows, batch)), label_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        losses.append(float(total) / len(rows))
    return losses


def _tensors(rows: RankRows, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    arrays = (rows.user[batch], rows.target[batch], rows.history[batch])
    user_B, target_B, history_BT = (torch.from_numpy(array).to(best_device()) for array in arrays)
    return user_B, target_B, history_BT


def _id_budget(data: RankData, dim: int) -> int:
    return _trained_rows(data.train, len(data.items) + 1)[1] * dim


# ---------------------------------------------------------------- evaluation


def evaluate(test: RankRows, scores_by_arm: Mapping[str, Sequence[Floats]]) -> dict[str, Any]:
    """Tables of the report as JSON: `arms` (arm -> stratum -> auc, gauc, logloss, auc_sd, rows, thin), `differences`, `users_covered`.

    Args:
        scores_by_arm: arm -> one array of logits per training seed, rows as in `test`.
    A metric is the mean over seeds; None where a class is missing. `thin` strata have fewer than 1,000 rows and carry no verdict.
    """
    masks = evaluation.strata(test.stratum, test.evidence)
    pairs = [(a, b) for a, b in DIFFERENCES if a in scores_by_arm and b in scores_by_arm]
    return {
        "arms": {arm: {name: _stratum_metrics(test, runs, mask) for name, mask in masks.items()} for arm, runs in scores_by_arm.items()},
        "differences": [
            {"a": a, "b": b, "stratum": name, **row}
            for a, b in pairs
            for name, mask in masks.items()
            for row in _differences(test, scores_by_arm[a], scores_by_arm[b], mask)
        ],
        "users_covered": evaluation.user_auc(test.label, np.zeros(len(test)), test.person).users_covered,
    }


def _stratum_metrics(test: RankRows, runs: Sequence[Floats], mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    label_S, person_S = test.label[mask], test.person[mask]
    auc_per_seed = [evaluation.auc(label_S, run[mask]) for run in runs]
    return {
        "auc": _number(np.mean(auc_per_seed)),
        "auc_sd": _number(np.std(auc_per_seed, ddof=1)) if len(runs) > 1 else None,
        "gauc": _number(np.mean([evaluation.gauc(label_S, run[mask], person_S)[0] for run in runs])),
        "logloss": _number(np.mean([evaluation.logloss(label_S, _probability(run[mask])) for run in runs])),
        "rows": int(mask.sum()),
        "thin": bool(mask.sum() < intervals.THIN_ROWS),
    }


def _differences(test: RankRows, runs_a: Sequence[Floats], runs_b: Sequence[Floats], mask: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Difference a - b in AUC and GAUC with the interval over users and seeds."""
    label_B, person_B = test.label[mask], test.person[mask]
    a_SB, b_SB = (np.stack([run[mask] for run in runs]) for runs in (runs_a, runs_b))
    effects = {"auc": intervals.auc_effect(label_B, a_SB, b_SB, person_B), "gauc": evaluation.gauc_effect(label_B, a_SB, b_SB, person_B)}
    thin = bool(mask.sum() < intervals.THIN_ROWS)
    return [{"metric": name, **evaluation.difference(effect), "thin": thin} for name, effect in effects.items()]


def _probability(logits: Floats) -> Floats:
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def _number(value: Any) -> float | None:
    """The value as JSON: NaN and infinities become null."""
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------- checkpoint


@dataclass(frozen=True)
class LoadedRanker:
    """A checkpoint beside the codes of one release: what a consumer scores with."""

    model: Network
    items: pa.Array
    users: pa.Array

    def score(self, examples: pa.Table, *, batch_size: int = 512) -> Floats:
        """Logits (R,) of rows shaped like rank.rank_example, in their order."""
        return scores(self.model, _rows(_plain(examples), self.items, self.users), batch_size)


def check_codebook(config: Mapping[str, Any], digest: str, *, allow_foreign_codebook: bool = False) -> None:
    """Nothing, when the checkpoint was trained on the codebook of that digest.

    Args:
        allow_foreign_codebook: for studies that measure what a changed vocabulary costs.
    Raises: VersionMismatch otherwise.
    """
    if config["codebook_digest"] == digest or allow_foreign_codebook:
        return
    raise VersionMismatch(
        "the ranker was trained on another codebook: its code rows would mean other items",
        expected=f"codebook_digest {config['codebook_digest']} (release {config['sid_version']})",
        found=f"codebook_digest {digest}",
        where="checkpoint sid_ranker",
        next_command="sid run consumers --date D, to train a ranker on the release that is read",
    )


def load_ranker(
    config: Mapping[str, Any], state: Mapping[str, Tensor], release: pa.Table, *, codebook_digest: str, allow_foreign_codebook: bool = False
) -> LoadedRanker:
    """The trained network reading the codes of `release`, which may be later than the one it was trained on.

    Items without an id row of their own are scored by their codes alone.
    Raises: VersionMismatch for another codebook, ConfigError for an arm whose codes no release holds.
    """
    check_codebook(config, codebook_digest, allow_foreign_codebook=allow_foreign_codebook)
    kind = arm_of(config["arm"])
    if kind.codes not in ("", "release"):
        raise ConfigError(
            "this arm is a control, it cannot be served", expected="id, id_sid, sid or popularity", found=config["arm"], where="checkpoint sid_ranker"
        )
    known = _plain(release).sort_by("item_id")
    id_items = pa.array(config["id_items"], type=pa.string())
    only_here = id_items.filter(pc.invert(pc.is_in(id_items, value_set=known["item_id"])))
    items = pa.concat_arrays([known["item_id"].combine_chunks(), only_here])
    id_N = np.concatenate([[0], _index(pa.chunked_array([items]), id_items)])
    popularity_N = np.zeros(len(items) + 1, dtype=np.float32)
    popularity_N[1 : 1 + known.num_rows] = known["popularity"].to_numpy()
    codes = item_codes(known, items, config["codebook_sizes"]) if kind.codes else None
    table = _table(kind, codes, popularity_N, id_N, len(id_items) + 1, weights=config["weights"], prefix_ngrams=config["prefix_ngrams"])
    widths = Widths(id=config["id_width"], token=config["token_width"])
    users = pa.array(config["users"], type=pa.string())
    model = network(config, table, widths, num_users=len(users)).to(best_device())
    model.load_state_dict(dict(state))
    return LoadedRanker(model, items, users)


def _checkpoint_config(data: RankData, arm: str, params: TrainRanker, table: ItemTable, widths: Widths) -> dict[str, Any]:
    """Everything but the tensors and the release that rebuilds the network, as JSON."""
    id_rows, _ = _trained_rows(data.train, len(data.items) + 1)
    return {
        "kind": "sid_ranker",
        "arm": arm,
        **{name: getattr(params, name) for name in SHAPE},
        "id_width": widths.id,
        "token_width": widths.token,
        "embedding_parameters": widths.id * table.id_rows + widths.token * table.token_rows * bool(table.tokens.shape[1]),
        "codebook_sizes": list(data.codes.codebook_sizes),
        "id_items": np.asarray(data.items, dtype=object)[id_rows[1:] > 0].tolist(),
        "users": list(data.users),
    }
