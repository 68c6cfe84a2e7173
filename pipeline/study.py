"""A study as data: the page (data sets, inputs, arms, readers, claims), its grid of cells, and the verdicts.

A page is one TOML file. An arm is a tokenizer or an ablation of it, a reader is what is trained on its codes, a claim is one paired comparison.
Not here: doing a cell's work (jobs/study_cells.py), running and resuming the grid (jobs/study.py), the statistics (pipeline/intervals.py), tables and plots
(pipeline/study_page.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline.config import Section, TrainBehaviorEncoder, TrainRanker, TrainRetriever, TrainTokenizer, read_toml
from pipeline.errors import ConfigError
from pipeline.intervals import Estimate

PAGES = Path(__file__).parent / "studies"
Model = TypeVar("Model", bound=BaseModel)
Option = int | float | str | bool
Part = Literal["valid", "test", "confirm"]
KEPT, NOT_KEPT, CANNOT_TELL = "kept", "not kept", "cannot tell"
FLOORS = ("popularity", "markov", "ease")  # arms of the reader `floor`
CLAIMED = {"retriever": ("recall@k or ndcg@k", r"(recall|ndcg)@[1-9]\d*"), "ranker": ("auc or gauc", "auc|gauc")}  # metrics by kind of reader
NEEDS_PATH = ("amazon_beauty", "online_retail")  # data sets that are the user's own copy
JUDGED_ROWS = "answers that training knows, ties apart"  # what rankers are judged on (study_cells.row_masks): part of what a cell is
TAKEN_AGAIN = ("online_retail", "shop")  # data sets whose users take an item more than once
JUDGED_ANSWERS = "answers that are new to the user"  # what readers of such sets are judged on (study_cells.set_apart): part of what a cell is


# ---------------------------------------------------------------- the page


class DataSet(Section):
    """A data set with its split; questions and strata use nothing after the training period."""

    kind: Literal["amazon_beauty", "movielens", "online_retail", "shop"] = Field("shop", description="which data set")
    path: str = Field("", description="folder of the user's own copy, or a folder that holds it under the kind's name")
    options: dict[str, Option] = Field({}, description="shop: fields of pipeline.synthetic.World; other kinds have none")
    inputs: str = Field("", description="a key of [inputs] for the arms that name none; empty = the first")
    train_tokenizer: dict[str, Any] = Field({}, description="changes to the page's section of that name, before an arm's: positions of an absent modality")
    worlds: int = Field(1, ge=1, description="shop: worlds, the seed of world w is options.seed + w; a world is then the unit of the statistics")
    max_users: int = Field(0, ge=0, description="users kept, drawn by a hash of their ids; 0 = all")
    max_questions: int = Field(0, ge=0, description="questions per part at most; 0 = all")
    confirm_share: float = Field(0.3, ge=0, lt=1, description="amazon_beauty: share of users, by hash, whose questions stay shut until --confirm")
    rank_events: int = Field(3, ge=1, description="latest training events per user that the ranker learns from")
    negatives: int = Field(4, ge=1, description="ranker: negatives per positive from its own popularity stratum, where there are no ratings")
    threshold: float = Field(4.0, description="ranker: smallest rating that is a positive label, where there are ratings")
    head_share: float = Field(0.2, gt=0, lt=1, description="share of items in the head, by training events")
    tail_share: float = Field(0.5, gt=0, lt=1, description="share of items in the tail")

    @model_validator(mode="after")
    def known_options(self) -> Self:
        """The data set; what is not generated is split one way, so an option would say nothing."""
        if self.options and self.kind != "shop":
            raise ValueError(f"{self.kind} has no options, found {', '.join(self.options)}")
        return self


class Inputs(Section):
    """How an item's vectors are made."""

    text: Literal["minilm", "tfidf", "none"] = Field("minilm", description="tfidf = TF-IDF and 128 singular directions: the weak encoder")
    image: Literal["none", "categories", "efficientnet_lite0"] = Field(
        "none", description="categories = TF-IDF and 64 singular directions of the category words, where there are no pictures"
    )
    train_behavior_encoder: dict[str, Any] = Field({}, description="changes to the page's section of that name")


class Arm(Section):
    """A tokenizer with changes, and how its codes are handed to readers."""

    tokenizer: str = Field("ada_sid", description="a key of pipeline.tokenizers.TOKENIZERS, `plain` (k-means per slot) or `none` (readers with item ids)")
    train_tokenizer: dict[str, Any] = Field({}, description="changes to the page's section of that name")
    inputs: str = Field("", description="a key of [inputs]; empty = the data set's")
    reads: list[Literal["text", "image", "behavior"]] = Field([], description="vectors that the tokenizer is given; empty = all there are")
    richness: Literal["", "norm", "count", "rank", "reliability"] = Field("", description="richness that steers alignment and router; empty = the page's")
    codes: Literal["own", "permuted"] = Field("own", description="permuted = codes and weights dealt to other items of the popularity decile")
    weights: Literal["own", "mean", "shuffled", "one"] = Field("own", description="router weights as read: the items' own, their mean, dealt to others, or 1")
    data: list[str] = Field([], description="keys of [data] the arm runs on; empty = all")
    readers: list[str] | None = Field(None, description="keys of [readers] that read it; absent = all, [] = the codes alone")


class Reader(Section):
    """What is trained on an arm's codes; `neighbours` is not trained: it ranks items by the codes they share with the last item of the history."""

    kind: Literal["retriever", "ranker", "neighbours"] = Field("retriever", description="kind of reader")
    train_retriever: dict[str, Any] = Field({}, description="changes to the page's section of that name")
    train_ranker: dict[str, Any] = Field({}, description="changes to the page's section of that name")
    item: Literal["sid", "id_sid"] = Field("id_sid", description="ranker: an item is its codes, or its id row beside them")
    data: list[str] = Field([], description="keys of [data]; empty = all")
    arms: list[str] = Field([], description="keys of [arms] it reads; empty = all that want it")


class Claim(Section):
    """One paired comparison; its verdict is kept, not kept or cannot tell."""

    title: str = Field(..., description="what is claimed, one sentence")
    arm: str = Field(..., description="a key of [arms], or of [inputs] with reader = features")
    control: str = Field("", description="what it is compared with, a floor too; empty = the arm itself (another metric)")
    reader: str = Field(..., description="a key of [readers]; codes = numbers of the codes themselves; features = numbers of the inputs")
    control_reader: str = Field("", description="reader of the control; empty = the same; floor for a floor")
    data: list[str] = Field([], description="keys of [data], one verdict each; empty = all")
    metric: str = Field(..., description="recall@k | ndcg@k | auc | gauc, or a number of the codes or features")
    control_metric: str = Field("", description="codes and features: metric of the control; empty = the same")
    times: float = Field(1.0, gt=0, description="the arm is compared with so many times the control's number: 2 = at least twice as much")
    stratum: Literal["all", "head", "torso", "tail", "evidence_0", "evidence_1_4", "all_with_ties", "all_with_repeats"] = Field(
        "all", description="slice of the questions that is compared"
    )
    direction: Literal["greater", "smaller", "not_worse"] = Field("greater", description="what the difference shall be")
    margin: float = Field(0.0, ge=0, description="greater, smaller: the difference must exceed it; not_worse: it may fall behind by it")
    least: float = Field(0.0, ge=0, description="smallest difference that would matter; an interval wholly below it is `not kept`")
    primary: bool = Field(False, description="a primary endpoint: its p-value is adjusted together with the others' (Holm)")

    @model_validator(mode="after")
    def can_be_multiplied(self) -> Self:
        """The claim; a multiple of an area under a curve or of a correlation means nothing."""
        if self.times != 1 and (self.reader == "features" or self.metric in ("auc", "gauc")):
            raise ValueError(f"claim {self.title!r} asks for {self.times:g} times {self.metric}, which has no zero to count from")
        return self


class Statistics(Section):
    """Seeds and intervals."""

    seeds: list[int] = Field([0, 1, 2], min_length=1, description="tokenizer seeds, each with its own reader seed")
    encoder_seeds: int = Field(1, ge=1, description="behaviour encoders trained per data set; seed s uses encoder s modulo this")
    level: float = Field(0.95, gt=0.5, lt=1, description="probability mass of an interval")
    min_seeds: int = Field(2, ge=1, description="seeds below which there is no verdict")
    min_worlds: int = Field(6, ge=2, description="worlds below which there is no verdict on generated shops")
    thin_rows: int = Field(1000, ge=1, description="rows below which there is no verdict")
    void_at_cap: bool = Field(True, description="no verdict where a reader of either arm was still improving at its last epoch")
    max_openings: int = Field(3, ge=1, description="times that the test part may be opened")


class Page(Section):
    """A whole study."""

    name: str = Field("unnamed", description="name of the study; the MLflow experiment is sid/study-<name>")
    only: str = Field("", description="regular expression over the names of cells that run where no other one is given; empty = all")
    title: str = Field("", description="headline of the page")
    about: str = Field("", description="a paragraph under it")
    seed: int = Field(20261120, ge=0, description="the one seed; all others derive from it")
    data: dict[str, DataSet] = Field({}, description="data sets by name")
    inputs: dict[str, Inputs] = Field({"default": Inputs()}, description="recipes of item vectors by name")
    arms: dict[str, Arm] = Field({}, description="tokenizers and ablations by name")
    readers: dict[str, Reader] = Field({}, description="readers by name")
    claims: list[Claim] = Field([], description="comparisons")
    statistics: Statistics = Statistics()
    train_behavior_encoder: TrainBehaviorEncoder = TrainBehaviorEncoder()
    train_tokenizer: TrainTokenizer = TrainTokenizer()
    train_retriever: TrainRetriever = TrainRetriever()
    train_ranker: TrainRanker = TrainRanker()

    @field_validator("claims", mode="before")
    @classmethod
    def one_a_control(cls, claims: list[Any]) -> list[Any]:
        """The claims; one with `controls` stands for a claim a name, and {control} in its title for the name."""
        return [each for claim in claims for each in _one_a_control(claim)]

    @model_validator(mode="after")
    def known_names(self) -> Self:
        """The page; every name that an arm, a reader or a claim uses is there."""
        for what, used, known in self._names():
            if unknown := [name for name in used if name not in known]:
                raise ValueError(f"{what} names {unknown[0]!r}, known: {', '.join(known) or 'none'}")
        return self

    def _names(self) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
        """(who, the names it uses, the names there are)."""
        for name, arm in self.arms.items():
            yield f"[arms.{name}] data", arm.data, [*self.data]
            yield f"[arms.{name}] readers", arm.readers or [], [*self.readers]
            yield f"[arms.{name}] inputs", [arm.inputs] if arm.inputs else [], [*self.inputs]
        for name, reader in self.readers.items():
            yield f"[readers.{name}] data", reader.data, [*self.data]
            yield f"[readers.{name}] arms", reader.arms, [*self.arms]
        for name, data in self.data.items():
            yield f"[data.{name}] inputs", [data.inputs] if data.inputs else [], [*self.inputs]
        for claim in self.claims:
            sides = [*self.inputs] if claim.reader == "features" else [*self.arms, *FLOORS]
            yield f"claim {claim.title!r}", [claim.arm, claim.control or claim.arm], sides
            yield f"claim {claim.title!r}", [claim.reader], [*self.readers, "codes", "features"]
            yield f"claim {claim.title!r}", [claim.control_reader or claim.reader], [*self.readers, "codes", "features", "floor"]
            yield f"claim {claim.title!r} data", claim.data, [*self.data]

    @model_validator(mode="after")
    def known_metrics(self) -> Self:
        """The page; a claim on a reader names one metric of that reader's kind, so that nothing is found wrong when all is run."""
        for claim in self.claims:
            if claim.reader not in self.readers:
                continue  # the numbers of codes and features are what they turn out to be
            words, pattern = CLAIMED["ranker" if self.readers[claim.reader].kind == "ranker" else "retriever"]
            if not re.fullmatch(pattern, claim.metric):
                raise ValueError(f"claim {claim.title!r} names {claim.metric!r}, reader {claim.reader!r} is judged by {words}")
            if claim.control_metric not in ("", claim.metric):
                raise ValueError(f"claim {claim.title!r} compares {claim.metric} with {claim.control_metric}: rows are compared in one metric")
        return self

    def digest(self) -> str:
        """12 hex digits that name this page; where the data lie does not count."""
        content = self.model_dump(mode="json", exclude={"data": {name: {"path"} for name in self.data}})
        return short_digest(content)


def _one_a_control(claim: Any) -> list[Any]:
    if not isinstance(claim, Mapping) or "controls" not in claim:
        return [claim]
    names, title = claim["controls"], str(claim.get("title", ""))
    if "control" in claim or not isinstance(names, list) or not names or "{control}" not in title:
        raise ValueError(f"claim {title!r} with `controls`: a list of names in place of `control`, and {{control}} in the title")
    shared = {key: value for key, value in claim.items() if key != "controls"}
    return [{**shared, "title": title.replace("{control}", str(name)), "control": name} for name in names]


def load(page: str, overrides: Sequence[str] = ()) -> Page:
    """The page with `key=value` overrides applied; `source.path=FOLDER` is the path of every data set that is the user's own.

    A page with `extends = NAME` is that page of pipeline/studies with what it says itself laid over it; lists are replaced whole.

    Args:
        page: a name in pipeline/studies or a path to a TOML file.
    Raises: ConfigError for an unknown page or key, a name that is not there, or a value of the wrong type.
    """
    path = Path(page) if page.endswith(".toml") else PAGES / f"{page}.toml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in PAGES.glob("*.toml")))
        raise ConfigError(f"unknown study {page!r}", expected=f"one of {known}, or a path to a .toml file", found=page, where=str(path))
    content = read_toml(path, overrides, what="page")
    if (base := content.pop("extends", "")) and (PAGES / f"{base}.toml").is_file():
        content = _merged(read_toml(PAGES / f"{base}.toml", (), what="page"), content)
    elif base:
        raise ConfigError("unknown page to extend", expected="a name in pipeline/studies", found=str(base), where=str(path))
    return parse(content, where=str(path))


def parse(content: dict[str, Any], *, where: str) -> Page:
    """The page of a nested dict; every arm's, input's and reader's changes are checked too.

    Raises: ConfigError naming the key that is wrong.
    """
    shared = dict(content.pop("source", {}))
    if unknown := [name for name in shared if name != "path"]:
        raise ConfigError(f"unknown key 'source.{unknown[0]}'", expected="source.path", found=unknown[0], where=where)
    try:
        page = Page.model_validate(content)
        if shared:
            own = {name: data.model_copy(update={"path": data.path or str(shared.get("path", ""))}) for name, data in page.data.items()}
            page = page.model_copy(update={"data": {name: data if data.kind in NEEDS_PATH else page.data[name] for name, data in own.items()}})
        for name in page.arms:
            for data in page.data:
                tokenizer_settings(page, name, data)
        for name in page.inputs:
            encoder_settings(page, name)
        for name in page.readers:
            reader_settings(page, name)
    except ValidationError as error:
        raise _explain(error, where) from error
    return page


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "(the page)"
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key {place!r}", expected=f"a key of {error.title} and its sections", found=str(first["loc"][-1]), where=where)
    return ConfigError(f"bad value for {place!r}", expected=first["msg"], found=repr(first.get("input"))[:200], where=where)


# ---------------------------------------------------------------- settings of one cell


def tokenizer_settings(page: Page, arm: str, data: str) -> TrainTokenizer:
    """The page's [train_tokenizer] with the changes of the data set, then of the arm."""
    chosen = page.arms[arm]
    found = changed(changed(page.train_tokenizer, page.data[data].train_tokenizer), chosen.train_tokenizer)
    return found if chosen.tokenizer in ("plain", "none") else found.model_copy(update={"tokenizer": chosen.tokenizer})


def encoder_settings(page: Page, inputs: str) -> TrainBehaviorEncoder:
    """The page's [train_behavior_encoder] with the recipe's changes."""
    return changed(page.train_behavior_encoder, page.inputs[inputs].train_behavior_encoder)


def reader_settings(page: Page, reader: str) -> TrainRetriever | TrainRanker:
    """The page's section of the reader's kind with its changes."""
    chosen = page.readers[reader]
    return changed(page.train_ranker, chosen.train_ranker) if chosen.kind == "ranker" else changed(page.train_retriever, chosen.train_retriever)


def changed(section: Model, changes: Mapping[str, Any]) -> Model:
    """The section with nested changes applied and checked.

    Raises: pydantic.ValidationError for an unknown key or a wrong type.
    """
    return type(section).model_validate(_merged(section.model_dump(), changes))


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: _merged(base[name], value) if isinstance(value, Mapping) and isinstance(base.get(name), dict) else value for name, value in changes.items()}
    return {**base, **both}


def inputs_of(page: Page, arm: str, data: str) -> str:
    """Name of the arm's input recipe on a data set."""
    return page.arms[arm].inputs or page.data[data].inputs or next(iter(page.inputs))


# ---------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Cell:
    """A piece of work with one result; cells with equal `spec` are one cell.

    Args:
        kind: features | floors | codes | read.
        name: data[#world]/..., for people.
        needs: keys of the cells whose results it reads.
        spec: everything that decides the result, JSON.
    """

    kind: str
    name: str
    data: str
    world: int
    seed: int
    inputs: str = ""
    arm: str = ""
    reader: str = ""
    needs: tuple[str, ...] = ()
    spec: str = ""

    @property
    def key(self) -> str:
        """16 hex digits that name the result."""
        return hashlib.sha256(f"{self.kind}|{self.spec}".encode()).hexdigest()[:16]


FREE_OF_VECTORS = ("richness", "low_strength_share", "alpha", "beta", "min_spearman", "min_probe_lift")  # settings that leave an encoder's vectors as they are


def grid(page: Page, digests: Mapping[str, str], part: Part = "valid") -> list[Cell]:
    """The cells in an order in which each comes after those it needs; an arm's codes that two readings share stand once.

    Args:
        digests: data[#world] -> digest of its files.
        part: which questions readers are asked.
    """
    found: dict[str, Cell] = {}
    ranked = any(reader.kind == "ranker" for reader in page.readers.values())
    for label, name, world in worlds(page):
        if label not in digests:
            continue
        ground = {
            "data": page.data[name].model_dump(mode="json", exclude={"path", "inputs", "train_tokenizer"}),
            "world": world,
            "digest": digests[label],
            "seed": page.seed,
        }
        floors = {
            **ground,
            "part": part,
            **page.train_retriever.model_dump(mode="json", include={"mask_history", "ease_up_to", "ease_decay"}),
            "rankers": JUDGED_ROWS if ranked else False,
            **_judged(page, name),
        }
        cells = [_cell("floors", f"{label}/floors", name, world, 0, spec=floors)]
        for arm in [each for each, chosen in page.arms.items() if not chosen.data or name in chosen.data]:
            cells += _arm_cells(page, label, name, world, arm, ground, part)
        for cell in cells:
            found.setdefault(cell.key, cell)  # the first arm names what several share
    order = {"floors": 0, "features": 0, "codes": 1, "read": 2}
    return sorted(found.values(), key=lambda cell: order[cell.kind])


def worlds(page: Page) -> Iterator[tuple[str, str, int]]:
    """(label, data set, world) of every world of the page; the label of a data set with one world is its name."""
    for name, data in page.data.items():
        for world in range(data.worlds):
            yield f"{name}#{world}" if data.worlds > 1 else name, name, world


def _arm_cells(page: Page, label: str, name: str, world: int, arm: str, ground: Mapping[str, Any], part: Part) -> list[Cell]:
    chosen, recipe = page.arms[arm], inputs_of(page, arm, name)
    encoder = encoder_settings(page, recipe)
    cells = []
    for seed in page.statistics.seeds:
        number = seed % page.statistics.encoder_seeds
        drawn = {**ground, "inputs": page.inputs[recipe].model_dump(mode="json"), "encoder_seed": number}
        drawn["encoder"] = encoder.model_dump(mode="json", exclude=set(FREE_OF_VECTORS))
        needs: tuple[str, ...] = ()
        if chosen.tokenizer != "none":
            features = _cell("features", f"{label}/inputs {recipe}/seed {number}", name, world, number, spec=drawn, inputs=recipe)
            how = {field: getattr(encoder, field) for field in FREE_OF_VECTORS} | ({"richness": chosen.richness} if chosen.richness else {})
            made = {**drawn, "richness": how, "tokenizer": chosen.tokenizer, "settings": _own_settings(page, arm, name), "tokenizer_seed": seed}
            made |= {"reads": chosen.reads} if chosen.reads else {}
            codes = _cell("codes", f"{label}/{arm}/codes/seed {seed}", name, world, seed, spec=made, inputs=recipe, arm=arm, needs=(features.key,))
            cells += [features, codes]
            needs = (features.key, codes.key)
        cells += [_read_cell(page, label, name, world, arm, reader, seed, part, needs, ground) for reader in readers_of(page, arm, name)]
    return cells


def _own_settings(page: Page, arm: str, data: str) -> dict[str, Any]:
    """[train_tokenizer] as the arm's tokenizer sees it: other tokenizers' sections do not count."""
    settings = tokenizer_settings(page, arm, data)
    others = {name for name, value in settings if isinstance(value, BaseModel) and name != page.arms[arm].tokenizer}
    kept = others - {"ada_sid"} if page.arms[arm].tokenizer == "plain" else others  # the plain control takes its slots from ADA-SID's section
    return settings.model_dump(mode="json", exclude=kept)


def readers_of(page: Page, arm: str, data: str) -> list[str]:
    """Readers of the arm on a data set; item ids alone are for rankers only."""
    chosen = page.arms[arm]
    wanted = {name: page.readers[name] for name in (page.readers if chosen.readers is None else chosen.readers)}
    fitting = {name: reader for name, reader in wanted.items() if data in (reader.data or [data]) and arm in (reader.arms or [arm])}
    return [name for name, reader in fitting.items() if chosen.tokenizer != "none" or reader.kind == "ranker"]


def _read_cell(
    page: Page, label: str, name: str, world: int, arm: str, reader: str, seed: int, part: Part, needs: tuple[str, ...], ground: Mapping[str, Any]
) -> Cell:
    chosen, read = page.arms[arm], page.readers[reader]
    how = {} if chosen.tokenizer == "none" else {"codes": chosen.codes, "weights": chosen.weights, "item": read.item if read.kind == "ranker" else ""}
    settings = {} if read.kind == "neighbours" else reader_settings(page, reader).model_dump(mode="json")
    how |= _judged(page, name) | ({"judged": JUDGED_ROWS} if read.kind == "ranker" else {})
    spec = {**ground, "needs": needs, "part": part, "kind": read.kind, "settings": settings, "reader_seed": seed, **how}
    return _cell(
        "read", f"{label}/{arm}/{reader}/seed {seed}", name, world, seed, spec=spec, inputs=inputs_of(page, arm, name), arm=arm, reader=reader, needs=needs
    )


def _judged(page: Page, data: str) -> dict[str, Any]:
    """What a cell's key says of the answers that count, where a user may take an item twice."""
    return {"answers": JUDGED_ANSWERS} if page.data[data].kind in TAKEN_AGAIN else {}


def _cell(kind: str, name: str, data: str, world: int, seed: int, *, spec: Mapping[str, Any], **more: Any) -> Cell:
    return Cell(kind, name, data, world, seed, spec=json.dumps(spec, sort_keys=True, default=str), **more)


def selected(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The cells whose name matches the regular expression, with everything they need; all without one.

    Raises: ConfigError for an expression that cannot be read or matches nothing.
    """
    if not only:
        return list(cells)
    try:
        wanted = {cell.key for cell in cells if re.search(only, cell.name)}
    except re.error as error:
        raise ConfigError("cannot read the selection", expected="a regular expression over cell names", found=str(error), where="--only") from error
    if not wanted:
        raise ConfigError("the selection matches no cell", expected="see --dry-run for the names", found=only, where="--only")
    for cell in reversed(cells):  # what a cell needs comes before it
        wanted |= set(cell.needs) if cell.key in wanted else set()
    wanted |= {cell.key for cell in cells if cell.kind == "floors" and any(other.key in wanted and _place(other) == _place(cell) for other in cells)}
    return [cell for cell in cells if cell.key in wanted]


def _place(cell: Cell) -> tuple[str, int]:
    return cell.data, cell.world


def short_digest(content: Any) -> str:
    """12 hex digits of a JSON document."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """kept | not kept | cannot tell, and why."""

    word: str
    reason: str


def null_of(claim: Claim) -> float:
    """The difference that the claim must stand above (below, for `smaller`)."""
    return {"greater": claim.margin, "smaller": -claim.margin, "not_worse": -claim.margin}[claim.direction]


def verdict(
    claim: Claim, found: Estimate, rules: Statistics, *, adjusted_p: float | None = None, capped: bool = False, several_worlds: bool = False
) -> Verdict:
    """What the interval says about the claim, or why it must not say anything.

    Args:
        adjusted_p: Holm's p of a primary endpoint; `kept` then needs it below 1 - level as well.
        capped: a reader of either arm was still improving at its last epoch.
        several_worlds: the units are generated worlds, not seeds and users.
    """
    sign = -1.0 if claim.direction == "smaller" else 1.0
    low, high = sorted((sign * found.low, sign * found.high))
    if refusal := _refusal(claim, found, rules, capped, several_worlds):
        return Verdict(CANNOT_TELL, refusal)
    null = sign * null_of(claim)
    if high < null or (claim.direction != "not_worse" and high < claim.least):
        return Verdict(NOT_KEPT, "the interval lies on the other side" if high < 0 else "the interval leaves no room for a difference that matters")
    if low > null and (adjusted_p is None or adjusted_p < 1 - rules.level):
        return Verdict(KEPT, "the interval lies on the claimed side")
    if low > null:
        return Verdict(CANNOT_TELL, "not after adjusting for the other primary endpoints")
    return Verdict(CANNOT_TELL, f"the interval holds both; differences from {found.detectable:.4f} on would be seen at this size")


def _refusal(claim: Claim, found: Estimate, rules: Statistics, capped: bool, several_worlds: bool) -> str:
    if not np.isfinite([found.difference, found.low, found.high]).all():
        return "too little was measured for an interval"
    if several_worlds and found.units < rules.min_worlds:
        return f"{found.units} worlds, a verdict needs {rules.min_worlds}"
    if not several_worlds and found.seeds < rules.min_seeds and claim.reader != "features":
        return f"{found.seeds} seed, a verdict needs {rules.min_seeds}"
    if claim.reader not in ("codes", "features") and not several_worlds and found.rows < rules.thin_rows:
        return f"{found.rows} rows, a verdict needs {rules.thin_rows}"
    if capped and rules.void_at_cap:
        return "a reader was still improving at its last epoch"
    return ""
