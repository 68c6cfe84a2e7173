"""train_tokenizer: fit the SID tokenizer of a new generation on the live items of the night; nothing on a frozen night.

A generation begins cold, or at the parent's tokenizer (warm), or there with its code rows pulled towards the parent's and its codes renamed to the
parent's by an optimal matching (anchored).

Not here: the tokenizers (pipeline/tokenizers), assigning codes (assign_sid). Under torchrun every process runs this job; process 0 answers for all.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.behavior_inputs import read_history, strings
from pipeline.context import Context, derive_seed
from pipeline.errors import ContractError, UpstreamMissing
from pipeline.log import progress
from pipeline.stages import FigureData, ModelBundle, StageResult
from pipeline.tracking import read_bundle

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from jobs.inputs import Inputs
    from pipeline.config import TrainTokenizer
    from pipeline.context import Plan
    from pipeline.tokenizers.base import FitReport, ItemBatch, Start, Tokenizer

EXAMPLE_ROWS = 2


def idle(inputs: Inputs, params: TrainTokenizer, ctx: Context) -> StageResult | None:
    """`skipped` when the night keeps its generation."""
    plan = ctx.plan()
    return None if plan.new_generation else StageResult(status="skipped", outputs={"generation": plan.generation})


def run(inputs: Inputs, params: TrainTokenizer, ctx: Context) -> StageResult:
    """The fitted tokenizer with its curves and code usage.

    Raises: UpstreamMissing without items of the night, ContractError for vectors that are missing, uneven or not finite.
    """
    plan = ctx.plan()
    from pipeline.tokenizers.base import FitOptions, items_from_arrow
    from pipeline.tokenizers.registry import named

    vectors = read_vectors(inputs, ctx)
    items = items_from_arrow(vectors)
    tokenizer: Tokenizer = named(params.tokenizer)(getattr(params, params.tokenizer))
    with processes() as rank:
        options = FitOptions(
            seed=derive_seed(plan.seed, "tokenizer", plan.logical_date),
            settings=params,
            checkpoint=FileCheckpoint(ctx.staging / "train_tokenizer.checkpoint.safetensors"),
            progress=progress,
            start=begin_at(inputs, plan, params),
            history=read_history(inputs, ctx, strings(vectors["item_id"])) if tokenizer.needs_history else None,
        )
        report = tokenizer.fit(items, options)
    if rank:
        raise SystemExit(0)  # a helper process: process 0 logs the model and writes the outcome
    if plan.start == "anchored":
        rename_codes(tokenizer, items, parent_codes(inputs, plan, vectors["item_id"]))
    return result(tokenizer, report, items, params.tokenizer, plan.generation)


def begin_at(inputs: Inputs, plan: Plan, params: TrainTokenizer) -> Start | None:
    """The parent's tokenizer to begin at, with the pull of the policy; None for a cold start."""
    if plan.start == "cold" or plan.parent is None:
        return None
    from pipeline.tokenizers.base import Start

    return Start(tokenizer=read_tokenizer(inputs, plan.parent.generation), pull=params.pull if plan.start == "anchored" else 0.0)


def read_tokenizer(inputs: Inputs, generation: int) -> Tokenizer:
    """The tokenizer of a generation.

    Raises: UpstreamMissing when the generation has no row.
    """
    from pipeline.tokenizers.registry import from_state

    rows = inputs.arrow("sid.generation", columns=("generation", "tokenizer_uri"), where=f"generation == {generation:d}").to_pylist()
    if not rows:
        raise UpstreamMissing(f"generation {generation} has no row", expected="one row", found="none", where="sid.generation")
    return from_state(*read_bundle(inputs.model(rows[0]["tokenizer_uri"])))


def parent_codes(inputs: Inputs, plan: Plan, item_ids: pa.ChunkedArray) -> Tensor:
    """Codes of the parent release for the items, (N, L) int64; -1 throughout for an item that is not in it."""
    import pyarrow.compute as pc
    import torch

    assert plan.parent is not None, "an anchored night has a parent"
    parent = inputs.release(plan.parent.tag)
    width = len(parent["codes"][0])
    codes_PL = torch.from_numpy(pc.list_flatten(parent["codes"]).to_numpy().astype("int64")).view(-1, width)
    place_N = torch.from_numpy(pc.fill_null(pc.index_in(item_ids, value_set=parent["item_id"].combine_chunks()), -1).to_numpy().astype("int64"))
    return torch.where(place_N[:, None] >= 0, codes_PL[place_N], -1)


def rename_codes(tokenizer: Tokenizer, items: ItemBatch, parent_NL: Tensor) -> None:
    """Rename the tokenizer's codes to the parent's where most popularity has both."""
    from pipeline.tokenizers.refresh import match_codes

    known_N = parent_NL[:, 0] >= 0
    mass_N = None if items.popularity_N is None else items.popularity_N[known_N] + 1.0  # an item without events still counts as one
    tokenizer.relabel(match_codes(parent_NL[known_N], tokenizer.encode(items).codes_NL[known_N], tokenizer.codebook_sizes, mass_N))


def read_vectors(inputs: Inputs, ctx: Context) -> pa.Table:
    """Live items of the night with their vectors, sorted by item_id.

    Raises: UpstreamMissing if the night has no live item.
    """
    import pyarrow.compute as pc

    from pipeline.tokenizers.base import join_vectors

    feature = inputs.arrow("feature.item_feature", where=f"logical_date == '{ctx.logical_date}' and status == 'live'")
    if not len(feature):
        raise UpstreamMissing(
            "no items to fit a tokenizer on",
            expected="live rows",
            found="none",
            where=f"feature.item_feature logical_date={ctx.logical_date}",
            next_command=f"sid run item_feature --date {ctx.logical_date}",
        )
    content = inputs.arrow("feature.item_content_vector", encoder_id=_named(feature, "encoder_id"), content_hash=_named(feature, "hash"))
    dates = sorted(day for day in pc.unique(feature["behavior_date"]).to_pylist() if day is not None)
    named = ", ".join(f"'{day}'" for day in dates) or f"'{ctx.logical_date}'"
    behavior = inputs.arrow("feature.item_behavior_vector", columns=("logical_date", "item_id", "vector"), where=f"logical_date in ({named})")
    return join_vectors(feature, content, behavior)


def _named(feature: pa.Table, what: str) -> set[str]:
    """Encoders or hashes that the night's manifest names, of texts and images."""
    return {value for modality in ("text", "image") for value in feature[f"{modality}_{what}"].unique().to_pylist() if value is not None}


def result(tokenizer: Tokenizer, report: FitReport, items: ItemBatch, name: str, generation: int) -> StageResult:
    """What the runner logs: model, metrics, curves, figures, and the outputs that assign_sid reads."""
    from pipeline.tokenizers import metrics
    from pipeline.tokenizers.base import codebook_digest

    digest = codebook_digest(tokenizer.codebooks())
    codes_NL = tokenizer.encode(items).codes_NL
    counts = [metrics.code_counts(codes_N, size).tolist() for codes_N, size in zip(codes_NL.unbind(1), tokenizer.codebook_sizes, strict=True)]
    vocabulary = {"tokenizer": name, "codebook_sizes": list(tokenizer.codebook_sizes), "slots": list(tokenizer.slots), "codebook_digest": digest}
    figures = {"code_usage": FigureData(kind="code_usage", data={"slots": list(tokenizer.slots), "counts": counts})}
    if losses := {name: values for name, values in report.curves.items() if name.startswith("loss/")}:
        figures["loss_curves"] = FigureData(kind="loss_curves", data={"curves": losses})
    return StageResult(
        metrics={f"tokenizer/{key}": value for key, value in report.metrics.items() if value == value},  # NaN = not measurable, e.g. an absent modality
        curves={f"tokenizer/{key}": values for key, values in report.curves.items()},
        outputs={**vocabulary, "generation": generation, "items": len(items)},
        figures=figures,
        model=bundle(tokenizer, items, vocabulary | {"generation": generation}),
    )


def bundle(tokenizer: Tokenizer, items: ItemBatch, vocabulary: dict[str, Any]) -> ModelBundle:
    """The model with an example of its columns; in them a row of NaN is an item without that modality."""
    first = items.take(slice(0, EXAMPLE_ROWS))
    columns = {name: _with_gaps(vectors, first.mask(name)) for name in ("text", "image", "behavior") if (vectors := first.vectors(name)) is not None}
    columns |= {"richness": first.richness_N.numpy(), "strength": first.strength_N.numpy()}
    answer = tokenizer.encode(first)
    return ModelBundle(
        name="sid_tokenizer",
        tensors=tokenizer.state(),
        config={**tokenizer.config(), **vocabulary},
        example_input=columns,
        example_output={"codes": answer.codes_NL.numpy(), "weights": answer.weights_NL.numpy()},
    )


def _with_gaps(vectors_ND: Tensor, mask_N: Tensor) -> Any:
    return vectors_ND.masked_fill(~mask_N[:, None], float("nan")).numpy()


@contextmanager
def processes() -> Iterator[int]:
    """The rank of this process, in a process group when torchrun started several."""
    import torch
    import torch.distributed as dist

    joined = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if joined:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        yield dist.get_rank() if joined else 0
        if joined:
            dist.barrier()
    finally:
        if joined:
            dist.destroy_process_group()


@dataclass(frozen=True)
class FileCheckpoint:
    """A training state in one safetensors file whose header holds the JSON document (`tokenizers.base.Checkpoint`)."""

    path: Path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last saved state, None if there is none.

        Raises: ContractError if the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["document"])  # noqa: SIM118 - no mapping
        except (SafetensorError, KeyError, ValueError) as error:
            raise ContractError(
                "the training checkpoint is damaged",
                expected="safetensors",
                found=str(error),
                where=str(self.path),
                next_command=shlex.join(["rm", str(self.path)]),
            ) from error

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Replace the file in one step."""
        from safetensors.torch import save_file

        temporary = self.path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"document": json.dumps(document)})
        temporary.replace(self.path)
