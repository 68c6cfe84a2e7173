"""train_behavior_encoder: the behaviour encoder of a new generation, or only the rows that moved on a frozen night.

New generation: the chosen encoder on all sequences before the cutoff, brought back to the parent's space by an orthogonal map, and the richness reference.
Frozen: an item's row is trained, against the generation's base, when it first reaches n_min events or its evidence bucket floor(log2(count)) rises above the
one in the parent's item_feature; nothing else is touched.

Both leave a bundle that behavior_embedding reads alike: config `item_ids` and the tensor `behavior_vectors`, one row per item to be written.
The base bundle also holds what later nights need of the encoder in its own space, the rotation into the exported space and the vocabulary of its tables.

An encoder with `cold_items` gives an item with a text its vector before n_min events. The mask is then open from the item's first night; what stands behind
the row is said by its evidence count, 0 = text alone, and such rows take no part in the richness reference, in reliability and in the rotation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.behavior_inputs import (
    Base,
    Content,
    Items,
    Night,
    flat,
    indexed,
    pack_ids,
    read_base,
    read_content,
    read_items,
    read_night,
    sorted_unique,
    strings,
)
from pipeline import config, richness
from pipeline.context import Context, Plan, derive_seed
from pipeline.device import best_device
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.popularity import STRATA
from pipeline.stages import FigureData, ModelBundle, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.behavior import BehaviorEncoder, MovedRows, Sequences, TrainedEncoder

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
NETWORK = "network."
NEIGHBOURS = 20
MEASURED_ITEMS = 5000  # items whose split-half overlap is measured at most
ENOUGH_ITEMS = 200  # fewer measured items decide nothing
EXAMPLE_ROWS = 2
ANEW = "sid run refresh --date D --set plan_night.policy=cold"


def run(inputs: Inputs, params: config.TrainBehaviorEncoder, ctx: Context) -> StageResult:
    """A new base encoder, or the rows that moved; `skipped` when no row did.

    Raises: ConfigError for an unknown encoder or a reliability that is not measured, UpstreamMissing without sequences or base,
        ContractError for events of unknown items, no item with n_min events, or vectors that are not finite.
    """
    chosen(params)
    if params.richness == "reliability" and not params.measure_reliability:
        raise ConfigError("richness = reliability must be measured", expected="true", found="false", where="[train_behavior_encoder] measure_reliability")
    if params.richness == "norm" and params.encoder == "sasrec" and params.sasrec.tied:
        logger.warning("the norm of a table that input and output share falls with an item's count: set train_behavior_encoder.sasrec.tied=false beside norm")
    items = read_items(inputs, ctx)
    return new_generation(inputs, params, ctx, read_night(inputs, ctx, items)) if ctx.plan().new_generation else frozen_night(inputs, params, ctx, items)


def chosen(params: config.TrainBehaviorEncoder, name: str = "", settings: Mapping[str, Any] | None = None, **changes: Any) -> BehaviorEncoder:
    """The configured encoder, or that of a logged base, with some of its settings changed.

    Raises: ConfigError for a name that is not registered.
    """
    from pipeline.encoders import BEHAVIOR_ENCODERS

    name = name or params.encoder
    if name not in BEHAVIOR_ENCODERS:
        raise ConfigError("unknown behaviour encoder", expected=" | ".join(BEHAVIOR_ENCODERS), found=name, where="[train_behavior_encoder] encoder")
    section = getattr(params, name)
    if settings is not None:
        section = type(section).model_validate(settings)
    return BEHAVIOR_ENCODERS[name](section.model_copy(update=changes))


# ---------------------------------------------------------------- a new generation


def new_generation(inputs: Inputs, params: config.TrainBehaviorEncoder, ctx: Context, night: Night) -> StageResult:
    """The base encoder of `plan.generation` with its richness reference."""
    plan, encoder = ctx.plan(), chosen(params)
    content = read_content(inputs, ctx) if encoder.reads_text else None
    vocabulary, warm_N, exported_N = base_items(params, night, content if encoder.cold_items else None)
    counts_N, strata_N = _facts(night, vocabulary)
    rows_M, warm_W = np.flatnonzero(exported_N), np.flatnonzero(warm_N)
    sequences, _ = indexed(night, vocabulary)
    vectors_NC = None if content is None else content.of(vocabulary)
    seed = derive_seed(plan.seed, "behavior_encoder", plan.logical_date)
    old = None if plan.parent is None else read_base(inputs, plan.parent.generation)
    begun = None if plan.start == "cold" else encoder_at_parent(old, params, plan, vocabulary)
    base = (begun or encoder).train(sequences, len(vocabulary), seed=seed, device=best_device(), what=params.encoder, content=vectors_NC)
    rotation_DD, drift = _bring_back(old, vocabulary.take(warm_W), base.item_vectors[warm_W])
    vectors_ND = (base.item_vectors @ rotation_DD).numpy()
    vectors_MD = checked(vectors_ND[rows_M], vocabulary.take(rows_M), "train_behavior_encoder", slower(params))
    overlap_W = split_half_overlap(sequences, len(vocabulary), warm_W, params, seed, vectors_NC) if params.measure_reliability else None
    reference, found, figure = fit_richness(params, counts_N[warm_W], np.linalg.norm(vectors_ND[warm_W], axis=1), overlap_W, strata_N[warm_W])
    found |= encoder.probe(sequences, len(vocabulary), seed=seed, device=best_device(), content=vectors_NC)
    metrics = {"begun_at_parent": float(begun is not None), **base.metrics, **floors(sequences, len(vocabulary), params, seed), **drift, **found}
    return StageResult(
        metrics={"vocabulary": float(len(vocabulary)), "vectors": float(rows_M.size), "cold_vectors": float(rows_M.size - warm_W.size), **metrics},
        curves={name: [value for value in values if np.isfinite(value)] for name, values in base.curves.items()},
        outputs={"richness_reference": reference, "generation": plan.generation, "rows": int(rows_M.size), "gate": gated(found, warm_W.size)},
        figures={"strength_by_stratum": figure, "loss_curves": FigureData(kind="loss_curves", data={"curves": {"behaviour": base.curves["loss"]}})},
        model=base_bundle(params, plan, base, rotation_DD, vocabulary, rows_M, vectors_MD, reference),
    )


def encoder_at_parent(old: Base | None, params: config.TrainBehaviorEncoder, plan: Plan, vocabulary: pa.Array) -> BehaviorEncoder | None:
    """The encoder, at its refit rate, that begins at the parent's; None, and said in the log, when that is of another kind or cannot be begun at.

    Raises: UpstreamMissing when the parent's encoder is not recorded; ContractError when its network has other sizes.
    """
    import torch

    from pipeline.encoders.behavior import Champion

    assert plan.parent is not None, "a warm or anchored night has a parent"
    if old is None:
        raise UpstreamMissing(f"the encoder of generation {plan.parent.generation} is not recorded", expected="one row", found="none", where="sid.generation")
    place_N = pc.fill_null(pc.index_in(vocabulary, value_set=old.vocabulary), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    state = {name.removeprefix(NETWORK): tensor for name, tensor in old.tensors.items() if name.startswith(NETWORK)}
    encoder = chosen(params, learning_rate=params.refit_rate * getattr(params, params.encoder).learning_rate)
    if old.config["encoder"] == params.encoder and encoder.begin_at(Champion(state, torch.from_numpy(place_N))):
        return encoder
    logger.warning("behaviour encoder begins anew encoder=%s parent_encoder=%s", params.encoder, old.config["encoder"])
    return None


def base_items(params: config.TrainBehaviorEncoder, night: Night, content: Content | None) -> tuple[pa.Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """(vocabulary of the base, which of it has n_min events, which of it gets a vector).

    Args:
        content: texts whose items need no event; None = only events count.
    Raises: ContractError when no item has n_min events.
    """
    vocabulary = sorted_unique(night.events())
    if content is not None:
        vocabulary = sorted_unique(pa.concat_arrays([vocabulary, night.item_ids.filter(pa.array(content.has(night.item_ids)))]))
    counts_N, _ = _facts(night, vocabulary)
    warm_N = counts_N >= params.n_min
    if not warm_N.any():
        raise ContractError(
            "no item has enough events for a behaviour vector",
            expected=f"an item with {params.n_min} events",
            found=f"at most {counts_N.max()}",
            where="feature.user_sequence of the night",
            next_command="sid run refresh --date D --set train_behavior_encoder.n_min=1",
        )
    return vocabulary, warm_N, warm_N if content is None else warm_N | content.has(vocabulary)


def fit_richness(
    params: config.TrainBehaviorEncoder, counts_M: NDArray[np.int64], norms_M: Floats, overlap_M: Floats | None, strata_M: NDArray[Any]
) -> tuple[dict[str, Any], dict[str, float], FigureData]:
    """(frozen reference, its metrics, histogram of w by stratum); every richness option is measured against the overlap, not only the chosen one."""
    from pipeline import evaluation

    if overlap_M is not None and not np.isfinite(overlap_M).any():
        overlap_M = None
    if overlap_M is None and params.richness == "reliability":
        raise ContractError(
            "too few items to measure reliability",
            expected=f"more than {NEIGHBOURS} items in both halves of the users",
            found=f"at most {counts_M.size}",
            where="[train_behavior_encoder] richness",
            next_command="sid run refresh --date D --set train_behavior_encoder.richness=rank",
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
    counts = {str(name): np.histogram(strength_M[strata_M == name], edges)[0].tolist() for name in STRATA}
    figure = FigureData(kind="strength_by_stratum", data={"edges": edges.tolist(), "counts": counts})
    return reference, {name: value for name, value in metrics.items() if np.isfinite(value)}, figure


def gated(metrics: Mapping[str, float], rows: int) -> dict[str, float]:
    """The metrics that behavior_embedding's audit judges; from fewer than ENOUGH_ITEMS items nothing is judged."""
    judged = ["low_strength_share", "mean_strength", "probe_lift"] if rows >= ENOUGH_ITEMS else []
    if metrics.get("measured_items", 0) >= ENOUGH_ITEMS:
        judged.append("richness_spearman")
    return {name: metrics[name] for name in judged if name in metrics}


def split_half_overlap(
    sequences: Sequences, num_items: int, rows_M: NDArray[np.int64], params: config.TrainBehaviorEncoder, seed: int, content: Tensor | None
) -> Floats:
    """Share of each item's 20 nearest neighbours on which encoders of two random halves of the users agree [M]; NaN where not measured.

    Measured on items that occur in both halves, at most MEASURED_ITEMS of them drawn by the seed; a half stops after `half_epochs`.
    """
    import torch

    from pipeline import evaluation

    users = torch.randperm(sequences.offsets.numel() - 1, generator=torch.Generator().manual_seed(seed))
    overlap_M = np.full(rows_M.size, np.nan)
    if users.numel() < 2:
        return overlap_M
    halves = [sequences.users(half.sort().values) for half in users.tensor_split(2)]
    encoder = chosen(params, max_epochs=min(params.half_epochs, getattr(params, params.encoder).max_epochs))
    vectors = [
        encoder.train(half, num_items, seed=derive_seed(seed, "half", number), device=best_device(), what=f"half {number}", content=content).item_vectors
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


def floors(sequences: Sequences, num_items: int, params: config.TrainBehaviorEncoder, seed: int) -> dict[str, float]:
    """`floor/<popularity | markov>_<recall | ndcg>@<10 | 20>` on the very questions that the encoder was validated with, the history masked as there.

    Fitted on what the encoder learns from: the events of all users but the held-out ones.
    """
    from pipeline import evaluation
    from pipeline.encoders import sasrec

    masked = chosen(params).masks_history
    rest, questions = sasrec.holdout(sequences, getattr(params, params.encoder).valid_users, 2, seed, new=masked)
    if not questions.users.numel():
        return {}
    asked = rest.users(questions.users)
    contexts = evaluation.Packed(asked.offsets.numpy(), asked.items.numpy())
    known = evaluation.Packed(rest.offsets.numpy(), rest.items.numpy())
    ranks = evaluation.floor_ranks(contexts, questions.targets.numpy(), num_items, mask_history=masked, ease=False, fitted_on=known)
    return {f"floor/{name}_{metric}": value for name, ranks_B in ranks.items() for metric, value in evaluation.ranking_metrics(ranks_B, (10, 20)).items()}


def _bring_back(old: Base | None, item_ids: pa.Array, vectors_MD: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(rotation from the new space to the exported one, drift that is left); the identity without a parent encoder of the same width."""
    import torch

    from pipeline.encoders import sasrec

    width = vectors_MD.shape[1]
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
    """The model `behavior_encoder`: exported rows, the encoder's state in its own space, rotation, vocabulary, and how it was made."""
    characters, offsets = pack_ids(vocabulary)
    network = {f"{NETWORK}{name}": tensor for name, tensor in encoder.state.items()}
    tensors = {"behavior_vectors": vectors_MD, "rotation": rotation_DD, "vocabulary_bytes": characters, "vocabulary_offsets": offsets, **network}
    about = {
        "kind": "behavior_encoder",
        "encoder": params.encoder,
        "generation": plan.generation,
        "params": getattr(params, params.encoder).model_dump(mode="json"),
        "n_min": params.n_min,
        "richness_reference": dict(reference),
    }
    return _bundle("behavior_encoder", vocabulary.take(rows_M).to_pylist(), vectors_MD, tensors, about)


# ---------------------------------------------------------------- a frozen night


def frozen_night(inputs: Inputs, params: config.TrainBehaviorEncoder, ctx: Context, items: Items) -> StageResult:
    """The rows that moved, made against the generation's base by the generation's encoder; `skipped` without any.

    Where its rows are a function of the base and the sequences that hold a moved item, only those are read.
    """
    plan = ctx.plan()
    base = read_base(inputs, plan.generation)
    if base is None:
        raise UpstreamMissing(
            f"the encoder of generation {plan.generation} is not recorded",
            expected="one row",
            found="none",
            where="sid.generation",
            next_command=ANEW,
        )
    encoder = chosen(params, base.config["encoder"], base.config["params"])
    content = read_content(inputs, ctx) if encoder.reads_text else None
    cold = content if encoder.cold_items else None
    moved, first = moved_items(inputs, params, plan, items, cold)
    skipped = {"generation": plan.generation, "rows": 0}
    if not moved.size:
        return StageResult(status="skipped", metrics={"moved_items": 0.0}, outputs=skipped)
    night = read_night(inputs, ctx, items, items.item_ids.take(moved) if encoder.local_rows else None)
    seen = pc.is_in(night.item_ids.take(moved), value_set=pc.unique(night.events())).to_numpy(zero_copy_only=False)
    if cold is not None:
        seen |= cold.has(night.item_ids.take(moved))
    metrics = {"moved_items": float(moved.size), "first_rows": float(first.sum()), "moved_without_sequence": float((~seen).sum())}
    if not seen.any():
        return StageResult(status="skipped", metrics=metrics, outputs=skipped)
    made, ids = _make_rows(encoder, base, night, moved[seen], plan, content)
    metrics |= {"rows": float(len(ids)), **made.metrics}
    if not len(ids):
        return StageResult(status="skipped", metrics=metrics, outputs=skipped)
    vectors_MD = checked((made.vectors @ base.tensors["rotation"]).numpy(), ids, "train_behavior_encoder", ANEW)  # the base's settings, which nobody can change
    about = {"kind": "behavior_rows", "generation": plan.generation}
    return StageResult(
        metrics=metrics,
        curves={"row_loss": made.curve} if made.curve else {},
        outputs={"richness_reference": base.config["richness_reference"], "generation": plan.generation, "rows": len(ids)},
        model=_bundle("behavior_rows", ids.to_pylist(), vectors_MD, {"behavior_vectors": vectors_MD}, about),
    )


def moved_items(
    inputs: Inputs, params: config.TrainBehaviorEncoder, plan: Plan, items: Items, cold: Content | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(rows of `items.item_ids` whose bucket rose above the parent's, which of them had no vector yet).

    An item that the parent masks or does not know counts as bucket -1, so reaching n_min is a rise as well.

    Args:
        cold: texts whose items need no event: their bucket is 0 from the start, so that they get a row on their first night.
    """
    assert plan.parent is not None, "a frozen night has a parent"
    where = f"logical_date == '{plan.parent.logical_date}' and generation == {plan.generation}"
    parent = inputs.arrow("feature.item_feature", columns=("item_id", "evidence_bucket"), where=where, at=plan.parent.manifest)
    place = pc.index_in(items.item_ids, value_set=strings(parent["item_id"]))
    before_N = pc.fill_null(flat(parent["evidence_bucket"]).take(place), -1).to_numpy(zero_copy_only=False)
    bucket_N, able_N = richness.evidence_bucket(items.counts), items.counts >= params.n_min
    if cold is not None:
        text_N = cold.has(items.item_ids)
        bucket_N, able_N = np.where(text_N, np.maximum(bucket_N, 0), bucket_N), able_N | text_N
    moved = np.flatnonzero(able_N & (bucket_N > before_N))
    return moved, before_N[moved] < 0


def _make_rows(encoder: BehaviorEncoder, base: Base, night: Night, moved: NDArray[np.int64], plan: Plan, content: Content | None) -> tuple[MovedRows, pa.Array]:
    """(rows in the base's own space, their items); an item that the base says nothing about waits for more events."""
    import torch

    item_ids, vocabulary = night.item_ids.take(moved), base.vocabulary
    buckets = richness.evidence_bucket(night.counts[moved]).tolist()
    # the night of the generation, not its number: numbers differ in a lake whose past was repaired
    seeds = [derive_seed(plan.seed, base.born, name, bucket) for name, bucket in zip(item_ids.to_pylist(), buckets, strict=True)]
    sequences, beyond = indexed(night, vocabulary, item_ids)
    known = pa.concat_arrays([vocabulary, beyond])
    moved_M = torch.from_numpy(pc.index_in(item_ids, value_set=known).to_numpy(zero_copy_only=False).astype(np.int64))
    state = {name.removeprefix(NETWORK): tensor for name, tensor in base.tensors.items() if name.startswith(NETWORK)}
    vectors_NC = None if content is None else content.of(known)
    made = encoder.train_rows(state, sequences, moved_M, torch.tensor(seeds, dtype=torch.int64), device=best_device(), content=vectors_NC)
    return made, item_ids.filter(pa.array(made.near.numpy()))


# ---------------------------------------------------------------- shared pieces


def slower(params: config.TrainBehaviorEncoder) -> str:
    """The command that makes the night again with half the encoder's step size."""
    rate = getattr(params, params.encoder).learning_rate / 2
    return f"sid run refresh --date D --set train_behavior_encoder.{params.encoder}.learning_rate={rate:g}"


def checked(vectors_MD: NDArray[np.float32], item_ids: pa.Array, where: str, next_command: str) -> NDArray[np.float32]:
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
