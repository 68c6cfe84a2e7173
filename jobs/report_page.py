"""What the page of one release shows, gathered from the lake and from what the release's own run wrote down."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import views
from jobs.images import read_image
from jobs.plan_night import MANIFEST, manifest_of
from jobs.releases import resolve, show_item
from jobs.views import Place
from pipeline import lakehouse
from pipeline.config import Config
from pipeline.context import Home, read_json
from pipeline.popularity import STRATA
from pipeline.redact import scrub
from pipeline.stages import BY_NAME

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.report import ReportContent

Row = dict[str, Any]
EXAMPLES, NEIGHBOURS = 6, 5
MAX_PICTURE_BYTES = 60_000
GATES = {  # metric -> side, setting of [publish_release], meaning
    "collision_rate": ("max", "max_collision_rate", "share of items that share their codes with another"),
    "min_perplexity_share": ("min", "min_perplexity_share", "evenness of code use at the worst position"),
    "max_dead_share": ("max", "max_dead_share", "unused codes at the worst position"),
    "shared_mass": ("max", "max_shared_mass", "popularity on items that share their codes"),
    "budget_churn": ("max", "max_churn", "items of the parent whose codes changed, first behaviour codes apart"),
    "budget_churn_head": ("max", "max_head_churn", "the same among the most popular items"),
    "budget_churn_refit": ("max", "max_refit_churn", "items whose codes an anchored refit changed"),
}


def write(lake: Place, tag: str, out: Path | None) -> Path:
    """The HTML page of a release; without `out` it goes to reports/<tag>.html of the home."""
    from pipeline import report

    home, config = lake
    release = resolve(lakehouse.read_releases(home, config.lake), tag)
    return report.write_report(out or home.folder("reports") / f"{release['tag']}.html", content(lake, release))


def content(lake: Place, release: Row) -> ReportContent:
    """The page's content; parts that this release does not have are left empty."""
    from pipeline.report import ReportContent

    home, config = lake
    outcomes = read_outcomes(home, release["tag"])
    vocabulary = views.generation(lake, release["generation"])
    rows = lakehouse.read_release(home, config.lake, release["tag"])
    tables = lineage(lake, release["tag"])
    return ReportContent(
        release=facts(lake, release, rows, vocabulary),
        gates=gates(outcomes, config),
        figures=[*figures(outcomes), *lake_figures(lake, release, rows, vocabulary)],
        slots=vocabulary["slots"],
        codebook_sizes=vocabulary["codebook_sizes"],
        examples=examples(lake, release, rows, vocabulary["codebook_sizes"]),
        ranker=ranker(outcomes),
        stages=stages(outcomes, tables),
        lineage=tables,
        commands=commands(home, release["tag"]),
        notes=notes(release, outcomes),
    )


def read_outcomes(home: Home, tag: str) -> dict[str, Row]:
    """Stage -> outcome document of the release's own run and of the consumers that read it, in the order of the stages."""
    folder = home.folder("reports") / tag
    return {name: read_json(folder / f"{name}.json") for name in BY_NAME if (folder / f"{name}.json").is_file()}


def facts(lake: Place, release: Row, rows: pa.Table, vocabulary: Row) -> Row:
    """Facts of the release for the page's header; the commit is that of the code which made its rows, not of the one which writes the page."""
    import pyarrow.compute as pc

    home, config = lake
    written = lakehouse.origin(home, config.lake, "sid.item_sid", release["snapshot_id"])
    kept = ("tag", "logical_date", "generation", "parent_tag", "items", "status", "codebook_digest", "refit_due", "reason")
    counted = {
        "new_items": pc.sum(rows["is_new"]).as_py() or 0,
        "moved_items": pc.sum(rows["changed_from_parent"]).as_py() or 0,
        "retired_items": pc.sum(pc.equal(rows["status"], "retired")).as_py() or 0,
    }
    origin = {
        "policy": release["reason"],
        "dataset": config.source.dataset,
        "tokenizer": vocabulary["tokenizer"],
        "git_sha": written.get("sid.git_sha", "unknown"),
        "run_id": written.get("sid.run_id", ""),
        "rows_digest": release["rows_digest"],
    }
    return {**{name: release[name] for name in kept}, **counted, **origin}


def gates(outcomes: Mapping[str, Row], config: Config) -> list[Row]:
    """The release's gates with the value and the limit it was judged by; none when nobody kept what was judged.

    A limit that the run did not note is that of the profile now, and said to be.
    """
    if "assign_sid" not in outcomes:
        return []
    metrics = outcomes["assign_sid"].get("metrics", {})
    noted = outcomes.get("publish_release", {}).get("outputs", {}).get("limits", {})
    return [
        {
            "name": name,
            "value": metrics.get(f"sid.item_sid/{name}"),
            side: noted.get(setting, getattr(config.publish_release, setting)),
            "severity": "fail",
            "meaning": meaning if setting in noted else f"{meaning} (the limit is that of the profile now)",
        }
        for name, (side, setting, meaning) in GATES.items()
    ]


def figures(outcomes: Mapping[str, Row]) -> list[Row]:
    """Every figure the run made, in the order of the stages."""
    return [
        {"kind": figure["kind"], "data": figure["data"], "stage": stage}
        for stage, outcome in outcomes.items()
        for figure in outcome.get("figures", {}).values()
    ]


def lake_figures(lake: Place, release: Row, rows: pa.Table, vocabulary: Row) -> list[Row]:
    """Alignment strength by stratum, where the manifest of the release is still there, and router weights against popularity, from its own rows."""
    behavior = [number for number, slot in enumerate(vocabulary["slots"]) if slot.startswith("behavior")]
    return [*_strength_figure(lake, release), *([_router_figure(rows, behavior)] if behavior else [])]


def _strength_figure(lake: Place, release: Row) -> list[Row]:
    """Histogram of alignment strength by stratum in the manifest that the release was made from; none when it is gone: main may show another revision's."""
    import numpy as np

    home, config = lake
    at = manifest_of(lake, lakehouse.read_releases(home, config.lake).to_pylist(), release["tag"])
    if at is None:
        return []
    where = f"logical_date == '{release['logical_date']}'"
    features = lakehouse.read_arrow(home, config.lake, MANIFEST, snapshot_id=at, columns=("strength", "popularity_stratum"), where=where)
    strength, stratum = features["strength"].to_numpy(), features["popularity_stratum"].to_numpy(zero_copy_only=False)
    edges = np.linspace(0.0, 1.0, 21)
    counts = {name: np.histogram(strength[stratum == name], edges)[0].tolist() for name in STRATA}
    return [
        {
            "kind": "strength_by_stratum",
            "data": {"edges": edges.tolist(), "counts": counts},
            "title": "Alignment strength by stratum",
            "caption": "How strongly behaviour is aligned to content (eq. 17); rare items lie near zero by design.",
        }
    ]


def _router_figure(rows: pa.Table, behavior: Sequence[int]) -> Row:
    """Mean router weight and share of active behaviour codes by popularity quantile."""
    import numpy as np
    import pyarrow.compute as pc

    weights = pc.list_flatten(rows["weights"]).to_numpy().reshape(rows.num_rows, -1)[:, list(behavior)]
    popularity = rows["popularity"].to_numpy()
    groups = np.array_split(np.argsort(popularity, kind="stable"), min(10, rows.num_rows))
    series = {
        "mean router weight": [float(weights[group].mean()) for group in groups],
        "share of behaviour codes on": [float((weights[group] > 0).mean()) for group in groups],
    }
    data = {"popularity": [float(np.median(popularity[group])) for group in groups], "series": series, "label": "behaviour codes"}
    return {
        "kind": "weight_by_popularity",
        "data": data,
        "title": "Behaviour router against popularity",
        "caption": "Ten groups of equal size, least to most popular.",
    }


def examples(lake: Place, release: Row, rows: pa.Table, codebook_sizes: Sequence[int]) -> list[Row]:
    """The most popular live items with the items that share most codes with them, with titles and pictures."""
    import pyarrow as pa
    import pyarrow.compute as pc

    live = rows.filter(pc.equal(rows["status"], "live")).select(["item_id", "popularity"]).sort_by([("popularity", "descending"), ("item_id", "ascending")])
    found = [show_item(rows, item_id, codebook_sizes, top=NEIGHBOURS) for item_id in live["item_id"].slice(0, EXAMPLES).to_pylist()]
    named = sorted({row["item_id"] for item in found for row in (item, *item["neighbours"])})
    chosen = rows.filter(pc.is_in(rows["item_id"], value_set=pa.array(named, rows["item_id"].type)))
    codes = {row["item_id"]: row for row in chosen.select(["item_id", "codes", "weights"]).to_pylist()}
    texts, root = {row["item_id"]: row for row in views.titles(lake, release["logical_date"], named).to_pylist()}, _image_root(lake)
    seen = {name: {"title": texts.get(name, {}).get("title") or name, "picture": picture(root, texts.get(name, {}).get("image_uri"))} for name in named}
    return [_example(item, codes, seen) for item in found]


def ranker(outcomes: Mapping[str, Row]) -> list[Row]:
    """One row per arm and stratum with the paired difference to the arm `id`."""
    outputs = outcomes.get("train_ranker", {}).get("outputs", {})
    deltas = {(row["a"], row["stratum"]): row for row in outputs.get("differences", []) if row["b"] == "id" and row["metric"] == "auc"}
    return [
        _ranker_row(arm, stratum, values, deltas.get((arm, stratum), {}))
        for arm, strata in outputs.get("arms", {}).items()
        for stratum, values in strata.items()
    ]


def lineage(lake: Place, tag: str) -> list[Row]:
    """Snapshots and runs behind the release, as the page lists them."""
    return [
        {
            "stage": row["stage"],
            "direction": row["side"].removesuffix("s"),
            "table": row["table"],
            "snapshot_id": row["snapshot"],
            "run": row["mlflow_run"],
        }
        for row in views.lineage(lake, tag)
    ]


def stages(outcomes: Mapping[str, Row], tables: Sequence[Row]) -> list[Row]:
    """How each stage ended, in how many seconds, and its MLflow run where the lineage knows it."""
    runs = {row["stage"]: row["run"] for row in tables}
    return [{"stage": name, "seconds": outcome["seconds"], "status": outcome["status"], "run": runs.get(name, "")} for name, outcome in outcomes.items()]


def commands(home: Home, tag: str) -> list[dict[str, str]]:
    """What a reader of the page may want to type next."""
    return [
        {"what": "open MLflow", "command": f"mlflow ui --backend-store-uri {scrub(home.tracking_uri)} --host 127.0.0.1"},
        {"what": "look at one item", "command": f"sid show ITEM --release {tag} --lineage"},
        {"what": "list all releases", "command": "sid releases"},
    ]


def notes(release: Row, outcomes: Mapping[str, Row]) -> list[str]:
    """Sentences a reader should see first."""
    said = []
    if release["refit_due"]:
        said.append("A refit is due: the next night fits a new generation.")
    if release["status"] != "current":
        said.append(f"This release is {release['status']}; consumers read another one.")
    if "train_ranker" in outcomes and not outcomes["train_ranker"]["outputs"].get("arms"):
        said.append("No ranker evaluation: there are not enough events after a release's cutoff yet.")
    return said


def picture(root: str, uri: str | None) -> str:
    """A small picture of the image folder as a data URI; empty when there is none, it lies elsewhere (also: on a server), or it is no small picture file."""
    kind = mimetypes.guess_type(uri or "")[0] or ""
    if not uri or not root or "://" in root or "://" in uri or kind not in ("image/jpeg", "image/png", "image/webp"):
        return ""
    try:
        content = read_image(root, uri, MAX_PICTURE_BYTES)  # refuses what leaves the folder or is larger: raw.item keeps the addresses of refused pictures, too
    except (OSError, ValueError):
        return ""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _image_root(lake: Place) -> str:
    from pipeline.datasets import dataset

    home, config = lake
    return dataset(config.source.dataset).prepare(config.source, home.folder("data"), config.seed).image_root


def _example(item: Row, codes: Mapping[str, Row], seen: Mapping[str, Row]) -> Row:
    near = [{**codes[row["item_id"]], **seen[row["item_id"]], "positions": row["positions"]} for row in item["neighbours"]]
    return {**codes[item["item_id"]], **seen[item["item_id"]], "stratum": item["popularity_stratum"], "neighbours": near}


def _ranker_row(arm: str, stratum: str, values: Mapping[str, Any], delta: Mapping[str, Any]) -> Row:
    return {
        "arm": arm,
        "stratum": stratum,
        **{name: values.get(name) for name in ("rows", "auc", "gauc", "logloss")},
        "delta": delta.get("mean"),
        "delta_low": delta.get("low"),
        "delta_high": delta.get("high"),
    }
