"""Fixtures: one Spark session per test process on a throw-away warehouse; tables are emptied between modules, not rebuilt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Lake, Launch
from pipeline.context import Home

for _name in [name for name in os.environ if name.startswith(("SID_", "MLFLOW_TRACKING_", "MLFLOW_REGISTRY_", "AIRFLOW"))]:
    del os.environ[_name]  # whoever tests from a shell that works on a lake must not test on that lake
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread for a file of tiny networks: on a busy machine a second costs more than it brings."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _session_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("sid"))


@pytest.fixture(scope="session")
def spark(_session_home: Home):
    """The process's session; its warehouse is the throw-away home of `lake_home`."""
    from pipeline import lakehouse
    from pipeline import spark as gate

    session = gate.session(_session_home, Lake(), Launch(driver_memory="1g", shuffle_partitions=2, java_options="-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"))
    lakehouse.create_tables(session)
    yield session
    session.stop()


@pytest.fixture
def lake_home(spark, _session_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose tables are all empty, with an MLflow store of its own (MLflow caches a store per address and process)."""
    import shutil

    from pipeline import lakehouse

    for folder in ("staging", "mlartifacts"):
        shutil.rmtree(_session_home.root / folder, ignore_errors=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for table in lakehouse.table_names():
        found = lakehouse.history(_session_home, Lake(), table)
        if len(found.committed) > 1 or len(found.branches) + len(found.tags) > 1:  # metadata alone: a query per table costs more than the test
            spark.sql(f"DROP TABLE lake.{table} PURGE")
    lakehouse.create_tables(spark)
    return _session_home
