"""The training loop: exact resume, early stopping, held-out items, several processes, and the Arrow join in front of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tokenizer_contract as contract
import torch
from safetensors.torch import load_file
from tokenizer_items import ada_settings, rq_settings, stop_after, tiny_items, training

from jobs import train_tokenizer
from jobs.train_tokenizer import FileCheckpoint
from pipeline.config import Config
from pipeline.context import Context, Home
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.tokenizers import fit, from_state
from pipeline.tokenizers.ada_sid import AdaSid
from pipeline.tokenizers.base import FitOptions, ItemBatch, codebook_digest, items_from_arrow, join_vectors


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    contract.resumes_bit_for_bit("ada_sid", ada_settings(), tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path):
    items, checkpoint = tiny_items(), FileCheckpoint(tmp_path / "state.safetensors")
    first, second = AdaSid(ada_settings()), AdaSid(ada_settings())
    first.fit(items, FitOptions(seed=3, settings=training(), checkpoint=checkpoint))
    second.fit(items, FitOptions(seed=3, settings=training(), checkpoint=checkpoint, progress=stop_after(1)))
    assert torch.equal(first.encode(items).codes_NL, second.encode(items).codes_NL)


def test_a_checkpoint_of_other_data_is_left_alone(tmp_path, caplog):
    checkpoint = FileCheckpoint(tmp_path / "state.safetensors")
    AdaSid(ada_settings()).fit(tiny_items(seed=1), FitOptions(seed=3, settings=training(), checkpoint=checkpoint))
    fresh, straight = AdaSid(ada_settings()), AdaSid(ada_settings())
    fresh.fit(tiny_items(), FitOptions(seed=3, settings=training(), checkpoint=checkpoint))
    straight.fit(tiny_items(), FitOptions(seed=3, settings=training()))
    assert "starting anew" in caplog.text
    assert torch.equal(fresh.codebooks()[0], straight.codebooks()[0])


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path):
    path = tmp_path / "state.safetensors"
    assert FileCheckpoint(path).load() is None
    path.write_bytes(b"half of a file")
    with pytest.raises(ContractError, match="damaged"):
        FileCheckpoint(path).load()


def test_training_stops_when_nothing_gets_better():
    report = AdaSid(ada_settings()).fit(tiny_items(), FitOptions(seed=0, settings=training(max_epochs=60, patience=1, learning_rate=0.3, revive_until=0.0)))
    epochs = {len(values) for name, values in report.curves.items() if name.startswith(("nmse", "held_out", "loss/total"))}
    assert max(epochs) < 20
    assert len(epochs) == 1


def test_held_out_items_are_a_fixed_share_and_small_catalogues_have_none():
    rows, held = fit.hold_out(4000, 0.05, seed=7)
    assert len(held) == 200
    assert torch.equal(torch.cat([rows, held]).sort().values, torch.arange(4000))
    assert torch.equal(held, fit.hold_out(4000, 0.05, seed=7)[1])
    rows, held = fit.hold_out(100, 0.05, seed=7)
    assert torch.equal(rows, held)


def test_steps_follow_the_batch_size_but_small_catalogues_take_more():
    assert fit.steps_per_epoch(12_000, 256) == 47
    assert fit.steps_per_epoch(1_682, 256) == 16
    assert fit.steps_per_epoch(96, 256) == 1


def test_learning_rate_falls_from_the_set_rate_to_a_twentieth():
    rates = [fit.learning_rate(training(learning_rate=1e-3), share / 10) for share in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (pytest.approx(1e-3), pytest.approx(5e-5))


def test_bfloat16_autocast_trains_and_encodes():
    tokenizer = AdaSid(ada_settings())
    report = tokenizer.fit(tiny_items(), FitOptions(seed=0, settings=training(precision="bfloat16")))
    assert report.curves["loss/reconstruction"][-1] < report.curves["loss/reconstruction"][0]
    assert tokenizer.state()["codebook_LKD"].dtype == torch.float32


def test_revival_forgets_the_optimizers_memory_of_moved_rows():
    items = tiny_items()
    torch.manual_seed(0)
    model = _training(items)
    trainer = fit.Trainer(model, model.network.prepare(items), FitOptions(seed=0, settings=training()))
    trainer._epoch(0)
    trainer._epoch(1)
    trainer._epoch(2)
    model.network.usage_LK.fill_(9.0)
    model.network.usage_LK[1, 4] = 0.0
    before = model.network.codebook_LKD[1].detach().clone()
    trainer._revive(3)
    moments = trainer.optimizer.state[model.network.codebook_LKD]["exp_avg_sq"]
    assert (moments[1, 4] == 0).all()
    assert (moments[1, 3] > 0).any()
    changed = (model.network.codebook_LKD[1] != before).any(1)
    assert changed[4]


def _training(items: ItemBatch):
    from pipeline.tokenizers.ada_sid import Network, Training

    network = Network(ada_settings(), {"text": 12, "image": 8, "behavior": 6})
    network.fit_inputs(items)
    network.controller.fit_buckets(items.richness_N[items.behavior_N])
    return Training(network)


def test_two_processes_train_what_one_process_trains(tmp_path):
    """Tolerance: the same codes for at least 99 % of positions, losses within 1e-4; the processes themselves agree exactly."""
    script = Path(__file__).with_name("tokenizer_items.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    alone = AdaSid(ada_settings())
    report = alone.fit(tiny_items(), FitOptions(seed=3, settings=training(max_epochs=4, batch_size=48)))
    assert first.pop("losses").tolist() == pytest.approx(report.curves["loss/total"], abs=1e-4)
    together = from_state(alone.config(), first).encode(tiny_items()).codes_NL
    assert float((together == alone.encode(tiny_items()).codes_NL).double().mean()) >= 0.99


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ConfigError, match="rq_kmeans"):
        from_state({"tokenizer": "nope"}, {})


def feature_table(**changes: list[object]) -> pa.Table:
    columns = {
        "item_id": ["b", "a", "c"],
        "text_encoder_id": ["e1", "e1", None],
        "text_hash": ["h2", "h1", None],
        "image_encoder_id": pa.array([None, None, None], pa.string()),
        "image_hash": pa.array([None, None, None], pa.string()),
        "behavior_date": pa.array([None, "2026-01-01", "2026-01-02"]).cast(pa.date32()),
        "richness": pa.array([0.0, 0.5, 1.0], pa.float32()),
        "strength": pa.array([0.0, 0.1, 0.9], pa.float32()),
        "popularity": pa.array([0.0, 3.0, 9.0]),
    }
    return pa.table({**columns, **changes})


def vector_tables() -> tuple[pa.Table, pa.Table]:
    floats = pa.list_(pa.float32())
    content = pa.table(
        {
            "encoder_id": ["e1", "e1", "e2"],
            "modality": ["text", "text", "text"],
            "content_hash": ["h1", "h2", "h1"],
            "vector": pa.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], floats),
        }
    )
    behavior = pa.table(
        {
            "logical_date": pa.array(["2026-01-01", "2026-01-02", "2026-01-02"]).cast(pa.date32()),
            "item_id": ["a", "a", "c"],
            "vector": pa.array([[0.5], [0.6], [0.7]], floats),
        }
    )
    return content, behavior


def test_the_join_follows_the_manifest_and_sorts_by_item():
    items = items_from_arrow(table := join_vectors(feature_table(), *vector_tables()))
    assert table["item_id"].to_pylist() == ["a", "b", "c"]
    assert items.text_ND.tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    assert items.text_N.tolist() == [True, True, False]
    assert items.behavior_ND.tolist() == [[0.5], [0.0], [pytest.approx(0.7)]]
    assert items.behavior_N.tolist() == [True, False, True]
    assert items.image_ND is None
    assert not items.image_N.any()
    assert items.richness_N.tolist() == [0.5, 0.0, 1.0]


def test_a_record_batch_reads_like_a_table():
    table = join_vectors(feature_table(), *vector_tables())
    batch = table.combine_chunks().to_batches()[0]
    assert torch.equal(items_from_arrow(batch).text_ND, items_from_arrow(table).text_ND)
    assert torch.equal(items_from_arrow(batch.slice(1)).text_ND, items_from_arrow(table.slice(1)).text_ND)


def test_a_manifest_that_names_absent_vectors_is_refused():
    with pytest.raises(ContractError, match="not stored") as caught:
        join_vectors(feature_table(text_hash=["h7", "h1", None]), *vector_tables())
    assert "1 of 3 items" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [("text", [[1.0, float("nan")], [1.0, 1.0]], "finite"), ("text", [[1.0], [1.0, 2.0]], "one width"), ("richness", [0.5, float("inf")], "finite")],
)
def test_vectors_that_cannot_be_used_are_refused(column, values, message):
    floats = pa.list_(pa.float32())
    columns = {"item_id": ["x", "y"], "text": pa.array([[1.0], [1.0]], floats), "image": pa.nulls(2, floats), "behavior": pa.nulls(2, floats)}
    columns |= {"richness": [0.0, 0.0], "strength": [0.0, 0.0]}
    columns[column] = pa.array(values, floats) if column == "text" else values
    with pytest.raises(ContractError, match=message):
        items_from_arrow(pa.table(columns))
    with pytest.raises(ContractError, match="lack columns"):
        items_from_arrow(pa.table({"item_id": ["x"]}))


def test_an_item_batch_whose_rows_do_not_line_up_is_refused():
    items = tiny_items(5)
    with pytest.raises(ValueError, match="different heights"):
        ItemBatch(**{**vars(items), "text_N": items.text_N[:3]})


class Lake:
    """Tables as the job reads them."""

    def __init__(self, tables: dict[str, pa.Table]) -> None:
        self.tables = tables
        self.asked: dict[str, str] = {}
        self.among: dict[str, dict[str, Iterable[str]]] = {}

    def arrow(self, table: str, *, columns: tuple[str, ...] = ("*",), where: str = "", **among: Iterable[str]) -> pa.Table:
        self.asked[table], self.among[table] = where, among
        rows = self.tables[table]
        for name, values in among.items():
            rows = rows.filter(pc.is_in(rows[name], value_set=pa.array(sorted(values), rows[name].type)))
        return rows.set_column(3, "vector", rows["vector"].cast(pa.large_list(pa.float32()))) if among else rows


def night(tmp_path: Path, *, new_generation: bool, tokenizer: str) -> Context:
    section = training(tokenizer=tokenizer, ada_sid=ada_settings(), rq_kmeans=rq_settings(), max_epochs=3)
    ctx = Context(Config(train_tokenizer=section), Home(tmp_path), "train_tokenizer", date(2026, 1, 2), "run")
    plan = {"logical_date": "2026-01-02", "tag": "d20260102", "revision": 1, "generation": 4, "start": "cold" if new_generation else "", "reason": "test"}
    plan |= {"parent": None, "files": [], "input_fingerprint": "f", "config_hash": "c", "seed": 7}
    (ctx.staging / "plan_night.json").write_text(json.dumps({"outputs": plan}), encoding="utf-8")
    return ctx


def lake(count: int = 60) -> Lake:
    items = tiny_items(count)
    ids, floats = [f"i{row:03}" for row in range(count)], pa.list_(pa.float32())
    known = items.behavior_N.tolist()
    feature = pa.table(
        {
            "item_id": ids[::-1],
            "text_encoder_id": ["e"] * count,
            "text_hash": ids[::-1],
            "image_encoder_id": pa.nulls(count, pa.string()),
            "image_hash": pa.nulls(count, pa.string()),
            "behavior_date": pa.array([date(2026, 1, 2) if seen else None for seen in known[::-1]], pa.date32()),
            "richness": items.richness_N.numpy()[::-1].copy(),
            "strength": items.strength_N.numpy()[::-1].copy(),
            "popularity": [1.0] * count,
        }
    )
    text = pa.array(items.text_ND.tolist(), floats)
    rows = [row for row in range(count) if known[row]]
    behavior = {"logical_date": [date(2026, 1, 2)] * len(rows), "item_id": [ids[row] for row in rows]}
    return Lake(
        {
            "feature.item_feature": feature,
            "feature.item_content_vector": pa.table({"encoder_id": ["e"] * count, "modality": ["text"] * count, "content_hash": ids, "vector": text}),
            "feature.item_behavior_vector": pa.table({**behavior, "vector": pa.array(items.behavior_ND[rows].tolist(), floats)}),
        }
    )


@pytest.mark.parametrize("tokenizer", ["ada_sid", "rq_kmeans", "rq_vae", "letter", "opq"])
def test_the_job_fits_a_new_generation(tmp_path, tokenizer):
    tables = lake()
    ctx = night(tmp_path, new_generation=True, tokenizer=tokenizer)
    done = train_tokenizer.run(tables, ctx.config.train_tokenizer, ctx)
    again = from_state(json.loads(json.dumps(done.model.config)), dict(done.model.tensors))
    assert done.outputs["codebook_digest"] == codebook_digest(again.codebooks()) == done.model.config["codebook_digest"]
    assert (done.outputs["tokenizer"], done.outputs["generation"], done.outputs["items"]) == (tokenizer, 4, 60)
    assert (tuple(done.outputs["slots"]), tuple(done.outputs["codebook_sizes"])) == (again.slots, again.codebook_sizes)
    assert "status == 'live'" in tables.asked["feature.item_feature"]
    assert tables.asked["feature.item_behavior_vector"] == "logical_date in ('2026-01-02')"
    assert tables.among["feature.item_content_vector"] == {"encoder_id": {"e"}, "content_hash": {f"i{row:03}" for row in range(60)}}
    assert done.model.example_output["codes"].shape == (2, len(again.slots))
    assert 0.0 <= done.metrics["tokenizer/collision_rate"] <= 1.0
    assert json.dumps([dict(figure.data) for figure in done.figures.values()])
    assert {len(values) for values in done.curves.values()} == {len(next(iter(done.curves.values())))}


def test_a_frozen_night_fits_nothing(tmp_path):
    ctx = night(tmp_path, new_generation=False, tokenizer="ada_sid")
    done = train_tokenizer.idle(lake(), ctx.config.train_tokenizer, ctx)
    assert (done.status, done.model) == ("skipped", None)
    assert train_tokenizer.idle(lake(), ctx.config.train_tokenizer, night(tmp_path, new_generation=True, tokenizer="ada_sid")) is None


def test_a_night_without_items_says_what_to_run(tmp_path):
    tables = lake()
    tables.tables["feature.item_feature"] = tables.tables["feature.item_feature"].slice(0, 0)
    ctx = night(tmp_path, new_generation=True, tokenizer="ada_sid")
    with pytest.raises(UpstreamMissing, match="item_feature"):
        train_tokenizer.run(tables, ctx.config.train_tokenizer, ctx)
