"""train_content_encoder: SAIL-Embedding's recipe over the night's base vectors, for a generation that begins cold; skipped unless switched on.

Item pairs come from content_pair, sequences from user_sequence, the teacher is tonight's behaviour encoder; a share of the items is held from all of them
and pairs among those items are what the embedding report measures.
Not here: the recipe (pipeline/encoders/sail), writing vectors (content_cre).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.behavior_inputs import read_history
from jobs.content_inputs import Shelf, base_encoders, read_pairs, read_shelf, read_teacher
from jobs.content_pair import wanted
from jobs.train_tokenizer import FileCheckpoint
from pipeline import config
from pipeline.context import Context, derive_seed
from pipeline.device import best_device
from pipeline.errors import ContractError
from pipeline.log import progress
from pipeline.stages import FigureData, ModelBundle, StageResult

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.encoders.sail import Content, Sail
    from pipeline.encoders.sail_pairs import PairSet

EXAMPLE_ROWS = 2


def idle(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult | None:
    """`skipped` when the night trains none."""
    plan = ctx.plan()
    return None if wanted(params, plan) else StageResult(status="skipped", outputs={"generation": plan.generation})


def run(inputs: Inputs, params: config.ContentCre, ctx: Context) -> StageResult:
    """The trained encoder with its curves and the embedding report.

    Raises: UpstreamMissing without vectors or pairs; ContractError when too few items have pairs, or for weights that are not finite.
    """
    plan = ctx.plan()
    from pipeline.encoders import sail

    encoders = base_encoders(ctx)
    shelf = read_shelf(inputs, ctx, encoders)
    pairs = read_pairs(inputs, ctx, shelf.item_ids)
    taught = ctx.outcome("train_behavior_encoder")["outputs"].get("model_uri")
    teachers = {"behavior": read_teacher(inputs.model(taught), shelf.item_ids)} if taught else {}
    seed = derive_seed(plan.seed, "content_encoder", plan.logical_date)
    held_N = held_items(len(shelf.content), params.held_share, seed)
    try:
        given = sail.lessons(shelf.content, pairs, read_history(inputs, ctx, shelf.item_ids), teachers, held_N, params, seed)
    except ValueError as error:
        raise ContractError(
            "there is nothing to train a content encoder on", expected="pairs", found=str(error), where="feature.content_pair, [content_cre] sources"
        ) from error
    checkpoint = FileCheckpoint(ctx.staging / "train_content_encoder.checkpoint.safetensors")
    encoder, curves = sail.Sail.fit(shelf.content, given, params, seed=seed, device=best_device(), checkpoint=checkpoint, progress=progress)
    check_finite(encoder)
    table, ids = report(encoder, shelf, list(given.valid.values()), teachers, params, seed)
    return result(encoder, shelf.content, encoders, curves, table, ids, plan.generation)


def held_items(count: int, share: float, seed: int) -> Tensor:
    """Which items nothing is trained on, bool (N,)."""
    import torch

    from pipeline.tokenizers.fit import generator_for

    held_N = torch.zeros(count, dtype=torch.bool)
    held_N[torch.randperm(count, generator=generator_for(seed, "held items"))[: round(share * count)]] = True
    return held_N


def check_finite(encoder: Sail) -> None:
    """Nothing, when every weight is a number.

    Raises: ContractError otherwise.
    """
    bad = [name for name, tensor in encoder.state().items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ContractError(
            "the content encoder is not finite",
            expected="finite weights",
            found=", ".join(bad[:3]),
            where="train_content_encoder",
            next_command="sid run refresh --date D --set content_cre.learning_rate=0.0003",
        )


def report(
    encoder: Sail, shelf: Shelf, valid: Sequence[PairSet], teachers: Mapping[str, tuple[Tensor, Tensor]], params: config.ContentCre, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(the six-way table of base vectors and of every trained width, measures of IDs made of base and of trained vectors)."""
    import torch

    from pipeline.encoders import sail_report

    content = shelf.content
    spaces = {f"base {name}": vectors_ND * content.shown[name][:, None] for name, vectors_ND in content.vectors.items()}
    made = encoder.encode(content)
    spaces |= {f"cre {side}": vectors_ND for side, vectors_ND in made.vectors.items() if side in content.vectors}
    for width in params.widths:
        spaces[f"cre fused {width}"] = encoder.encode(content, width).vectors["fused"]
    reference_ND = next((vectors_ND for vectors_ND, _ in teachers.values()), torch.zeros(len(content), 1))
    table = sail_report.six_ways(spaces, valid, shelf.labels, reference_ND, seed=seed)
    first = next(iter(content.vectors))
    found: dict[str, float] = {}
    for space, vectors_ND in (("base", spaces[f"base {first}"]), ("cre", made.vectors["fused"])):
        codes = sail_report.sids(vectors_ND, params.cluster_sizes, params.quantise_levels, seed=seed)
        found |= {f"{space}/{name}": value for name, value in sail_report.sid_ways(codes, valid, shelf.labels).items()}
    return table, found


def result(
    encoder: Sail,
    content: Content,
    encoders: Mapping[str, str],
    curves: Mapping[str, list[float]],
    table: Mapping[str, Mapping[str, float]],
    ids: Mapping[str, float],
    generation: int,
) -> StageResult:
    """What the runner logs: model, curves, and the embedding report as metrics and as a figure."""
    from pipeline.encoders.sail_report import figure_data

    measured = {f"embedding/{space.replace(' ', '_')}/{name}": value for space, row in table.items() for name, value in row.items()}
    losses = {phase: values for phase in ("all", "nearest", "hard", "sequence", "identity") if (values := curves.get(f"{phase}/loss/total"))}
    return StageResult(
        metrics={**measured, **{f"embedding/{name}": value for name, value in ids.items()}},
        curves={f"content_encoder/{name}": values for name, values in curves.items()},
        outputs={"encoder_id": encoder.identify(), "generation": generation, "base_encoders": dict(encoders), "width": encoder.settings.delivered},
        figures={
            "embedding_report": FigureData(kind="embedding_report", data=figure_data({space: dict(row) for space, row in table.items()})),
            "content_loss": FigureData(kind="loss_curves", data={"curves": losses}),
        },
        model=bundle(encoder, content, encoders, generation),
    )


def bundle(encoder: Sail, content: Content, encoders: Mapping[str, str], generation: int) -> ModelBundle:
    """The model `content_encoder` with an example of its columns; in them a row of NaN is an item without that modality."""
    import torch

    first = content.take(torch.arange(EXAMPLE_ROWS).clamp(max=len(content) - 1))
    answer = encoder.encode(first)
    about: dict[str, Any] = {**encoder.config(), "base_encoders": dict(encoders), "generation": generation}
    return ModelBundle(
        name="content_encoder",
        tensors=encoder.state(),
        config=about,
        example_input={name: value.masked_fill(~first.shown[name][:, None], float("nan")).numpy() for name, value in first.vectors.items()},
        example_output={side: value.numpy() for side, value in answer.vectors.items()},
    )
