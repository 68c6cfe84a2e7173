"""What people look at: figures from plain numbers, and one self-contained HTML page about a release.

`FIGURES[kind](**data)` draws; `draw(kind, data, footer=...)` is the tolerant front door; `write_report(path, ReportContent(...))` writes the page.
Not here: tables, Spark, MLflow. `pipeline/tracking.py` saves the pictures beside their numbers, `jobs/report_page.py` fills `ReportContent`.
"""

from __future__ import annotations

import inspect
import io
import logging
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from pipeline import evenness
from pipeline.intervals import THIN_ROWS

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
INK = "#2b303b"  # in the HTML page this very colour becomes the text colour of the reader's theme
COLOURS = ("#4477aa", "#ee7733", "#009988", "#cc3377", "#aa8800", "#66ccee", "#888888")  # told apart with any colour vision
STRATA = {"head": COLOURS[0], "torso": COLOURS[1], "tail": COLOURS[2]}
HUES = {"shared": 215, "level": 215, "text": 28, "image": 330, "behavior": 165}  # colour of a slot's chips, by the word its name begins with
NEAR_LIMIT = 0.1  # a gate this close to its limit is amber


# --------------------------------------------------------------------------------------------------------------- figures


def code_usage(*, slots: Sequence[str] = (), counts: Sequence[Sequence[float]] = ()) -> Figure:
    """Heat map of how often each code is used, most used first, one row per position, with perplexity and dead codes.

    Args:
        slots: names of the positions.
        counts: items per code of each position, length K of that position.
    """
    usage = dict(zip(slots, counts, strict=True))
    widest = max((len(counts) for counts in usage.values()), default=1)
    figure, axes = _canvas(height=1.1 + 0.42 * max(len(usage), 1), width=9.0)
    grid_LK = np.full((max(len(usage), 1), widest), np.nan)
    for row, used in enumerate(usage.values()):
        grid_LK[row, : len(used)] = np.sort(np.asarray(used, dtype=float))[::-1]
    image = axes.imshow(np.log10(1 + grid_LK), aspect="auto", interpolation="nearest", cmap="cividis")
    top = np.nanmax(grid_LK, initial=1.0)
    ticks = [value for value in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000, 1_000_000) if value <= top]
    bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=np.log10(1 + np.array(ticks)))
    bar.ax.set_yticklabels([f"{tick:,}" for tick in ticks], color=INK, fontsize=8)
    bar.set_label("items per code", color=INK, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    names = [f"{slot}: perplexity {evenness.perplexity(used):.0f}, dead {evenness.dead_codes(used)}" for slot, used in usage.items()]
    axes.set_yticks(range(len(usage)), names)
    _dress(axes, "codes, most used first", "", grid=False)
    return figure


def collisions_by_decile(*, collision_rate: Sequence[float]) -> Figure:
    """Bars of the share of items that share their codes, by popularity decile (0 = least popular).

    Args:
        collision_rate: share in [0, 1], one per decile.
    """
    figure, axes = _canvas()
    axes.bar([str(decile) for decile in range(len(collision_rate))], collision_rate, color=COLOURS[0], width=0.75)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _dress(axes, "popularity decile (9 = most popular)", "items sharing their codes")
    return figure


def strength_by_stratum(*, edges: Sequence[float], counts: Mapping[str, Sequence[float]]) -> Figure:
    """Histogram of the alignment strength w, as a share of each popularity stratum.

    Args:
        edges: bin edges of w, length n + 1.
        counts: stratum -> items per bin, length n.
    """
    figure, axes = _canvas()
    for index, (stratum, values) in enumerate(counts.items()):
        shares = np.asarray(values, dtype=float) / max(float(np.sum(values)), 1.0)
        axes.stairs(shares, edges, label=stratum, color=_stratum_colour(stratum, index), linewidth=2, fill=False)
        axes.stairs(shares, edges, color=_stratum_colour(stratum, index), alpha=0.12, fill=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _dress(axes, "alignment strength w (0 = content alone, 1 = fully aligned)", "share of the stratum", legend=True)
    return figure


def weight_by_popularity(*, popularity: Sequence[float], series: Mapping[str, Sequence[float]], label: str = "mean value") -> Figure:
    """Lines over popularity on a log axis, e.g. mean w and mean router weight by popularity bucket.

    Args:
        popularity: centre of each bucket, decayed events.
        series: name -> one value per bucket.
        label: what the values are, with their unit.
    """
    figure, axes = _canvas()
    for index, (name, values) in enumerate(series.items()):
        axes.plot(popularity, values, marker="o", markersize=4, linewidth=2, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _dress(axes, "popularity (decayed events)", label, legend=True)
    return figure


def loss_curves(*, curves: Mapping[str, Sequence[float]], label: str = "loss") -> Figure:
    """Loss terms by epoch, on a log axis when they span more than a factor of 30.

    Args:
        curves: name -> one value per epoch.
        label: what the values are.
    """
    figure, axes = _canvas(width=7.0)
    for index, (name, values) in enumerate(curves.items()):
        style = "-" if index < len(COLOURS) else "--"
        axes.plot(range(1, len(values) + 1), values, style, color=COLOURS[index % len(COLOURS)], label=name, linewidth=1.8)
    values = [value for series in curves.values() for value in series if math.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) > 30:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, "epoch", label, legend=True)
    return figure


def churn(*, by_position: Mapping[str, float] | None = None, by_stratum: Mapping[str, float] | None = None, overall: float | None = None) -> Figure:
    """Share of the parent's items whose code changed, by position and by popularity stratum.

    Args:
        by_position: slot name -> share in [0, 1].
        by_stratum: stratum -> share in [0, 1].
        overall: share over all items.
    """
    by_stratum = {"all": overall} | dict(by_stratum or {}) if overall is not None else by_stratum
    groups = [(name, dict(values)) for name, values in (("position", by_position), ("popularity stratum", by_stratum)) if values]
    figure, panels = _panels(max(len(groups), 1))
    for panel, (name, values) in zip(panels, groups, strict=False):
        colours = [_stratum_colour(key, 0) if name != "position" else COLOURS[0] for key in values]
        panel.barh(list(values), list(values.values()), color=colours, height=0.65)
        panel.invert_yaxis()
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.set_xlim(0, max(0.01, *values.values()) * 1.15)
        _dress(panel, f"changed against the parent, by {name}", "")
    return figure


def differences(*, rows: Sequence[Mapping[str, Any]], label: str = "difference") -> Figure:
    """Paired differences with their intervals, one row each, in the colour of their verdict; 0 is the control.

    Args:
        rows: {"name", "difference", "low", "high", "verdict": kept | not kept | cannot tell}; ends may be None.
        label: what the difference is of.
    """
    figure, axes = _canvas(width=9.0, height=1.0 + 0.3 * max(len(rows), 2))
    for verdict, colour in (("kept", COLOURS[2]), ("not kept", COLOURS[3]), ("cannot tell", COLOURS[6])):
        places = [place for place, row in enumerate(rows) if row["verdict"] == verdict]
        points = [rows[place]["difference"] for place in places]
        ends = [[abs(_or(rows[place][end], point) - point) for place, point in zip(places, points, strict=True)] for end in ("low", "high")]
        if places:
            axes.errorbar(points, places, xerr=ends, fmt="o", color=colour, label=verdict, markersize=5, capsize=3, linewidth=1.5)
    axes.axvline(0.0, color=INK, linewidth=1, linestyle=":", alpha=0.6)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _dress(axes, label, "", legend=True)
    return figure


def by_stratum(*, arms: Mapping[str, Mapping[str, float | None]], rows: Mapping[str, int] | None = None, label: str = "recall@50") -> Figure:
    """A metric of each arm by stratum of the answer, one line of dots per stratum; strata under 1,000 rows are grey.

    Args:
        arms: arm -> stratum -> value.
        rows: stratum -> questions.
        label: what the value is, with its unit.
    """
    figure = _dots(arms, rows, label)
    figure.axes[0].set_xlim(left=0)
    return figure


def ranker_auc(*, arms: Mapping[str, Mapping[str, float | None]], rows: Mapping[str, int] | None = None) -> Figure:
    """AUC of each ranker arm by stratum; strata under 1,000 rows are grey.

    Args:
        arms: arm -> stratum -> AUC.
        rows: stratum -> labelled test rows.
    """
    figure = _dots(arms, rows, "AUC (0.5 = guessing)")
    figure.axes[0].axvline(0.5, color=INK, linewidth=1, linestyle=":", alpha=0.6)
    return figure


def _dots(arms: Mapping[str, Mapping[str, float | None]], rows: Mapping[str, int] | None, label: str) -> Figure:
    """A value of each arm by stratum, one line of dots per stratum."""
    strata = list(dict.fromkeys(stratum for values in arms.values() for stratum in values))
    figure, axes = _canvas(width=7.0, height=1.3 + 0.2 * max(len(arms) * len(strata), 4))
    for index, (arm, values) in enumerate(arms.items()):
        shown = [stratum for stratum in strata if values.get(stratum) is not None]
        places = [strata.index(stratum) + (index - (len(arms) - 1) / 2) * 0.7 / max(len(arms), 1) for stratum in shown]
        marker = "osD^v"[index // len(COLOURS) % 5]
        axes.plot([_or(values[stratum], math.nan) for stratum in shown], places, marker, color=COLOURS[index % len(COLOURS)], label=arm, markersize=5)
    axes.set_yticks(range(len(strata)), [f"{stratum} (n={rows[stratum]:,})" if rows and stratum in rows else stratum for stratum in strata])
    axes.set_ylim(max(len(strata), 1) - 0.5, -0.5)
    _dress(axes, label, "", legend=True)
    for text, stratum in zip(axes.get_yticklabels(), strata, strict=True):
        text.set_alpha(0.45 if rows and rows.get(stratum, THIN_ROWS) < THIN_ROWS else 1.0)
    return figure


def _or(value: float | None, fallback: float) -> float:
    return fallback if value is None else value


def embedding_report(*, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Figure:
    """Six ways to look at an embedding on items that nothing was trained on, one row per space; the best value of a column is bold.

    Args:
        columns: measures, `<measure>/<content | collaborative>`; more is better in each.
        rows: space -> one value per measure, None = not measured.
    """
    figure, axes = _canvas(width=1.6 + 0.85 * max(len(columns), 1), height=1.0 + 0.3 * max(len(rows), 1))
    _dress(axes, "items that nothing was trained on; bold = best of its column", "", grid=False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    names = list(rows)
    if not names or not columns:
        return figure
    texts = [["-" if value is None else f"{value:.3f}" for value in rows[name]] for name in names]
    table = axes.table(cellText=texts, rowLabels=names, colLabels=[column.replace("/", chr(10)) for column in columns], loc="center", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1.0, 1.25)
    for cell in table.get_celld().values():
        cell.set(edgecolor="none", facecolor="none")
        cell.get_text().set_color(INK)
    for column in range(len(columns)):
        table[0, column].set_height(1.7 * table[0, column].get_height())
        values = [math.nan if (value := rows[name][column]) is None else value for name in names]
        if not np.isnan(values).all():
            table[1 + int(np.nanargmax(values)), column].get_text().set_fontweight("bold")
    return figure


FIGURES: dict[str, Callable[..., Figure]] = {
    "code_usage": code_usage,
    "collisions_by_decile": collisions_by_decile,
    "strength_by_stratum": strength_by_stratum,
    "weight_by_popularity": weight_by_popularity,
    "loss_curves": loss_curves,
    "churn": churn,
    "ranker_auc": ranker_auc,
    "embedding_report": embedding_report,
    "differences": differences,
    "by_stratum": by_stratum,
}


def draw(kind: str, data: Mapping[str, Any], *, footer: str = "") -> Figure:
    """The figure of a kind, with a footer (release tag and run id); keys it does not know are left out with a warning.

    Raises: ValueError for an unknown kind.
    """
    if kind not in FIGURES:
        raise ValueError(f"unknown figure {kind!r}; known: {', '.join(FIGURES)}")
    function = FIGURES[kind]
    known = inspect.signature(function).parameters
    if extra := sorted(set(data) - set(known)):
        logger.warning("figure data left out kind=%s keys=%s", kind, ",".join(extra))
    figure = function(**{name: value for name, value in data.items() if name in known})
    if footer:
        figure.text(0.995, 0.004, footer, ha="right", va="bottom", fontsize=7, color=INK, alpha=0.7)
    return figure


def _canvas(*, width: float = 5.6, height: float = 3.3) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout=_layout())
    return figure, figure.subplots()


def _layout() -> ConstrainedLayoutEngine:
    """Automatic spacing that leaves a line for the footer."""
    return ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 3.1), layout=_layout())
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def _dress(axes: Axes, xlabel: str, ylabel: str, *, legend: bool = False, grid: bool = True) -> None:
    """Labels with units, quiet spines and grid, all in the one ink colour."""
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.spines[["left", "bottom"]].set_alpha(0.4)
    if grid:
        axes.grid(True, color=INK, alpha=0.12, linewidth=0.7)
        axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _stratum_colour(stratum: str, index: int) -> str:
    return STRATA.get(stratum, COLOURS[(index + 3) % len(COLOURS)])


# ------------------------------------------------------------------------------------------------------------------ page


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything the page shows, as plain dicts and lists; what is empty is left out of the page.

    Args:
        release: facts of the release: tag, logical_date, generation, parent_tag, policy, items, new_items, moved_items, retired_items,
            codebook_digest, git_sha, run_id, dataset, tokenizer, reason, status; unknown keys are shown too.
        gates: {"name", "value", "min" and/or "max", "severity": fail | warn, "meaning"}.
        figures: {"kind", "data"} and, where they are known, "title", "caption", "stage" (that made it); `kind` is a key of FIGURES and decides the section.
        slots: name of each position, in order of the codes.
        codebook_sizes: K of each position; code K means masked.
        examples: {"item_id", "title", "picture" (data URI or empty), "stratum", "codes", "weights",
            "neighbours": [{"item_id", "title", "picture", "codes", "weights", "positions" (of the codes that count as shared)}], most shared first}.
        ranker: {"arm", "stratum", "rows", "auc", "gauc", "logloss", "delta", "delta_low", "delta_high"}, deltas against the arm `id`.
        stages: {"stage", "seconds", "status", "run"}.
        lineage: {"stage", "direction": input | output, "table", "snapshot_id", "run"}.
        commands: {"what", "command"}: how to open MLflow, how to show an item, how to roll back.
        notes: sentences shown under the header, e.g. what falls short.
    """

    release: Mapping[str, Any]
    gates: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Mapping[str, Any]] = ()
    slots: Sequence[str] = ()
    codebook_sizes: Sequence[int] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    ranker: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    lineage: Sequence[Mapping[str, Any]] = ()
    commands: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


SECTIONS = {
    "codes": ("code_usage", "collisions_by_decile"),
    "popularity": ("strength_by_stratum", "weight_by_popularity"),
    "churn": ("churn",),
    "training": ("loss_curves", "embedding_report"),
    "ranker": ("ranker_auc",),
}  # differences and by_stratum are for studies
HEADINGS = {
    "collisions_by_decile": "Collisions by popularity",
    "strength_by_stratum": "Alignment strength by stratum",
    "ranker_auc": "AUC by stratum",
    "embedding_report": "Content vectors, six ways",
}


def write_report(path: Path, content: ReportContent) -> Path:
    """The path, now one self-contained HTML page: no script, no file, no address outside itself."""
    shown = {
        "release": content.release,
        "content": content,
        "facts": _facts(content.release),
        "gates": [dict(gate) | {"light": gate_light(gate)} for gate in content.gates],
        "verdict": _verdict(content.gates),
        "figures": {section: _section_figures(content, kinds) for section, kinds in SECTIONS.items()},
        "examples": [_example(example, content) for example in content.examples],
        "legend": [{"slot": slot, "hue": _hue(slot)} for slot in content.slots],
        "ranker": [_ranker_row(row) for row in content.ranker],
        "longest": max((stage["seconds"] for stage in content.stages), default=1.0) or 1.0,
    }
    return write_html(path, "report.html", shown, {"number": _number, "picture": _picture, "short": _short})


def write_html(path: Path, template: str, shown: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> Path:
    """The path, now the page of a template of TEMPLATES; every text is escaped and a name that is not there is an error."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(filters)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(shown), encoding="utf-8")
    return path


def gate_light(gate: Mapping[str, Any]) -> str:
    """Light of a gate: pass | near | warn | fail | unknown; `near` is within a tenth of its limit."""
    value = gate.get("value")
    if value is None or not math.isfinite(value):
        return "unknown"
    low, high = gate.get("min"), gate.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        return "warn" if gate.get("severity") == "warn" else "fail"
    near_low = low is not None and low > 0 and value < low * (1 + NEAR_LIMIT)
    near_high = high is not None and high > 0 and value > high * (1 - NEAR_LIMIT)
    return "near" if near_low or near_high else "pass"


def to_svg(figure: Figure) -> str:
    """The figure as inline SVG whose ink takes the reader's text colour; same figure, same text."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sidmill"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace('width="', 'data-width="', 1).replace('height="', 'data-height="', 1)


def _section_figures(content: ReportContent, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    chosen = [figure for kind in kinds for figure in content.figures if figure["kind"] == kind]
    return [_figure_card(figure, index, content.release) for index, figure in enumerate(chosen)]


def _figure_card(figure: Mapping[str, Any], index: int, release: Mapping[str, Any]) -> dict[str, Any]:
    """Title, caption and inline SVG of one figure; numbers that cannot be drawn cost their picture, not the page."""
    kind = figure["kind"]
    title = figure.get("title") or HEADINGS.get(kind, kind.replace("_", " ").capitalize())
    said = figure.get("caption") or (inspect.getdoc(FIGURES[kind]) or "").splitlines()[0]
    card = {"title": ", ".join(filter(None, (title, figure.get("stage")))), "caption": said}
    footer = ", ".join(str(release[name]) for name in ("tag", "run_id") if release.get(name))
    try:
        drawn = draw(kind, figure["data"], footer=footer)
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{kind}-{index}-", to_svg(drawn))  # many SVGs share the page: ids must differ
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("figure not drawn kind=%s reason=%s", kind, error)
        return card | {"caption": f"This figure could not be drawn: {error}", "svg": "", "wide": False}
    return card | {"svg": Markup(svg), "wide": drawn.get_size_inches()[0] > 6}  # noqa: S704 - matplotlib escapes its texts


def _facts(release: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of the facts that are no tile and no headline."""
    shown = {"tag", "items", "new_items", "moved_items", "retired_items", "logical_date", "dataset", "policy", "generation", "status"}
    return [(name.replace("_", " "), "none" if value in (None, "") else str(value)) for name, value in release.items() if name not in shown]


def _verdict(gates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    lights = [gate_light(gate) for gate in gates]
    failed, warned = lights.count("fail"), lights.count("warn")
    if failed:
        return {"light": "fail", "text": f"{failed} of {len(gates)} gates failed"}
    if warned:
        return {"light": "warn", "text": f"{len(gates)} gates, {warned} with a warning"}
    passed = lights.count("pass") + lights.count("near")
    if not passed:
        return {"light": "unknown", "text": "no gate was measured" if gates else "no gates recorded"}
    return {"light": "pass", "text": f"all {passed} gates passed" if passed == len(gates) else f"{passed} of {len(gates)} gates passed, the rest not measured"}


def _example(example: Mapping[str, Any], content: ReportContent) -> dict[str, Any]:
    neighbours = [dict(each) | {"chips": _chips(each, content, each["positions"]), "shared": len(each["positions"])} for each in example["neighbours"]]
    return dict(example) | {"chips": _chips(example, content, range(len(example["codes"]))), "neighbours": neighbours}


def _masked(code: int, position: int, content: ReportContent) -> bool:
    return position < len(content.codebook_sizes) and code >= content.codebook_sizes[position]


def _chips(item: Mapping[str, Any], content: ReportContent, shared: Container[int]) -> list[dict[str, Any]]:
    """One coloured chip per position: slot, code, weight, and whether the code is among the shared ones."""
    weights = list(item.get("weights") or [1.0] * len(item["codes"]))
    top = max([1.0, *weights])
    return [
        {
            "slot": content.slots[position] if position < len(content.slots) else f"position {position}",
            "hue": _hue(content.slots[position]) if position < len(content.slots) else 215,
            "code": "-" if _masked(code, position, content) else str(code),
            "weight": f"{weights[position]:.2f}",
            "height": round(100 * max(0.0, min(1.0, weights[position] / top))),
            "masked": _masked(code, position, content),
            "same": position in shared,
        }
        for position, code in enumerate(item["codes"])
    ]


def _hue(slot: str) -> int:
    return next((hue for word, hue in HUES.items() if slot.startswith(word)), 265)


def _ranker_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every optional number present, its thinness, and a verdict only where its interval leaves zero."""
    full = dict.fromkeys(("rows", "auc", "gauc", "logloss", "delta", "delta_low", "delta_high")) | dict(row)
    thin = full["rows"] is not None and full["rows"] < THIN_ROWS
    low, high = full["delta_low"], full["delta_high"]
    verdict = ""
    if not thin and low is not None and high is not None:
        verdict = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    return full | {"thin": thin, "verdict": verdict}


def _number(value: Any, digits: int = 3) -> str:
    """A number as people read it: thousands separated, `digits` decimals for fractions, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.{digits}f}" if abs(value) >= 10.0**-digits else f"{value:.2g}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def _short(text: Any) -> str:
    return str(text)[:12]


def _picture(uri: Any) -> str:
    """The picture's data URI; anything else (an address outside the page) is left out."""
    text = str(uri or "")
    return text if re.fullmatch(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+", text) else ""
