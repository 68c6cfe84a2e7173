"""One TOML profile = one whole run, loaded into frozen models; a section is a stage, a field has a default, a unit and a line.

Unknown keys, unknown sections and wrong types fail at load with the key, the section, the file and the known names.
Addresses and secrets never stand here: they come from the environment (`SID_HOME`, `SID_WAREHOUSE`, `SID_CATALOG_URI`, `MLFLOW_TRACKING_URI`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Lake(Section):
    """Where the tables live; addresses come from the environment."""

    catalog: Literal["hadoop", "jdbc", "rest", "glue"] = Field("hadoop", description="Iceberg catalog type; hadoop = a local folder, no server")
    properties: dict[str, str] = Field({}, description="further catalog properties, e.g. io-impl; no secrets")


class Launch(Section):
    """How a stage's process is started; the runner and the manifest are the same for all."""

    kind: Literal["inline", "submit", "torchrun", "kubernetes"] = Field(
        "inline", description="inline = this process; torchrun and kubernetes concern their engines, Spark stages then use submit"
    )
    master: str = Field("local[2]", description="Spark master for inline and submit")
    driver_memory: str = Field("2g", description="Spark driver memory")
    java_options: str = Field("", description="further JVM options, e.g. '-XX:TieredStopAtLevel=1 -XX:+UseSerialGC' where sessions are short")
    shuffle_partitions: int = Field(4, ge=1, description="Spark shuffle partitions")
    processes: int = Field(2, ge=1, description="processes per node for torchrun")
    threads: int = Field(2, ge=1, description="torch threads per process")
    image: str = Field("", description="container image by digest or version, for kubernetes")
    namespace: str = Field("default", description="kubernetes namespace")


class Source(Section):
    """The data set and its calendar."""

    dataset: str = Field("movielens", description="a key of pipeline.datasets.DATASETS")
    path: str = Field("", description="folder or file of the user's own copy; empty = let the data set fetch or generate it")
    start: date = Field(date(1970, 1, 1), description="first day of the calendar; the first night loads everything from here on")
    closed_weekdays: list[str] = Field([], description="days without trading, e.g. ['saturday']: an absent file is then declared_empty")
    closed_dates: list[date] = Field([], description="further days without trading")
    absent: Literal["missing", "declared_empty"] = Field("missing", description="what an absent file of an open day means")
    wait_until: str = Field("", description="HH:MM UTC after the cutoff until which an absent file is waited for; empty = do not wait")
    catalogue: Literal["snapshot", "delta", "from_events"] = Field("delta", description="what a catalogue file holds; only a snapshot retires by absence")
    events_pattern: str = Field("", description="folder: events path under `path`, with {date}; e.g. events/{date}.csv")
    items_pattern: str = Field("", description="folder: items path under `path`, with {date}; e.g. items/{date}.jsonl")
    event_columns: dict[str, str] = Field({}, description="folder: our column -> theirs (user_id, item_id, event_ts, event_type, value, session_id)")
    item_columns: dict[str, str] = Field({}, description="folder: our column -> theirs (item_id, title, text, category, image_uri)")
    image_root: str = Field("", description="folder or fsspec URI that relative image_uri values are joined to")
    options: dict[str, int | float | str | bool] = Field({}, description="options of the data set itself, e.g. items and seed of `shop`")


class PlanNight(Section):
    """The refresh policy and the vocabulary's first day."""

    policy: Literal["frozen", "cold"] = Field("frozen", description="frozen = keep the generation; cold = a new generation every night")
    refit_when_due: bool = Field(True, description="obey sid.release.refit_due of the parent with a new generation")


class Ingest(Section):
    """Quarantine limits."""

    max_rejected_share: float = Field(0.05, ge=0, le=1, description="share of a night's rows that may be rejected before the gate fails")
    max_retired_share: float = Field(0.05, ge=0, le=1, description="share of the catalogue that one snapshot may retire")
    max_image_bytes: int = Field(20_000_000, ge=1, description="bytes of one image file that are read at most")


class ItemPopularity(Section):
    """Decayed popularity."""

    window_days: int = Field(90, ge=1, description="days of item_day_stat that count")
    half_life_days: float = Field(14.0, gt=0, description="days after which an event counts half")
    head_share: float = Field(0.2, gt=0, lt=1, description="share of items in the head stratum, most popular first")
    tail_share: float = Field(0.5, gt=0, lt=1, description="share of items in the tail stratum, least popular last")


class ContentEmbedding(Section):
    """Text and image encoders."""

    text_encoder: str = Field("minilm", description="minilm | none | precomputed | hf:<model name or folder>")
    image_encoder: str = Field("none", description="efficientnet_lite0 | none | precomputed | hf:<model name or folder>")
    normalize: bool = Field(True, description="L2-normalise content vectors")
    text_batch: int = Field(
        64, ge=2, description="texts of 16 tokens per forward pass, fewer of longer ones; part of the encoder id: another value encodes anew"
    )
    image_batch: int = Field(4, ge=2, description="images per forward pass; part of the encoder id: another value encodes anew")
    image_size: int = Field(224, ge=32, description="pixels per side after resizing")
    max_pixels: int = Field(50_000_000, ge=1, description="pixels of one image that are decoded at most")
    max_tokens: int = Field(128, ge=8, description="tokens of one text that are read")


class UserSequence(Section):
    """Order of a user's events."""

    order: Literal["time", "basket"] = Field(
        "time", description="time = (event_ts, item_id); basket = events of one session have no order and are shuffled by a hash"
    )
    max_events: int = Field(500, ge=2, description="latest events kept per user")


class SasRec(Section):
    """SASRec hyper-parameters."""

    dim: int = Field(64, ge=4, description="width of item vectors")
    num_blocks: int = Field(2, ge=1, description="attention blocks")
    num_heads: int = Field(2, ge=1, description="attention heads")
    max_length: int = Field(50, ge=2, description="events per training window")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on embeddings, attention output and feed-forward")
    tied: bool = Field(False, description="one item table for input and output; False = the input table is the behaviour vector")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW step size; moved rows start at three times it")
    batch_size: int = Field(64, ge=1, description="windows per step")
    max_epochs: int = Field(40, ge=1, description="epochs at most")
    patience: int = Field(5, ge=1, description="epochs without better validation NDCG@10")
    sampled_above: int = Field(20_000, ge=1, description="catalogue size above which the softmax is sampled")
    num_negatives: int = Field(1024, ge=1, description="shared uniform negatives of the sampled softmax")
    valid_users: int = Field(3000, ge=1, description="users of the validation sample")
    row_steps: int = Field(100, ge=1, description="steps that train moved rows under the frozen policy")


class TrainBehaviorEncoder(Section):
    """Behaviour encoder and the richness reference it fits."""

    encoder: str = Field("sasrec", description="a key of pipeline.encoders.BEHAVIOR_ENCODERS")
    sasrec: SasRec = SasRec()
    n_min: int = Field(5, ge=1, description="events from which an item has a behaviour vector")
    richness: Literal["norm", "count", "rank", "reliability"] = Field("rank", description="what measures how informative an item's behaviour is")
    low_strength_share: float = Field(0.4, gt=0, lt=1, description="share of items that shall get alignment strength below .05; fixes beta")
    alpha: float = Field(10.0, gt=0, description="steepness of the alignment strength (eq. 17)")
    beta: float | None = Field(None, description="fixed beta of eq. 17; None = from low_strength_share")
    measure_reliability: bool = Field(True, description="train two half encoders and measure split-half neighbour overlap (needed by richness = reliability)")
    half_epochs: int = Field(10, ge=1, description="epochs of each half encoder at most")
    min_spearman: float = Field(0.2, ge=-1, le=1, description="gate at a new generation: rank correlation of richness and split-half overlap")


class BehaviorEmbedding(Section):
    """Behaviour rows of the night."""

    max_shift: float = Field(10.0, gt=0, description="gate: largest norm of a behaviour vector, in units of the generation's maximum norm")


class ItemFeature(Section):
    """Manifest gates."""

    min_content_share: float = Field(0.5, ge=0, le=1, description="gate: share of live items with at least one content vector")


class AdaSid(Section):
    """ADA-SID (ADC-SID form by default); names follow specs and paper."""

    form: Literal["v3", "v2"] = Field("v3", description="v3 = ADC-SID pairwise alignment; v2 = ADA-SID two-stage alignment")
    num_shared: int = Field(1, ge=0, description="N_s shared experts")
    num_text: int = Field(1, ge=0, description="N_t text experts")
    num_image: int = Field(1, ge=0, description="N_v image experts; dropped when the data set has no images")
    num_behavior: int = Field(3, ge=0, description="N_b behaviour experts")
    codebook_size: int = Field(100, ge=2, description="K codes per expert")
    latent_dim: int = Field(128, ge=2, description="d, width of latents and codes")
    projection_dim: int = Field(128, ge=2, description="d_h, width of the projections that are aligned")
    hidden_dim: int = Field(256, ge=2, description="hidden width of experts, projections and decoder")
    latent_scale: float = Field(4.0, gt=0, description="norm of latents and code rows")
    temperature: float = Field(0.07, gt=0, description="tau of the contrastive terms")
    align_weight: float = Field(0.1, ge=0, description="mu of the alignment terms")
    codebook_weight: float = Field(0.25, ge=0, description="weight of the codebook term")
    commitment: float = Field(0.05, ge=0, description="weight of the commitment term")
    strength: Literal["adaptive", "mean", "shuffled", "one", "zero", "inverted"] = Field(
        "adaptive", description="alignment strength w: adaptive is the method, the others are controls"
    )
    router: Literal["adaptive", "one"] = Field("adaptive", description="behaviour gate: adaptive is the method, one is the control")
    sparsity: Literal["bucket", "scalar", "off"] = Field("bucket", description="lambda per richness bucket, one scalar (paper), or none")
    sparsity_buckets: int = Field(8, ge=1, description="richness buckets (quantiles, frozen with the generation) that have a lambda each")
    active_share: float = Field(0.6, gt=0, le=1, description="share of behaviour gates on for the poorest items (N = 0); theta = 1 - active share")
    lambda_init: float = Field(1e-3, gt=0, description="first lambda of the sparsity controller")
    lambda_step: float = Field(1.02, gt=1, description="factor by which lambda moves per step")
    lambda_max: float = Field(10.0, gt=0, description="largest lambda")
    behavior_dropout: float = Field(0.2, ge=0, lt=1, description="share of items whose behaviour is hidden in a step")
    content_dropout: float = Field(0.1, ge=0, lt=1, description="share of items whose text or image is hidden in a step")
    warmup_epochs: int = Field(8, ge=0, description="epochs without quantisation before k-means initialisation")
    detach_behavior: bool = Field(False, description="stop the gradient into h_b in the alignment terms")
    code_gradient: bool = Field(True, description="let the decoder's gradient reach the code rows")
    text_dim: int = Field(128, ge=1, description="PCA width of text vectors before the tokenizer")
    image_dim: int = Field(128, ge=1, description="PCA width of image vectors before the tokenizer")


class RqKmeans(Section):
    """Residual k-means on the concatenated unit-norm modalities."""

    num_levels: int = Field(6, ge=1, description="L residual levels")
    codebook_size: int = Field(100, ge=2, description="K codes per level")
    iterations: int = Field(25, ge=1, description="Lloyd iterations per level")
    balanced: bool = Field(True, description="balanced assignment while fitting")


class TrainTokenizer(Section):
    """The tokenizer, its training loop and its variant's own section."""

    tokenizer: str = Field("ada_sid", description="a key of pipeline.tokenizers.TOKENIZERS")
    ada_sid: AdaSid = AdaSid()
    rq_kmeans: RqKmeans = RqKmeans()
    learning_rate: float = Field(1e-3, gt=0, description="AdamW step size")
    batch_size: int = Field(256, ge=2, description="items per step at most, over all processes; a small catalogue takes smaller steps")
    max_epochs: int = Field(60, ge=1, description="epochs at most, warm-up included")
    patience: int = Field(10, ge=1, description="epochs without a better validation loss, after warm-up")
    valid_share: float = Field(0.05, ge=0, lt=1, description="share of items held out for early stopping; catalogues under 2,000 items hold out none")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast type")
    revive_until: float = Field(0.8, ge=0, le=1, description="share of the epochs in which dead codes are revived")


class AssignSid(Section):
    """Collisions."""

    max_disambiguator: int = Field(64, ge=1, description="D_max: items that may share one code tuple")


class PublishRelease(Section):
    """The release's gates."""

    max_collision_rate: float = Field(0.3, ge=0, le=1, description="share of items that share their codes with another")
    min_perplexity_share: float = Field(0.3, ge=0, le=1, description="perplexity of each position as a share of the codes in use or items, whichever is fewer")
    max_dead_share: float = Field(0.3, ge=0, le=1, description="share of unused codes per position")
    max_shared_mass: float = Field(0.3, ge=0, le=1, description="share of popularity mass on items that share their codes")
    max_churn: float = Field(0.1, ge=0, le=1, description="churn budget: share of items of the parent whose SID changed, within a generation")
    max_head_churn: float = Field(0.05, ge=0, le=1, description="churn budget of the head stratum, within a generation")


class GateDrift(Section):
    """When a refit is due."""

    window_days: int = Field(7, ge=1, description="days of co-occurrence that neighbours by shared codes are compared with")
    max_agreement_loss: float = Field(0.3, ge=0, le=1, description="relative loss of agreement against its value at birth")
    max_post_base_mass: float = Field(0.3, ge=0, le=1, description="popularity mass on rows trained after the base")
    max_doubled_mass: float = Field(0.5, ge=0, le=1, description="popularity mass on items whose evidence at least doubled since the base")


class RankExample(Section):
    """Labels, negatives and periods of the ranking examples."""

    label: Literal["value", "next_basket"] = Field(
        "value", description="value = value >= threshold is positive; next_basket = bought next against sampled negatives"
    )
    threshold: float = Field(4.0, description="smallest value that is a positive label")
    train_on: Literal["before_cutoff", "after_cutoff"] = Field(
        "before_cutoff", description="train on events the SIDs have seen (stated) or on a period after the release's cutoff"
    )
    train_days: int = Field(28, ge=1, description="after_cutoff: days of the training period (T0, T1]")
    negatives: int = Field(4, ge=1, description="next_basket: negatives per positive, from its popularity stratum")
    min_test_rows: int = Field(500, ge=1, description="labelled rows after a cutoff that make an evaluation")
    max_history: int = Field(20, ge=1, description="latest items of the user's history")


class TrainRanker(Section):
    """The DIN-style ranker."""

    arms: list[str] = Field(["id", "id_sid", "id_permuted"], description="id | id_sid | id_permuted | sid | permuted | id_kmeans | popularity")
    seeds: int = Field(1, ge=1, description="seeds per arm")
    dim: int = Field(16, ge=2, description="embedding width per item")
    hidden_dims: list[int] = Field([128, 64], description="widths of the last layers")
    learning_rate: float = Field(2e-3, gt=0, description="Adam step size")
    batch_size: int = Field(512, ge=1, description="rows per step")
    max_epochs: int = Field(4, ge=1, description="epochs at most")
    weights: bool = Field(True, description="router weights as inputs")
    prefix_ngrams: bool = Field(False, description="code prefixes as tokens, for residual codes")
    bootstrap: int = Field(500, ge=1, description="paired bootstrap resamples over users")


class Maintain(Section):
    """Weekly housekeeping."""

    keep_branches_days: int = Field(14, ge=1, description="days an audit branch stays for inspection")
    keep_snapshots_days: int = Field(14, ge=1, description="days an untagged snapshot stays readable")


class Config(Section):
    """A whole run."""

    name: str = Field("unnamed", description="profile name; the MLflow experiment is sid/<name>")
    seed: int = Field(20261120, ge=0, description="the one seed; all others derive from it")
    lake: Lake = Lake()
    launch: Launch = Launch()
    source: Source = Source()
    plan_night: PlanNight = PlanNight()
    ingest: Ingest = Ingest()
    item_popularity: ItemPopularity = ItemPopularity()
    content_embedding: ContentEmbedding = ContentEmbedding()
    user_sequence: UserSequence = UserSequence()
    train_behavior_encoder: TrainBehaviorEncoder = TrainBehaviorEncoder()
    behavior_embedding: BehaviorEmbedding = BehaviorEmbedding()
    item_feature: ItemFeature = ItemFeature()
    train_tokenizer: TrainTokenizer = TrainTokenizer()
    assign_sid: AssignSid = AssignSid()
    publish_release: PublishRelease = PublishRelease()
    gate_drift: GateDrift = GateDrift()
    rank_example: RankExample = RankExample()
    train_ranker: TrainRanker = TrainRanker()
    maintain: Maintain = Maintain()

    def digest(self) -> str:
        """12 hex digits that name this configuration; where it runs (`launch`) does not count."""
        content = self.model_dump(mode="json", exclude={"launch", "name"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def flat(self) -> dict[str, Any]:
        """Every setting as `section.key` -> value, for MLflow parameters."""
        return _flatten(self.model_dump(mode="json"))


def load(profile: str, overrides: tuple[str, ...] = ()) -> Config:
    """The profile's configuration with `section.key=value` overrides applied.

    Args:
        profile: a name in pipeline/profiles or a path to a TOML file.
        overrides: `section.key=value`; the value is TOML, a bare word is a string.
    Raises: ConfigError for an unknown profile, section or key, or a value of the wrong type.
    """
    path = _profile_path(profile)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the profile is not valid TOML", expected="a TOML file in UTF-8", found=str(error), where=str(path)) from error
    for override in overrides:
        _apply(data, override)
    return parse({"name": path.stem, **data}, where=str(path))


def parse(data: dict[str, Any], *, where: str) -> Config:
    """Configuration from a nested dict; `where` names its origin in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from error


def known_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def _profile_path(profile: str) -> Path:
    path = Path(profile) if profile.endswith(".toml") else PROFILES / f"{profile}.toml"
    if not path.is_file():
        raise ConfigError(
            f"unknown profile {profile!r}",
            expected="one of " + ", ".join(known_profiles()) + ", or a path to a .toml file",
            found=profile,
            where=str(path),
            next_command=f"sid run refresh --date D --profile {known_profiles()[0]}",
        )
    return path


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"cannot read the override {override!r}", expected="section.key=value", found=override, where="--set")
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        read = {"value": text}
    if set(read) != {"value"}:
        raise ConfigError(f"cannot read the override {override!r}", expected="one value", found=", ".join(read), where="--set")
    value = read["value"]
    *sections, name = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{section!r} is a value, not a section", expected="section.key=value", found=override, where="--set")
    data[name] = value


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    section, key = ".".join(path[:-1]) or "(top level)", path[-1] if path else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(_section_fields(path[:-1])))
        return ConfigError(f"unknown key {key!r} in section [{section}]", expected=f"one of {known}", found=key, where=f"{where}, section [{section}]")
    return ConfigError(
        f"bad value for {key!r} in section [{section}]", expected=first["msg"], found=repr(first.get("input")), where=f"{where}, section [{section}]"
    )


def _section_fields(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in path:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
