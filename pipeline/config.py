"""One TOML profile = one whole run, loaded into frozen models; a section is a stage, a field has a default, a unit and a line.

Unknown keys, unknown sections and wrong types fail at load with the key, the section, the file and the known names.
Addresses and secrets never stand here: they come from the environment (`SID_HOME`, `SID_WAREHOUSE`, `SID_CATALOG_URI`, `MLFLOW_TRACKING_URI`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.redact import IN_ADDRESS

PROFILES = Path(__file__).parent / "profiles"
# Also a key of any kind (adls.auth.shared-key.account.key, s3.access-key-id) and a header that logs in.
SECRET_PROPERTY = re.compile(
    r"(?i)secret|passw|token|credential|authorization|cookie|api-?key|(?:access|account|shared|private|encryption)[-._]?key|[-._]sas\b"
)


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys and silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="after")
    def heads_share_the_width(self) -> Self:
        """The section; where it has attention heads they divide the width among them."""
        width, heads = getattr(self, "dim", None), getattr(self, "num_heads", 1)
        if width is not None and width % heads:
            raise ValueError(f"num_heads must divide dim: {heads} heads, width {width}")
        return self

    @model_validator(mode="after")
    def strata_fit(self) -> Self:
        """The section; where it has strata, head and tail are not more than all items."""
        head, tail = getattr(self, "head_share", 0.0), getattr(self, "tail_share", 0.0)
        if head + tail > 1:
            raise ValueError(f"head_share and tail_share are more than all items together: {head:g} + {tail:g}")
        return self


class Lake(Section):
    """Where the tables live; addresses come from the environment."""

    catalog: Literal["hadoop", "jdbc", "rest", "glue"] = Field("hadoop", description="Iceberg catalog type; hadoop = a local folder, no server")
    properties: dict[str, str] = Field({}, description="further catalog properties, e.g. io-impl; no secrets")

    @field_validator("properties")
    @classmethod
    def no_secrets(cls, given: dict[str, str]) -> dict[str, str]:
        """The properties; a profile is logged, stored and shown, so none may be a secret."""
        wrong = [name for name in given if SECRET_PROPERTY.search(name)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: secrets come from the environment")
        return given


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
    volume_claim: str = Field("", description="kubernetes PersistentVolumeClaim (ReadWriteMany) mounted at SID_HOME; the launcher reads outcomes from it")


class Source(Section):
    """The data set and its calendar."""

    dataset: str = Field("movielens", description="a key of pipeline.datasets.DATASETS")
    path: str = Field("", description="folder or file of the user's own copy; empty = let the data set fetch or generate it")
    start: date = Field(date(1970, 1, 1), description="first day of the calendar; the first night loads everything from here on")
    closed_weekdays: list[str] = Field([], description="days without trading, e.g. ['saturday']: an absent file is then declared_empty")
    closed_dates: list[date] = Field([], description="further days without trading")
    absent: Literal["missing", "declared_empty"] = Field("missing", description="what an absent file of an open day means")
    catalogue: Literal["snapshot", "delta", "from_events"] = Field("delta", description="what a catalogue file holds; only a snapshot retires by absence")
    events_pattern: str = Field("", description="folder: events path under `path`, with {date}; e.g. events/{date}.csv")
    items_pattern: str = Field("", description="folder: items path under `path`, with {date}; e.g. items/{date}.jsonl")
    event_columns: dict[str, str] = Field(
        {}, description="folder: our column -> theirs (user_id, item_id, event_ts, event_type, value, session_id); empty = same names"
    )
    item_columns: dict[str, str] = Field(
        {}, description="folder: our column -> theirs (item_id, title, text, category, image_uri, text_vector, image_vector); empty = same names"
    )
    image_root: str = Field("", description="folder or fsspec URI that image_uri values are joined to; a complete URI must begin with it")
    options: dict[str, int | float | str | bool] = Field({}, description="options of the data set itself, e.g. time_format of `folder`, items of `shop`")

    @field_validator("image_root")
    @classmethod
    def no_password(cls, given: str) -> str:
        """The address; a profile is logged, stored and shown, so none may carry a password."""
        if IN_ADDRESS.search(given):
            raise ValueError("an address without a password: stores take theirs from the environment (AWS's variables, or fsspec's FSSPEC_...)")
        return given


class PlanNight(Section):
    """The refresh policy and the vocabulary's first day."""

    policy: Literal["frozen", "anchored", "warm", "cold"] = Field(
        "frozen", description="frozen = keep the generation until a refit is due; anchored, warm, cold = begin a new generation that way every night"
    )
    refit: Literal["anchored", "warm", "cold"] = Field(
        "anchored",
        description="a due refit begins: anchored = at the champion, rows pulled towards it, codes matched and held; warm = at the champion; cold = anew",
    )
    refit_when_due: bool = Field(True, description="obey sid.release.refit_due of the parent with a new generation")


class Ingest(Section):
    """Quarantine limits."""

    max_rejected_share: float = Field(0.05, ge=0, le=1, description="share of a night's rows, and of its catalogue rows, that may be rejected")
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
    text_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="products of the text encoder; bfloat16 is twice as fast where the processor has it (cosine to float32 .9999); part of the encoder id",
    )
    image_batch: int = Field(4, ge=2, description="images per forward pass; part of the encoder id: another value encodes anew")
    image_size: int = Field(224, ge=32, description="pixels per side after resizing")
    max_pixels: int = Field(50_000_000, ge=1, description="pixels of one image that are decoded at most")
    max_tokens: int = Field(128, ge=8, description="tokens of one text that are read")


class ContentCre(Section):
    """SAIL-Embedding's recipe over the base encoders' vectors; a cold generation trains it, later nights and refits keep its model."""

    enabled: bool = Field(False, description="train it at the next cold generation; a generation that has one keeps it whatever this says")
    widths: list[int] = Field([64, 128, 256], min_length=1, description="nested output widths, ascending: each is trained to stand alone")
    width: int = Field(0, ge=0, description="width that is delivered, one of `widths`; 0 = the widest")
    input_dim: int = Field(256, ge=2, description="principal axes of a modality's base vectors that its adapter reads")
    hidden_dim: int = Field(512, ge=2, description="hidden width of a modality's adapter")
    patterns: list[str] = Field(
        ["fused-fused", "text-text", "image-image", "text-image", "image-text"],
        description="query-target patterns over text | image | fused; a pair counts in those that it has the vectors for",
    )
    sources: list[Literal["category", "words", "session", "sequence"]] = Field(["category", "words", "session", "sequence"], description="pair sets in use")
    target: Literal["content", "collaborative"] = Field("collaborative", description="whose held-out pairs the sources are weighed against")
    pairs_per_item: int = Field(20, ge=1, description="pairs of one source that an item brings at most")
    min_together: int = Field(2, ge=1, description="sessions, or neighbourhoods in sequences, that two items must share")
    window: int = Field(3, ge=1, description="events apart that still count as neighbours in a sequence")
    max_holders: int = Field(60, ge=2, description="items of one word pair, or of one session, that are paired at most, chosen by a hash")
    held_share: float = Field(0.1, gt=0, lt=1, description="share of items that nothing is trained on; pairs among them are the measure")
    steps: int = Field(300, ge=0, description="steps of each of the three content phases (all sources, nearest sources, hard negatives)")
    sequence_steps: int = Field(300, ge=0, description="steps of sequence-to-item distillation; 0 = ablation")
    identity_steps: int = Field(300, ge=0, description="steps of ID-to-item distillation; 0 = ablation")
    round_steps: int = Field(50, ge=1, description="steps between checkpoints, and between looks at weights and hard negatives")
    batch_size: int = Field(256, ge=2, description="pairs, questions or items per step")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW step size, cosine to a twentieth")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    temperature: float = Field(0.07, gt=0, description="first tau of every source; learned from there")
    negatives: Literal["f1", "fixed", "off"] = Field("f1", description="threshold of hard negatives: chosen by F1, fixed, or no hard negatives (ablations)")
    fixed_threshold: float = Field(0.9, ge=-1, le=1, description="cosine threshold of negatives = fixed")
    num_hard: int = Field(8, ge=1, description="hard negatives per query")
    weights: Literal["adaptive", "uniform"] = Field("adaptive", description="weights of the sources; uniform = ablation")
    weight_temperature: float = Field(0.05, gt=0, description="temperature of the softmax over the sources' agreement")
    specialised: bool = Field(True, description="one source per batch; False = ablation, all sources in every batch")
    cosent: float = Field(0.1, ge=0, description="weight of the order of graded pairs")
    single: float = Field(0.5, ge=0, description="weight of patterns within one modality")
    cross: float = Field(0.25, ge=0, description="weight of patterns across modalities")
    keep: float = Field(1.0, ge=0, description="weight of the auxiliary item pairs while distilling")
    hidden_share: float = Field(0.1, ge=0, lt=0.5, description="share of items that have their text hidden in a step, and as many their image")
    max_history: int = Field(10, ge=1, description="past items of a question")
    max_questions: int = Field(200_000, ge=1, description="questions drawn from the sequences at most")
    min_peak: int = Field(3, ge=1, description="past items like the target that a single-peak question needs")
    peak_quantile: float = Field(0.9, gt=0, lt=1, description="like = above this quantile of the similarity of random pairs")
    peak_share: float = Field(0.5, ge=0, le=1, description="share of the history in the target's cluster that a multi-peak question needs")
    sample: int = Field(4096, ge=16, description="pairs that choose the sources' weights, and candidates for hard negatives, at most")
    clusters: int = Field(16, ge=2, description="centroids per pair set, and clusters of the multi-peak samplers")
    cluster_sizes: list[int] = Field([64, 256], description="code-book sizes of the clustered IDs in the embedding report")
    quantise_levels: int = Field(3, ge=1, description="levels of the quantised IDs in the embedding report")

    @field_validator("widths")
    @classmethod
    def ascending(cls, given: list[int]) -> list[int]:
        """The widths; each holds the ones before it."""
        if sorted(set(given)) != given or given[0] < 2:
            raise ValueError("widths must ascend from 2 or more")
        return given

    @field_validator("patterns")
    @classmethod
    def known_patterns(cls, given: list[str]) -> list[str]:
        """The patterns; both sides are text, image or fused."""
        sides = ("text", "image", "fused")
        wrong = [pattern for pattern in given if tuple(pattern.split("-")) not in {(query, target) for query in sides for target in sides}]
        if wrong or not given:
            raise ValueError(f"unknown patterns {wrong}: use <text | image | fused>-<text | image | fused>")
        return given

    @model_validator(mode="after")
    def known_width(self) -> ContentCre:
        """The section; the delivered width is a trained one."""
        if self.width and self.width not in self.widths:
            raise ValueError(f"width must be one of widths {self.widths} or 0")
        return self

    @property
    def delivered(self) -> int:
        """The width that is stored."""
        return self.width or self.widths[-1]


class UserSequence(Section):
    """Order of a user's events."""

    order: Literal["time", "basket"] = Field(
        "time", description="time = by event_ts; basket = events of one session have no order; what has none is shuffled by a hash"
    )
    max_events: int = Field(500, ge=2, description="latest events kept per user")


class SasRec(Section):
    """SASRec hyper-parameters."""

    dim: int = Field(64, ge=4, description="width of item vectors")
    num_blocks: int = Field(2, ge=1, description="attention blocks")
    num_heads: int = Field(2, ge=1, description="attention heads")
    max_length: int = Field(50, ge=2, description="events per training window")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on embeddings, attention output and feed-forward")
    tied: bool = Field(
        True, description="one item table for input and output; False = two, and the input table is the behaviour vector (richness = norm wants it)"
    )
    learning_rate: float = Field(2e-3, gt=0, description="AdamW step size; moved rows start at three times it")
    batch_size: int = Field(64, ge=1, description="windows per step")
    max_epochs: int = Field(40, ge=1, description="epochs at most")
    patience: int = Field(5, ge=1, description="epochs without better validation NDCG@10")
    sampled_above: int = Field(20_000, ge=1, description="catalogue size above which the softmax is sampled")
    num_negatives: int = Field(1024, ge=1, description="shared uniform negatives of the sampled softmax")
    valid_users: int = Field(3000, ge=1, description="users of the validation sample")
    row_steps: int = Field(100, ge=1, description="steps that train moved rows under the frozen policy")


class GraphEncoder(Section):
    """What every encoder on the user-item graph is trained with; a pair of user and item counts once."""

    dim: int = Field(64, ge=4, description="width of a user's and an item's row")
    learning_rate: float = Field(5e-3, gt=0, description="Adam step size; moved rows are trained with it as well")
    decay: float = Field(1e-4, ge=0, description="weight of the squared rows of a batch, per pair")
    batch_size: int = Field(1024, ge=1, description="pairs per step at least")
    max_steps: int = Field(100, ge=1, description="steps per epoch at most: every step propagates over the whole graph, so a large graph takes larger batches")
    max_epochs: int = Field(100, ge=1, description="epochs at most")
    patience: int = Field(10, ge=1, description="epochs without better validation NDCG@10")
    valid_users: int = Field(3000, ge=1, description="users of the validation sample")
    row_steps: int = Field(100, ge=1, description="steps that train moved rows under the frozen policy")


class BprMf(GraphEncoder):
    """BPR matrix factorisation: the floor of the graph encoders."""


class LightGcn(GraphEncoder):
    """LightGCN hyper-parameters."""

    num_layers: int = Field(3, ge=0, description="propagation layers K; the vector is the mean of layers 0 .. K")


class Ngcf(GraphEncoder):
    """NGCF hyper-parameters; the vector is num_layers + 1 times as wide as `dim`."""

    num_layers: int = Field(3, ge=1, description="propagation layers; the vector is layers 0 .. num_layers end to end")
    form: Literal["paper", "released"] = Field(
        "paper", description="paper = D^-1/2 A D^-1/2 and one activation; released = D^-1 (A + I), an activation per part, layers of unit length"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="message dropout: share of a layer's outputs that are dropped in a step")
    product: bool = Field(True, description="the element-wise product of a node and its neighbours; False = the ablation without it")
    decay: float = Field(1e-5, ge=0, description="weight of the squared final vectors of a batch, per pair")


class AlphaRec(GraphEncoder):
    """AlphaRec hyper-parameters; it reads the night's text vectors and has no row per id."""

    form: Literal["mlp", "linear"] = Field("mlp", description="map of the text vectors: two layers, or one linear map without bias (the paper's `homo`)")
    hidden_dim: int = Field(512, ge=2, description="hidden width of the two-layer map")
    num_layers: int = Field(2, ge=0, description="propagation layers K; the vector is the mean of layers 0 .. K")
    temperature: float = Field(0.15, gt=0, description="tau of the contrastive loss")
    num_negatives: int = Field(256, ge=1, description="uniform negatives per step, shared by its pairs")
    learning_rate: float = Field(5e-4, gt=0, description="Adam step size")
    decay: float = Field(0.0, ge=0, description="weight decay of the map")
    cold_items: bool = Field(False, description="items with a text get a vector before n_min events, from the text alone while they have none")
    probe: bool = Field(
        True, description="at a new generation measure the text vectors by a linear map without graph, beside the same vectors dealt out at random"
    )


class TrainBehaviorEncoder(Section):
    """Behaviour encoder and the richness reference it fits."""

    encoder: str = Field("sasrec", description="a key of pipeline.encoders.BEHAVIOR_ENCODERS")
    sasrec: SasRec = SasRec()
    bpr_mf: BprMf = BprMf()
    ngcf: Ngcf = Ngcf()
    lightgcn: LightGcn = LightGcn()
    alpharec: AlphaRec = AlphaRec()
    refit_rate: float = Field(0.3, gt=0, description="anchored and warm: share of the encoder's learning rate")
    n_min: int = Field(5, ge=1, description="events from which an item has a behaviour vector")
    richness: Literal["norm", "count", "rank", "reliability"] = Field("rank", description="what measures how informative an item's behaviour is")
    low_strength_share: float = Field(0.4, gt=0, lt=1, description="share of items that shall get alignment strength below .05; fixes beta")
    alpha: float = Field(10.0, gt=0, description="steepness of the alignment strength (eq. 17)")
    beta: float | None = Field(None, description="fixed beta of eq. 17; None = from low_strength_share")
    measure_reliability: bool = Field(True, description="train two half encoders and measure split-half neighbour overlap (needed by richness = reliability)")
    half_epochs: int = Field(10, ge=1, description="epochs of each half encoder at most")
    min_probe_lift: float = Field(
        1.0, ge=0, description="gate at a new generation, alpharec: recall of its linear probe of the texts over that of texts dealt out at random"
    )
    min_spearman: float = Field(0.2, ge=-1, le=1, description="gate at a new generation: rank correlation of richness and split-half overlap")


class BehaviorEmbedding(Section):
    """Behaviour rows of the night."""

    max_shift: float = Field(10.0, gt=0, description="gate: largest norm of a behaviour vector, in units of the generation's maximum norm")


class ItemFeature(Section):
    """Manifest gates."""

    min_content_share: float = Field(0.5, ge=0, le=1, description="gate: share of live items with at least one content vector")


class AdaSid(Section):
    """ADA-SID (ADC-SID form by default); names follow the paper."""

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
    temperature: float = Field(0.07, gt=0, description="tau of the contrastive terms and of the next-item loss")
    align_weight: float = Field(0.1, ge=0, description="mu of the alignment terms")
    codebook_weight: float = Field(0.25, ge=0, description="weight of the codebook term")
    commitment: float = Field(0.05, ge=0, description="weight of the commitment term")
    strength: Literal["adaptive", "mean", "shuffled", "one", "zero", "inverted"] = Field(
        "adaptive", description="alignment strength w: adaptive is the method, the others are controls"
    )
    behavior_prior: Literal["none", "absent", "poor"] = Field(
        "none", description="what content says of behaviour: absent = stands in where there is none; poor = draws poor behaviour towards it, too; none = unused"
    )
    router: Literal["adaptive", "one"] = Field("adaptive", description="behaviour gate: adaptive is the method, one is the control")
    sparsity: Literal["bucket", "expert", "scalar", "off"] = Field(
        "expert",
        description="gates close by richness bucket, all experts alike (expert) or the weakest first (bucket); by one scalar (paper); or unpressed (off)",
    )
    sparsity_buckets: int = Field(8, ge=1, description="richness buckets (quantiles, frozen with the generation) that have a lambda each")
    active_share: float = Field(0.6, gt=0, le=1, description="share of behaviour gates on for the poorest items (N = 0); theta = 1 - active share")
    lambda_init: float = Field(1e-3, gt=0, description="first lambda of the sparsity controller")
    lambda_step: float = Field(1.02, gt=1, description="factor by which lambda moves per step")
    lambda_max: float = Field(10.0, gt=0, description="largest lambda")
    behavior_dropout: float = Field(0.2, ge=0, lt=1, description="share of items whose behaviour is hidden in a step")
    content_dropout: float = Field(0.1, ge=0, lt=1, description="share of items whose text or image is hidden in a step")
    warmup_epochs: int = Field(8, ge=0, description="epochs without quantisation before k-means initialisation")
    expert_start: Literal["parts", "whole"] = Field(
        "parts",
        description="where the experts of one modality begin: each with its own part of the principal axes, or each with all of them, turned its own way",
    )
    detach_behavior: bool = Field(False, description="stop the gradient into h_b in the alignment terms")
    code_gradient: bool = Field(True, description="let the decoder's gradient reach the code rows")
    text_dim: int = Field(128, ge=1, description="PCA width of text vectors before the tokenizer")
    image_dim: int = Field(128, ge=1, description="PCA width of image vectors before the tokenizer")
    tune_epochs: int = Field(
        0, ge=0, description="epochs of tuning by users' histories through soft codes (MMQ's second stage) after the training; 0 = the paper"
    )
    tune_rate: float = Field(1.0, gt=0, description="step size while tuning, as a share of the learning rate")
    tune_keep: float = Field(1.0, ge=0, description="weight of the training's own loss while tuning")
    tune_popularity: float = Field(
        0.5, ge=0, le=1, description="how much of popularity the tuning learns: 1 = what a user takes next, 0 = what this user takes oftener than others do"
    )
    soft_temperature: float = Field(0.1, gt=0, description="tau of the soft codes")
    max_history: int = Field(20, ge=1, description="latest items of the user's history")


class RqKmeans(Section):
    """Residual k-means on the concatenated unit-norm modalities."""

    num_levels: int = Field(6, ge=1, description="L residual levels")
    codebook_size: int = Field(100, ge=2, description="K codes per level")
    iterations: int = Field(25, ge=1, description="Lloyd iterations per level")
    balanced: bool = Field(True, description="assign evenly in the last third of the iterations")


class RqVae(Section):
    """RQ-VAE in TIGER's form, trained by this loop; the paper's sizes are 3 levels of 256 codes."""

    num_levels: int = Field(6, ge=1, description="L residual levels")
    codebook_size: int = Field(100, ge=2, description="K codes per level")
    latent_dim: int = Field(32, ge=2, description="width of latents and code rows")
    hidden_dims: list[int] = Field([512, 256, 128], description="hidden widths of the encoder; the decoder has them in reverse")
    codebook_weight: float = Field(1.0, ge=0, description="weight of the codebook term")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment term")
    warmup_epochs: int = Field(8, ge=0, description="epochs without quantisation before k-means initialisation; the papers start at once")
    sinkhorn: bool = Field(False, description="assign evenly at the last level while training (LC-Rec, LETTER)")
    sinkhorn_epsilon: float = Field(0.003, gt=0, description="temperature of that assignment, distances lie in [-1, 1]")
    sinkhorn_rounds: int = Field(50, ge=1, description="rounds of that assignment")


class Letter(RqVae):
    """LETTER: an RQ-VAE of the content whose quantised latent is drawn to behaviour and whose codes are spread; the paper's sizes are 4 levels of 256."""

    sinkhorn: bool = Field(True, description="assign evenly at the last level while training")
    collaborative_weight: float = Field(0.1, ge=0, description="alpha of the alignment with behaviour vectors; 0 = ablation")
    collaborative: Literal["own", "shuffled"] = Field("own", description="whose behaviour an item is drawn to; shuffled = control, another item's")
    diversity_weight: float = Field(1e-4, ge=0, description="beta of the diversity of code rows; 0 = ablation")
    num_clusters: int = Field(10, ge=1, description="clusters of code rows that the diversity term keeps together, at most half the codes")


class Opq(Section):
    """OPQ as RPG uses it: parallel codes of the sub-spaces of a learned rotation."""

    num_positions: int = Field(16, ge=1, le=64, description="L sub-spaces; the paper uses 16 to 64")
    codebook_size: int = Field(256, ge=2, description="K codes per sub-space")
    pca_dim: int = Field(512, ge=1, description="width kept by PCA before the rotation; filled up with zeros to a multiple of the positions")
    whiten: bool = Field(True, description="unit variance along each principal axis; False keeps distances as they are")
    iterations: int = Field(25, ge=0, description="alternations of rotation and code rows; 0 = product quantisation without a learned rotation")


class RandomCodes(Section):
    """Control: codes that say nothing about an item but which one it is."""

    num_positions: int = Field(6, ge=1, description="L positions")
    codebook_size: int = Field(100, ge=2, description="K codes per position")


class Mmq(Section):
    """MMQ v1: shared and content-specific experts, auxiliary reconstruction, orthogonality, tuning by behaviour."""

    num_shared: int = Field(2, ge=0, description="N_s shared experts")
    num_text: int = Field(2, ge=0, description="N_t text experts")
    num_image: int = Field(2, ge=0, description="N_v image experts; dropped when the data set has no images")
    codebook_size: int = Field(100, ge=2, description="K codes per expert")
    latent_dim: int = Field(128, ge=2, description="width of latents and codes")
    hidden_dim: int = Field(256, ge=2, description="hidden width of experts and decoders")
    latent_scale: float = Field(4.0, gt=0, description="norm of latents and code rows")
    input_dim: int = Field(128, ge=1, description="PCA width of a modality's vectors before the tokenizer")
    reconstruction: float = Field(12.0, ge=0, description="weight of the reconstruction from all experts")
    auxiliary: float = Field(10.0, ge=0, description="weight of each modality's reconstruction from its own experts; 0 = ablation")
    orthogonality: float = Field(0.005, ge=0, description="weight of the overlap between experts' maps; 0 = ablation")
    codebook_weight: float = Field(3.0, ge=0, description="weight of the codebook term")
    commitment: float = Field(0.6, ge=0, description="weight of the commitment term")
    warmup_epochs: int = Field(8, ge=0, description="epochs without quantisation before k-means initialisation")
    code_gradient: bool = Field(True, description="let the decoder's gradient reach the code rows")
    tune_epochs: int = Field(20, ge=0, description="epochs of tuning by users' histories through soft codes; 0 = ablation, no histories needed")
    tune_rate: float = Field(1.0, gt=0, description="step size while tuning, as a share of the learning rate")
    tune_reconstruction: float = Field(0.5, ge=0, description="weight of the reconstruction while tuning")
    tune_auxiliary: float = Field(0.5, ge=0, description="weight of the auxiliary reconstruction while tuning")
    tune_popularity: float = Field(
        1.0, ge=0, le=1, description="how much of popularity the tuning learns: 1 = what a user takes next, 0 = what this user takes oftener than others do"
    )
    soft_temperature: float = Field(0.1, gt=0, description="tau of the soft codes")
    temperature: float = Field(0.1, gt=0, description="tau of the next-item loss")
    max_history: int = Field(20, ge=1, description="latest items of the user's history")


class Das(RqVae):
    """DAS: an RQ-VAE of items and one of users, aligned with a debiased collaborative model in the same training."""

    num_levels: int = Field(4, ge=1, description="L residual levels, of items and of users")
    tower_dim: int = Field(128, ge=2, description="hidden width of the collaborative model's towers")
    input_dim: int = Field(128, ge=1, description="PCA width of behaviour vectors before the towers")
    collaborative: float = Field(1.0, ge=0, description="weight of the collaborative model's loss")
    align_user_item: float = Field(0.05, ge=0, description="weight of users against the items they take, both ways; 0 = ablation")
    align_items: float = Field(0.05, ge=0, description="weight of codes against the collaborative vector of the same item; 0 = ablation")
    align_users: float = Field(0.05, ge=0, description="weight of codes against the collaborative vector of the same user; 0 = ablation")
    align_neighbours: float = Field(0.05, ge=0, description="weight of items next to each other and of users of one item; 0 = ablation")
    joint: bool = Field(True, description="quantise while aligning; False = ablation, code books by k-means once the alignment is learnt")
    debias: bool = Field(True, description="popularity explains its part of the collaborative score apart from the vectors; False = ablation")
    temperature: float = Field(0.1, gt=0, description="tau of all contrastive terms")
    max_history: int = Field(20, ge=1, description="latest items of the user's history")


class Unger(RqKmeans):
    """UNGER (PRORec): content and behaviour made one vector by alignment and a next-item loss, then residual k-means."""

    num_levels: int = Field(3, ge=1, description="L residual levels")
    codebook_size: int = Field(256, ge=2, description="K codes per level")
    latent_dim: int = Field(128, ge=2, description="width of each half of the integrated vector")
    hidden_dim: int = Field(256, ge=2, description="hidden width of the next-item reader")
    input_dim: int = Field(128, ge=1, description="PCA width of a modality's vectors before the tokenizer")
    next_item: float = Field(1.0, ge=0, description="weight of the next-item loss; 0 = ablation")
    alignment: float = Field(0.5, ge=0, description="alpha, weight of content against behaviour; 0 = ablation")
    freeze_behavior: bool = Field(False, description="behaviour's map stays as it begins: the shortcut that is not the method")
    temperature: float = Field(0.07, gt=0, description="tau of the alignment")
    next_temperature: float = Field(0.1, gt=0, description="tau of the next-item loss")
    max_history: int = Field(20, ge=1, description="latest items of the user's history")
    balanced: bool = Field(False, description="assign evenly in the last third of the iterations")


class TrainTokenizer(Section):
    """The tokenizer, its training loop and its variant's own section."""

    tokenizer: str = Field("ada_sid", description="a key of pipeline.tokenizers.TOKENIZERS")
    ada_sid: AdaSid = AdaSid()
    rq_kmeans: RqKmeans = RqKmeans()
    mmq: Mmq = Mmq()
    das: Das = Das()
    unger: Unger = Unger()
    rq_vae: RqVae = RqVae()
    letter: Letter = Letter()
    opq: Opq = Opq()
    random_codes: RandomCodes = RandomCodes()
    pull: float = Field(1.0, ge=0, description="anchored: weight of the pull of code rows towards the champion's")
    refit_rate: float = Field(0.1, gt=0, description="anchored and warm: share of the learning rate; the champion needs adjusting, not learning")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW step size")
    batch_size: int = Field(256, ge=2, description="items per step at most, over all processes; a small catalogue takes smaller steps")
    max_epochs: int = Field(60, ge=1, description="epochs at most, warm-up included")
    patience: int = Field(10, ge=1, description="epochs without a better validation loss, after warm-up")
    valid_share: float = Field(0.05, ge=0, lt=1, description="share of items held out for early stopping; catalogues under 2,000 items hold out none")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast type")
    cuda_graph: bool = Field(
        False, description="one process on an accelerator: record the step once and replay it (ada_sid, rq_vae, mmq before its tuning; others run as they come)"
    )
    revive_until: float = Field(0.8, ge=0, le=1, description="share of the epochs in which dead codes are revived")


class AssignSid(Section):
    """Collisions."""

    hold_margin: float = Field(0.5, ge=0, description="frozen and anchored: a code stays while its distance is within this share of the nearest code's")
    max_disambiguator: int = Field(64, ge=1, description="D_max: items that may share one code tuple")


class PublishRelease(Section):
    """The release's gates."""

    max_collision_rate: float = Field(0.3, ge=0, le=1, description="share of items that share their codes with another")
    min_perplexity_share: float = Field(0.3, ge=0, le=1, description="perplexity of each position as a share of the codes in use or items, whichever is fewer")
    max_dead_share: float = Field(0.3, ge=0, le=1, description="share of unused codes per position")
    max_shared_mass: float = Field(0.3, ge=0, le=1, description="share of popularity mass on items that share their codes")
    max_churn: float = Field(0.1, ge=0, le=1, description="churn budget: share of items of the parent whose SID changed, within a generation")
    max_head_churn: float = Field(0.05, ge=0, le=1, description="churn budget of the head stratum, within a generation")
    max_refit_churn: float = Field(0.6, ge=0, le=1, description="churn budget of a night that begins an anchored generation")


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
    """The ranker: its network, its arms and what an item is to it."""

    model: Literal["din", "ppnet", "dcnv2"] = Field("din", description="network: DIN, PPNet gating or DCNv2 crosses; all pool the history as DIN does")
    arms: list[str] = Field(["id", "id_sid", "id_permuted"], description="id | id_sid | id_permuted | sid | permuted | id_other | popularity")
    other_release: str = Field("", description="tag of a second release, say of another tokenizer, for the arm id_other")
    seeds: int = Field(1, ge=1, description="seeds per arm")
    dim: int = Field(16, ge=2, description="embedding width per item")
    hidden_dims: list[int] = Field([128, 64], description="widths of the last layers")
    learning_rate: float = Field(2e-3, gt=0, description="Adam step size")
    batch_size: int = Field(512, ge=1, description="rows per step")
    max_epochs: int = Field(4, ge=1, description="epochs at most")
    weights: bool = Field(True, description="router weights as inputs")
    prefix_ngrams: bool = Field(False, description="code prefixes as tokens, for residual codes")
    pooling: Literal["concat", "sum"] = Field("concat", description="an item's code rows side by side, or summed (with prefix_ngrams: the prefix n-gram form)")
    gate_dim: int = Field(32, ge=1, description="ppnet: hidden width of the gates")
    cross_layers: int = Field(3, ge=1, description="dcnv2: cross layers")
    cross_rank: int = Field(0, ge=0, description="dcnv2: rank of a cross layer's matrix; 0 = full")


class Parallel(Section):
    """RPG-like parallel heads on a causal transformer."""

    dim: int = Field(64, ge=4, description="width of code rows and states")
    num_blocks: int = Field(2, ge=1, description="attention blocks")
    num_heads: int = Field(2, ge=1, description="attention heads")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on embeddings, attention output and feed-forward")
    temperature: float = Field(0.07, gt=0, description="tau of the heads' cosine logits")
    scoring: Literal["mean", "sum", "prior", "marginal"] = Field(
        "marginal",
        description="item score from weighted log-probabilities: mean over all slots, absent ones as any code (marginal); mean over present slots; "
        "sum; or sum after subtracting log p of the code (prior)",
    )


class Tiger(Section):
    """T5-like encoder-decoder on code tokens; reruns of the paper have dim 128, 6 heads of 64 (here heads divide dim), feed_dim 1024, 4 + 4 layers."""

    dim: int = Field(64, ge=4, description="width of token rows and states")
    num_heads: int = Field(4, ge=1, description="attention heads")
    feed_dim: int = Field(256, ge=4, description="hidden width of the feed-forward")
    encoder_layers: int = Field(2, ge=1, description="encoder layers")
    decoder_layers: int = Field(2, ge=1, description="decoder layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in both stacks")


class DiscRec(Section):
    """The branches that `discrec` puts before both stacks of [train_retriever.tiger]."""

    num_heads: int = Field(2, ge=1, description="heads of the attention inside an item")
    feed_dim: int = Field(256, ge=4, description="hidden width of the branch's feed-forward; the paper uses 1024 at dim 128")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the branch's feed-forward")
    local: bool = Field(True, description="attention stays inside the item; False = ablation, over the whole history")
    gate: bool = Field(True, description="learned mix of the branches; False = ablation, their sum")


class Sequential(Section):
    """REG4Rec-like decoding of the codes slot by slot."""

    dim: int = Field(64, ge=4, description="width of code rows, items and states")
    num_heads: int = Field(4, ge=1, description="attention heads")
    feed_dim: int = Field(256, ge=4, description="hidden width of the feed-forward")
    encoder_layers: int = Field(2, ge=1, description="encoder layers over items")
    decoder_layers: int = Field(1, ge=1, description="decoder layers over slots")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in both stacks")
    temperature: float = Field(0.1, gt=0, description="tau of the heads' cosine logits")


class TrainRetriever(Section):
    """The generative retriever, its arms and its variant's own section."""

    enabled: bool = Field(False, description="train it at all; False = the stage is skipped, because it takes minutes")
    retriever: str = Field("parallel", description="a key of pipeline.retrievers.RETRIEVERS: parallel | tiger | discrec | sequential")
    parallel: Parallel = Parallel()
    tiger: Tiger = Tiger()
    discrec: DiscRec = DiscRec()
    sequential: Sequential = Sequential()
    arms: list[str] = Field(["real", "permuted", "random"], description="codes as released | dealt out within popularity deciles | uniform")
    seeds: int = Field(1, ge=1, description="seeds per arm")
    max_history: int = Field(20, ge=1, description="latest events of a history")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW step size, decayed along a cosine")
    batch_size: int = Field(128, ge=1, description="histories per step")
    max_epochs: int = Field(30, ge=1, description="epochs at most")
    patience: int = Field(30, ge=1, description="epochs without a better validation score; the step size is annealed, so to stop early is to give up its end")
    valid_users: int = Field(1000, ge=1, description="users whose last basket is the validation sample")
    stop_on: Literal["ndcg", "loss"] = Field("ndcg", description="validation score: NDCG@50 over the full ranking, or the loss (cheap for beam searches)")
    router_share: float = Field(1.0, ge=0, le=1, description="share of the router weights in loss and score: (1 - share) + share * weight")
    weighted_inputs: bool = Field(False, description="multiply code rows of the history by router weights")
    distill_weight: float = Field(0.0, ge=0, description="beta of UNGER's distillation towards the item's own vectors; 0 = off")
    distill_temperature: float = Field(0.07, gt=0, description="temperature of the distillation")
    beams: int = Field(50, ge=1, description="beams of the generative retrievers; metrics beyond it are left out")
    mask_history: bool = Field(True, description="the user's earlier items leave the ranking, for every arm and floor alike, and are not asked for")
    max_questions: int = Field(0, ge=0, description="test questions at most, drawn by the seed; 0 = all")
    ease_up_to: int = Field(6000, ge=0, description="catalogue size up to which the floor EASE is computed; it costs N^3")
    ease_decay: float = Field(1.0, gt=0, le=1, description="weight of an event in the context that EASE reads, per later event of the user; 1 = all alike")


class Maintain(Section):
    """Weekly housekeeping."""

    release_days: int = Field(90, ge=1, description="days a release's tag lives after it was published; the first of a generation and pinned ones live on")
    keep_branches_days: int = Field(14, ge=1, description="days an audit branch, or a tag without a release row, stays for inspection")
    keep_snapshots_days: int = Field(14, ge=1, description="days a snapshot that nothing points at stays readable; running stages read such snapshots")
    keep_staging_days: int = Field(
        30, ge=1, description="days a run's staging folder stays after its last change, and a model fetched from a remote store after its last use"
    )
    compact_from_files: int = Field(5, ge=2, description="small files in one partition before they are joined into larger ones")


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
    content_cre: ContentCre = ContentCre()
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
    train_retriever: TrainRetriever = TrainRetriever()
    maintain: Maintain = Maintain()

    def digest(self, without: Iterable[str] = ()) -> str:
        """12 hex digits that name this configuration; where it runs (`launch`) and housekeeping do not count.

        Args:
            without: further sections that do not count.
        """
        content = self.model_dump(mode="json", exclude={"launch", "name", "maintain", *without})
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
    return parse(read_toml(path, overrides, what="profile"), where=str(path))


def read_toml(path: Path, overrides: Iterable[str] = (), *, what: str) -> dict[str, Any]:
    """What a TOML file says, with `section.key=value` overrides applied; `name` is the file's stem where the file gives none.

    Args:
        what: the kind of file, for the error's text.
    Raises: ConfigError for a file that is not TOML in UTF-8, or an override that is not one assignment.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the {what} is not valid TOML", expected="a TOML file in UTF-8", found=str(error), where=str(path)) from error
    for override in overrides:
        apply_override(data, override)
    return {"name": path.stem, **data}


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
        )
    return path


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set the key of `section.key=value` in a nested dict; the value is TOML, a bare word is a string.

    Raises: ConfigError for an override that is not one assignment.
    """
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
    given = first.get("input")
    found = ", ".join(given) if first["type"] == "value_error" and isinstance(given, dict) else repr(given)  # of a refused secret only the name
    return ConfigError(f"bad value for {key!r} in section [{section}]", expected=first["msg"], found=found, where=f"{where}, section [{section}]")


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
