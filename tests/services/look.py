"""What the services hold after the runs: releases, rows, places of files, MLflow runs and models; run in a process with the stages' environment."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pipeline import config, lakehouse, tracking
from pipeline.context import Home


def everything() -> dict[str, Any]:
    """JSON of all that `run.py` checks."""
    home, lake = Home.from_environment(), config.load(os.environ["SID_PROFILE"]).lake
    releases = lakehouse.read_releases(home, lake).select(["tag", "generation", "status", "parent_tag", "items"]).to_pylist()
    tables = {name: lakehouse.open_table(home, lake, name) for name in lakehouse.table_names()}
    with tracking._session(home, locked=False) as client:
        runs = client.search_runs(tracking._sid_experiments(client), "tags.`sid.kind` = 'stage' and tags.stage != 'rollback'", max_results=1000)
        models = sorted(f"{model.name} {dict(model.aliases)}" for model in client.search_registered_models())
    return {
        "releases": releases,
        "rows": {name: lakehouse.read_arrow(home, lake, name).num_rows for name in tables},
        "places": sorted({table.location() for table in tables.values()}),
        "runs": len(runs),
        "states": sorted({run.info.status for run in runs if run.data.tags.get("superseded") != "true"}),
        "models": models,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(everything()) + "\n")
