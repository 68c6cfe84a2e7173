"""Figures and the release page: numbers in, pictures and one safe, self-contained page out."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from jobs import report_page
from pipeline import config, lakehouse, report
from pipeline.context import Home
from pipeline.evenness import perplexity
from pipeline.report import FIGURES, ReportContent, draw, gate_light, to_svg, write_report

SLOTS = ["shared_0", "text_0", "image_0", "behavior_0", "behavior_1", "behavior_2"]
TITLES = ["Star Wars (1977)", "Fargo (1996)", "Toy Story (1995)", "Pulp Fiction (1994)"]
NEIGHBOURS = [
    ["Return of the Jedi (1983)", "Empire Strikes Back, The (1980)", "Raiders of the Lost Ark (1981)", "Indiana Jones and the Last Crusade (1989)"],
    ["Big Lebowski, The (1998)", "Sling Blade (1996)", "Trainspotting (1996)", "Welcome to the Dollhouse (1995)"],
    ["Aladdin (1992)", "Lion King, The (1994)", "Beauty and the Beast (1991)", "Wallace & Gromit: The Best of Aardman Animation (1996)"],
    ["Reservoir Dogs (1992)", "GoodFellas (1990)", "Usual Suspects, The (1995)", "True Romance (1993)"],
]


def figure_data(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    usage = {slot: rng.multinomial(1682, rng.dirichlet(np.full(100, 0.6 + index))).tolist() for index, slot in enumerate(SLOTS)}
    edges = np.linspace(0, 1, 21)
    strata = {"head": (8, 4, 336), "torso": (3, 4, 505), "tail": (1, 9, 841)}
    counts = {name: np.histogram(rng.beta(a, b, size), edges)[0].tolist() for name, (a, b, size) in strata.items()}
    arms = {"id": (0.68, 0.71, 0.66, 0.5), "id_sid": (0.72, 0.73, 0.70, 0.61), "id_permuted": (0.69, 0.71, 0.66, 0.51)}
    auc = {arm: dict(zip(("all", "head", "tail", "0 events"), values, strict=True)) for arm, values in arms.items()}
    epochs = np.arange(60)
    return {
        "code_usage": {"slots": list(usage), "counts": list(usage.values())},
        "collisions_by_decile": {"collision_rate": np.linspace(0.09, 0.01, 10).tolist()},
        "strength_by_stratum": {"edges": edges.tolist(), "counts": counts},
        "weight_by_popularity": {
            "popularity": [0, 1, 3, 10, 30, 100, 300],
            "series": {"strength w": [0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.9], "router weight": [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45]},
            "label": "mean over the items of a bucket",
        },
        "loss_curves": {
            "curves": {name: (scale * np.exp(-epochs / 15) + floor).tolist() for name, scale, floor in (("total", 4, 1), ("reconstruction", 1, 0.4))}
        },
        "churn": {"by_position": dict(zip(SLOTS, rng.uniform(0, 0.03, 6).tolist(), strict=True)), "by_stratum": {"head": 0.004, "torso": 0.02, "tail": 0.031}},
        "ranker_auc": {"arms": auc, "rows": {"all": 20000, "head": 14210, "tail": 1893, "0 events": 67}},
        "embedding_report": {"columns": ["recall@50/content", "auc/collaborative"], "rows": {"base text": [0.4, 0.61], "cre fused": [0.48, None]}},
        "differences": {"rows": [{"name": "one", "difference": 0.01, "low": 0.002, "high": 0.02, "verdict": "kept"}], "label": "recall@50"},
        "by_stratum": {"arms": {"ada_sid": {"all": 0.13, "tail": 0.04}, "plain": {"all": 0.12, "tail": None}}, "rows": {"all": 9000, "tail": 800}},
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a small picture and a large one; a picture of somebody else lies beside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"small")
    (folder / "big.png").write_bytes(b"x" * (report_page.MAX_PICTURE_BYTES + 1))
    (tmp_path / "private.png").write_bytes(b"not for this page")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    return folder


def test_only_small_pictures_of_the_image_folder_are_embedded(pictures: Path) -> None:
    private = pictures.parent / "private.png"
    assert report_page.picture(str(pictures), "a.png") == "data:image/png;base64," + base64.b64encode(b"small").decode()
    for uri in (
        str(private),
        f"file://{private}",
        "../private.png",
        "link.png",
        "big.png",
        "none.png",
        "a.txt",
        "x" * 300 + ".png",
        "http://127.0.0.1:9/a.png",
        "",
        None,
    ):
        assert report_page.picture(str(pictures), uri) == "", uri
    assert report_page.picture("", str(private)) == "", "without a folder no file is ours to show"
    assert report_page.picture("s3://bucket", "a.png") == "", "a page is written without the network"


def test_the_commands_of_a_page_hold_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:hunter22@db/mlflow")
    shown = str(report_page.commands(Home(tmp_path), "d20260301"))
    assert "hunter22" not in shown
    assert "postgresql://mlflow:***@db/mlflow" in shown


def test_the_facts_of_a_page_name_the_commit_and_the_policy_that_made_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever upgraded or changed the profile meanwhile writes the page with other ones."""
    monkeypatch.setenv("SID_GIT_SHA", "of-the-page")
    written = {4: {"sid.git_sha": "of-the-rows", "sid.run_id": "night"}}
    monkeypatch.setattr(lakehouse, "origin", lambda home, lake, table, snapshot_id: written.get(snapshot_id, {}))
    columns = ("tag", "logical_date", "generation", "parent_tag", "items", "status", "codebook_digest", "refit_due", "reason", "rows_digest")
    release = dict.fromkeys(columns, "x") | {"snapshot_id": 4}
    rows = pa.table({"is_new": [True], "changed_from_parent": [False], "status": ["live"]})
    lake = (Home(tmp_path), config.load("tiny"))
    found = report_page.facts(lake, release | {"reason": "refit due, anchored"}, rows, {"tokenizer": "opq"})
    assert (found["git_sha"], found["run_id"], found["policy"]) == ("of-the-rows", "night", "refit due, anchored")
    assert report_page.facts(lake, release | {"snapshot_id": 5}, rows, {"tokenizer": "opq"})["git_sha"] == "unknown", "swept away"


def test_the_examples_of_a_page_ask_the_catalogue_for_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, asked = [f"i{number:02d}" for number in range(20)], []
    facts = {"disambiguator": 0, "popularity_stratum": "head", "first_seen": date(2026, 1, 5), "changed_from_parent": False, "status": "live"}
    rows = [{"item_id": name, "codes": [at % 10, 3], "weights": [1.0, 0.0], "popularity": float(at)} | facts for at, name in enumerate(names)]

    def titles(lake: Any, day: date, item_ids: list[str]) -> pa.Table:
        """Titles of all but one item."""
        asked.append(item_ids)
        return pa.table({"item_id": item_ids, "title": [None if name == "i09" else name.upper() for name in item_ids], "image_uri": [None] * len(item_ids)})

    monkeypatch.setattr(report_page.views, "titles", titles)
    monkeypatch.setattr(report_page, "_image_root", lambda lake: "")
    lake = (Home(tmp_path), config.load("tiny"))
    shown = report_page.examples(lake, {"logical_date": date(2026, 1, 5)}, pa.Table.from_pylist(rows), (10, 10))
    assert [item["item_id"] for item in shown] == ["i19", "i18", "i17", "i16", "i15", "i14"]
    assert [near["title"] for item in shown for near in item["neighbours"]] == ["i09", "I08", "I07", "I06", "I05", "I04"]
    assert [near["positions"] for item in shown for near in item["neighbours"]] == [[0]] * 6, "the second slot is switched off"
    assert (shown[1]["title"], shown[1]["codes"], shown[1]["weights"], shown[1]["stratum"]) == ("I18", [8, 3], [1.0, 0.0], "head")
    assert asked == [[f"i{number:02d}" for number in (4, 5, 6, 7, 8, 9, 14, 15, 16, 17, 18, 19)]]


def test_a_stage_is_shown_with_its_mlflow_run_and_not_with_the_tag() -> None:
    outcomes = {"assign_sid": {"seconds": 2.0, "status": "done"}, "train_ranker": {"seconds": 1.0, "status": "done"}}
    shown = report_page.stages(outcomes, [{"stage": "assign_sid", "table": "sid.item_sid", "run": "0f3c"}])
    assert [(row["stage"], row["run"]) for row in shown] == [("assign_sid", "0f3c"), ("train_ranker", "")]


def test_gates_are_shown_with_the_limits_they_were_judged_by() -> None:
    now = config.load("tiny")
    judged = {"assign_sid": {"metrics": {"sid.item_sid/collision_rate": 0.2}}}
    noted = {"publish_release": {"outputs": {"limits": now.publish_release.model_dump() | {"max_collision_rate": 0.25}}}}
    first, *rest = report_page.gates(judged | noted, now)
    assert (first["value"], first["max"], first["meaning"]) == (0.2, 0.25, report_page.GATES["collision_rate"][2])
    assert len(rest) == len(report_page.GATES) - 1
    assert {gate_light(gate) for gate in rest} == {"unknown"}, "what was not measured is shown as that"
    first = report_page.gates(judged, now)[0]
    assert (first["max"], "profile now" in first["meaning"]) == (now.publish_release.max_collision_rate, True)
    assert report_page.gates({}, now) == []


def poster(rng: np.random.Generator) -> str:
    figure = Figure(figsize=(0.6, 0.6))
    figure.patch.set_facecolor(rng.uniform(0.2, 0.9, 3))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def example(rng: np.random.Generator, index: int) -> dict[str, Any]:
    codes = rng.integers(0, 100, 6)
    weights = [1.0, 1.0, 1.0, *rng.uniform(0.2, 0.9, 3).round(2).tolist()]
    neighbours = []
    for number, title in enumerate(NEIGHBOURS[index]):
        other = codes.copy()
        other[rng.choice(6, number + 1, replace=False)] = rng.integers(0, 100, number + 1)
        weight = list(weights)
        if number == 3:
            other[3], weight[3] = 100, 0.0
        shown = {"item_id": str(900 + number), "title": title, "picture": poster(rng) if number % 2 else "", "codes": other.tolist(), "weights": weight}
        neighbours.append(shown | {"positions": np.flatnonzero(other == codes).tolist()})
    stratum = "tail" if index == 3 else "head"
    return {
        "item_id": str(50 + index), "title": TITLES[index], "picture": poster(rng), "stratum": stratum, "codes": codes.tolist(), "weights": weights,
        "neighbours": neighbours,
    }  # fmt: skip


def ranker_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    spread = {"all": 0.006, "head": 0.008, "tail": 0.02, "0 events": 0.07}
    for arm, values in data["arms"].items():
        for stratum, auc in values.items():
            gain = auc - data["arms"]["id"][stratum]
            delta = {} if arm == "id" else {"delta": gain, "delta_low": gain - spread[stratum], "delta_high": gain + spread[stratum]}
            rows.append({"arm": arm, "stratum": stratum, "rows": data["rows"][stratum], "auc": auc, "gauc": auc - 0.03, "logloss": 0.61, **delta})
    return rows


def sample() -> ReportContent:
    """A page as a night of MovieLens would fill it."""
    rng = np.random.default_rng(20261120)
    data = figure_data(rng)
    stages = [
        "plan_night",
        "ingest",
        "item_popularity",
        "content_embedding",
        "user_sequence",
        "train_behavior_encoder",
        "item_feature",
        "assign_sid",
        "publish_release",
    ]
    return ReportContent(
        release={
            "tag": "d19980402", "logical_date": "1998-04-02", "dataset": "movielens", "policy": "frozen", "status": "current", "generation": 1, "items": 1682,
            "new_items": 2, "moved_items": 31, "retired_items": 0, "parent_tag": "d19980401", "codebook_digest": "9f" * 32, "git_sha": "ab" * 20,
            "run_id": "manual__1998-04-02", "tokenizer": "ada_sid", "config_hash": "0123456789ab", "reason": "nightly",
        },
        gates=[
            {"name": "collision rate", "value": 0.041, "max": 0.2, "severity": "fail", "meaning": "share of items that share their codes with another"},
            {"name": "churn", "value": 0.092, "max": 0.1, "severity": "fail", "meaning": "share of the parent's items whose codes changed"},
            {"name": "dead codes, worst position", "value": 0.34, "max": 0.3, "severity": "warn", "meaning": "share of codes that no item uses"},
            {"name": "null codes", "value": 0, "max": 0, "severity": "fail", "meaning": "rows without codes"},
            {"name": "perplexity share, worst position", "value": 0.61, "min": 0.3, "severity": "fail"},
            {"name": "agreement with co-occurrence", "value": None, "min": 0.3, "severity": "warn", "meaning": "needs seven days of events"},
        ],
        figures=[{"kind": kind, "data": values} for kind, values in data.items() if kind not in ("differences", "by_stratum")],
        slots=SLOTS,
        codebook_sizes=[100] * 6,
        examples=[example(rng, index) for index in range(4)],
        ranker=ranker_rows(data["ranker_auc"]),
        stages=[{"stage": name, "seconds": float(rng.uniform(2, 40)), "status": "done", "run": "0f3c" * 8} for name in stages],
        lineage=[
            {"stage": "assign_sid", "direction": "input", "table": "feature.item_feature", "snapshot_id": 6512345678901234567, "run": "0f3c" * 8},
            {"stage": "assign_sid", "direction": "output", "table": "sid.item_sid", "snapshot_id": 8123456789012345678, "run": "0f3c" * 8},
        ],
        commands=[{"what": "Open MLflow", "command": "mlflow ui --backend-store-uri sqlite:///.sid/mlflow.db"}],
        notes=["MovieLens-100K is the demo set: about 190 events and 2 new films a night."],
    )  # fmt: skip


class Page(HTMLParser):
    """Collects what a browser would load, run or read aloud, and checks that tags close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.pictures_without_text = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for name in ("src", "href", "xlink:href", "action") if (value := found.get(name))]
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.pictures_without_text += tag == "img" and not found.get("alt")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    return text, page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "reports" / "d19980402.html", sample())


NUMBER = re.compile(r"[-\u2212]?[0-9.,]+%?|\$.*\$")


def says_what_it_is(axis: Axis) -> bool:
    """Whether an axis has a label or shows names alone, which need none; numbers without a label say nothing."""
    return bool(axis.get_label_text()) or not any(NUMBER.fullmatch(text.get_text()) for text in axis.get_ticklabels())


@pytest.mark.parametrize("kind", sorted(FIGURES))
def test_every_kind_draws_labelled_axes_and_a_footer(kind: str) -> None:
    figure = draw(kind, figure_data(np.random.default_rng(1))[kind], footer="d19980402  run-1")
    figure.canvas.draw()
    assert all(says_what_it_is(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis))
    assert [text.get_text() for text in figure.texts] == ["d19980402  run-1"]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="code_usage"):
        draw("pie", {})


def test_keys_that_a_figure_does_not_know_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    draw("collisions_by_decile", {"collision_rate": [0.1], "colour": "red"})
    assert "colour" in caplog.text


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("code_usage", {}),
        ("code_usage", {"slots": ["a", "b"], "counts": [[0, 0], [1, 2, 3]]}),
        ("collisions_by_decile", {"collision_rate": [0.1, 0.2]}),
        ("churn", {}),
        ("churn", {"overall": 0.0, "by_stratum": {"head": 0.0}, "by_position": {"level_0": 0.0}}),
        ("strength_by_stratum", {"edges": [0, 0.5, 1], "counts": {"tail": [0, 0]}}),
        ("loss_curves", {"curves": {"nan": [float("nan"), 1.0], "empty": []}}),
        ("ranker_auc", {"arms": {"id": {"all": 0.6, "tail": float("nan")}, "sid": {"head": 0.7}}}),
        ("ranker_auc", {"arms": {}}),
        ("collisions_by_decile", {"collision_rate": []}),
        ("weight_by_popularity", {"popularity": [0, 2, 2000], "series": {"weight": [0, 0.2, 0.5]}}),
    ],
)
def test_figures_bear_empty_and_odd_data(kind: str, data: dict[str, Any]) -> None:
    assert "<svg" in to_svg(draw(kind, data))


def test_popularity_axis_is_logarithmic() -> None:
    figure = draw("weight_by_popularity", figure_data(np.random.default_rng(1))["weight_by_popularity"])
    assert figure.axes[0].get_xscale() == "symlog"


def test_perplexity_is_that_of_a_slow_loop() -> None:
    counts = [4, 0, 1, 3]
    entropy = 0.0
    for count in counts:
        if count:
            entropy -= count / 8 * np.log(count / 8)
    assert perplexity(counts) == pytest.approx(np.exp(entropy))
    assert perplexity([2, 2, 2]) == pytest.approx(3.0)
    assert perplexity([0, 0]) == 1.0, "as for a tokenizer without items"


def test_svg_takes_the_readers_ink_and_is_the_same_twice() -> None:
    data = figure_data(np.random.default_rng(1))["churn"]
    first, second = to_svg(draw("churn", data)), to_svg(draw("churn", data))
    assert first == second
    assert "currentColor" in first
    assert report.INK not in first
    ET.fromstring(first)


@pytest.mark.parametrize(
    ("gate", "light"),
    [
        ({"value": 0.1, "max": 0.2}, "pass"),
        ({"value": 0.19, "max": 0.2}, "near"),
        ({"value": 0.21, "max": 0.2}, "fail"),
        ({"value": 0.21, "max": 0.2, "severity": "warn"}, "warn"),
        ({"value": 0.31, "min": 0.3}, "near"),
        ({"value": 0.29, "min": 0.3}, "fail"),
        ({"value": 0, "max": 0}, "pass"),
        ({"value": None, "max": 0}, "unknown"),
        ({"value": float("nan"), "max": 0}, "unknown"),
    ],
)
def test_gate_lights(gate: dict[str, Any], light: str) -> None:
    assert gate_light(gate) == light


MEASURED, UNMEASURED = {"name": "one", "value": 1.0, "max": 2.0}, {"name": "two", "value": None, "max": 2.0}


@pytest.mark.parametrize(
    ("gates", "text", "light"),
    [
        ([], "no gates recorded", "unknown"),
        ([UNMEASURED], "no gate was measured", "unknown"),
        ([MEASURED, MEASURED], "all 2 gates passed", "pass"),
        ([MEASURED, UNMEASURED, {**MEASURED, "value": 1.9}], "2 of 3 gates passed, the rest not measured", "pass"),
        ([MEASURED, UNMEASURED, {**MEASURED, "value": 3.0, "severity": "warn"}], "3 gates, 1 with a warning", "warn"),
        ([UNMEASURED, {**MEASURED, "value": 3.0}, {**MEASURED, "value": 3.0, "severity": "warn"}], "1 of 3 gates failed", "fail"),
        ([{**MEASURED, "value": float("nan")}, MEASURED], "1 of 2 gates passed, the rest not measured", "pass"),
    ],
)
def test_the_verdict_counts_what_was_measured(gates: list[dict[str, Any]], text: str, light: str, tmp_path: Path) -> None:
    content = ReportContent(release={"tag": "d20110104", "logical_date": "2011-01-04", "items": 0}, gates=gates)
    page, _ = parsed(write_report(tmp_path / "page.html", content))
    assert f'<span class="pill {light}"><span class="dot"></span>{text}</span>' in page


def test_the_page_is_self_contained_and_well_formed(written: Path) -> None:
    text, page = parsed(written)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert page.pictures_without_text == 0
    assert text.count("<h1") == 1


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as WCAG 2 defines it."""

    def light(colour: str) -> float:
        parts = [int(part * (2 if len(colour) == 4 else 1), 16) / 255 for part in re.findall("." if len(colour) == 4 else "..", colour[1:])]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_every_text_colour_can_be_read_in_both_themes(written: Path) -> None:
    themes = [dict(re.findall(r"--([a-z]+):(#[0-9a-f]+)", rule)) for rule in re.findall(r":root\{(.*?)\}", written.read_text(encoding="utf-8"))]
    assert len(themes) == 4, "light and dark, of all pages and of this one"
    for colours in (themes[0] | themes[2], themes[1] | themes[3]):
        for name in ("ink", "soft", "accent", "pass", "fail", "unknown", "near", "warn"):
            assert min(contrast(colours[name], colours[ground]) for ground in ("card", "ground")) >= 4.5, (name, colours[name])


def test_figures_of_one_kind_are_told_apart_by_their_stage(tmp_path: Path) -> None:
    losses = {"kind": "loss_curves", "data": {"curves": {"loss": [2.0, 1.0]}}}
    figures = report_page.figures({"train_tokenizer": {"figures": {"loss_curves": losses}}, "train_retriever": {"figures": {"loss_curves": losses}}})
    page, _ = parsed(write_report(tmp_path / "page.html", ReportContent(release={"tag": "t", "logical_date": "d"}, figures=figures)))
    assert re.findall("<h3>(Loss.*?)</h3>", page) == ["Loss curves, train_tokenizer", "Loss curves, train_retriever"]


def test_the_page_says_what_the_release_is(written: Path) -> None:
    text, _ = parsed(written)
    for fact in ("d19980402", "1,682", "generation 1", "d19980401", "9f" * 32, "Star Wars (1977)", "Wallace &amp; Gromit", "8123456789012345678", "mlflow ui"):
        assert fact in text
    assert "6 gates, 1 with a warning" in text
    assert text.count("<svg") == len(sample().figures)


def test_thin_strata_get_no_verdict(written: Path) -> None:
    text, _ = parsed(written)
    thin = re.findall(r'<tr class="thin">.*?</tr>', text)
    assert len(thin) == 3
    assert not any("better" in row or "worse" in row or "cannot tell" in row for row in thin)
    assert ">better<" in text


def test_a_chip_is_filled_where_the_code_counts_as_shared(tmp_path: Path) -> None:
    """Equal codes of a masked or a switched off slot count nowhere else (`releases.neighbours`), so they do not count here."""
    content = ReportContent(release={"tag": "t", "logical_date": "d"}, slots=["text_0", "behavior_0", "behavior_1"], codebook_sizes=[10, 10, 10])
    item = {"item_id": "1", "title": "one", "codes": [3, 10, 4], "weights": [1.0, 0.0, 0.0]}
    made = report._example(item | {"neighbours": [item | {"item_id": "2", "positions": [0]}]}, content)
    assert [chip["same"] for chip in made["neighbours"][0]["chips"]] == [True, False, False]
    assert made["neighbours"][0]["shared"] == 1
    assert [chip["masked"] for chip in made["chips"]] == [False, True, False]
    page = write_report(tmp_path / "page.html", replace(content, examples=[item | {"neighbours": [item | {"item_id": "2", "positions": [0]}]}]))
    assert "1 / 3</span>" in page.read_text(encoding="utf-8")


def test_text_from_the_catalogue_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"onload=\"x"
    item = {"item_id": evil, "title": evil, "picture": "https://evil.example/x.png", "stratum": evil, "codes": [1], "weights": [1.0]}
    content = ReportContent(
        release={"tag": evil, "logical_date": evil, "dataset": evil, "run_id": evil, "reason": evil},
        gates=[{"name": evil, "value": 1.0, "max": 2.0, "meaning": evil}],
        figures=[{"kind": "churn", "data": {"by_position": {evil: 0.1}}, "title": evil, "caption": evil}],
        slots=[evil],
        examples=[item | {"neighbours": [item | {"positions": [0]}]}],
        ranker=[{"arm": evil, "stratum": evil}],
        stages=[{"stage": evil, "seconds": 0.0, "status": evil, "run": evil}],
        lineage=[{"stage": evil, "direction": "input", "table": evil, "snapshot_id": None}],
        commands=[{"what": evil, "command": evil}],
        notes=[evil],
    )
    _, page = parsed(write_report(tmp_path / "page.html", content))
    assert "script" not in page.tags
    assert "img" not in page.tags


def test_a_release_without_extras_still_makes_a_page(tmp_path: Path) -> None:
    text, page = parsed(write_report(tmp_path / "page.html", ReportContent(release={"tag": "d20110104", "logical_date": "2011-01-04", "items": 0})))
    assert "no gates recorded" in text
    assert "svg" not in page.tags


def test_numbers_that_cannot_be_drawn_cost_their_picture_and_not_the_page(tmp_path: Path) -> None:
    broken = {"kind": "churn", "data": {"by_position": {"a": "x"}}}
    text, page = parsed(write_report(tmp_path / "page.html", ReportContent(release={"tag": "t", "logical_date": "d"}, figures=[broken])))
    assert "could not be drawn" in text
    assert "svg" not in page.tags


def test_small_numbers_do_not_become_zero() -> None:
    assert [report._number(value) for value in (0.25, 0.0004, 0.0, 12345, None, float("nan"))] == ["0.250", "0.0004", "0", "12,345", "-", "-"]
