"""The list of stages: names, edges, tables, words; everything else is built from it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from pipeline import lakehouse
from pipeline.context import ROOT
from pipeline.stages import BY_NAME, STAGES, Stage, group, upstream

GROUPS = ("refresh", "consumers", "maintenance", "rollback")


def test_names_are_unique_and_looked_up() -> None:
    names = [stage.name for stage in STAGES]
    assert len(names) == len(set(names))
    assert list(BY_NAME) == names


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_a_job_file_of_its_name_with_a_run_function(stage: Stage) -> None:
    path = ROOT / "jobs" / f"{stage.name}.py"
    assert path.is_file(), f"jobs/{stage.name}.py is missing"
    assert "\ndef run(inputs: Inputs, params: " in path.read_text(encoding="utf-8")


def test_every_group_is_known_and_together_they_are_all_stages() -> None:
    assert [stage for name in GROUPS for stage in group(name)] == list(STAGES)


def test_every_table_is_declared_by_a_folder_and_every_folder_is_written_by_a_stage() -> None:
    used = {table for stage in STAGES for table in (*stage.inputs, *stage.outputs)}
    assert used <= set(lakehouse.table_names())
    assert {table for stage in STAGES for table in stage.outputs} == set(lakehouse.table_names())


def test_only_spark_stages_write_tables_and_only_torch_stages_want_a_gpu() -> None:
    assert {stage.engine for stage in STAGES if stage.outputs} == {"spark"}
    assert {stage.engine for stage in STAGES if stage.gpu} == {"torch"}


@pytest.mark.parametrize("name", GROUPS)
def test_the_declared_order_is_a_valid_order_to_run_them(name: str) -> None:
    done: set[str] = set()
    for stage in group(name):
        assert set(upstream(stage)) <= done, f"{stage.name} stands before a stage it waits for"
        done.add(stage.name)


def test_edges_follow_who_writes_what_is_read() -> None:
    for stage in STAGES:
        for other in STAGES[: STAGES.index(stage)]:
            if other.group == stage.group and set(other.outputs) & set(stage.inputs):
                assert other.name in upstream(stage)
    assert upstream(BY_NAME["plan_night"]) == ()
    assert upstream(BY_NAME["ingest"]) == ("plan_night",)
    assert "item_feature" in upstream(BY_NAME["assign_sid"])
    assert "train_tokenizer" in upstream(BY_NAME["assign_sid"])  # an order no table shows
    assert upstream(BY_NAME["publish_release"]) == ("assign_sid",)
    assert upstream(BY_NAME["train_ranker"]) == ("rank_example",)
    assert upstream(BY_NAME["train_retriever"]) == ("rank_example",)


def test_a_stage_that_reads_last_nights_rows_of_a_later_table_waits_for_nobody() -> None:
    assert "sid.generation" in BY_NAME["train_behavior_encoder"].inputs
    assert "assign_sid" not in upstream(BY_NAME["train_behavior_encoder"])


def test_every_refresh_stage_comes_after_the_plan() -> None:
    def ancestors(stage: Stage) -> set[str]:
        direct = set(upstream(stage))
        return direct.union(*(ancestors(BY_NAME[name]) for name in direct))

    for stage in group("refresh")[1:]:
        assert "plan_night" in ancestors(stage), stage.name
    everything = {stage.name for stage in group("refresh")}
    assert ancestors(BY_NAME["gate_drift"]) == everything - {"gate_drift"}, "the last stage waits for all others"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_summary_is_one_line_without_an_end(stage: Stage) -> None:
    assert 20 <= len(stage.summary) <= 120
    assert "\n" not in stage.summary
    assert not stage.summary.endswith(".")


def test_a_stage_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        STAGES[0].name = "other"  # type: ignore[misc]
