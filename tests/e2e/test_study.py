"""The study in small through the command: cells, resume, MLflow, verdicts and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

TINY = ["data.shop.options.items=150", "data.shop.options.users=300", "data.shop.options.events_per_day=700", "train_tokenizer.max_epochs=4"]
TINY += ["train_retriever.max_epochs=1", "statistics.thin_rows=50", "train_behavior_encoder.sasrec.max_epochs=1"]
TINY += ['readers.near.kind="neighbours"']  # the reader without training, which the shipped smoke page has no arm for
SETS = [word for text in TINY for word in ("--set", text)]
ONLY = "shop/(ada_sid/(parallel|din)|permuted/parallel|plain/(parallel|near))/seed"


def sid(home: Path, *arguments: str) -> str:
    environment = {**os.environ, "SID_HOME": str(home), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """(home, the document of a first run)."""
    home = tmp_path_factory.mktemp("study")
    assert all(not row["finished"] for row in json.loads(sid(home, "study", "study-smoke", *SETS, "--only", ONLY, "--dry-run", "--json")))
    return home, json.loads(sid(home, "study", "study-smoke", *SETS, "--only", ONLY, "--jobs", "2", "--out", str(home / "out"), "--json"))


def test_every_claim_whose_arms_ran_has_a_verdict_with_its_interval(told) -> None:
    _, document = told
    claims = {row["title"]: row for row in document["claims"]}
    for title in ("Codes carry meaning: they beat permuted codes", "Codes of ADA-SID find the next item better than k-means per slot"):
        assert claims[title]["seeds"] == 2
        assert claims[title]["low"] < claims[title]["difference"] < claims[title]["high"]
        assert claims[title]["verdict"] in ("kept", "not kept", "cannot tell")
    assert "Clusters are purer than under residual k-means" not in claims, "residual k-means was not run"
    assert "Clusters are purer than under residual k-means (shop)" in document["not_run"]
    assert sum(document["counts"].values()) == len(document["claims"])


def test_the_plain_control_has_codes_and_both_its_readers_rank_by_them(told) -> None:
    _, document = told
    plain = next(row for row in document["codes"] if row["name"] == "plain")
    assert plain["fits"] == 2
    assert plain["metrics"]["purity"] > 1.5 / 8, "its codes know more than chance of the 8 clusters"
    rows = {(row["arm"], row["reader"]): row for row in document["readings"] if row["stratum"] == "all"}
    assert rows.keys() >= {("plain", "parallel"), ("plain", "near"), ("ada_sid", "parallel"), ("ada_sid", "din")}
    assert 0 < rows["plain", "near"]["metrics"]["recall@50"] < 1


def test_the_page_and_the_tables_stand_beside_the_numbers(told) -> None:
    home, document = told
    page = (home / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert document["config"] in page
    assert json.loads((home / "out" / "study.json").read_text())["claims"] == document["claims"]
    assert "### shop, parallel" in (home / "out" / "study.md").read_text()


def test_a_rerun_does_no_work_and_fills_the_place_of_a_results_file(told) -> None:
    home, document = told
    before = {path: path.stat().st_mtime_ns for path in (home / "study" / "cells").glob("*.json")}
    results = home / "results.md"
    results.write_text("# Results\n<!-- study:study-smoke -->\n<!-- /study -->\n", encoding="utf-8")
    again = json.loads(sid(home, "study", "study-smoke", *SETS, "--only", ONLY, "--results", str(results), "--json"))
    assert {path: path.stat().st_mtime_ns for path in (home / "study" / "cells").glob("*.json")} == before
    assert again["claims"] == document["claims"]
    assert "### Verdicts" in results.read_text(encoding="utf-8")


def test_mlflow_has_one_run_with_a_child_per_cell(told) -> None:
    home, document = told
    script = (
        "import json, mlflow, sys\n"
        "client = mlflow.MlflowClient(sys.argv[1])\n"
        "runs = client.search_runs([client.get_experiment_by_name('sid/study-study-smoke').experiment_id])\n"
        "print(json.dumps([run.data.tags['sid.kind'] for run in runs]))\n"
    )
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    uri = f"sqlite:///{home / 'mlflow.db'}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, uri], env=environment, capture_output=True, text=True, timeout=120, check=True)
    kinds = json.loads(done.stdout.splitlines()[-1])
    assert kinds.count("study") == 1
    assert kinds.count("cell") == len(document["cells"])
