"""The stages that a refresh policy touches, replayed in one process on the lake of the default policy: no Spark, no tables, seconds a night.

What no policy touches (events, popularity, sequences, content vectors, the manifest's other fields) is read from the lake that the pipeline made, and so
are the first night's models and the default policy's behaviour rows. Elsewhere the jobs `train_behavior_encoder` and `train_tokenizer` run as they are, on a
view of the lake in which the tables a policy touches are the branch's own; the manifest's behaviour fields and the assignment are their SQL in Arrow. `differs`
compares a replayed night with the release that the pipeline published, row by row. A night that is there is not replayed again.
Suffixes: N items, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from stability_measures import matrix

from jobs import assign_sid, behavior_embedding, item_feature, train_behavior_encoder, train_tokenizer
from jobs.inputs import Inputs
from pipeline import lakehouse, richness, tracking
from pipeline.config import Config
from pipeline.context import Context, Home, Plan, Release, read_json, write_json
from pipeline.stages import BY_NAME
from pipeline.tokenizers import collisions
from pipeline.tokenizers.base import join_vectors

MASKED = {"behavior_date": None, "evidence_count": 0, "evidence_bucket": -1, "richness": 0.0, "strength": 0.0}  # of an item without a behaviour row
VECTORS = pa.schema([("logical_date", pa.date32()), ("item_id", pa.string()), ("vector", pa.large_list(pa.float32()))])
ROUNDING = 1e-6
POLICIES = ("frozen", "anchored", "warm", "cold")
CONTENT_ONLY = "content only"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One line of the table: a tokenizer under a policy; `content only` = frozen, and behaviour masked throughout.

    Args:
        margin: `assign_sid.hold_margin`.
        due: nights whose parent has a refit due, obeyed by `frozen`.
    """

    tokenizer: str
    policy: str
    margin: float
    due: frozenset[date] = frozenset()

    @property
    def name(self) -> str:
        """Name of its folder; only where a vocabulary goes on is anything held."""
        held = "" if self.policy in ("warm", "cold") else f"-{self.margin:g}"
        return f"{self.tokenizer}-{self.policy.replace(' ', '_')}{held}"

    @property
    def track(self) -> str:
        """Branches of one track have the same behaviour rows: `warm` and `anchored` both begin the encoder at the parent's, and no row depends on a code."""
        return {"anchored": "warm", "content only": ""}.get(self.policy, self.policy)

    def start(self, night: date, *, first: bool) -> str:
        """How the night begins, as `Plan.start`."""
        if first:
            return "cold"
        if self.policy in ("frozen", CONTENT_ONLY):
            return "anchored" if night in self.due and self.policy == "frozen" else ""
        return self.policy


@dataclass(frozen=True)
class View(Inputs):
    """The lake, with tables of the branch in place of its own; each holds only the rows its one reader asks for.

    Args:
        tables: table -> rows.
        parent: the branch's last release.
    """

    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    parent: pa.Table | None = None

    def arrow(self, table: str, *, columns: tuple[str, ...] = ("*",), where: str = "", at: int | None = None, **among: Any) -> pa.Table:
        """Rows of the branch's table, else of the lake's."""
        return self.tables[table] if table in self.tables else super().arrow(table, columns=columns, where=where, **among)

    def release(self, tag: str) -> pa.Table:
        """The branch's last release, whatever its name."""
        assert self.parent is not None, "a first night asks for no parent"
        return self.parent


@dataclass(frozen=True)
class Base:
    """What every branch reads of the lake, once: manifests and popularity by night, content vectors, the default policy's behaviour rows and generations."""

    home: Home
    config: Config
    manifests: Mapping[date, pa.Table]
    evidence: Mapping[date, pa.Table]
    content: pa.Table
    vectors: pa.Table
    generations: Mapping[int, Mapping[str, Any]]
    snapshots: Mapping[str, int | None]

    @classmethod
    def read(cls, home: Home, config: Config, nights: Sequence[date]) -> Base:
        """The base of those nights."""
        tables = {name for stage in ("train_behavior_encoder", "train_tokenizer") for name in BY_NAME[stage].inputs}
        snapshots = {name: lakehouse.current_snapshot(home, config.lake, name) for name in sorted(tables)}

        def rows(table: str, night: date) -> pa.Table:
            """The table's rows of a night, in order of item_id, with Arrow's plain types."""
            return lakehouse.read_arrow(home, config.lake, table, where=f"logical_date == '{night}'").sort_by("item_id")

        manifests = {night: plain(rows("feature.item_feature", night)) for night in nights}
        evidence = {night: plain(rows("feature.item_popularity", night)) for night in nights}
        content = lakehouse.read_arrow(home, config.lake, "feature.item_content_vector", columns=("encoder_id", "modality", "content_hash", "vector"))
        vectors = lakehouse.read_arrow(home, config.lake, "feature.item_behavior_vector", columns=("generation", *VECTORS.names))
        generations = {row["generation"]: row for row in lakehouse.read_arrow(home, config.lake, "sid.generation").to_pylist()}
        return cls(home, config, manifests, evidence, content, vectors, generations, snapshots)

    def generation(self, night: date) -> Mapping[str, Any]:
        """The generation of the release that the pipeline published for a night."""
        return self.generations[self.manifests[night]["generation"][0].as_py()]

    def view(self, tables: Mapping[str, pa.Table] | None = None, parent: pa.Table | None = None) -> View:
        """The lake with those tables in place of its own."""
        return View(self.home, self.config.lake, self.snapshots, tables=tables or {}, parent=parent)


def plain(table: pa.Table) -> pa.Table:
    """The table with `string` in place of `large_string`: PyIceberg hands out either."""
    kinds = [pa.field(one.name, pa.string() if pa.types.is_large_string(one.type) else one.type) for one in table.schema]
    return table.cast(pa.schema(kinds))


# ---------------------------------------------------------------- the behaviour rows of a track


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """State of a track after a night.

    Args:
        manifest: the night's item_feature rows.
        vectors: rows (logical_date, item_id, vector) of the generation so far.
        born / encoder: night and address of the generation's encoder; no address without behaviour.
    """

    manifest: pa.Table
    vectors: pa.Table
    born: date
    encoder: str

    def save(self, folder: Path) -> None:
        """Write the state; the last file marks it complete."""
        pq.write_table(self.manifest, folder / "manifest.parquet")
        pq.write_table(self.vectors, folder / "vectors.parquet")
        write_json(folder / "night.json", {"born": str(self.born), "encoder": self.encoder})

    @classmethod
    def load(cls, folder: Path) -> Behaviour:
        """The state that was saved."""
        about = read_json(folder / "night.json")
        tables = {name: pq.read_table(folder / f"{name}.parquet") for name in ("manifest", "vectors")}
        return cls(**tables, born=date.fromisoformat(about["born"]), encoder=about["encoder"])


def behaviour_night(base: Base, root: Path, branch: Branch, night: date, start: str, before: Behaviour | None) -> Behaviour:
    """The track's rows of a night: the pipeline's own on the first night and under the default policy, else trained or masked."""
    if branch.track and (before is None or branch.policy == "frozen"):
        return published(base, night)
    folder = root / "behaviour" / (branch.track or "masked") / str(night)
    if not (folder / "night.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (trained_night(base, root, branch, night, start, before) if before and branch.track else masked(base, night)).save(folder)
    return Behaviour.load(folder)


def published(base: Base, night: date) -> Behaviour:
    """The rows that the pipeline made under the default policy."""
    generation = base.generation(night)
    mine = pc.and_(pc.equal(base.vectors["generation"], generation["generation"]), pc.less_equal(base.vectors["logical_date"], pa.scalar(night)))
    vectors = base.vectors.filter(mine).select(VECTORS.names).cast(VECTORS)
    return Behaviour(manifest=base.manifests[night], vectors=vectors, born=generation["logical_date"], encoder=generation["encoder_uri"])


def masked(base: Base, night: date) -> Behaviour:
    """No item has a behaviour row."""
    nothing = trained_rows(behavior_embedding.SCHEMA.empty_table(), base.evidence[night], {})
    return Behaviour(manifest=manifest(base.manifests[night], nothing, night), vectors=VECTORS.empty_table(), born=night, encoder="")


def trained_night(base: Base, root: Path, branch: Branch, night: date, start: str, before: Behaviour) -> Behaviour:
    """A new generation's rows: train_behavior_encoder as it is, behavior_embedding and item_feature in Arrow."""
    ctx = context(base, root / "runs" / branch.track, "train_behavior_encoder", night, start, before.born)
    inputs = base.view({"sid.generation": generation_row(before.born, encoder_uri=before.encoder)})
    found = with_threads(base.config, train_behavior_encoder.run, inputs, base.config.train_behavior_encoder, ctx)
    assert found.model is not None, "a new generation has an encoder"
    model = tracking.save_bundle(root / "behaviour" / branch.track / str(night) / "model", found.model)
    rows = behavior_embedding.bundle_rows(model)
    trained = trained_rows(rows, base.evidence[night], found.outputs["richness_reference"])
    vectors = pa.table({"logical_date": pa.array([night] * len(rows), pa.date32()), "item_id": rows["item_id"], "vector": rows["vector"]}, schema=VECTORS)
    return Behaviour(manifest=manifest(base.manifests[night], trained, night), vectors=vectors, born=night, encoder=str(model))


def trained_rows(rows: pa.Table, evidence: pa.Table, reference: Mapping[str, Any]) -> pa.Table:
    """item_id and the behaviour fields but the date of the rows trained tonight, as behavior_embedding's and item_feature's SQL give them."""
    place = pc.index_in(rows["item_id"], value_set=evidence["item_id"].combine_chunks())
    count = evidence["evidence_count"].take(place)
    buckets = pa.array(richness.evidence_bucket(count.to_numpy().astype(np.int64)), pa.int32())
    given = pa.table({"item_id": rows["item_id"], "evidence_count": count, "evidence_bucket": buckets, "norm": rows["norm"]}).combine_chunks()
    schema = pa.schema([("item_id", pa.string()), *zip(list(MASKED)[1:], (pa.int64(), pa.int32(), pa.float32(), pa.float32()), strict=True)])
    return pa.Table.from_batches(item_feature.richness_mapper(reference)(iter(given.to_batches())) if len(given) else [], schema)


def manifest(shelf: pa.Table, trained: pa.Table, night: date) -> pa.Table:
    """The manifest of a new generation: the behaviour fields of `trained`, else masked."""
    dated = trained.append_column("behavior_date", pa.array([night] * len(trained), pa.date32()))
    for name, value in MASKED.items():
        at = shelf.column_names.index(name)
        kind = shelf.schema.field(at).type
        shelf = shelf.set_column(at, shelf.schema.field(at), pc.coalesce(pc.cast(matched(shelf["item_id"], dated, name), kind), pa.scalar(value, kind)))
    return shelf


def matched(item_ids: pa.ChunkedArray, rows: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of `rows` in the order of the items; null for an item that is not among them."""
    return rows[name].take(pc.index_in(item_ids, value_set=rows["item_id"].combine_chunks()))


# ---------------------------------------------------------------- the codes of a branch


@dataclass(frozen=True, kw_only=True)
class Released:
    """A replayed night.

    Args:
        table: item_id, codes, weights, disambiguator, popularity, popularity_stratum, status, first_seen, behavior_date, in order of item_id.
        sizes: K per position.
        start: how the night began, empty = frozen.
        born / tokenizer: night and folder of its generation's tokenizer.
    """

    night: date
    table: pa.Table
    sizes: tuple[int, ...]
    start: str
    born: date
    tokenizer: str

    def save(self, folder: Path) -> None:
        """Write the night; the last file marks it complete."""
        pq.write_table(self.table, folder / "release.parquet")
        about = {"sizes": list(self.sizes), "start": self.start, "born": str(self.born), "tokenizer": self.tokenizer}
        write_json(folder / "night.json", about)

    @classmethod
    def load(cls, folder: Path, night: date) -> Released:
        """The night that was saved."""
        about = read_json(folder / "night.json")
        about |= {"sizes": tuple(about["sizes"]), "born": date.fromisoformat(about["born"])}
        return cls(night=night, table=pq.read_table(folder / "release.parquet"), **about)


def replay(base: Base, root: Path, branch: Branch, nights: Sequence[date]) -> list[Released]:
    """The branch's nights, in order; those that are there are only read."""
    released: list[Released] = []
    behaviour: Behaviour | None = None
    for night in nights:
        start = branch.start(night, first=not released)
        behaviour = behaviour_night(base, root, branch, night, start, behaviour)
        folder = root / "branches" / branch.name / str(night)
        if not (folder / "night.json").is_file():
            released_night(base, root, branch, night, start, behaviour, released[-1] if released else None).save(folder)
        released.append(Released.load(folder, night))
    return released


def released_night(base: Base, root: Path, branch: Branch, night: date, start: str, behaviour: Behaviour, parent: Released | None) -> Released:
    """train_tokenizer as it is, where a generation begins, and assign_sid in Arrow."""
    folder = root / "branches" / branch.name / str(night)
    folder.mkdir(parents=True, exist_ok=True)
    if start:
        tokenizer, born = fitted(base, root, branch, night, start, behaviour, parent), night
    else:
        assert parent is not None, "a frozen night has a parent"
        tokenizer, born = parent.tokenizer, parent.born
    sizes = tuple(int(size) for size in read_json(Path(tokenizer) / "config.json")["codebook_sizes"])
    margin = branch.margin if start in assign_sid.SAME_WORDS else None
    encoded = encode(base, behaviour, parent, tokenizer, sizes, night if not start else None, margin)
    table = release_rows(behaviour.manifest, encoded, parent.table if parent else None, carry=not start, same_words=start in assign_sid.SAME_WORDS)
    return Released(night=night, table=table, sizes=sizes, start=start, born=born, tokenizer=tokenizer)


def fitted(base: Base, root: Path, branch: Branch, night: date, start: str, behaviour: Behaviour, parent: Released | None) -> str:
    """Folder of the tokenizer fitted tonight; the first one that sees behaviour is shared by all policies, and is the pipeline's own for its tokenizer."""
    if parent is None and branch.track and branch.tokenizer == base.config.train_tokenizer.tokenizer:
        return str(base.view().model(base.generation(night)["tokenizer_uri"]))
    folder = root / "tokenizers" / (branch.name if parent or not branch.track else f"{branch.tokenizer}-first") / str(night)
    if not (folder / "config.json").is_file():
        ctx = context(base, root / "runs" / branch.name, "train_tokenizer", night, start, parent.born if parent else None)
        tables = {"feature.item_feature": behaviour.manifest.filter(pc.equal(behaviour.manifest["status"], "live"))}
        tables["feature.item_behavior_vector"] = behaviour.vectors
        if parent is not None:
            tables["sid.generation"] = generation_row(parent.born, tokenizer_uri=parent.tokenizer)
        params = base.config.train_tokenizer.model_copy(update={"tokenizer": branch.tokenizer})
        found = with_threads(base.config, train_tokenizer.run, base.view(tables, parent.table if parent else None), params, ctx)
        assert found.model is not None, "a generation has a tokenizer"
        tracking.save_bundle(folder, found.model)
    return str(folder)


def encode(
    base: Base, behaviour: Behaviour, parent: Released | None, tokenizer: str, sizes: tuple[int, ...], frozen_night: date | None, margin: float | None
) -> pa.Table:
    """item_id, codes, weights of the items to encode: all of a new generation, else those not in the parent or with a behaviour row of the frozen night."""
    chosen = behaviour.manifest
    if frozen_night is not None:
        assert parent is not None, "a frozen night has a parent"
        new = pc.invert(pc.is_in(chosen["item_id"], value_set=parent.table["item_id"].combine_chunks()))
        chosen = chosen.filter(pc.or_(new, pc.fill_null(pc.equal(chosen["behavior_date"], pa.scalar(frozen_night)), False)))
    rows = join_vectors(chosen, base.content, behaviour.vectors)
    keep = matched(rows["item_id"], parent.table, "codes") if parent else pa.chunked_array([pa.nulls(len(rows), pa.list_(pa.int32()))])
    rows = rows.append_column("keep", keep).append_column("dangling", pa.array(np.zeros(len(rows), bool)))
    described = pc.or_(pc.or_(rows["text"].is_valid(), rows["image"].is_valid()), rows["behavior"].is_valid())
    model = SimpleNamespace(value=assign_sid.model_files(Path(tokenizer)))
    seen = rows.filter(described).combine_chunks().to_batches()
    found = with_threads(base.config, lambda: list(assign_sid.encode_batches(iter(seen), model, margin)))
    schema = pa.schema([("item_id", pa.string()), ("codes", pa.list_(pa.int32())), ("weights", pa.list_(pa.float32()))])
    empty = rows.filter(pc.invert(described))["item_id"]
    nothing = {"codes": [list(sizes)] * len(empty), "weights": [[0.0] * len(sizes)] * len(empty)}
    tables = [pa.Table.from_batches([batch.select(schema.names) for batch in found]).cast(schema)] if found else []
    return pa.concat_tables([*tables, pa.table({"item_id": empty, **nothing}, schema=schema)])


def release_rows(features: pa.Table, encoded: pa.Table, parent: pa.Table | None, *, carry: bool, same_words: bool) -> pa.Table:
    """The release: codes just encoded, else the parent's; the number of an unmoved item stays."""
    kinds = {"codes": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())}
    columns = {name: features[name] for name in ("item_id", "popularity", "popularity_stratum", "status", "first_seen", "behavior_date")}
    for name, kind in kinds.items():
        found = [matched(features["item_id"], rows, name) for rows in (encoded, parent if carry else None) if rows is not None]
        columns[name] = chosen_lists([pc.cast(one, kind).combine_chunks() for one in found])
    codes_NL = matrix(columns["codes"])
    existing_N = np.full(len(codes_NL), collisions.UNSET)
    if parent is not None and same_words:
        place_N = pc.fill_null(pc.index_in(features["item_id"], value_set=parent["item_id"].combine_chunks()), -1).to_numpy().astype(np.int64)
        same_N = (place_N >= 0) & (matrix(parent["codes"])[place_N] == codes_NL).all(1)
        existing_N = np.where(same_N, parent["disambiguator"].to_numpy()[place_N], collisions.UNSET)
    number_N = collisions.disambiguate(codes_NL, features["first_seen"], features["item_id"], existing_N)
    return pa.table({**columns, "disambiguator": number_N})


def chosen_lists(lists: Sequence[pa.Array]) -> pa.Array:
    """Per row the first list that is not null."""
    rows = pa.chunked_array(lists)
    count = len(lists[0])
    place_N = np.full(count, -1)
    for number in reversed(range(len(lists))):  # over sources, never over items
        place_N = np.where(lists[number].is_valid().to_numpy(zero_copy_only=False), number * count + np.arange(count), place_N)
    return rows.take(pa.array(place_N)).combine_chunks()


def differs(replayed: pa.Table, published: pa.Table) -> str:
    """What the pipeline's release and the replayed one disagree in; empty when they hold the same rows.

    Weights are equal up to ROUNDING: the last bit of one may depend on the row's place in its batch, and Spark's batches are others.
    """
    published = published.sort_by("item_id")
    for name in ("item_id", "disambiguator"):
        if replayed[name].to_pylist() != published[name].to_pylist():
            return name
    if not np.array_equal(matrix(replayed["codes"]), matrix(published["codes"])):
        return "codes"
    return "" if np.allclose(matrix(replayed["weights"]), matrix(published["weights"]), rtol=0, atol=ROUNDING) else "weights"


# ---------------------------------------------------------------- runs of jobs


def context(base: Base, root: Path, stage: str, night: date, start: str, born: date | None) -> Context:
    """The context in which a job runs by itself, its manifest written beside it."""
    root.mkdir(parents=True, exist_ok=True)
    ctx = Context(config=base.config, home=Home(root), stage=stage, logical_date=night, run_id=f"replay_{night}")
    parent = None if born is None else Release(tag="parent", logical_date=born, revision=1, generation=1, snapshot_id=0, manifest=0)
    plan = Plan(
        logical_date=night,
        tag=f"d{night:%Y%m%d}",
        revision=1,
        generation=2 if start and born else 1,
        start=start,
        reason="replay",
        parent=parent,
        files=(),
        input_fingerprint="",
        config_hash="",
        seed=base.config.seed,
    )
    write_json(ctx.staging / "plan_night.json", {"status": "done", "outputs": plan.model_dump(mode="json")})
    return ctx


def generation_row(born: date, **uris: str) -> pa.Table:
    """The row of sid.generation that a job looks up."""
    return pa.table({"generation": [1], "logical_date": pa.array([born], pa.date32()), **{name: [uri] for name, uri in uris.items()}})


def with_threads(config: Config, work: Any, *given: Any) -> Any:
    """What `work` returns, computed with the profile's number of threads: another number would round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.launch.threads)
    try:
        return work(*given)
    finally:
        torch.set_num_threads(before)
