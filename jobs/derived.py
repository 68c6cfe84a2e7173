"""What follows from sid.release and can always be made again: the MLflow alias of the vocabulary that consumers read.

sid.release is the truth; this module only brings the copy in line. publish_release applies it after each publish, `sid repair` at any time.
"""

from __future__ import annotations

import logging
from typing import Any

from jobs.releases import newest_current
from pipeline import lakehouse, tracking
from pipeline.config import Config
from pipeline.context import Home

logger = logging.getLogger(__name__)
ALIAS = "current"


def align(home: Home, config: Config, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """One row per registered model: name, where its alias points, where it should, whether it was moved."""
    newest = newest_current(lakehouse.read_releases(home, config.lake).to_pylist())
    if newest is None:
        return []
    generations = lakehouse.read_arrow(home, config.lake, "sid.generation", where=f"generation == {int(newest['generation'])}").to_pylist()
    uris = [generations[0]["encoder_uri"], generations[0]["tokenizer_uri"]] if generations else []
    return [_align_model(home, uri, dry_run=dry_run) for uri in uris if uri and uri.startswith("models:/")]


def _align_model(home: Home, uri: str, *, dry_run: bool) -> dict[str, Any]:
    name = uri.removeprefix("models:/").rsplit("/", 1)[0]
    found = tracking.alias_target(home, name, ALIAS)
    if found != uri and not dry_run:
        tracking.set_alias(home, name, uri, ALIAS)
        logger.info("alias moved model=%s alias=%s to=%s", name, ALIAS, uri)
    return {"model": name, "alias": ALIAS, "points_at": found or "nothing", "should_be": uri, "moved": found != uri and not dry_run}
