"""The ranker on small planted worlds: arrays, arms, budgets, the network against slow loops, evaluation, checkpoint, and its two jobs' rules."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
from rank_tables import drawn, release_tables

from jobs import rank_example, train_ranker
from jobs.rank_example import Published
from pipeline import evaluation, ranker
from pipeline.config import Config, RankExample, TrainRanker
from pipeline.context import Context, Home, write_json
from pipeline.errors import ConfigError, ContractError, UpstreamMissing, VersionMismatch
from pipeline.rankers.dcnv2 import DcnV2
from pipeline.rankers.ppnet import PpNet

SIZES = (4, 3, 4)
PARAMS = TrainRanker(dim=8, hidden_dims=[16], max_epochs=2, batch_size=64)
START = datetime(2026, 1, 1, tzinfo=UTC)
pytestmark = pytest.mark.usefixtures("one_thread")


def world(rows: int = 1500, items: int = 60, users: int = 40, seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Users like one of four taste clusters; the first code of an item is its cluster, so codes say all and half of the items are rare."""
    draw = np.random.default_rng(seed)
    cluster, taste = np.arange(items) % 4, draw.integers(0, 4, users)
    share = np.where(np.arange(items) < items // 2, 20.0, 1.0)
    user, item = draw.integers(0, users, rows), draw.choice(items, rows, p=share / share.sum())
    like = draw.random(rows) < np.where(cluster[item] == taste[user], 0.9, 0.1)
    liked = [np.flatnonzero(cluster == kind) for kind in range(4)]
    history = [[f"i{i}" for i in draw.choice(liked[taste[u]], size=draw.integers(0, 6))] for u in user]
    examples = pa.table(
        {
            "release": ["d20260101"] * rows,
            "split": np.where(np.arange(rows) < rows * 2 // 3, "train", "test"),
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            "event_ts": pa.array([START + timedelta(seconds=n) for n in range(rows)], pa.timestamp("us", tz="UTC")),
            "history": pa.array(history, pa.list_(pa.string())),
            "label": pa.array(like.astype(np.int32)),
            "popularity_stratum": np.where(item < items // 2, "head", "tail"),
            "evidence_count": pa.array(np.where(item < items // 2, 50, item % 7)),
        }
    )
    codes = np.stack([cluster, np.arange(items) % 3, draw.integers(0, 4, items)], axis=1)
    codes[5] = SIZES[0], codes[5, 1], codes[5, 2]
    weights = np.where(codes == np.asarray(SIZES), 0.0, np.stack([np.ones(items), np.ones(items), draw.random(items)], axis=1))
    return examples, release_of(codes, weights, share)


def release_of(codes, weights, popularity, names=None) -> pa.Table:
    return pa.table(
        {
            "item_id": names or [f"i{i}" for i in range(len(codes))],
            "codes": pa.array(codes.tolist(), pa.list_(pa.int32())),
            "weights": pa.array(weights.tolist(), pa.list_(pa.float32())),
            "popularity": np.asarray(popularity, dtype=np.float64),
        }
    )


@pytest.fixture(scope="module")
def data() -> ranker.RankData:
    return ranker.rank_data(*world(), SIZES)


def same(a: ranker.RankRows, b: ranker.RankRows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


# ---------------------------------------------------------------- arrays


def test_arrays_do_not_depend_on_row_order_or_on_large_types():
    examples, release = world()
    shuffled = examples.take(np.random.default_rng(1).permutation(examples.num_rows))
    large = shuffled.set_column(3, "item_id", shuffled["item_id"].cast(pa.large_string()))
    a, b = ranker.rank_data(examples, release, SIZES), ranker.rank_data(large, release.take(np.arange(60)[::-1]), SIZES)
    assert same(a.train, b.train)
    assert same(a.test, b.test)
    assert (a.items, a.users) == (b.items, b.users)
    np.testing.assert_array_equal(a.codes.codes, b.codes.codes)


def test_unknown_items_are_masked_and_unseen_users_share_row_zero_but_stay_persons():
    examples, release = world(rows=30)
    late = examples.slice(29, 1).to_pylist()[0]
    rows = [late | {"user_id": "x", "item_id": "new", "history": ["i1", "new"]}, late | {"user_id": "y", "item_id": "i3", "history": []}]
    data = ranker.rank_data(pa.concat_tables([examples.slice(0, 20), pa.Table.from_pylist(rows, schema=examples.schema)]), release, SIZES)
    new = data.items.index("new") + 1
    assert tuple(data.codes.codes[new]) == SIZES
    assert not data.codes.weights[new].any()
    assert data.popularity[new] == 0
    assert tuple(data.codes.codes[0]) == SIZES
    unseen = data.test.user == 0
    assert unseen.sum() == 2
    assert len(set(data.test.person[unseen])) == 2
    row = data.test.history[data.test.target == new][0]
    assert [data.items[index - 1] for index in row[row > 0]] == ["i1", "new"]


def test_codes_that_do_not_fit_their_codebook_are_refused():
    examples, release = world(rows=30)
    with pytest.raises(ContractError, match="outside its codebook"):
        ranker.rank_data(examples, release, (2, 3, 4))
    with pytest.raises(ContractError, match="number of positions"):
        ranker.rank_data(examples, release, (4, 3))


def test_position_tokens_against_a_slow_loop(data):
    tokens, rows = ranker.position_tokens(data.codes)
    for item, codes in enumerate(data.codes.codes):
        for position, code in enumerate(codes):
            masked = code == SIZES[position]
            assert tokens[item, position] == (0 if masked else 1 + sum(SIZES[:position]) + code)
    assert rows == 1 + sum(SIZES)


def test_prefix_tokens_are_shared_by_items_with_the_same_prefix_and_stop_at_a_masked_slot():
    codes = np.array([[1, 2, 3], [1, 2, 0], [1, 0, 3], [4, 2, 3], [1, 3, 3]])
    tokens, rows = ranker.prefix_tokens(ranker.ItemCodes(codes, np.ones(codes.shape, np.float32), SIZES))
    assert tokens[0, 0] == tokens[1, 0] == tokens[2, 0] == 2
    assert tokens[0, 1] == tokens[1, 1] != tokens[2, 1]
    assert tokens[0, 2] != tokens[1, 2]
    assert tokens[3].tolist() == [0, 0, 0]
    assert tokens[4, 0] == 2
    assert tokens[4, 1:].tolist() == [0, 0]
    assert tokens.max() < rows
    alone, _ = ranker.prefix_tokens(ranker.ItemCodes(codes[:1], np.ones((1, 3), np.float32), SIZES))
    assert alone.tolist() == tokens[:1].tolist()


# ---------------------------------------------------------------- arms


def test_permutation_keeps_pairs_and_deciles_and_leaves_items_without_sid(data):
    moved = ranker.permute_within_deciles(data.codes, data.popularity, seed=3)
    pairs = [np.concatenate([codes.codes, codes.weights], axis=1) for codes in (data.codes, moved)]
    ranked = 1 + np.argsort(data.popularity[1:], kind="stable")
    for decile in np.array_split(ranked, 10):
        assert sorted(map(tuple, pairs[0][decile])) == sorted(map(tuple, pairs[1][decile]))
    assert (pairs[0] != pairs[1]).any()
    assert tuple(moved.codes[0]) == SIZES
    other = ranker.permute_within_deciles(data.codes, data.popularity, seed=4)
    assert (moved.codes != other.codes).any()


@pytest.mark.parametrize("ngrams", [False, True])
def test_every_arm_trains_and_none_has_more_embedding_parameters_than_ids(data, ngrams):
    params = PARAMS.model_copy(update={"max_epochs": 1, "prefix_ngrams": ngrams})
    full = ranker.RankData(**{**data.__dict__, "other": data.codes})
    spent = {}
    for arm in ranker.ARMS:
        fit = ranker.fit(full, arm, params, seed=0)
        assert np.isfinite(fit.scores_test).all()
        assert len(fit.scores_test) == len(full.test)
        stored = sum(value.numel() for name, value in fit.state.items() if name in ("items.id_table.weight", "items.token_table.weight"))
        spent[arm] = fit.config["embedding_parameters"]
        assert stored == spent[arm]
    assert max(spent.values()) == spent["id"]
    assert spent["id_sid"] == spent["id_permuted"] > 0.7 * spent["id"]


def test_arms_that_cannot_be_built_say_why(data):
    with pytest.raises(ConfigError, match="unknown ranker arm"):
        ranker.fit(data, "ids", PARAMS, seed=0)
    with pytest.raises(ConfigError, match="needs a second release"):
        ranker.fit(data, "id_other", PARAMS, seed=0)
    with pytest.raises(ContractError, match="no training rows"):
        ranker.fit(ranker.RankData(**{**data.__dict__, "train": rows_of(data.train, slice(0, 0))}), "id", PARAMS, seed=0)


class TwoReleases:
    """Two releases as a stage's inputs see them; the second has two positions of its own size."""

    def __init__(self, second_date: date) -> None:
        self.examples, first = world(rows=300)
        codes = np.stack([np.arange(60) % 5, np.arange(60) % 2], axis=1)
        self.releases = {"d20260101": first, "d20251231": release_of(codes, np.ones((60, 2)), np.ones(60))}
        self.dates = {"d20260101": date(2026, 1, 1), "d20251231": second_date}

    def release(self, tag: str) -> pa.Table:
        return self.releases[tag]

    def arrow(self, table: str) -> pa.Table:
        if table == "sid.generation":
            return pa.table({"generation": [1, 2], "codebook_sizes": [list(SIZES), [5, 2]]})
        return pa.table({"tag": list(self.dates), "logical_date": list(self.dates.values()), "generation": [1, 2], "codebook_digest": ["a", "b"]})


def test_an_arm_reads_the_codes_of_a_second_release_unless_that_one_is_younger():
    inputs = TwoReleases(date(2025, 12, 31))
    words = train_ranker.vocabulary(inputs, "d20260101")
    data = train_ranker.load_data(inputs, inputs.examples, words, "d20251231")
    assert data.other is not None
    assert (data.other.codes.shape, data.codes.codes.shape) == ((61, 2), (61, 3))
    fit = ranker.fit(data, "id_other", PARAMS, seed=0)
    assert np.isfinite(fit.scores_test).all()
    assert not np.array_equal(fit.scores_test, ranker.fit(data, "id_sid", PARAMS, seed=0).scores_test)
    with pytest.raises(ConfigError, match="days that the tested one has not"):
        train_ranker.load_data(TwoReleases(date(2026, 1, 2)), inputs.examples, words, "d20251231")


def rows_of(rows: ranker.RankRows, part) -> ranker.RankRows:
    return ranker.RankRows(**{name: getattr(rows, name)[part] for name in rows.__dataclass_fields__})


def test_router_weights_scale_embeddings_and_enter_as_numbers_only_when_asked(data):
    on, off = (ranker.item_table(data, "sid", PARAMS.model_copy(update={"weights": flag}), 0) for flag in (True, False))
    np.testing.assert_array_equal(on.factors, data.codes.weights)
    np.testing.assert_array_equal(on.dense, data.codes.weights)
    assert (off.factors == 1).all()
    assert off.dense.shape[1] == 0


def test_items_without_training_rows_share_the_zero_id_row(data):
    table = ranker.item_table(data, "id", PARAMS, 0)
    seen = set(data.train.target) | set(data.train.history.ravel()) - {0}
    assert {index for index in range(len(data.items) + 1) if table.id_row[index]} == seen
    assert sorted(table.id_row[sorted(seen)]) == list(range(1, table.id_rows))


# ---------------------------------------------------------------- network


def network(data: ranker.RankData, arm: str = "id_sid") -> ranker.Network:
    torch.manual_seed(0)
    table = ranker.item_table(data, arm, PARAMS, 0)
    widths = ranker.equal_budget(table, budget=table.id_rows * 8, dim=8)
    return ranker.network({"dim": 8, "hidden_dims": [16]}, table, widths, num_users=len(data.users)).eval()


def test_item_vectors_and_pooling_against_slow_loops(data):
    model = network(data)
    item, history = 7, [3, 9, 5]
    table, state = ranker.item_table(data, "id_sid", PARAMS, 0), {name: value.numpy() for name, value in model.state_dict().items()}

    def vector(row: int):
        parts = [table.dense[row], state["items.id_table.weight"][table.id_row[row]]]
        for position, token in enumerate(table.tokens[row]):
            parts.append(state["items.token_table.weight"][token] * table.factors[row, position])
        return state["items.projection.weight"] @ np.concatenate(parts) + state["items.projection.bias"]

    target, pooled = vector(item), np.zeros(8)
    for row in history:
        h = vector(row)
        unit = state["attention.0.weight"] @ np.concatenate([h, target, h - target, h * target]) + state["attention.0.bias"]
        unit = np.where(unit > 0, unit, state["attention.1.weight"] * unit)
        pooled += (state["attention.2.weight"] @ unit + state["attention.2.bias"])[0] * h / np.sqrt(len(history))
    padded = torch.tensor([[*history, 0, 0]])
    with torch.no_grad():
        vectors = model.items(torch.tensor([item]))
        found = model.pool(vectors, model.items(padded.flatten()).view(1, 5, -1), padded > 0)
    np.testing.assert_allclose(vectors[0].numpy(), target, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0].numpy(), pooled, rtol=1e-5, atol=1e-6)


def test_an_item_without_sid_is_nothing_to_a_code_only_arm(data):
    model = network(data, "sid")
    masked = torch.tensor([0])
    with torch.no_grad():
        np.testing.assert_array_equal(model.items(masked)[0].numpy(), model.items.projection.bias.numpy())


def test_same_seed_same_parameters_and_test_labels_are_never_read(data):
    first = ranker.fit(data, "id_sid", PARAMS, seed=5)
    flipped = ranker.RankRows(**{**data.test.__dict__, "label": 1 - data.test.label})
    again = ranker.fit(ranker.RankData(**{**data.__dict__, "test": flipped}), "id_sid", PARAMS, seed=5)
    other = ranker.fit(data, "id_sid", PARAMS, seed=6)
    assert all(first.state[name].numpy().tobytes() == again.state[name].numpy().tobytes() for name in first.state)
    assert first.scores_test.tobytes() == again.scores_test.tobytes()
    assert first.curves == again.curves
    assert (first.scores_test != other.scores_test).any()


def test_codes_that_carry_taste_beat_the_same_codes_permuted_on_rare_items():
    data = ranker.rank_data(*world(rows=6000, seed=2), SIZES)
    params = PARAMS.model_copy(update={"max_epochs": 6, "learning_rate": 5e-3})
    fits = {arm: ranker.fit(data, arm, params, seed=0) for arm in ("sid", "permuted")}
    rare = data.test.stratum == "tail"
    found = {arm: evaluation.auc(data.test.label[rare], fit.scores_test[rare]) for arm, fit in fits.items()}
    assert found["sid"] > found["permuted"] + 0.1
    assert fits["sid"].curves["train_loss"][-1] < fits["sid"].curves["train_loss"][0]


def test_the_gates_of_ppnet_and_the_crosses_of_dcnv2_equal_slow_loops():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    ppnet, dcn = PpNet(2, [5], gate_dim=4), {rank: DcnV2(2, [5], 2, rank) for rank in (0, 3)}
    for module in (ppnet, *dcn.values()):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    w = {name: value.detach().numpy() for name, value in ppnet.named_parameters()}
    for row, found in zip(x.numpy(), ppnet(x).detach().numpy(), strict=True):
        asked, hidden = np.concatenate([row[:2], row[6:], row]), row
        for layer in range(2):
            gate = w[f"gates.{layer}.layers.2.weight"] @ np.maximum(w[f"gates.{layer}.layers.0.weight"] @ asked + w[f"gates.{layer}.layers.0.bias"], 0)
            scale = 2 / (1 + np.exp(-gate - w[f"gates.{layer}.layers.2.bias"]))
            hidden = w[f"layers.{layer}.weight"] @ (scale * hidden) + w[f"layers.{layer}.bias"]
            hidden = np.maximum(hidden, 0) if layer == 0 else hidden
        np.testing.assert_allclose(found, hidden, rtol=1e-4, atol=1e-5)
    for rank, model in dcn.items():
        w = {name: value.detach().numpy() for name, value in model.named_parameters()}
        for row, found in zip(x.numpy(), model(x).detach().numpy(), strict=True):
            crossed = row
            for layer in range(2):
                name = f"crosses.{layer}.layer"
                matrix, bias = (w[f"{name}.1.weight"] @ w[f"{name}.0.weight"], w[f"{name}.1.bias"]) if rank else (w[f"{name}.weight"], w[f"{name}.bias"])
                crossed = row * (matrix @ crossed + bias) + crossed
            deep = np.maximum(w["layers.0.weight"] @ row + w["layers.0.bias"], 0)
            np.testing.assert_allclose(found, w["out.weight"] @ np.concatenate([crossed, deep]) + w["out.bias"], rtol=1e-4, atol=1e-4)


def test_the_gates_of_ppnet_give_no_gradient_to_what_they_read_but_the_priors():
    torch.manual_seed(0)
    gate = PpNet(2, [5], gate_dim=4)
    torch.nn.init.normal_(gate.gates[0].layers[2].weight)
    x = torch.randn(1, 8, requires_grad=True)
    fresh = x.detach().clone().requires_grad_()
    scale = gate.gates[0](torch.cat([fresh[:, :2], fresh[:, 6:]], dim=1), x.detach())
    scale.sum().backward()
    assert fresh.grad[0, 2:6].abs().sum() == 0
    assert fresh.grad[0, :2].abs().sum() > 0
    assert torch.equal(PpNet(2, [5], gate_dim=4).gates[0](x[:, :4], x).detach(), torch.ones(1, 8)), "factors begin at 1"


@pytest.mark.parametrize("model", ["ppnet", "dcnv2"])
@pytest.mark.parametrize("form", [{}, {"pooling": "sum"}, {"pooling": "sum", "prefix_ngrams": True}, {"weights": False}])
def test_every_network_and_form_of_codes_trains_and_comes_back_from_its_checkpoint(model, form):
    examples, release = world(rows=400)
    params = PARAMS.model_copy(update={"max_epochs": 1, "model": model, "cross_rank": 4, **form})
    fit = ranker.fit(ranker.rank_data(examples, release, SIZES), "id_sid", params, seed=0)
    test = examples.filter(pa.compute.equal(examples["split"], "test"))
    loaded = ranker.load_ranker(checkpoint(fit), fit.state, release, codebook_digest="abc")
    np.testing.assert_allclose(loaded.score(test), fit.scores_test, rtol=1e-5, atol=1e-5)
    assert fit.config["model"] == model


def test_summed_codes_are_the_sum_of_their_rows(data):
    table = ranker.item_table(data, "sid", PARAMS, 0)
    model = ranker.network({"dim": 8, "hidden_dims": [16], "pooling": "sum"}, table, ranker.Widths(id=0, token=5), num_users=2)
    rows = model.items.token_table.weight.detach().numpy()
    summed = sum(rows[token] * factor for token, factor in zip(table.tokens[7], table.factors[7], strict=True))
    slow = model.items.projection.weight.detach().numpy() @ np.concatenate([table.dense[7], summed]) + model.items.projection.bias.detach().numpy()
    np.testing.assert_allclose(model.items(torch.tensor([7]))[0].detach().numpy(), slow, rtol=1e-5, atol=1e-6)


def test_an_unknown_network_is_named_and_an_old_checkpoint_is_a_din(data):
    table = ranker.item_table(data, "id", PARAMS, 0)
    with pytest.raises(ConfigError, match="no such ranker"):
        ranker.network({"model": "wukong", "dim": 8, "hidden_dims": []}, table, ranker.Widths(id=4, token=0), num_users=1)
    fit = ranker.fit(data, "id_sid", PARAMS.model_copy(update={"max_epochs": 1}), seed=0)
    old = {name: value for name, value in checkpoint(fit).items() if name not in ("model", "pooling", "gate_dim", "cross_layers", "cross_rank")}
    assert ranker.load_ranker(old, fit.state, world()[1], codebook_digest="abc").model is not None


# ---------------------------------------------------------------- evaluation


def test_evaluation_uses_the_one_definition_and_flags_thin_strata(data):
    draw = np.random.default_rng(0)
    runs = [draw.normal(size=len(data.test)).astype(np.float32) for _ in range(2)]
    table = ranker.evaluate(data.test, {"id": runs, "id_sid": runs})
    tail = data.test.stratum == "tail"
    expected = np.mean([evaluation.auc(data.test.label[tail], run[tail]) for run in runs])
    assert table["arms"]["id"]["tail"]["auc"] == pytest.approx(expected)
    assert table["arms"]["id"]["tail"]["gauc"] == pytest.approx(
        np.mean([evaluation.gauc(data.test.label[tail], run[tail], data.test.person[tail])[0] for run in runs])
    )
    assert set(table["arms"]["id"]) == {"all", "head", "tail", "evidence_0", "evidence_1_4"}
    assert all(row["thin"] and row["rows"] < 1000 for row in table["arms"]["id"].values())
    assert {(row["a"], row["b"]) for row in table["differences"]} == {("id_sid", "id")}
    decided = [row for row in table["differences"] if row["stratum"] in ("all", "head", "tail")]
    assert len(decided) == 6
    assert all(row["mean"] == row["low"] == row["high"] == row["seed_sd"] == 0 for row in decided)
    assert 0 < table["users_covered"] <= 1
    json.dumps(table, allow_nan=False)


def test_a_better_arm_has_an_interval_above_zero_that_holds_the_mean(data):
    draw = np.random.default_rng(0)
    noise = [draw.normal(size=len(data.test)) for _ in range(3)]
    good, bad = ([(shift * data.test.label + run).astype(np.float32) for run in noise] for shift in (1.0, 0.2))
    table = ranker.evaluate(data.test, {"id": bad, "id_sid": good})
    for row in (row for row in table["differences"] if row["stratum"] == "all"):
        assert 0 < row["low"] < row["mean"] < row["high"]
        assert row["seeds"] == 3


def test_a_stratum_of_one_class_has_no_auc(data):
    one = ranker.RankRows(**{**data.test.__dict__, "label": np.ones(len(data.test), np.float32)})
    table = ranker.evaluate(one, {"id": [np.zeros(len(one), np.float32)], "id_sid": [np.zeros(len(one), np.float32)]})
    assert table["arms"]["id"]["all"]["auc"] is None
    assert all(row["mean"] is None and row["low"] is None for row in table["differences"])
    assert table["users_covered"] == 0
    json.dumps(table, allow_nan=False)


# ---------------------------------------------------------------- checkpoint


def checkpoint(fit: ranker.RankerFit) -> dict:
    return json.loads(json.dumps(dict(fit.config) | {"sid_version": "d20260101", "codebook_digest": "abc"}))


def test_checkpoint_gives_the_same_scores_and_reads_a_later_release():
    examples, release = world()
    data = ranker.rank_data(examples, release, SIZES)
    fit = ranker.fit(data, "id_sid", PARAMS, seed=0)
    test = examples.filter(pa.compute.equal(examples["split"], "test"))
    loaded = ranker.load_ranker(checkpoint(fit), fit.state, release, codebook_digest="abc")
    np.testing.assert_allclose(loaded.score(test), fit.scores_test, rtol=1e-5, atol=1e-5)
    newcomer = release_of(np.array([[1, 1, 1]]), np.ones((1, 3)), [0.0], ["brand_new"])
    later = ranker.load_ranker(checkpoint(fit), fit.state, pa.concat_tables([release, newcomer]), codebook_digest="abc")
    np.testing.assert_allclose(later.score(test), fit.scores_test, rtol=1e-5, atol=1e-5)
    row = test.slice(0, 1).set_column(3, "item_id", pa.array(["brand_new"]))
    assert np.isfinite(later.score(row)).all()
    assert later.score(row) != loaded.score(row)


def test_checkpoint_refuses_another_codebook(data):
    fit = ranker.fit(data, "id_sid", PARAMS.model_copy(update={"max_epochs": 1}), seed=0)
    _, release = world()
    with pytest.raises(VersionMismatch) as caught:
        ranker.load_ranker(checkpoint(fit), fit.state, release, codebook_digest="other")
    fields = caught.value.fields()
    assert "abc" in fields["expected"]
    assert "d20260101" in fields["expected"]
    assert "other" in fields["found"]
    assert fields["where"]
    assert fields["next_command"]
    assert ranker.load_ranker(checkpoint(fit), fit.state, release, codebook_digest="other", allow_foreign_codebook=True).model is not None
    with pytest.raises(ConfigError, match="control"):
        ranker.load_ranker(checkpoint(fit) | {"arm": "id_permuted"}, fit.state, release, codebook_digest="abc")


# ---------------------------------------------------------------- jobs/rank_example: which release


def published(day: int, status: str = "superseded", revision: int = 1) -> Published:
    return Published(f"d2026010{day}" + (f"_r{revision}" if revision > 1 else ""), date(2026, 1, day), revision, status)


def test_candidates_walk_back_over_releases_in_use():
    releases = [published(1), published(2), published(2, revision=2), published(3, "withdrawn"), published(4, "current"), published(5, "withdrawn")]
    served = rank_example.served_release(releases, "")
    assert served.tag == "d20260104"
    held = {release.tag for release in releases}
    assert [release.tag for release in rank_example.candidates(releases, served, held)] == ["d20260104", "d20260102_r2", "d20260101"]
    swept = held - {"d20260102", "d20260102_r2"}
    assert [release.tag for release in rank_example.candidates(releases, served, swept)] == ["d20260104", "d20260101"], "no codes are left to test"
    assert rank_example.served_release(releases, "d20260102").tag == "d20260102"
    with pytest.raises(ContractError, match="withdrawn"):
        rank_example.served_release(releases, "d20260105")
    with pytest.raises(UpstreamMissing, match="no current release"):
        rank_example.served_release([], "")


def test_evaluation_needs_enough_events_after_the_test_cutoff():
    found = [published(4), published(2), published(1)]
    days = {date(2026, 1, day): 10 for day in range(1, 6)}
    pick = [rank_example.evaluation_release(found, days, RankExample(min_test_rows=rows)) for rows in (10, 11, 31, 41)]
    assert [release.tag if release else None for release in pick] == ["d20260104", "d20260102", "d20260101", None]
    later = RankExample(min_test_rows=10, train_on="after_cutoff", train_days=2)
    assert rank_example.evaluation_release(found, days, later).tag == "d20260102"
    train, test = rank_example.periods(published(2), later)
    assert (train.after, train.until, test.after) == (date(2026, 1, 2), date(2026, 1, 4), date(2026, 1, 4))


# ---------------------------------------------------------------- jobs/train_ranker


class Tables:
    """Stands in for jobs.inputs.Inputs: the tables of one small lake."""

    def __init__(self, examples: pa.Table, release: pa.Table) -> None:
        self.examples, self.codes = examples, release

    def arrow(self, table: str, where: str = "") -> pa.Table:
        return {"rank.rank_example": self.examples, **release_tables(SIZES)}[table]

    def release(self, tag: str) -> pa.Table:
        return self.codes


def context(tmp_path, outputs: dict) -> Context:
    ctx = Context(config=Config(train_ranker=PARAMS), home=Home(tmp_path), stage="train_ranker", logical_date=date(2026, 1, 1), run_id="r")
    write_json(ctx.staging / "rank_example.json", {"outputs": outputs})
    return ctx


def test_job_trains_every_arm_and_hands_back_tables_figure_and_model(tmp_path):
    examples, release = world(rows=600)
    params = PARAMS.model_copy(update={"max_epochs": 1, "seeds": 2})
    result = train_ranker.run(Tables(examples, release), params, context(tmp_path, drawn(examples)))
    assert set(result.outputs["arms"]) == {"id", "id_sid", "id_permuted"}
    assert result.metrics["ranker/id_sid/all/auc"] == pytest.approx(result.outputs["arms"]["id_sid"]["all"]["auc"])
    assert result.figures["ranker_auc"].data["rows"]["all"] == 200
    assert {len(values) for values in result.curves.values()} == {1}
    assert len(result.curves) == 6
    model = result.model
    assert (model.config["sid_version"], model.config["codebook_digest"]) == ("d20260101", "abc")
    assert len(model.example_input["item_id"]) == 2
    json.dumps([result.outputs, model.config], allow_nan=False)


def test_job_without_test_rows_reports_no_auc_but_hands_back_a_model(tmp_path):
    examples, release = world(rows=300)
    train = examples.filter(pa.compute.equal(examples["split"], "train"))
    result = train_ranker.run(Tables(train, release), PARAMS, context(tmp_path, drawn(train, evaluation_release="", note="too few")))
    assert result.outputs["arms"] == {}
    assert result.outputs["note"] == "too few"
    assert not result.metrics
    assert not result.figures
    assert result.model.config["arm"] == "id_sid"


def test_job_serves_the_served_release_and_skips_an_empty_period(tmp_path):
    examples, release = world(rows=300)
    result = train_ranker.run(Tables(examples, release), PARAMS, context(tmp_path, drawn(examples, served_release="d20260102")))
    assert result.outputs["evaluation_release"] == "d20260101"
    assert result.model.config["sid_version"] == "d20260102"
    empty = examples.slice(0, 0)
    assert train_ranker.run(Tables(empty, release), PARAMS, context(tmp_path, drawn(empty))).status == "skipped"


def test_job_refuses_rows_of_another_run_a_leak_and_an_unknown_vocabulary(tmp_path):
    examples, release = world(rows=90)
    tables = Tables(examples, release)
    with pytest.raises(UpstreamMissing, match="not those this run drew") as caught:
        train_ranker.read_examples(tables, drawn(examples, example_release="d20251231"))
    assert caught.value.next_command == "sid run rank_example --date D", "the run's date: that of the release the examples stand for is another run's"
    with pytest.raises(UpstreamMissing, match="not those this run drew"):
        train_ranker.read_examples(tables, drawn(examples, train_rows=1))
    with pytest.raises(ContractError, match="after the training period"):
        train_ranker.refuse_leak(examples, date(2025, 12, 31))
    train_ranker.refuse_leak(examples, date(2026, 1, 1))
    with pytest.raises(UpstreamMissing, match="no vocabulary"):
        train_ranker.vocabulary(tables, "d19990101")
