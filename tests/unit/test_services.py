"""The profile of the services run: `make test-services` is no part of CI, so a change of the profile `tiny` must not break it unseen."""

from __future__ import annotations

import importlib
import tomllib
from datetime import date

import pytest

from pipeline import config
from pipeline.context import ROOT


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """A stack that is not started, as `python tests/services/run.py` sees it."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "services"))
    return importlib.import_module("stack").Stack(tmp_path)


@pytest.mark.parametrize(("cluster", "kind"), [(True, "submit"), (False, "inline")])
def test_the_profile_of_the_services_is_tiny_on_the_servers(stack, cluster, kind):
    importlib.import_module("stack").write_profile(stack, date(2026, 3, 4), cluster=cluster)
    found = config.parse({"name": "services", **tomllib.loads(stack.profile.read_text())}, where="services.toml")
    tiny = config.load("tiny")
    assert (found.launch.kind, found.lake.catalog, found.launch.java_options) == (kind, "jdbc", tiny.launch.java_options)
    assert (found.launch.master == f"spark://127.0.0.1:{stack.ports['master']}") == cluster
    assert found.source.options["start"] == "2026-03-02"
    assert found.train_tokenizer == tiny.train_tokenizer
