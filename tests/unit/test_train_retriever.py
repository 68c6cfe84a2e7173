"""The job train_retriever on a small planted shop: what it reads, what it asks, what it hands back, and that nothing of the test leaks."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from rank_tables import drawn, release_tables

from jobs import train_retriever as job
from jobs import train_tokenizer
from pipeline.config import Config, Parallel, Sequential, TrainRetriever
from pipeline.config import RqKmeans as RqKmeansSettings
from pipeline.context import Context, Home, write_json
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.tokenizers.rq_kmeans import RqKmeans

SIZES, ITEMS, USERS, KNOWN = (6, 3), 60, 60, 6
DAY = date(2026, 1, 1)
PARAMS = TrainRetriever(
    enabled=True,
    max_history=5,
    max_epochs=2,
    batch_size=32,
    valid_users=20,
    beams=10,
    stop_on="loss",
    parallel=Parallel(dim=16, num_blocks=1),
    sequential=Sequential(dim=16, num_heads=2, feed_dim=16, encoder_layers=1),
)
pytestmark = pytest.mark.usefixtures("one_thread")


class Tables:
    """Stands in for jobs.inputs.Inputs: one small lake of a ring of six clusters; item i59 is retired, i58 has no code."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.events = (draw.integers(0, 6, (USERS, 1)) + np.arange(KNOWN + 2)) % 6 + 6 * draw.integers(0, 9, (USERS, KNOWN + 2))
        codes = np.stack([np.arange(ITEMS) % 6, draw.integers(0, 3, ITEMS)], axis=1)
        codes[58] = SIZES
        order = draw.permutation(ITEMS)
        number = [sum((codes[other] == codes[item]).all() for other in range(item)) for item in range(ITEMS)]
        self.codes = pa.table(
            {
                "logical_date": [DAY] * ITEMS,
                "item_id": [f"i{item:02d}" for item in order],
                "codes": pa.array(codes[order].tolist(), pa.list_(pa.int32())),
                "weights": pa.array((codes[order] != np.asarray(SIZES)).astype(np.float32).tolist(), pa.list_(pa.float32())),
                "disambiguator": pa.array(np.asarray(number)[order], pa.int32()),
                "popularity": draw.random(ITEMS),
                "status": np.where(order == 59, "retired", "live"),
            }
        )
        self.sequences = pa.table(
            {
                "user_id": [f"u{user:02d}" for user in range(USERS)][::-1],
                "item_ids": pa.array([[f"i{item:02d}" for item in row[:KNOWN]] for row in self.events[::-1]], pa.list_(pa.string())),
                "baskets": pa.array([list(range(KNOWN))] * USERS, pa.list_(pa.int32())),
            }
        )
        self.examples = pa.Table.from_pylist([self._row(user, at) for user in range(USERS) for at in (KNOWN - 1, KNOWN, KNOWN + 1)])

    def _row(self, user: int, at: int, **changes) -> dict:
        """One labelled row: the event `at` of a user, those before it as history."""
        row = {
            "release": "d20260101",
            "split": "train" if at < KNOWN else "test",
            "user_id": f"u{user:02d}",
            "item_id": f"i{self.events[user, at]:02d}",
            "event_ts": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=at - KNOWN + 1, seconds=user),
            "history": [f"i{item:02d}" for item in self.events[user, :at]],
            "label": 1 if at != KNOWN + 1 or user % 2 else 0,
            "popularity_stratum": ("head", "tail")[user % 2],
            "evidence_count": user % 7,
        }
        return row | changes

    def arrow(self, table: str, columns: tuple[str, ...] = (), where: str = "") -> pa.Table:
        own = {"rank.rank_example": self.examples, "feature.user_sequence": self.sequences}
        return {**own, **release_tables(SIZES)}[table]

    def release(self, tag: str) -> pa.Table:
        return self.codes


def context(tmp_path, outputs: dict | None = None) -> Context:
    ctx = Context(config=Config(train_retriever=PARAMS), home=Home(tmp_path), stage="train_retriever", logical_date=DAY, run_id="r")
    write_json(ctx.staging / "rank_example.json", {"outputs": outputs or {}})
    return ctx


def read(tables: Tables, ctx: Context, **changes):
    """(shelf, sequences, questions) as the job reads them."""
    shelf = job.read_shelf(tables, "d20260101", ctx)
    sequences, users = job.read_sequences(tables, shelf)
    return shelf, sequences, job.read_questions(tables.examples, shelf, sequences, users, PARAMS.model_copy(update=changes), 0)


# ---------------------------------------------------------------- reading


def test_a_shelf_holds_the_live_items_in_order_with_codes_and_numbers(tmp_path) -> None:
    tables = Tables()
    shelf = job.read_shelf(tables, "d20260101", context(tmp_path))
    assert shelf.item_ids.to_pylist() == [f"i{item:02d}" for item in range(59)]
    rows = {row["item_id"]: row for row in tables.codes.to_pylist()}
    for place, item_id in enumerate(shelf.item_ids.to_pylist()):
        assert shelf.catalogue.codes_NL[place].tolist() == rows[item_id]["codes"]
        assert shelf.catalogue.number_N[place] == rows[item_id]["disambiguator"]
        assert shelf.popularity[place] == rows[item_id]["popularity"]
    assert shelf.catalogue.usable_N.tolist() == [item != 58 for item in range(59)]
    assert shelf.catalogue.numbers == 64
    assert (shelf.day, shelf.words.codebook_digest) == (DAY, "abc")
    tables.codes = tables.codes.filter(pa.compute.equal(tables.codes["status"], "retired"))
    with pytest.raises(ContractError, match="no live item"):
        job.read_shelf(tables, "d20260101", context(tmp_path))


def test_sequences_and_questions_equal_slow_loops(tmp_path) -> None:
    tables = Tables()
    new = [tables._row(0, KNOWN, item_id="brand_new"), tables._row(1, KNOWN, item_id="i59"), tables._row(2, KNOWN, history=["brand_new"])]
    tables.examples = pa.concat_tables([tables.examples, pa.Table.from_pylist(new, schema=tables.examples.schema)])
    shelf, sequences, questions = read(tables, context(tmp_path))
    assert sequences.items.tolist() == [item for row in tables.events for item in row[:KNOWN] if item != 59]
    rows = sorted((row for row in tables.examples.to_pylist() if row["split"] == "test" and row["label"]), key=lambda row: (row["event_ts"], row["user_id"]))
    live = set(shelf.item_ids.to_pylist())
    asked = [row for row in rows if row["item_id"] in live and live & set(row["history"])]
    trained = [{f"i{item:02d}" for item in row[:KNOWN]} for row in tables.events]
    good = [row for row in asked if row["item_id"] not in {*row["history"], *trained[int(row["user_id"][1:])]}]
    assert questions.left_out == {"item_not_in_release": 2, "no_history": 1, "had_before": len(asked) - len(good)}
    assert len(good) < len(asked)
    open_to_all = read(tables, context(tmp_path), mask_history=False)[2]
    assert [f"i{item:02d}" for item in open_to_all.targets] == [row["item_id"] for row in asked], "what is not masked may be asked for"
    assert open_to_all.left_out["had_before"] == 0
    assert [f"i{item:02d}" for item in questions.targets] == [row["item_id"] for row in good]
    assert questions.users.tolist() == [row["user_id"] for row in good]
    for number, row in enumerate(good):
        part = questions.histories.part(number, number + 1).items.tolist()
        known = [int(item[1:]) for item in row["history"] if item in live]
        assert part == known
        earlier = [item for item in tables.events[int(row["user_id"][1:]), :KNOWN].tolist() if item != 59]
        assert set(questions.seen.part(number, number + 1).items.tolist()) == set(known) | set(earlier)
        assert (questions.stratum[number], questions.evidence[number]) == (row["popularity_stratum"], row["evidence_count"])
    assert len(read(tables, context(tmp_path), max_questions=10)[2].targets) == 10
    tables.sequences = tables.sequences.slice(0, 0)
    with pytest.raises(UpstreamMissing, match="no sequences"):
        job.read_sequences(tables, shelf)


def test_permuted_codes_stay_in_their_decile_and_move_whole_tuples(tmp_path) -> None:
    shelf = job.read_shelf(Tables(), "d20260101", context(tmp_path))
    moved = job.arm_codes(shelf, "permuted", 5)
    ranked = [item for item in np.argsort(shelf.popularity, kind="stable") if item != 58]
    decile = np.arange(58) * 10 // 58
    assert not torch.equal(moved.codes_NL, shelf.catalogue.codes_NL)
    for number in range(10):
        part = np.asarray(ranked)[decile == number]
        assert sorted(moved.tokens_NS[part].tolist()) == sorted(shelf.catalogue.tokens_NS[part].tolist())
    moved.constraint()
    assert job.arm_codes(shelf, "real", 5) is shelf.catalogue


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("name", ["parallel", "sequential"])
def test_the_job_hands_back_tables_with_floors_and_a_model_that_knows_its_codebook(tmp_path, name: str) -> None:
    tables = Tables()
    params = PARAMS.model_copy(update={"retriever": name, "arms": ["real", "random"], "max_epochs": 1, "seeds": 2 if name == "parallel" else 1})
    result = job.run(tables, params, context(tmp_path, drawn(tables.examples)))
    out = result.outputs
    assert set(out["arms"]) == {"real", "random", "popularity", "markov", "ease"}
    assert set(out["arms"]["real"]) == {"all", "head", "tail", "evidence_0", "evidence_1_4"}
    metrics = {metric for metric in out["arms"]["real"]["all"] if "@" in metric}
    ks = (5, 10, 50, 100) if name == "parallel" else (5, 10)
    assert metrics == {f"{kind}@{k}" for kind in ("recall", "ndcg") for k in ks}
    assert {(row["a"], row["b"]) for row in out["differences"]} == {("real", other) for other in ("random", "popularity", "markov", "ease")}
    assert out["questions"] == out["arms"]["real"]["all"]["rows"] > 60
    assert set(out["invalid_beams"]) == (set() if name == "parallel" else {"real", "random"})
    assert result.metrics["retriever/real/all/recall@10"] == out["arms"]["real"]["all"]["recall@10"]
    assert len(result.curves["retriever/real/seed_0/loss"]) == 1
    assert (result.model.config["sid_version"], result.model.config["codebook_digest"]) == ("d20260101", "abc")
    assert result.model.config["trie_digest"] == out["trie_digest"]
    assert {"trie.items", "trie.starts_0"} <= set(result.model.tensors)
    json.dumps([out, result.model.config], allow_nan=False)


def test_perturbing_every_test_event_leaves_every_trained_input_and_model_as_it_was(tmp_path) -> None:
    tables, other = Tables(), Tables()
    test = [{**row, "item_id": "i01", "history": ["i02"], "label": 1} if row["split"] == "test" else row for row in other.examples.to_pylist()]
    other.examples = pa.Table.from_pylist(test, schema=other.examples.schema)
    ctx = context(tmp_path, drawn(tables.examples))
    (shelf, sequences, questions), (shelf_, sequences_, questions_) = (read(part, ctx) for part in (tables, other))
    assert sequences.items.numpy().tobytes() == sequences_.items.numpy().tobytes()
    assert sequences.offsets.numpy().tobytes() == sequences_.offsets.numpy().tobytes()
    for arm in job.ARMS:
        a, b = job.arm_codes(shelf, arm, 1), job.arm_codes(shelf_, arm, 1)
        assert [x.numpy().tobytes() for x in (a.tokens_NS, a.weights_NL)] == [x.numpy().tobytes() for x in (b.tokens_NS, b.weights_NL)]
    assert questions.targets.tolist() != questions_.targets.tolist()
    results = [job.run(part, PARAMS.model_copy(update={"arms": ["real"]}), ctx) for part in (tables, other)]
    states = [{name: torch.as_tensor(tensor).numpy().tobytes() for name, tensor in result.model.tensors.items()} for result in results]
    assert states[0] == states[1]
    assert results[0].metrics != results[1].metrics


def test_without_a_release_to_test_or_with_another_to_serve_the_model_is_trained_on_the_served_one(tmp_path) -> None:
    tables = Tables()
    params = PARAMS.model_copy(update={"arms": ["real"], "max_epochs": 1})
    untested = job.run(tables, params, context(tmp_path, drawn(tables.examples, evaluation_release="", note="too few")))
    assert (untested.outputs["arms"], untested.outputs["note"], untested.metrics) == ({}, "too few", {})
    assert untested.model.config["sid_version"] == "d20260101"
    later = job.run(tables, params, context(tmp_path, drawn(tables.examples, served_release="d20260102")))
    assert later.outputs["evaluation_release"] == "d20260101"
    assert later.model.config["sid_version"] == "d20260102"


def test_it_is_off_by_default_and_names_unknown_arms(tmp_path) -> None:
    result = job.idle(Tables(), TrainRetriever(), context(tmp_path))
    assert result.status == "skipped"
    assert "enabled" in result.outputs["note"]
    assert job.idle(Tables(), PARAMS, context(tmp_path)) is None
    with pytest.raises(ConfigError, match="unknown retriever arm"):
        job.run(Tables(), PARAMS.model_copy(update={"arms": ["shuffled"]}), context(tmp_path))


def test_the_teacher_is_the_items_vectors_in_the_order_of_the_shelf(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, ctx = Tables(), context(tmp_path)
    shelf = job.read_shelf(tables, "d20260101", ctx)
    rows = {
        "item_id": ["i02", "i00"],
        "text": pa.array([[3.0, 4.0], [0.0, 2.0]], pa.list_(pa.float32())),
        "image": pa.array([None, None], pa.list_(pa.float32())),
        "behavior": pa.array([[1.0], None], pa.list_(pa.float32())),
        "richness": pa.array([1.0, 0.0]),
        "strength": pa.array([1.0, 0.0]),
    }
    seen: list[date] = []
    monkeypatch.setattr(train_tokenizer, "read_vectors", lambda inputs, ctx: seen.append(ctx.logical_date) or pa.table(rows))
    monkeypatch.setattr(train_tokenizer, "read_tokenizer", lambda inputs, generation: RqKmeans(RqKmeansSettings()))
    teacher = job.read_teacher(tables, shelf, ctx)
    assert seen == [DAY]
    torch.testing.assert_close(teacher[[0, 1, 2]], torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.6, 0.8, 1.0]]))
    params = PARAMS.model_copy(update={"arms": ["real"], "max_epochs": 1, "distill_weight": 1.0})
    assert job.run(tables, params, context(tmp_path, drawn(tables.examples))).outputs["arms"]
