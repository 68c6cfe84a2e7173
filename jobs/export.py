"""`sid export`: one release from the lake into one file that a training maps into memory."""

from __future__ import annotations

from pathlib import Path

from jobs import views
from jobs.releases import resolve
from pipeline import lakehouse, release_file
from pipeline.config import Config
from pipeline.context import Home

FACTS = ("tag", "logical_date", "revision", "generation", "codebook_digest", "rows_digest", "parent_tag")


def write(lake: tuple[Home, Config], tag: str, out: Path | None) -> Path:
    """The file of a release; without `out` it goes to exports/<tag>.arrow of the home. A release never changes, so neither does its file.

    Raises: UpstreamMissing for an unknown tag; ContractError for a release that has expired.
    """
    home, config = lake
    release = resolve(lakehouse.read_releases(home, config.lake), tag)
    vocabulary = views.generation(lake, release["generation"])
    facts = {name: release[name] for name in FACTS} | {name: vocabulary[name] for name in ("tokenizer", "slots", "codebook_sizes")}
    rows = lakehouse.read_release(home, config.lake, release["tag"])
    return release_file.write(rows, facts, out or home.folder("exports") / f"{release['tag']}.arrow")
