"""The command `sid study`: a page's cells run resumable over processes, MLflow hears of each, and tables, verdicts and one HTML page come out.

A finished cell is one JSON in SID_HOME/study/cells with its config hash, data digest, commit, command and seconds; a rerun skips it. No Spark.
Not here: the work of a cell (jobs/study_cells.py), verdicts (pipeline/study.py), intervals (pipeline/intervals.py), rendering (pipeline/study_page.py).
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import intervals, log, study
from pipeline.context import Home, read_json, write_json
from pipeline.errors import ConfigError
from pipeline.study import FLOORS, Cell, Claim, Page, Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.study_cells import Store
    from jobs.study_data import World

    Floats = NDArray[np.float64]

logger = logging.getLogger(__name__)
WAVES = (("floors", "features"), ("codes",), ("read",))
FLOOR_SEED = -1
HAVE_CONFIRM = ("amazon_beauty", "online_retail")  # generated shops are confirmed on unseen worlds: data.NAME.options.seed


@dataclass(frozen=True)
class Plan:
    """What one call of the command runs."""

    page: Page
    cells: list[Cell]
    digests: dict[str, str]
    part: Part
    home: Home
    command: str

    @property
    def store(self) -> Store:
        """Where results are kept."""
        from jobs.study_cells import Store

        return Store(self.home.folder("study"))

    def document(self, cell: Cell) -> Path:
        """The file of a finished cell."""
        folder = self.home.folder("study") / "cells"
        folder.mkdir(exist_ok=True)
        return folder / f"{cell.key}.json"

    def finished(self, cell: Cell) -> bool:
        """Whether the cell needs no work."""
        return self.document(cell).is_file()


def plan(name: str, *, sets: Sequence[str] = (), only: str = "", part: Part = "valid", home: Home, command: str = "") -> Plan:
    """The cells of a page that the selection wants, in order.

    Raises: ConfigError for a page or selection that cannot be used, or a data set that is not there.
    """
    from jobs.study_data import data_digest

    page = study.load(name, sets)
    only = only or page.only
    labels = {label: (data, world) for label, data, world in study.worlds(page) if part != "confirm" or page.data[data].kind in HAVE_CONFIRM}
    wanted = study.selected(study.grid(page, dict.fromkeys(labels, "")), only)
    used = {(cell.data, cell.world) for cell in wanted}
    digests = {label: data_digest(page.data[data], data, world) for label, (data, world) in labels.items() if (data, world) in used}
    cells = study.selected(study.grid(page, digests, part), only)
    return Plan(page, cells, digests, part, home, command or f"sid study {name}")


def run(todo: Plan, *, jobs: int, out: Path, results: Path | None = None) -> dict[str, Any]:
    """The study's document after every cell has run: out/study.json, out/index.html, out/study.md and, between its markers, a given results file.

    Raises: ConfigError when the part was opened too often or the code is not committed, or the results file is not there or has no markers.
    """
    from pipeline import study_page

    if results is not None:
        with_table(results, todo.page.name, "")  # before hours of work, and before a part is opened
    if todo.part != "valid":
        open_part(todo)
    for wave in WAVES:
        execute(todo, [cell for cell in todo.cells if cell.kind in wave and not todo.finished(cell)], jobs)
        track(todo)
    document = summary(todo)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", document)
    table = study_page.markdown(document)
    (out / "study.md").write_text(table, encoding="utf-8")
    study_page.write_page(out / "index.html", document)
    if results is not None:
        results.write_text(with_table(results, todo.page.name, table), encoding="utf-8")
    return document


def with_table(results: Path, name: str, table: str) -> str:
    """The text of a results file with the table in its place.

    Raises: ConfigError when the file cannot be read or has no place for the study.
    """
    from pipeline import study_page

    try:
        text = results.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the results file cannot be read", expected="a Markdown file", found=str(error), where=str(results)) from error
    return study_page.inserted(text, name, table, where=str(results))


def open_part(todo: Plan) -> int:
    """How often the part has been opened for this study, this time counted; each commit counts once with each configuration.

    Raises: ConfigError when it was opened too often, or nobody could say later what it was opened with.
    """
    from pipeline.tracking import committed_sha

    path = todo.home.folder("study") / "openings.json"
    known = read_json(path) if path.is_file() else {}
    before, this = known.get(f"{todo.page.name}/{todo.part}", []), f"{committed_sha()} {todo.page.digest()}"
    opened = before if this in before else [*before, this]
    most = 1 if todo.part == "confirm" else todo.page.statistics.max_openings
    if len(opened) > most:
        raise ConfigError(f"the {todo.part} part was opened before", expected=f"at most {most} times", found=", ".join(opened), where=str(path))
    write_json(path, {**known, f"{todo.page.name}/{todo.part}": opened})
    logger.warning("opened part=%s study=%s commit and configuration=%s count=%d of %d", todo.part, todo.page.name, this, len(opened), most)
    return len(opened)


# ---------------------------------------------------------------- running cells


def execute(todo: Plan, cells: Sequence[Cell], jobs: int) -> None:
    """Run the cells; with one job in this process, else in processes of one thread each."""
    started = time.monotonic()
    for done, (cell, seconds) in enumerate(_ended(todo, cells, jobs), start=1):
        passed = time.monotonic() - started
        left = passed / done * (len(cells) - done)
        logger.info("cell %d of %d done name=%s seconds=%.0f left=%.0f", done, len(cells), cell.name, seconds, left)


def _ended(todo: Plan, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, float]]:
    if jobs == 1 or len(cells) < 2:
        for cell in log.progress(cells, "study", len(cells)):
            yield cell, run_cell(todo, cell)
        return
    with ProcessPoolExecutor(min(jobs, len(cells)), mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        waiting: dict[Future[float], Cell] = {pool.submit(run_cell, todo, cell): cell for cell in cells}
        try:
            for ended in log.progress(as_completed(waiting), "study", len(cells)):
                yield waiting[ended], ended.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Speak and sleep as the parent does, and end with it: who is killed cannot call its workers back, and one of them may have an hour of work left."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log.configure()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def run_cell(todo: Plan, cell: Cell) -> float:
    """Wall seconds of the cell's work, whose document is written last; 0 when another process finished it meanwhile."""
    import torch

    from jobs.study_cells import Job, work
    from pipeline.device import device_name
    from pipeline.tracking import git_sha

    if todo.finished(cell):
        return 0.0
    torch.set_num_threads(1)
    started, used = time.monotonic(), time.process_time()
    data = todo.page.data[cell.data]
    world = _world(data.model_dump_json(), cell.data, cell.world, todo.home)
    found = work(Job(todo.page, cell, world, todo.store, todo.part))
    seconds = time.monotonic() - started
    about = {"key": cell.key, "kind": cell.kind, "name": cell.name, "commit": git_sha(), "command": todo.command, "config": study.short_digest(cell.spec)}
    label = cell.name.partition("/")[0]
    spent = {"seconds": round(seconds, 1), "cpu_seconds": round(time.process_time() - used, 1), "device": device_name()}
    write_json(todo.document(cell), {**about, "data_digest": todo.digests[label], **spent, **_finite(found)})
    return seconds


@functools.lru_cache(maxsize=1)
def _world(data: str, name: str, world: int, home: Home) -> World:
    """The data set of a cell, read once per process while the cells stay with it."""
    from jobs.study_data import read_world

    return read_world(study.DataSet.model_validate_json(data), name, world, home)


def _finite(value: Any) -> Any:
    """The value as JSON that every reader understands: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value


def track(todo: Plan) -> None:
    """One parent run in MLflow, one child per finished cell; a cell that is there already is not logged again."""
    from pipeline.tracking import log_study

    cells = [read_json(todo.document(cell)) for cell in todo.cells if todo.finished(cell)]
    log_study(todo.home, todo.page.name, todo.page.digest(), todo.page.model_dump(mode="json"), cells)


# ---------------------------------------------------------------- the study's document


def summary(todo: Plan) -> dict[str, Any]:
    """Everything the page shows, as JSON: provenance, facts of the data sets, tables by data set, reader and arm, numbers of codes and inputs, verdicts."""
    from pipeline.tracking import git_sha

    cells = {cell.key: (cell, read_json(todo.document(cell))) for cell in todo.cells}
    documents = [document for _, document in cells.values()]
    claims, not_run = judged(todo, list(cells.values()))
    words = [row["verdict"] for row in claims]
    return {
        "name": todo.page.name,
        "title": todo.page.title,
        "about": todo.page.about,
        "part": todo.part,
        "commit": git_sha(),
        "commits": sorted({document["commit"] for document in documents}),
        "devices": sorted({document.get("device", "cpu") for document in documents}),
        "config": todo.page.digest(),
        "command": todo.command,
        "seeds": todo.page.statistics.seeds,
        "statistics": todo.page.statistics.model_dump(mode="json"),
        "cpu_seconds": sum(document["cpu_seconds"] for document in documents),
        "seconds": sum(document["seconds"] for document in documents),
        "counts": {word: words.count(word) for word in (study.KEPT, study.NOT_KEPT, study.CANNOT_TELL)},
        "data": {
            cell.name.partition("/")[0]: {**document["facts"], "digest": document["data_digest"]} for cell, document in cells.values() if cell.kind == "floors"
        },
        "readings": readings(todo.page, list(cells.values())),
        "codes": numbers(list(cells.values()), "codes"),
        "inputs": numbers(list(cells.values()), "features"),
        "strength": {cell.name: document["strength"] for cell, document in cells.values() if document.get("strength")},
        "claims": claims,
        "not_run": not_run,
        "curves": {cell.name: document["curves"] for cell, document in cells.values() if document.get("curves")},
        "cells": [{name: document[name] for name in ("name", "key", "config", "data_digest", "commit", "command", "seconds")} for document in documents],
    }


Pair = tuple[Cell, dict[str, Any]]


def readings(page: Page, cells: Sequence[Pair]) -> list[dict[str, Any]]:
    """One row per data set, reader, arm and slice: every metric's mean over seeds (and worlds) and its deviation, rows, and whether a reader was capped."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell, document in cells:
        if cell.kind == "read":
            groups.setdefault((cell.data, cell.reader, cell.arm), []).append(document)
        elif cell.kind == "floors":
            for name, table in document["table"].items():
                groups.setdefault((cell.data, "floor", name), []).append({"table": table, "capped": False})
    rows = []
    for (data, reader, arm), documents in groups.items():
        for name in dict.fromkeys(name for document in documents for name in document["table"]):
            tables = [document["table"][name] for document in documents if name in document["table"]]
            metrics = {metric: _mean([table[metric] for table in tables]) for metric in tables[0] if metric != "rows"}
            spread = {metric: _spread([table[metric] for table in tables]) for metric in metrics}
            count = int(tables[0]["rows"])
            about = {"data": data, "reader": reader, "arm": arm, "stratum": name, "rows": count, "fits": len(tables), "thin": count < page.statistics.thin_rows}
            rows.append({**about, "capped": any(document["capped"] for document in documents), "metrics": metrics, "spread": spread})
    return rows


def numbers(cells: Sequence[Pair], kind: str) -> list[dict[str, Any]]:
    """One row per data set and arm (or recipe of inputs): mean and deviation of every number over seeds and worlds."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for cell, document in cells:
        if cell.kind == kind:
            groups.setdefault((cell.data, cell.arm or cell.inputs), []).append(document["metrics"])
    rows = []
    for (data, name), found in groups.items():
        names = sorted(set.intersection(*[set(each) for each in found]))
        means = {metric: _mean([each[metric] for each in found]) for metric in names}
        rows.append(
            {"data": data, "name": name, "fits": len(found), "metrics": means, "spread": {each: _spread([one[each] for one in found]) for each in names}}
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    import numpy as np

    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


# ---------------------------------------------------------------- claims


def judged(todo: Plan, cells: Sequence[Pair]) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row per claim and data set: difference, interval, p (Holm's for primary ones), verdict and its reason; claims whose arms were not run)."""
    asked = [(claim, data) for claim in todo.page.claims for data in claim.data or [*todo.page.data]]
    found = [(claim, data, compared(todo, cells, claim, data)) for claim, data in asked]
    rows = [(claim, data, *sides) for claim, data, sides in found if sides is not None]
    primary = [at for at, row in enumerate(rows) if row[0].primary]
    absent = sum(claim.primary for claim, _, sides in found if sides is None)  # the family is the page's, whatever part of it was run
    adjusted = dict(zip(primary, intervals.holm([rows[at][2].p for at in primary] + [1.0] * absent), strict=False))
    not_run = [f"{claim.title} ({data})" for claim, data, sides in found if sides is None]
    return [_claim_row(todo.page, *row, adjusted.get(at)) for at, row in enumerate(rows)], not_run


def _claim_row(page: Page, claim: Claim, data: str, found: intervals.Estimate, capped: bool, adjusted: float | None) -> dict[str, Any]:
    several = page.data[data].worlds > 1
    word = study.verdict(claim, found, page.statistics, adjusted_p=adjusted, capped=capped, several_worlds=several)
    about = claim.model_dump(mode="json", exclude={"data"}) | {"data": data, "holm_p": adjusted, "unit": "worlds" if several else "seeds and users"}
    return _finite({**about, **vars(found), "verdict": word.word, "reason": word.reason})


def compared(todo: Plan, cells: Sequence[Pair], claim: Claim, data: str) -> tuple[intervals.Estimate, bool] | None:
    """(the claim's difference on a data set, whether a reader was capped); None where a side was not run."""
    import numpy as np

    left = _side(cells, data, claim.arm, claim.reader)
    right = _side(cells, data, claim.control or claim.arm, claim.control_reader or claim.reader)
    if not left or not right:
        return None
    capped = any(document.get("capped", False) for _, document in (*left, *right))
    options: dict[str, Any] = {"null": study.null_of(claim), "level": todo.page.statistics.level}
    if todo.page.data[data].worlds > 1 or claim.reader == "codes":
        sides = _grid(left, claim.metric, claim.stratum), _grid(right, claim.control_metric or claim.metric, claim.stratum)
        worlds = sorted(set(sides[0]) & set(sides[1]))
        seeds = sorted(set.intersection(*[set(side[world]) for side in sides for world in worlds])) if worlds else []
        if not seeds:
            return None
        a, b = (np.array([[side[world][seed] for seed in seeds] for world in worlds]) for side in sides)
        return intervals.scalar_estimate(a, claim.times * b, seed=todo.page.seed, **options), capped
    effect = _effect(todo, cells, claim, data, left, right)
    return None if effect is None else (intervals.estimate(effect, **options), capped)


def _side(cells: Sequence[Pair], data: str, arm: str, reader: str) -> list[Pair]:
    """The cells of one side of a claim."""
    if reader == "floor" or arm in FLOORS:
        return [pair for pair in cells if pair[0].kind == "floors" and pair[0].data == data and arm in pair[1]["table"]]
    kind = {"codes": "codes", "features": "features"}.get(reader, "read")
    name = "inputs" if kind == "features" else "arm"
    return [pair for pair in cells if pair[0].kind == kind and pair[0].data == data and getattr(pair[0], name) == arm and pair[0].reader in (reader, "")]


def _grid(side: Sequence[Pair], metric: str, stratum: str) -> dict[int, dict[int, float]]:
    """World -> seed -> number."""
    found: dict[int, dict[int, float]] = {}
    for cell, document in side:
        table = document.get("table", {}).get(stratum, {}) if cell.kind == "read" else document["metrics"]
        name = metric if cell.kind == "read" or stratum == "all" else f"{metric}/{stratum}"
        if table.get(name) is not None:
            found.setdefault(cell.world, {})[cell.seed] = table[name]
    return found


def _effect(todo: Plan, cells: Sequence[Pair], claim: Claim, data: str, left: Sequence[Pair], right: Sequence[Pair]) -> intervals.Effect | None:
    """The paired effect on rows, both sides in the order of their seeds; a floor stands for every seed."""
    import numpy as np

    from pipeline import evaluation

    if claim.reader == "features":
        return _richness_effect(todo, claim, left, right)
    floor = next(cell for cell, _ in cells if cell.kind == "floors" and cell.data == data)
    shared = todo.store.arrays(floor.key)
    kind = todo.page.readers[claim.reader].kind
    mask = shared.get(f"{'row_mask' if kind == 'ranker' else 'mask'}/{claim.stratum}")
    if mask is None or not mask.any():
        return None
    a, b = (_rows(todo, side, arm) for side, arm in ((left, claim.arm), (right, claim.control)))
    one_for_all = a.keys() | b.keys() if FLOOR_SEED in (*a, *b) else a.keys() & b.keys()
    if not (seeds := sorted(one_for_all - {FLOOR_SEED})):
        return None
    pairs = [(a.get(seed, next(iter(a.values())))[mask], b.get(seed, next(iter(b.values())))[mask]) for seed in seeds]
    a_SB, b_SB = np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])
    if kind == "ranker":
        effect = intervals.auc_effect if claim.metric == "auc" else evaluation.gauc_effect
        return effect(shared["label_B"][mask], a_SB, b_SB, shared["person_B"][mask])
    return intervals.mean_effect(_at(claim.metric, a_SB) - claim.times * _at(claim.metric, b_SB), shared["user_Q"][mask])


def _rows(todo: Plan, side: Sequence[Pair], arm: str) -> dict[int, Floats]:
    """Seed -> ranks or scores of all rows."""
    found = {}
    for cell, _ in side:
        arrays = todo.store.arrays(cell.key)
        seed = FLOOR_SEED if cell.kind == "floors" else cell.seed
        found[seed] = arrays[f"rank/{arm}"] if cell.kind == "floors" else arrays["rank_Q"] if "rank_Q" in arrays else arrays["score_B"]
    return found


def _at(metric: str, ranks_SB: Floats) -> Floats:
    """recall@k or ndcg@k of every row."""
    from pipeline import evaluation

    name, _, k = metric.partition("@")
    return (evaluation.recall_at if name == "recall" else evaluation.ndcg_at)(ranks_SB, int(k))


def _richness_effect(todo: Plan, claim: Claim, left: Sequence[Pair], right: Sequence[Pair]) -> intervals.Effect | None:
    """Spearman of one kind of richness with the split-half overlap of its own inputs minus that of another, over encoder seeds and items."""
    import numpy as np

    kinds = [metric.rpartition("/")[2] for metric in (claim.metric, claim.control_metric or claim.metric)]
    sides = [{cell.seed: todo.store.arrays(cell.key) for cell, _ in side} for side in (left, right)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    known = [seed for seed in seeds if all(f"richness/{kind}" in side[seed] for kind, side in zip(kinds, sides, strict=True))]
    if not known:
        return None
    measured = np.logical_and.reduce([np.isfinite(side[seed]["overlap_N"]) for side in sides for seed in known])
    richness = [np.stack([side[seed][f"richness/{kind}"][measured] for seed in known]) for kind, side in zip(kinds, sides, strict=True)]
    overlaps = [np.stack([side[seed]["overlap_N"][measured] for seed in known]) for side in sides]
    return intervals.spearman_effect(*richness, *overlaps) if measured.sum() > 2 else None


def overview(todo: Plan) -> list[dict[str, Any]]:
    """One row per cell for a dry run: name, kind, key, and whether it is finished."""
    return [{"cell": cell.name, "kind": cell.kind, "key": cell.key, "finished": todo.finished(cell)} for cell in todo.cells]


def claims_table(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdicts as rows for a terminal."""
    return [
        {
            "claim": row["title"],
            "data": row["data"],
            "difference": row["difference"],
            "interval": "-" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]",
            "verdict": row["verdict"],
            "why": row["reason"],
        }
        for row in document["claims"]
    ]
