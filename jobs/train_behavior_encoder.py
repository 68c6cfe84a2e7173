"""train_behavior_encoder: the behaviour encoder of a new generation, or only the rows that moved on a frozen night.

New generation: SASRec on all sequences before the cutoff, brought back to the parent's space by an orthogonal map, and the frozen richness reference.
Frozen: an item's row is trained, against the generation's base, when it first reaches n_min events or its evidence bucket floor(log2(count)) rises above the
one in the parent's item_feature; nothing else is touched.

Both leave a bundle that behavior_embedding reads alike: config `item_ids` and the tensor `behavior_vectors`, one row per item to be written.
The base bundle also holds the network in its own space, the rotation into the exported space and the vocabulary of its tables.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import config, richness
from pipeline.context import Context, Plan, derive_seed
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.stages import FigureData, ModelBundle, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.sasrec import Rows, SasRec, Sequences, TrainedEncoder

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
NETWORK = "network."
NEIGHBOURS = 20
MEASURED_ITEMS = 5000  # items whose split-half overlap is measured at most
ENOUGH_ITEMS = 200  # fewer measured items decide nothing
EXAMPLE_ROWS = 2
SLOWER = "sid run train_behavior_encoder --date D --set train_behavior_encoder.sasrec.learning_rate=0.001"


@dataclass(frozen=True)
class Night:
    """The night's items (sorted by id) and its sequences of two events or more (sorted by user)."""

    item_ids: pa.Array
    counts: NDArray[np.int64]
    strata: pa.Array
    sequences: pa.Table

    def events(self) -> pa.Array:
        """Item of every event, users end to end."""
        return _strings(self.sequences["item_ids"])


@dataclass(frozen=True)
class Base:
    """A generation's encoder as it was logged."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def vocabulary(self) -> pa.Array:
        """Items of the network's tables, in row order."""
        return unpack_ids(self.tensors["vocabulary_bytes"].numpy(), self.tensors["vocabulary_offsets"].numpy())


def run(inputs: Inputs, params: config.TrainBehaviorEncoder, ctx: Context) -> StageResult:
    """A new base encoder, or the rows that moved; `skipped` when no row did.

    Raises: ConfigError for an unknown encoder or a reliability that is not measured, UpstreamMissing without sequences or base,
        ContractError for events of unknown items, no item with n_min events, or vectors that are not finite.
    """
    if int(os.environ.get("RANK", "0")):
        raise SystemExit(0)  # a helper process of torchrun: this stage runs in one process
    if params.encoder != "sasrec":
        raise ConfigError("unknown behaviour encoder", expected="sasrec", found=params.encoder, where="[train_behavior_encoder] encoder")
    if params.richness == "reliability" and not params.measure_reliability:
        raise ConfigError("richness = reliability must be measured", expected="true", found="false", where="[train_behavior_encoder] measure_reliability")
    plan, night = ctx.plan(), read_night(inputs, ctx)
    return new_generation(inputs, params, plan, night) if plan.new_generation else frozen_night(inputs, params, plan, night)


def read_night(inputs: Inputs, ctx: Context) -> Night:
    """The night's popularity and sequences in an order that does not depend on files.

    Raises: UpstreamMissing when no user has two events.
    """
    where = f"logical_date == '{ctx.logical_date}'"
    popularity = inputs.arrow("feature.item_popularity", columns=("item_id", "evidence_count", "popularity_stratum"), where=where).sort_by("item_id")
    sequences = inputs.arrow("feature.user_sequence", columns=("user_id", "item_ids", "baskets", "num_events"), where=where).sort_by("user_id")
    sequences = sequences.filter(pc.greater_equal(sequences["num_events"], 2))
    if not len(sequences):
        raise UpstreamMissing(
            "no user has two events to learn an order from",
            expected="sequences",
            found="none",
            where=f"feature.user_sequence logical_date={ctx.logical_date}",
            next_command=f"sid run user_sequence --date {ctx.logical_date}",
        )
    counts = popularity["evidence_count"].to_numpy().astype(np.int64)
    return Night(_strings(popularity["item_id"]), counts, _strings(popularity["popularity_stratum"]), sequences)


def indexed(night: Night, vocabulary: pa.Array) -> tuple[Sequences, pa.Array]:
    """(sequences by item_index, the items beyond the vocabulary in the order of their indices N, N + 1, ...)."""
    import torch

    from pipeline.encoders.sasrec import Sequences

    events = night.events()
    found = pc.index_in(events, value_set=vocabulary)
    beyond = _sorted_unique(events.filter(pc.is_null(found)))
    extra = pc.add(pc.index_in(events, value_set=beyond), len(vocabulary))
    items_T = torch.from_numpy(pc.coalesce(found, extra).to_numpy(zero_copy_only=False).astype(np.int64))
    lengths = pc.list_value_length(night.sequences["item_ids"]).to_numpy()
    baskets_T = torch.from_numpy(_flat(night.sequences["baskets"]).to_numpy(zero_copy_only=False).astype(np.int64))
    return Sequences(torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)), items_T, baskets_T), beyond


# ---------------------------------------------------------------- a new generation


def new_generation(inputs: Inputs, params: config.TrainBehaviorEncoder, plan: Plan, night: Night) -> StageResult:
    """The base encoder of `plan.generation` with its richness reference."""
    from pipeline.encoders import sasrec

    vocabulary = _sorted_unique(night.events())
    counts_N, strata_N = _facts(night, vocabulary)
    rows_M = np.flatnonzero(counts_N >= params.n_min)
    if not rows_M.size:
        raise ContractError(
            "no item has enough events for a behaviour vector",
            expected=f"an item with {params.n_min} events",
            found=f"at most {counts_N.max()}",
            where=f"feature.user_sequence logical_date={plan.logical_date}",
            next_command="sid run refresh --date D --set train_behavior_encoder.n_min=1",
        )
    sequences, _ = indexed(night, vocabulary)
    seed = derive_seed(plan.seed, "behavior_encoder", plan.generation)
    encoder = sasrec.train(sequences, len(vocabulary), params.sasrec, seed=seed, device=_device())
    rotation_DD, drift = _bring_back(inputs, plan, vocabulary.take(rows_M), encoder.item_vectors[rows_M])
    vectors_MD = checked((encoder.item_vectors[rows_M] @ rotation_DD).numpy(), vocabulary.take(rows_M), "train_behavior_encoder")
    overlap_M = split_half_overlap(sequences, len(vocabulary), rows_M, params, seed) if params.measure_reliability else None
    reference, found, figure = fit_richness(params, counts_N[rows_M], np.linalg.norm(vectors_MD, axis=1), overlap_M, strata_N[rows_M])
    metrics = {**encoder.metrics, **floors(sequences, len(vocabulary), params.sasrec, seed), **drift, **found}
    model = base_bundle(params, plan, encoder, rotation_DD, vocabulary, rows_M, vectors_MD, reference)
    return StageResult(
        metrics={"vocabulary": float(len(vocabulary)), "vectors": float(rows_M.size), **metrics},
        curves={name: [value for value in values if np.isfinite(value)] for name, values in encoder.curves.items()},
        outputs={"richness_reference": reference, "generation": plan.generation, "rows": int(rows_M.size), "gate": gated(found, rows_M.size)},
        figures={"strength_by_stratum": figure, "loss_curves": FigureData(kind="loss_curves", data={"curves": {"behaviour": encoder.curves["loss"]}})},
        model=model,
    )


def fit_richness(
    params: config.TrainBehaviorEncoder, counts_M: NDArray[np.int64], norms_M: Floats, overlap_M: Floats | None, strata_M: NDArray[Any]
) -> tuple[dict[str, Any], dict[str, float], FigureData]:
    """(frozen reference, its metrics, histogram of w by stratum); every richness option is measured against the overlap, not only the chosen one."""
    from pipeline import evaluation

    if overlap_M is not None and not np.isfinite(overlap_M).any():
        overlap_M = None
    if overlap_M is None and params.richness == "reliability":
        raise ContractError(
            "too few items to measure reliability", expected=f"more than {NEIGHBOURS} items in both halves of the users", found=str(counts_M.size)
        )
    settings: dict[str, Any] = {"alpha": params.alpha, "low_strength_share": params.low_strength_share, "beta": params.beta}
    reference = richness.fit_reference(params.richness, counts_M, norms_M, overlap_M, **settings)
    richness_M = richness.richness(reference, counts_M, norms_M)
    strength_M = richness.alignment_strength(richness_M, reference["alpha"], reference["beta"])
    metrics = {
        "beta": reference["beta"],
        "low_strength_share": float((strength_M < richness.LOW_STRENGTH).mean()),
        "high_strength_share": float((strength_M > 0.5).mean()),
        "mean_strength": float(strength_M.mean()),
        "spearman_norm_count": evaluation.spearman(norms_M, counts_M),
    }
    if overlap_M is not None:
        for kind in richness.KINDS:
            other = richness.richness(richness.fit_reference(kind, counts_M, norms_M, overlap_M, **settings), counts_M, norms_M)
            metrics[f"richness_spearman/{kind}"] = evaluation.spearman(other, overlap_M)
        metrics |= {"richness_spearman": metrics[f"richness_spearman/{params.richness}"], "split_half_overlap": float(np.nanmean(overlap_M))}
        metrics |= {"kappa": reference["kappa"], "measured_items": float(np.isfinite(overlap_M).sum())}
    edges = np.linspace(0, 1, 21)
    counts = {str(name): np.histogram(strength_M[strata_M == name], edges)[0].tolist() for name in ("head", "torso", "tail")}
    figure = FigureData(kind="strength_by_stratum", data={"edges": edges.tolist(), "counts": counts})
    return reference, {name: value for name, value in metrics.items() if np.isfinite(value)}, figure


def gated(metrics: Mapping[str, float], rows: int) -> dict[str, float]:
    """The metrics that behavior_embedding's audit judges; from fewer than ENOUGH_ITEMS items nothing is judged."""
    judged = ["low_strength_share", "mean_strength"] if rows >= ENOUGH_ITEMS else []
    if metrics.get("measured_items", 0) >= ENOUGH_ITEMS:
        judged.append("richness_spearman")
    return {name: metrics[name] for name in judged if name in metrics}


def split_half_overlap(sequences: Sequences, num_items: int, rows_M: NDArray[np.int64], params: config.TrainBehaviorEncoder, seed: int) -> Floats:
    """Share of each item's 20 nearest neighbours on which encoders of two random halves of the users agree [M]; NaN where not measured.

    Measured on items that occur in both halves, at most MEASURED_ITEMS of them drawn by the seed; a half stops after `half_epochs`.
    """
    import torch

    from pipeline import evaluation
    from pipeline.encoders import sasrec

    users = torch.randperm(sequences.offsets.numel() - 1, generator=torch.Generator().manual_seed(seed))
    overlap_M = np.full(rows_M.size, np.nan)
    if users.numel() < 2:
        return overlap_M
    halves = [sequences.users(half.sort().values) for half in users.tensor_split(2)]
    settings = params.sasrec.model_copy(update={"max_epochs": min(params.half_epochs, params.sasrec.max_epochs)})
    vectors = [
        sasrec.train(half, num_items, settings, seed=derive_seed(seed, "half", number), device=_device(), what=f"half {number}").item_vectors
        for number, half in enumerate(halves)
    ]
    seen_N = np.logical_and.reduce([np.bincount(half.items.numpy(), minlength=num_items) > 0 for half in halves])
    both = np.flatnonzero(seen_N[rows_M])
    if both.size <= NEIGHBOURS:
        return overlap_M
    asked = np.sort(np.random.default_rng(seed).permutation(both.size)[:MEASURED_ITEMS])
    candidates = torch.from_numpy(rows_M[both])
    overlap_M[both[asked]] = evaluation.neighbor_overlap(vectors[0][candidates], vectors[1][candidates], k=NEIGHBOURS, rows_B=torch.from_numpy(asked))
    return overlap_M


def floors(sequences: Sequences, num_items: int, params: config.SasRec, seed: int) -> dict[str, float]:
    """`floor/<popularity | markov>_<recall@10 | ndcg@10>` on the very questions that the encoder was validated with."""
    from pipeline import evaluation
    from pipeline.encoders import sasrec

    rest, questions = sasrec.holdout(sequences, params.valid_users, params.max_length, seed)
    if not questions.users.numel():
        return {}
    asked = rest.users(questions.users)
    contexts = evaluation.Packed(asked.offsets.numpy(), asked.items.numpy())
    ranks = evaluation.floor_ranks(contexts, questions.targets.numpy(), num_items, mask_history=False, ease=False)
    return {f"floor/{name}_{metric}": value for name, ranks_B in ranks.items() for metric, value in evaluation.ranking_metrics(ranks_B, (10,)).items()}


def _bring_back(inputs: Inputs, plan: Plan, item_ids: pa.Array, vectors_MD: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(rotation from the new space to the exported one, drift that is left); the identity without a parent encoder of the same width."""
    import torch

    from pipeline.encoders import sasrec

    width = vectors_MD.shape[1]
    old = None if plan.parent is None else read_base(inputs, plan.parent.generation)
    if old is None or old.tensors["behavior_vectors"].shape[1] != width:
        return torch.eye(width), {}
    place = pc.index_in(item_ids, value_set=pa.array(old.config["item_ids"], pa.large_string()))
    shared = np.flatnonzero(pc.is_valid(place).to_numpy(zero_copy_only=False))
    if shared.size < width:
        logger.warning("space not brought back: shared_items=%d width=%d", shared.size, width)
        return torch.eye(width), {"procrustes/shared_items": float(shared.size)}
    new_SD, old_SD = vectors_MD[shared], old.tensors["behavior_vectors"][pc.drop_null(place).to_numpy().astype(np.int64)]
    rotation_DD = sasrec.procrustes(new_SD, old_SD)
    left = (new_SD @ rotation_DD - old_SD).norm() / old_SD.norm()
    cosine = torch.nn.functional.cosine_similarity
    return rotation_DD, {
        "procrustes/shared_items": float(shared.size),
        "procrustes/cosine_before": float(cosine(new_SD, old_SD).mean()),
        "procrustes/cosine_after": float(cosine(new_SD @ rotation_DD, old_SD).mean()),
        "procrustes/drift_left": float(left),
    }


def base_bundle(
    params: config.TrainBehaviorEncoder,
    plan: Plan,
    encoder: TrainedEncoder,
    rotation_DD: Tensor,
    vocabulary: pa.Array,
    rows_M: NDArray[np.int64],
    vectors_MD: NDArray[np.float32],
    reference: Mapping[str, Any],
) -> ModelBundle:
    """The model `behavior_encoder`: exported rows, network in its own space, rotation, vocabulary, and how it was made."""
    characters, offsets = pack_ids(vocabulary)
    network = {f"{NETWORK}{name}": tensor for name, tensor in encoder.state.items()}
    tensors = {"behavior_vectors": vectors_MD, "rotation": rotation_DD, "vocabulary_bytes": characters, "vocabulary_offsets": offsets, **network}
    about = {
        "kind": "behavior_encoder",
        "encoder": params.encoder,
        "generation": plan.generation,
        "params": params.sasrec.model_dump(mode="json"),
        "n_min": params.n_min,
        "richness_reference": dict(reference),
    }
    return _bundle("behavior_encoder", vocabulary.take(rows_M).to_pylist(), vectors_MD, tensors, about)


# ---------------------------------------------------------------- a frozen night


def frozen_night(inputs: Inputs, params: config.TrainBehaviorEncoder, plan: Plan, night: Night) -> StageResult:
    """The rows that moved, trained against the generation's base; `skipped` without any."""
    moved, first = moved_items(inputs, params, plan, night)
    moved_ids = night.item_ids.take(moved)
    seen = pc.is_in(moved_ids, value_set=pc.unique(night.events())).to_numpy(zero_copy_only=False)
    metrics = {"moved_items": float(moved.size), "first_rows": float(first.sum()), "moved_without_sequence": float((~seen).sum())}
    if not seen.any():
        return StageResult(status="skipped", metrics=metrics, outputs={"generation": plan.generation, "rows": 0})
    base = read_base(inputs, plan.generation)
    if base is None:
        raise UpstreamMissing(
            f"the encoder of generation {plan.generation} is not recorded", expected="one row", found="none", where="sid.generation", next_command="sid repair"
        )
    kept = moved[seen]
    buckets = richness.evidence_bucket(night.counts[kept])
    names = night.item_ids.take(kept).to_pylist()
    seeds = [derive_seed(plan.seed, plan.generation, name, bucket) for name, bucket in zip(names, buckets.tolist(), strict=True)]
    trained, ids, shift = _train_moved(base, night, night.item_ids.take(kept), np.asarray(seeds, np.int64))
    metrics |= {"rows": float(len(ids)), **shift["metrics"]}
    if not len(ids):
        return StageResult(status="skipped", metrics=metrics, outputs={"generation": plan.generation, "rows": 0})
    vectors_MD = checked((trained.inputs @ base.tensors["rotation"]).numpy(), ids, "train_behavior_encoder")
    about = {"kind": "behavior_rows", "generation": plan.generation}
    return StageResult(
        metrics=metrics,
        curves={"row_loss": shift["curve"]},
        outputs={"richness_reference": base.config["richness_reference"], "generation": plan.generation, "rows": len(ids)},
        model=_bundle("behavior_rows", ids.to_pylist(), vectors_MD, {"behavior_vectors": vectors_MD}, about),
    )


def moved_items(inputs: Inputs, params: config.TrainBehaviorEncoder, plan: Plan, night: Night) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(rows of `night.item_ids` whose bucket rose above the parent's, which of them had no vector yet).

    An item that the parent masks or does not know counts as bucket -1, so reaching n_min is a rise as well.
    """
    assert plan.parent is not None, "a frozen night has a parent"
    where = f"logical_date == '{plan.parent.logical_date}' and generation == {plan.generation}"
    parent = inputs.arrow("feature.item_feature", columns=("item_id", "evidence_bucket"), where=where)
    place = pc.index_in(night.item_ids, value_set=_strings(parent["item_id"]))
    before_N = pc.fill_null(_flat(parent["evidence_bucket"]).take(place), -1).to_numpy(zero_copy_only=False)
    moved = np.flatnonzero((night.counts >= params.n_min) & (richness.evidence_bucket(night.counts) > before_N))
    return moved, before_N[moved] < 0


def _train_moved(base: Base, night: Night, item_ids: pa.Array, seeds_M: NDArray[np.int64]) -> tuple[Rows, pa.Array, dict[str, Any]]:
    """(trained rows in the base's own space, their items, how far they moved); an item with nothing of the base near it waits for more events."""
    import torch

    from pipeline.encoders import sasrec

    params = config.SasRec.model_validate(base.config["params"])
    vocabulary = base.vocabulary
    model: SasRec = sasrec.restore({name.removeprefix(NETWORK): tensor for name, tensor in base.tensors.items() if name.startswith(NETWORK)}, params)
    sequences, beyond = indexed(night, vocabulary)
    index_M = pc.index_in(item_ids, value_set=pa.concat_arrays([vocabulary, beyond])).to_numpy(zero_copy_only=False).astype(np.int64)
    moved_M = torch.from_numpy(index_M)
    start, near_M = sasrec.initial_rows(model, sequences, moved_M)
    start = sasrec.Rows(start.inputs[near_M], start.outputs[near_M])
    model = model.to(_device())
    rows, curve = sasrec.train_rows(model, sequences, moved_M[near_M], start, torch.from_numpy(seeds_M)[near_M], params)
    cosine = torch.nn.functional.cosine_similarity(rows.inputs, start.inputs)
    metrics = {"rows_alone": float((~near_M).sum())}
    if cosine.numel():
        metrics |= {"row_cosine_to_start": float(cosine.mean()), "mean_row_norm": float(rows.inputs.norm(dim=1).mean())}
    return rows, item_ids.filter(pa.array(near_M.numpy())), {"metrics": metrics, "curve": curve}


# ---------------------------------------------------------------- shared pieces


def read_base(inputs: Inputs, generation: int) -> Base | None:
    """The encoder of a generation; None when sid.generation does not hold it."""
    from safetensors.torch import load_file

    rows = inputs.arrow("sid.generation", columns=("generation", "encoder_uri"), where=f"generation == {generation:d}").to_pylist()
    if not rows:
        return None
    folder = inputs.model(rows[0]["encoder_uri"])
    return Base(json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors"))


def checked(vectors_MD: NDArray[np.float32], item_ids: pa.Array, where: str, next_command: str = SLOWER) -> NDArray[np.float32]:
    """The vectors themselves.

    Raises: ContractError naming the first items whose vector is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(vectors_MD).all(axis=1))
    if bad.size:
        raise ContractError(
            "behaviour vectors are not finite",
            expected="finite numbers",
            found=f"{bad.size} of {len(item_ids)} rows with NaN or infinity, e.g. items {item_ids.take(bad[:3]).to_pylist()}",
            where=where,
            next_command=next_command,
        )
    return vectors_MD


def pack_ids(item_ids: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(UTF-8 bytes end to end, offsets [N + 1]): item ids as tensors."""
    fresh = item_ids.cast(pa.large_string()).take(pa.array(np.arange(len(item_ids))))  # buffers that begin at 0
    offsets = np.frombuffer(fresh.buffers()[1], np.int64)[: len(item_ids) + 1].copy()
    characters = fresh.buffers()[2]
    return (np.frombuffer(characters, np.uint8)[: offsets[-1]].copy() if characters else np.zeros(0, np.uint8)), offsets


def unpack_ids(characters: NDArray[np.uint8], offsets: NDArray[np.int64]) -> pa.Array:
    """The item ids that `pack_ids` packed."""
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets.tobytes()), pa.py_buffer(characters.tobytes()))


def _bundle(name: str, item_ids: list[str], vectors_MD: NDArray[np.float32], tensors: Mapping[str, Any], about: Mapping[str, Any]) -> ModelBundle:
    asked = (item_ids * EXAMPLE_ROWS)[:EXAMPLE_ROWS]
    shown = np.concatenate([vectors_MD] * EXAMPLE_ROWS)[:EXAMPLE_ROWS]
    return ModelBundle(
        name=name, tensors=tensors, config={**about, "item_ids": item_ids}, example_input={"item_id": np.asarray(asked)}, example_output={"vector": shown}
    )


def _facts(night: Night, vocabulary: pa.Array) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(events so far, stratum) of the vocabulary's items.

    Raises: ContractError for an item with events that item_popularity does not know.
    """
    place = pc.index_in(vocabulary, value_set=night.item_ids)
    if place.null_count:
        unknown = vocabulary.filter(pc.is_null(place))
        raise ContractError(
            "sequences hold items that item_popularity lacks",
            expected="every item with an event",
            found=f"{len(unknown)} unknown, e.g. {unknown[:3].to_pylist()}",
            where="feature.item_popularity",
            next_command="sid run item_popularity --date D",
        )
    rows = place.to_numpy().astype(np.int64)
    return night.counts[rows], night.strata.take(rows).to_numpy(zero_copy_only=False)


def _strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return _flat(column).cast(pa.large_string())


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array; a list column gives its values."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return column


def _sorted_unique(values: pa.Array) -> pa.Array:
    found = pc.unique(values)
    return found.take(pc.array_sort_indices(found))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
