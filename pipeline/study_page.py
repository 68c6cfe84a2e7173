"""What a study says: a Markdown table between markers, and one self-contained HTML page with tables, plots, verdicts and where each number comes from.

Input is the study's document (jobs/study.py), output is text; nothing is computed here but places and formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.errors import ConfigError
from pipeline.study import CANNOT_TELL, KEPT, NOT_KEPT

RETRIEVED = ("recall@5", "recall@10", "recall@50", "recall@100", "ndcg@10", "ndcg@50", "invalid_beams")
RANKED = ("auc", "gauc", "logloss")
SLICES = ("all", "head", "torso", "tail", "evidence_0", "evidence_1_4", "all_with_ties", "all_with_repeats")
CODED = ("utilisation", "perplexity", "collision_rate", "nmse/text", "nmse/image", "nmse/behavior", "nmse/behavior/tail", "closed_share/head")
CODED_TOO = ("closed_share/tail", "head_share@10", "purity", "purity/tail")
RICH = ("norm", "count", "rank", "reliability")
LIGHTS = {KEPT: "pass", NOT_KEPT: "fail", CANNOT_TELL: "unknown"}
OPENED = {"valid": "validation part; the test part is shut", "test": "test part", "confirm": "confirmation part"}


# ---------------------------------------------------------------- Markdown


def markdown(document: Mapping[str, Any]) -> str:
    """The study as Markdown tables: provenance, verdicts, readers by slice, codes, inputs."""
    lines = [f"**{document['title'] or document['name']}**", "", *_provenance(document), ""]
    lines += ["### Verdicts", "", *_verdicts(document["claims"], document["statistics"]["level"]), ""]
    lines += [f"Not run here: {len(document['not_run'])} of {len(document['not_run']) + len(document['claims'])} comparisons of the page.", ""]
    for (data, reader), rows in _groups(document["readings"]).items():
        lines += [f"### {data}, {reader}", "", *_reading_table(rows), ""]
    if document["codes"]:
        lines += ["### Codes", "", *_number_table(document["codes"], (*CODED, *CODED_TOO)), ""]
    if document["inputs"]:
        lines += [
            "### Inputs: Spearman of richness with the split-half overlap, and shares of the alignment strength",
            "",
            *_richness_table(document["inputs"]),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def inserted(text: str, name: str, table: str, *, where: str) -> str:
    """The text with the table between `<!-- study:NAME -->` and `<!-- /study -->`.

    Raises: ConfigError when the markers are not there exactly once.
    """
    pattern = re.compile(rf"(<!-- study:{re.escape(name)} -->\n).*?(<!-- /study -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ConfigError(
            "the results file has no place for the study", expected=f"<!-- study:{name} --> ... <!-- /study --> once", found="not so", where=where
        )
    return pattern.sub(lambda found: f"{found[1]}{table}{found[2]}", text)


def _provenance(document: Mapping[str, Any]) -> list[str]:
    digests = ", ".join(f"{name} {facts['digest']}" for name, facts in document["data"].items())
    return [
        f"`{document['command']}`",
        "",
        f"Asked: {OPENED[document['part']]}. Seeds {', '.join(map(str, document['seeds']))}. Commit {', '.join(each[:10] for each in document['commits'])}, "
        f"configuration {document['config']}, data {digests}; {len(document['cells'])} cells, {document['cpu_seconds'] / 60:.0f} CPU minutes, "
        f"on {', '.join(document['devices'])}.",
    ]


def _verdicts(claims: Sequence[Mapping[str, Any]], level: float) -> list[str]:
    if not claims:
        return ["No claim could be judged."]
    lines = [f"| claim | data | metric | difference | {level:.0%} interval | seeds | verdict | why |", "|---|---|---|---|---|---|---|---|"]
    return lines + [
        f"| {row['title']} | {row['data']} | {claim_metric(row)} | {signed(row['difference'])} | {interval(row)} | {row['seeds']} | "
        f"**{row['verdict']}** | {row['reason']} |"
        for row in claims
    ]


def _reading_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms as rows; the metrics of all rows, then one metric by slice."""
    table = reading_table(rows)
    head = f"| arm | fits | {' | '.join(table['heads'])} |"
    lines = [head, "|---" * (len(table["heads"]) + 2) + "|"]
    return lines + [f"| {row['arm']}{' (capped)' if row['capped'] else ''} | {row['fits']} | {' | '.join(row['cells'])} |" for row in table["rows"]]


def _number_table(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> list[str]:
    names = [name for name in wanted if any(name in row["metrics"] for row in rows)]
    lines = [f"| data | arm | fits | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    return lines + [f"| {row['data']} | {row['name']} | {row['fits']} | {' | '.join(decimal(row['metrics'].get(name)) for name in names)} |" for row in rows]


def _richness_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| data | inputs | richness | Spearman with overlap | mean w | share of w < .05 | share of w > .5 |", "|---|---|---|---|---|---|---|"]
    return lines + [f"| {' | '.join(row)} |" for row in richness_rows(rows)]


# ---------------------------------------------------------------- rows of tables


def claim_metric(row: Mapping[str, Any]) -> str:
    """Metric, reader and slice of a claim in a few words."""
    times = "" if row["times"] == 1 else f"{row['times']:g} x "
    against = f" - {times}{row['control_metric'] or 'control'}" if times or row["control_metric"] else ""
    return f"{row['metric']}{against}, {row['reader']}, {row['stratum']}" + (" (primary)" if row["primary"] else "")


def reading_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`heads` and `rows` of one reader's table: metrics over all rows, then the leading metric by slice."""
    ranked = any("auc" in row["metrics"] for row in rows)
    wanted = [name for name in (RANKED if ranked else RETRIEVED) if any(name in row["metrics"] for row in rows)]
    lead = "auc" if ranked else next((name for name in ("recall@50", "recall@10") if name in wanted), wanted[0])
    slices = [name for name in SLICES[1:] if any(row["stratum"] == name for row in rows)]
    sizes = {row["stratum"]: f"{row['rows']}{', thin' if row['thin'] else ''}" for row in rows}
    heads = [*wanted, *[f"{lead} {name} ({sizes[name]})" for name in slices]]
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = {row["stratum"]: row for row in rows if row["arm"] == arm}
        everything = own.get("all", next(iter(own.values())))
        cells = [with_spread(everything, name) for name in wanted] + [with_spread(own[name], lead) if name in own else "-" for name in slices]
        found.append({"arm": arm, "fits": everything["fits"], "capped": any(row["capped"] for row in own.values()), "cells": cells})
    return {"heads": heads, "rows": found}


def with_spread(row: Mapping[str, Any], metric: str) -> str:
    """A mean and, from two fits on, the deviation between them."""
    spread = row["spread"].get(metric)
    return decimal(row["metrics"].get(metric)) + (f" ({decimal(spread)})" if spread is not None else "")


def richness_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """data, inputs, kind and its numbers, for every kind that was measured."""
    found = []
    for row in rows:
        for kind in RICH:
            if f"mean_strength/{kind}" in row["metrics"]:
                names = ("richness_spearman", "mean_strength", "low_strength_share", "high_strength_share")
                found.append([row["data"], row["name"], kind, *[decimal(row["metrics"].get(f"{name}/{kind}")) for name in names]])
    return found


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(data, reader) -> rows; the floors of a data set stand first in each of its retrievers' tables."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["reader"] != "floor":
            found.setdefault((row["data"], row["reader"]), []).append(row)
    for (data, _), group in found.items():
        if "auc" not in group[0]["metrics"]:
            group[:0] = [row for row in rows if row["reader"] == "floor" and row["data"] == data]
    return found or {(row["data"], "floor"): [each for each in rows if each["data"] == row["data"]] for row in rows}


def decimal(value: float | None) -> str:
    """Four decimals, three digits for large numbers, a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """Four decimals with a sign, a dash for nothing."""
    return "-" if value is None else f"{value:+.4f}"


def interval(row: Mapping[str, Any]) -> str:
    """Both ends of a row's interval."""
    return "-" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]"


# ---------------------------------------------------------------- HTML


def write_page(path: Path, document: Mapping[str, Any]) -> Path:
    """The path, now one self-contained HTML page: no script, no file, no address outside itself."""
    from pipeline import report

    readings = [{"data": data, "reader": reader, **reading_table(rows)} for (data, reader), rows in _groups(document["readings"]).items()]
    shown = {
        "study": document,
        "opened": OPENED[document["part"]],
        "claims": [{**row, "light": LIGHTS[row["verdict"]], "what": claim_metric(row), "interval": interval(row)} for row in document["claims"]],
        "readings": readings,
        "richness": richness_rows(document["inputs"]),
        "coded": [name for name in (*CODED, *CODED_TOO) if any(name in row["metrics"] for row in document["codes"])],
        "figures": _figures(document),
    }
    return report.write_html(path, "study.html", shown, {"decimal": decimal, "signed": signed})


def _figures(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Section -> cards with a title, a caption and an inline picture."""
    number, level = iter(range(10_000)), document["statistics"]["level"]
    return {
        "claims": [
            _card(next(number), "differences", data, title, f"Dots are paired differences, bars {level:.0%} intervals.")
            for title, data in _claim_data(document)
        ],
        "readings": [_card(next(number), "by_stratum", data, title, "Means over seeds; grey slices are thin.") for title, data in _slice_data(document)],
        "strength": [
            _card(next(number), "strength_by_stratum", data, title, "What this richness makes of the items.") for title, data in _strength_data(document)
        ],
        "curves": [_card(next(number), "loss_curves", data, title, "Validation NDCG@50 by epoch, one line per fit.") for title, data in _curve_data(document)],
    }


def _claim_data(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """One plot per metric: differences of unlike metrics share no axis."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["claims"]:
        if row["difference"] is not None:
            name = f"{row['arm']} - {row['control'] or row['control_metric']}, {row['data']}, {row['stratum']}"
            groups.setdefault(row["metric"], []).append({"name": name, **{key: row[key] for key in ("difference", "low", "high", "verdict")}})
    return [(metric, {"rows": rows, "label": f"difference in {metric} (0 = the control)"}) for metric, rows in groups.items()]


def _slice_data(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for (data, reader), rows in _groups(document["readings"]).items():
        lead = "auc" if "auc" in rows[-1]["metrics"] else "recall@50" if "recall@50" in rows[-1]["metrics"] else next(iter(rows[-1]["metrics"]))
        arms: dict[str, dict[str, float | None]] = {}
        for row in rows:
            arms.setdefault(row["arm"], {})[row["stratum"]] = row["metrics"].get(lead)
        found.append((f"{data}, {reader}", {"arms": arms, "rows": {row["stratum"]: row["rows"] for row in rows}, "label": f"{lead} by slice of the answer"}))
    return found


def _strength_data(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{cell}, richness {kind}", data) for cell, kinds in document["strength"].items() if cell.endswith("seed 0") for kind, data in kinds.items()]


def _curve_data(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    groups: dict[str, dict[str, list[float]]] = {}
    for cell, curves in document["curves"].items():
        data, *middle, seed = cell.split("/")
        if "valid_ndcg@50" in curves and len(middle) == 2:
            groups.setdefault(f"{data}, {middle[1]}", {})[f"{middle[0]} {seed.removeprefix('seed ')}"] = curves["valid_ndcg@50"]
    return [(title, {"curves": curves, "label": "validation NDCG@50"}) for title, curves in groups.items()]


def _card(number: int, kind: str, data: Mapping[str, Any], title: str, caption: str) -> dict[str, Any]:
    """One picture; ids inside it are made unique, because many share the page."""
    from pipeline import report

    drawn = report.draw(kind, data)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>s{number}-", report.to_svg(drawn))
    return {"title": title, "caption": caption, "wide": drawn.get_size_inches()[0] > 6, "svg": Markup(svg)}  # noqa: S704 - matplotlib escapes its texts
