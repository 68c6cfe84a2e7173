"""What a stage and a table are, and the list of all stages: the CLI, the DAGs, the docs and the tests are built from it.

Light on purpose (standard library only): DAG files, every image and every job import it.
A new stage is one `Stage` line here, one job file of the same name, and the folders of the tables it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

Engine = Literal["python", "spark", "torch"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run: job file, CLI name, Airflow task_id and MLflow run name are all `name`."""

    name: str
    summary: str
    engine: Engine
    group: Literal["refresh", "consumers", "maintenance", "rollback"]
    inputs: tuple[str, ...] = ()  # pinned in this order: a marker before the rows it vouches for, so that it is never newer than they are
    outputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # order that no table shows
    gpu: bool = False
    settings: str = ""  # the profile section of a stage that has none of its own

    @property
    def section(self) -> str:
        """The profile section that configures the stage."""
        return self.settings or self.name


@dataclass(frozen=True, kw_only=True)
class Write:
    """One table write that a Spark job asks the runner for; the runner owns branch, audit and publish.

    Without dates, slice and whole the rows are appended (rows with absent keys only).

    Args:
        table: `namespace.name`, a folder under sql/.
        frame: Spark DataFrame with exactly the table's columns.
        dates: partitions to replace, every row must carry one of them.
        slice: equality on the replaced rows: beside `dates`, e.g. {"stage": "ingest"} where two stages share a partition, or alone, in a table without dates.
        metrics: numbers the job already knows about these rows; they join the audit's metrics frame.
        whole: replace every row of the table in one commit (small tables only).
        hold: leave the audited branch unpublished (a later stage publishes it).
        copies: some of the rows were copied from the table as the stage read it, so nobody may have moved it since; what is not dated always does so.
    """

    table: str
    frame: Any
    dates: tuple[date, ...] = ()
    slice: Mapping[str, str | int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    hold: bool = False
    whole: bool = False
    copies: bool = False

    @property
    def appends(self) -> bool:
        """Whether no row that is there is replaced."""
        return not (self.dates or self.slice or self.whole)


@dataclass(frozen=True, kw_only=True)
class FigureData:
    """A picture to be drawn by `report.FIGURES[kind](**data)`; data is JSON and is stored beside the picture."""

    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A trained model on its way to MLflow: tensors (safetensors) + config (JSON), never a pickle.

    Args:
        name: registered model name, e.g. `sid_tokenizer`.
        tensors: name -> torch tensor or NumPy array.
        config: everything needed to rebuild the module, JSON.
        example_input / example_output: NumPy arrays by column, for the signature; batch >= 2.
    """

    name: str
    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
    example_input: Mapping[str, Any]
    example_output: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a job hands back to the runner.

    `outputs` is JSON that later stages of the same run read through `ctx.outcome(stage)["outputs"]`.
    `curves` are per-step series for MLflow: name -> list of values, one per epoch.
    """

    writes: tuple[Write, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, FigureData] = field(default_factory=dict)
    model: ModelBundle | None = None
    status: Literal["done", "reused", "skipped"] = "done"


STAGES: tuple[Stage, ...] = (
    Stage(
        name="plan_night",
        summary="fix parent release, generation, input digests and seed of the night in a manifest",
        engine="python",
        group="refresh",
        inputs=("sid.release", "sid.generation", "raw.source_file"),
    ),
    Stage(
        name="ingest",
        summary="load the day's events and catalogue; quarantine bad rows with a reason",
        engine="spark",
        group="refresh",
        inputs=("raw.source_file", "raw.item", "raw.rejected_row"),
        outputs=("raw.interaction", "raw.item", "raw.rejected_row", "raw.source_file"),
        after=("plan_night",),
    ),
    Stage(
        name="item_popularity",
        summary="decayed popularity, percentile and stratum per item as of the cutoff",
        engine="spark",
        group="refresh",
        inputs=("raw.source_file", "raw.interaction", "raw.item", "feature.item_day_stat", "feature.item_popularity"),
        outputs=("feature.item_day_stat", "feature.item_popularity"),
    ),
    Stage(
        name="content_embedding",
        summary="text and image vectors of content not seen before",
        engine="spark",
        group="refresh",
        inputs=("raw.item", "feature.item_content_vector", "raw.rejected_row"),
        outputs=("feature.item_content_vector", "raw.rejected_row"),
    ),
    Stage(
        name="user_sequence",
        summary="each user's events in order as of the cutoff",
        engine="spark",
        group="refresh",
        inputs=("raw.source_file", "raw.interaction", "feature.user_sequence"),
        outputs=("feature.user_sequence",),
    ),
    Stage(
        name="content_pair",
        summary="pairs of items that belong together, for a generation that trains a content encoder",
        engine="spark",
        group="refresh",
        inputs=("raw.item", "raw.interaction", "feature.user_sequence"),
        outputs=("feature.content_pair",),
        settings="content_cre",
    ),
    Stage(
        name="train_behavior_encoder",
        summary="train the behaviour encoder (new generation) or only the rows that moved (frozen)",
        engine="torch",
        group="refresh",
        inputs=("raw.item", "feature.user_sequence", "feature.item_popularity", "feature.item_content_vector", "feature.item_feature", "sid.generation"),
        gpu=True,
    ),
    Stage(
        name="behavior_embedding",
        summary="behaviour vectors of the rows trained tonight",
        engine="spark",
        group="refresh",
        inputs=("feature.item_popularity",),
        outputs=("feature.item_behavior_vector",),
        after=("train_behavior_encoder",),
    ),
    Stage(
        name="train_content_encoder",
        summary="train adapters over text and image vectors by pairs, sequences and behaviour (cold generation, when switched on)",
        engine="torch",
        group="refresh",
        inputs=("raw.item", "feature.item_content_vector", "feature.content_pair", "feature.user_sequence"),
        after=("train_behavior_encoder",),
        gpu=True,
        settings="content_cre",
    ),
    Stage(
        name="content_cre",
        summary="content vectors in the space of the generation's content encoder, beside the base vectors",
        engine="spark",
        group="refresh",
        inputs=("raw.item", "feature.item_content_vector", "feature.content_encoder", "sid.generation"),
        outputs=("feature.item_content_vector", "feature.content_encoder"),
        after=("train_content_encoder",),
    ),
    Stage(
        name="item_feature",
        summary="thin manifest of the night: hashes, masks, counts, richness, behaviour reference",
        engine="spark",
        group="refresh",
        inputs=(
            "raw.source_file",
            "raw.item",
            "feature.item_popularity",
            "feature.item_content_vector",
            "feature.item_behavior_vector",
            "feature.item_feature",
            "sid.generation",
            "sid.release",
        ),
        outputs=("feature.item_feature",),
    ),
    Stage(
        name="train_tokenizer",
        summary="fit the SID tokenizer (only for a new generation)",
        engine="torch",
        group="refresh",
        inputs=(
            "feature.item_feature",
            "feature.item_content_vector",
            "feature.item_behavior_vector",
            "feature.user_sequence",
            "sid.item_sid",
            "sid.release",
            "sid.generation",
        ),
        gpu=True,
    ),
    Stage(
        name="assign_sid",
        summary="codes, router weights and disambiguators on an audit branch",
        engine="spark",
        group="refresh",
        inputs=(
            "feature.item_feature",
            "feature.item_content_vector",
            "feature.item_behavior_vector",
            "feature.user_sequence",
            "sid.item_sid",
            "sid.generation",
            "sid.codebook",
        ),
        outputs=("sid.codebook", "sid.generation", "sid.user_sid", "sid.item_sid"),
        after=("train_tokenizer",),
    ),
    Stage(
        name="publish_release",
        summary="publish the audited branch with its tag, write the release row, move the alias",
        engine="spark",
        group="refresh",
        inputs=("sid.release", "sid.item_sid"),
        outputs=("sid.release",),
    ),
    Stage(
        name="gate_drift",
        summary="measure drift without the frozen encoder and decide whether a refit is due",
        engine="spark",
        group="refresh",
        inputs=("sid.release", "sid.item_sid", "sid.generation", "feature.item_feature", "feature.item_popularity", "raw.interaction"),
        outputs=("sid.release",),
        after=("publish_release",),
    ),
    Stage(
        name="rank_example",
        summary="labelled ranking examples around one release",
        engine="spark",
        group="consumers",
        inputs=("raw.source_file", "raw.interaction", "sid.release", "sid.item_sid", "feature.item_popularity"),
        outputs=("rank.rank_example",),
    ),
    Stage(
        name="train_ranker",
        summary="train the ranker on a pinned release, with and without SIDs",
        engine="torch",
        group="consumers",
        inputs=("rank.rank_example", "sid.release", "sid.item_sid", "sid.generation"),
        gpu=True,
    ),
    Stage(
        name="train_retriever",
        summary="train a generative retriever on a pinned release: real, permuted and random codes beside floors",
        engine="torch",
        group="consumers",
        inputs=(
            "rank.rank_example",
            "sid.release",
            "sid.item_sid",
            "sid.generation",
            "feature.user_sequence",
            "feature.item_feature",
            "feature.item_content_vector",
            "feature.item_behavior_vector",
        ),
        gpu=True,
    ),
    Stage(
        name="maintain",
        summary="expire old releases, branches, snapshots, partitions and files that nothing holds; compact small files",
        engine="spark",
        group="maintenance",
        inputs=("sid.release", "sid.item_sid", "feature.item_feature"),
    ),
    Stage(
        name="rollback",
        summary="make an earlier release the current one and withdraw all newer ones, in one commit",
        engine="spark",
        group="rollback",
        inputs=("sid.release",),
        outputs=("sid.release",),
        settings="publish_release",
    ),
)

BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}


def group(name: str) -> tuple[Stage, ...]:
    """The stages of one group, in the order they are declared (which is a valid order to run them)."""
    return tuple(stage for stage in STAGES if stage.group == name)


def upstream(stage: Stage) -> tuple[str, ...]:
    """Names of the stages of the same group that must have ended before `stage`: who writes what it reads, plus `after`.

    A stage that reads a table written later in the list reads last night's rows of it, so that is no edge.
    """
    before = STAGES[: STAGES.index(stage)]
    writers = [other.name for other in before if other.group == stage.group and set(other.outputs) & set(stage.inputs)]
    return tuple(dict.fromkeys([*writers, *stage.after]))
