"""What each refresh policy keeps and costs over consecutive nights: `make stability WORK=<folder>`, or with SOURCE=<folder of day files> Online Retail.

The default policy runs through the real pipeline, one Spark session for all nights; what no policy touches is computed there, once. Every other (tokenizer,
policy) is replayed on those manifests from the same first night (stability_replay.py); the replay of the default policy must give the published releases row by
row, or the bench stops. All of it is resumable by night. Beside the policies stand `never update`, the first release read on every later night, in which new
items have no codes, and `content only`, frozen and with behaviour masked. What is measured: stability_measures.py; a fresh reader and old ones: here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file, save_file
from stability_measures import aged, baskets, collision_rate, compared, kept, mean_recall, over_nights, recalls, upper_bound
from stability_replay import CONTENT_ONLY, POLICIES, Base, Branch, Released, differs, replay, with_threads

from pipeline import config, evaluation, lakehouse, ranker
from pipeline.context import Home, derive_seed, read_json, write_json

FUTURE_DAYS = 7
OLD_READERS = 3
FRESH_READERS = 2
EXAMPLES = "stability_examples"
NEVER = "never update"
RELAXED = ("publish_release.max_churn=1.0", "publish_release.max_head_churn=1.0", "publish_release.max_refit_churn=1.0")  # the bench measures, it does not gate


# ---------------------------------------------------------------- the real pipeline


def run_pipeline(home: Home, given: argparse.Namespace) -> None:
    """The default policy up to the last night, with the days to come loaded and ranking examples around the first release; nothing that is there runs again."""
    for name in [name for name in os.environ if name.startswith(("SID_", "MLFLOW_TRACKING_", "AIRFLOW"))]:
        del os.environ[name]  # not the caller's lake
    os.environ.update(SID_HOME=str(home.root), SID_PROFILE=given.profile)
    lake, future = config.load(given.profile).lake, str(given.last + timedelta(days=FUTURE_DAYS))
    there = set(lakehouse.read_releases(home, lake)["logical_date"].to_pylist())
    missing = [night for night in days(given.first, given.last) if night not in there]
    if given.first in missing:
        sid(given.sets, "run", "ingest", "--date", future)  # for measuring; no stage of a night reads past it
    if missing:
        sid(given.sets, "backfill", "--start", str(missing[0]), "--end", str(given.last), "--reason", "stability")
    if not (home.run_folder(EXAMPLES) / "rank_example.json").is_file():
        drawn = ("run", "rank_example", "--run-id", EXAMPLES, "--param", f"release=d{given.first:%Y%m%d}", "--date", future)
        sid([*given.sets, "rank_example.train_on=before_cutoff"], *drawn)


def sid(sets: Sequence[str], *words: str) -> None:
    """Run a `sid` command.

    Raises: CalledProcessError when it fails.
    """
    changes = [word for change in (*sets, *RELAXED) for word in ("--set", change)]
    subprocess.run([sys.executable, "-m", "jobs.cli", *words, *changes], check=True)


def days(first: date, last: date) -> list[date]:
    """Every day from the first to the last."""
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]


# ---------------------------------------------------------------- readers


@dataclass(frozen=True)
class World:
    """What branches are measured against: manifests, ranking examples around the first release, what is bought in the days after each night."""

    base: Base
    examples: pa.Table
    pairs: Mapping[date, pa.Table]
    with_file: frozenset[date]

    @classmethod
    def read(cls, base: Base, nights: Sequence[date]) -> World:
        """The world of those nights."""
        events = lakehouse.read_arrow(
            base.home, base.config.lake, "raw.interaction", where=f"file_date >= '{nights[0]}'", columns=("file_date", "session_id", "item_id")
        )
        examples = lakehouse.read_arrow(base.home, base.config.lake, "rank.rank_example")

        def bought(night: date) -> pa.Table:
            """The events of the day files that follow."""
            until = pa.scalar(night + timedelta(days=FUTURE_DAYS))
            return events.filter(pc.and_(pc.greater(events["file_date"], pa.scalar(night)), pc.less_equal(events["file_date"], until)))

        return cls(base, examples, {night: baskets(bought(night)) for night in nights}, frozenset(pc.unique(events["file_date"]).to_pylist()))

    def shelf(self, night: date) -> pa.ChunkedArray:
        """The live items of a night."""
        rows = self.base.manifests[night]
        return rows.filter(pc.equal(rows["status"], "live"))["item_id"]

    def later(self, night: date) -> pa.Table:
        """The ranking rows of the days after a night."""
        when = self.examples["event_ts"]
        return self.examples.filter(pc.and_(pc.greater_equal(when, after(night)), pc.less(when, after(night + timedelta(days=FUTURE_DAYS)))))


def after(night: date) -> datetime:
    """The first instant after a night, UTC."""
    return datetime.combine(night + timedelta(days=1), time(), tzinfo=UTC)


@dataclass(frozen=True)
class OldReader:
    """A ranker trained on a first release: what rebuilds the network."""

    config: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]


def old_readers(world: World, first: Released, folder: Path) -> list[OldReader]:
    """Rankers trained on the first release's codes, kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}.safetensors" for seed in range(OLD_READERS)]
    for seed, path in enumerate(paths):
        if not path.is_file():
            data = ranker.rank_data(world.examples, first.table, first.sizes)
            made = with_threads(world.base.config, ranker.fit, data, "id_sid", world.base.config.train_ranker, derive_seed("stability", seed))
            write_json(path.with_suffix(".json"), {**made.config, "codebook_digest": "", "sid_version": ""})
            save_file(dict(made.state), path)
    return [OldReader(read_json(path.with_suffix(".json")), load_file(path)) for path in paths]


def read_by(readers: Sequence[OldReader], release: pa.Table, rows: pa.Table) -> list[float]:
    """AUC of each ranker on the rows with the codes of a release."""
    loaded = [ranker.load_ranker(one.config, one.state, release, codebook_digest="", allow_foreign_codebook=True) for one in readers]
    return [evaluation.auc(rows["label"].to_numpy(), one.score(rows)) for one in loaded]


def fresh_reader(world: World, one: Released, night: date) -> float:
    """AUC on the days to come of rankers that read codes alone, trained with a release's codes on all rows up to the night; an item without codes is masked."""
    later = world.later(night)
    known = world.examples.filter(pc.less(world.examples["event_ts"], after(night)))
    splits = [rows.set_column(rows.column_names.index("split"), "split", pa.array([name] * len(rows))) for name, rows in (("train", known), ("test", later))]
    data = ranker.rank_data(pa.concat_tables(splits), one.table, one.sizes)
    settings, seeds = world.base.config.train_ranker, [derive_seed("stability", "fresh", number) for number in range(FRESH_READERS)]
    fits = [with_threads(world.base.config, ranker.fit, data, "sid", settings, seed) for seed in seeds]
    return float(np.mean([evaluation.auc(data.test.label, fit.scores_test) for fit in fits]))


# ---------------------------------------------------------------- one branch


def measure(world: World, folder: Path, name: str, released: Sequence[Released], readers: Sequence[OldReader]) -> list[dict[str, Any]]:
    """One row per night after the first, each measured once and kept in the folder; the last one with a fresh reader."""
    first, last, rows = released[0], released[-1], []
    for before, one in itertools.pairwise(released):
        row = remembered(folder / f"{one.night}.json", lambda before=before, one=one: measured(world, first, before, one, readers))
        rows.append({"branch": name, **row})
    rows[-1] |= remembered(folder / f"fresh-{last.night}.json", lambda: {"fresh_reader": fresh_reader(world, last, last.night)})
    return rows


def remembered(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON document of that path, made where it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return read_json(path)


def measured(world: World, first: Released, before: Released, one: Released, readers: Sequence[OldReader]) -> dict[str, Any]:
    """The numbers of a night."""
    step, since = (compared(old.table, one.table) for old in (before, first))
    row: dict[str, Any] = {"night": str(one.night), "start": one.start, "file": one.night in world.with_file}
    row |= {f"{view}_{key}": value for view, items in (("night", step), ("since_first", since)) for key, value in kept(items).items()}
    row |= {"collision_rate": collision_rate(one.table, one.sizes), **neighbours(world, before, one, step)}
    later = world.later(one.night)
    now = read_by(readers, one.table, later)
    known = now if one.table is first.table else read_by(readers, first.table, later)
    losses = [a - b for a, b in zip(known, now, strict=True)]
    return row | {"reader_auc": float(np.mean(now)), "reader_losses": losses, "reader_rows": len(later)}


def neighbours(world: World, before: Released, one: Released, step: pa.Table) -> dict[str, float]:
    """R@20 of the night; of the items with their first behaviour row, and of those that moved, with last night's codes and with tonight's."""
    pairs, shelf = world.pairs[one.night], world.shelf(one.night)
    now = recalls(one.table, one.sizes, pairs, shelf)
    moved = pc.and_(pc.invert(step["same"]), pc.invert(step["first_row"]))
    changed = step["item_id"].filter(pc.or_(moved, step["first_row"])).combine_chunks()
    then = recalls(aged(before.table, one.table), one.sizes, pairs.filter(pc.is_in(pairs["item_id"], value_set=changed)), shelf)
    found: dict[str, float] = {"recall": mean_recall(now)[0]}
    for name, chosen in (("first", step["first_row"]), ("moved", moved)):
        items = step["item_id"].filter(chosen)
        (found[f"{name}_before"], found[f"{name}_asked"]), (found[f"{name}_after"], _) = mean_recall(then, items), mean_recall(now, items)
    return found


# ---------------------------------------------------------------- the tables


def three(row: Mapping[str, float], prefix: str) -> str:
    """Items / mass / head."""
    return " / ".join(f"{row[f'{prefix}{part}']:.3f}" for part in ("items", "mass", "head"))


def sid_line(mine: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of what a branch keeps."""
    average = {key: over_nights(mine, key) for key in mine[0] if isinstance(mine[0][key], float)}
    with_file = over_nights([row for row in mine if row["file"]], "night_head")
    since = [
        cell for row in (mine[min(FUTURE_DAYS, len(mine)) - 1], mine[-1]) for cell in (three(row, "since_first_"), f"{row['since_first_apart_items']:.3f}")
    ]
    numbers = [f"{average['night_moved']:.0f} + {average['night_unmasked']:.0f}", f"{average['collision_rate']:.3f}"]
    counts = f"{average['night_retrained']:.3f}"
    return [three(average, "night_"), f"{with_file:.3f}", three(average, "night_apart_"), counts, *since, *numbers]


def before_after(mine: Sequence[Mapping[str, Any]], name: str) -> str:
    """R@20 with last night's codes and with tonight's, over the items of all nights, and how many were asked for."""
    asked = sum(row[f"{name}_asked"] for row in mine)
    then, now = (over_nights(mine, f"{name}_{when}", f"{name}_asked") for when in ("before", "after"))
    return f"{then:.3f} -> {now:.3f} ({asked})" if asked else "-"


def quality_line(mine: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of what a branch's codes are worth."""
    pairs = [before_after(mine, name) for name in ("first", "moved")]
    losses = [row["reader_losses"] for row in mine]
    old = f"{over_nights(mine, 'reader_auc'):.4f}, {np.mean(losses):.4f} ({upper_bound(losses):.4f})"
    return [f"{over_nights(mine, 'recall'):.4f}", *pairs, f"{over_nights(mine, 'fresh_reader'):.4f}", old]


SID_TITLES = (
    "kept a night, items / mass / head",
    "head, nights with a file",
    "kept a night, first behaviour rows apart",
    "rows trained again",
    "kept after 7 nights",
    "first rows apart",
    "kept at the end",
    "first rows apart",
    "moved + unmasked a night",
    "collisions",
)
QUALITY_TITLES = (
    "R@20",
    "items with their first behaviour row, before -> after (n)",
    "moved items, before -> after (n)",
    "fresh rankers on codes alone: AUC, last night",
    "old rankers: AUC, loss (upper 95 %)",
)


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables, one line per branch: what is kept, and what the codes are worth."""
    parts = []
    for titles, cells in ((SID_TITLES, sid_line), (QUALITY_TITLES, quality_line)):
        lines = ["| " + " | ".join(("branch", *titles)) + " |", "|" + "---|" * (len(titles) + 1)]
        for branch in dict.fromkeys(row["branch"] for row in rows):
            lines.append("| " + " | ".join([branch, *cells([row for row in rows if row["branch"] == branch])]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- main


def branches(given: argparse.Namespace, settings: config.Config, due: frozenset[date]) -> list[Branch]:
    """The branches to replay, the default one first; further margins are further frozen branches."""
    margin = settings.assign_sid.hold_margin
    chosen = [Branch(tokenizer=tokenizer, policy=policy, margin=margin, due=due) for tokenizer in given.tokenizers for policy in given.policies]
    more = [Branch(tokenizer=tokenizer, policy="frozen", margin=float(text), due=due) for tokenizer in given.tokenizers for text in given.margins]
    return list(dict.fromkeys([*chosen, *more]))


def check_replay(base: Base, released: Sequence[Released]) -> None:
    """Nothing, when the replayed nights hold the published rows.

    Raises: SystemExit naming the first night that differs.
    """
    tags = {row["logical_date"]: row["tag"] for row in lakehouse.read_releases(base.home, base.config.lake).to_pylist() if row["status"] == "current"}
    for one in released:
        if unequal := differs(one.table, lakehouse.read_release(base.home, base.config.lake, tags[one.night])):
            sys.exit(f"the replay of {one.night} differs from release {tags[one.night]} in: {unequal}")
    sys.stderr.write(f"replayed {len(released)} nights of the default policy: the published rows\n")


def label(branch: Branch, settings: config.Config) -> str:
    """Its name in the table."""
    margin = "" if branch.margin == settings.assign_sid.hold_margin else f", margin {branch.margin:g}"
    return f"{branch.tokenizer} {branch.policy}{margin}"


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all branches."""
    home = Home((given.work / "home").resolve())
    run_pipeline(home, given)
    settings, nights = config.load(given.profile, tuple(given.sets)), days(given.first, given.last)
    releases = lakehouse.read_releases(home, settings.lake).to_pylist()
    due = frozenset(row["logical_date"] + timedelta(days=1) for row in releases if row["refit_due"])
    base = Base.read(home, settings, nights)
    world = World.read(base, nights)
    rows: list[dict[str, Any]] = []
    root, seen = given.work.resolve() / "replay", set()
    for branch in branches(given, settings, due):
        released = replay(base, root, branch, nights)
        if (branch.tokenizer, branch.policy, branch.margin) == (settings.train_tokenizer.tokenizer, "frozen", settings.assign_sid.hold_margin):
            check_replay(base, released)
        words = f"{branch.tokenizer} {CONTENT_ONLY if branch.policy == CONTENT_ONLY else NEVER}"
        readers = old_readers(world, released[0], root / "readers" / words.replace(" ", "_"))
        if words not in seen and branch.policy != CONTENT_ONLY:
            first_always = [replace(released[0], night=night, table=aged(released[0].table, base.manifests[night])) for night in nights]
            rows += measure(world, root / "measured" / words.replace(" ", "_"), words, first_always, readers)
        seen.add(words)
        rows += measure(world, root / "measured" / branch.name, label(branch, settings), released, readers)
        given.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        sys.stderr.write(f"measured {label(branch, settings)}\n")
    return rows


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--profile", default="online_retail")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--first", type=date.fromisoformat, default=date(2010, 12, 31))
    parser.add_argument("--last", type=date.fromisoformat, default=date(2011, 1, 14))
    parser.add_argument("--tokenizers", type=names, default=["ada_sid", "rq_kmeans"])
    parser.add_argument("--policies", type=names, default=[*POLICIES, CONTENT_ONLY])
    parser.add_argument("--margins", type=names, default=[], help="further values of assign_sid.hold_margin, as further frozen branches")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".sid/stability.json"))
    return parser.parse_args()


def main() -> None:
    """Run what is missing, measure everything, write JSON and print the tables."""
    given = arguments()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = run(given)
    sys.stdout.write(tables(rows) + "\n")


if __name__ == "__main__":
    main()
