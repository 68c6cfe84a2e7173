"""What each refresh policy keeps and costs over consecutive nights, through the real pipeline: `make stability SOURCE=<folder of day files>`.

The stages that no policy touches run once for all nights. Then every (tokenizer, policy) continues a copy of that lake from the same first release, night
by night, resumable: a night that is published is not run again. The lake is reached through one link, because Iceberg's metadata holds absolute paths.
Measured on the releases: SIDs kept from night to night and since the first (by items, by popularity mass, in the head; moved items apart from copied ones),
collisions, Recall@20 of neighbours by shared codes against what is bought together in the next 7 days, and the reference `never update`: the first release
read on every later night, in which new items have no codes. And what a change of codes costs a reader that is not trained again: rankers trained on the
first release score the next 7 days with the codes of each later night, less the AUC they have with the codes they were trained on.
Suffixes: N items, L positions, Q queries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from pipeline import config, evaluation, lakehouse, ranker
from pipeline.context import Home, derive_seed, read_json
from pipeline.ranker import RankerFit

WITHOUT_POLICY = "item_popularity,content_embedding,user_sequence"
WITH_POLICY = (
    "content_embedding,content_pair,train_behavior_encoder,behavior_embedding,train_content_encoder,content_cre,"
    "item_feature,train_tokenizer,assign_sid,publish_release,gate_drift"
)
POLICIES = ("frozen", "anchored", "warm", "cold")
FUTURE_DAYS = 7
NEIGHBOURS = 20
READERS = 3
LOOSE = ["publish_release.max_churn=1.0", "publish_release.max_head_churn=1.0", "publish_release.max_refit_churn=1.0", "plan_night.refit=anchored"]


class Work:
    """The folder of the experiment: one lake folder and one home per branch, and the link through which all lakes are reached."""

    def __init__(self, root: Path, profile: str, sets: list[str]) -> None:
        self.root, self.profile, self.sets = root.resolve(), profile, sets
        for name in ("lakes", "homes"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def use(self, name: str, origin: str = "") -> Home:
        """The home of a branch, its lake behind the link; on first use both are copies of those of `origin`."""
        for kind in ("lakes", "homes"):
            folder = self.root / kind / name
            if origin and not folder.exists():
                shutil.copytree(self.root / kind / origin, folder.with_suffix(".partial"), dirs_exist_ok=True)
                folder.with_suffix(".partial").rename(folder)
            folder.mkdir(exist_ok=True)
        link = self.root / "lake"
        link.unlink(missing_ok=True)
        link.symlink_to(self.root / "lakes" / name)
        os.environ.update(SID_HOME=str(self.root / "homes" / name), SID_WAREHOUSE=str(link), SID_PROFILE=self.profile)
        return Home(self.root / "homes" / name)

    def sid(self, *words: str, sets: tuple[str, ...] = ()) -> None:
        """Run a `sid` command on the branch in use.

        Raises: CalledProcessError when it fails.
        """
        changes = [word for change in (*self.sets, *LOOSE, *sets) for word in ("--set", change)]
        subprocess.run([sys.executable, "-m", "jobs.cli", *words, *changes], check=True)


def run_nights(work: Work, first: date, last: date, tokenizers: list[str], policies: list[str]) -> None:
    """Every branch up to the last night; what is there already is not run again."""
    span = ("backfill", "--start", str(first), "--reason", "stability")
    if not (work.root / "lakes" / "base").exists():
        work.use("base.new")
        work.sid("run", "ingest", "--date", str(last + timedelta(days=FUTURE_DAYS)))  # the future is for measuring; no stage of a night reads past it
        work.sid(*span, "--end", str(last), "--stages", WITHOUT_POLICY)
        for kind in ("lakes", "homes"):
            (work.root / kind / "base.new").rename(work.root / kind / "base")
    for tokenizer in tokenizers:
        chosen = f"train_tokenizer.tokenizer={tokenizer}"
        work.use(tokenizer, "base")
        work.sid(*span, "--end", str(first), "--stages", WITH_POLICY, sets=(chosen,))
        examples = ("run", "rank_example", "--run-id", "stability_examples", "--param", f"release=d{first:%Y%m%d}")
        work.sid(*examples, "--date", str(last + timedelta(days=FUTURE_DAYS)), sets=(chosen, "rank_example.train_on=before_cutoff"))
        for policy in policies:
            work.use(f"{tokenizer}_{policy}", tokenizer)
            nights = ("backfill", "--start", str(first + timedelta(days=1)), "--reason", "stability", "--end", str(last), "--stages", WITH_POLICY)
            work.sid(*nights, sets=(chosen, f"plan_night.policy={policy}"))


# ---------------------------------------------------------------- measuring


def sids(release: pa.Table) -> pa.Table:
    """item_id, one text per full SID (codes and number), popularity, stratum of the live items."""
    live = release.filter(pc.equal(release["status"], "live")).sort_by("item_id")
    codes = pc.binary_join(pc.cast(live["codes"].combine_chunks(), pa.list_(pa.string())), "-")
    full = pc.binary_join_element_wise(codes, pc.cast(live["disambiguator"], pa.string()), "/")
    return pa.table({"item_id": live["item_id"], "sid": full, "popularity": live["popularity"], "stratum": live["popularity_stratum"]})


def kept(old: pa.Table, new: pa.Table) -> dict[str, float]:
    """Shares of the items of both releases that keep their full SID: of items, of popularity mass, of the head; `new_items` are those without a past."""
    before, after = sids(old), sids(new)
    place = pc.index_in(after["item_id"], value_set=before["item_id"].combine_chunks())
    known = place.is_valid().to_numpy()
    same = np.asarray(pc.equal(before["sid"].take(place.drop_null()), after["sid"].filter(place.is_valid())))
    mass, head = after["popularity"].to_numpy()[known], np.asarray(pc.equal(after["stratum"], "head"))[known]
    return {
        "items": float(same.mean()),
        "mass": float(same @ mass / mass.sum()),
        "head": float(same[head].mean()),
        "moved": float((~same).sum()),
        "new_items": float((~known).sum()),
    }


def future_pairs(home: Home, lake: config.Lake, night: date) -> pa.Table:
    """(item_a, item_b) of different items that one user bought in one basket within the next days, both directions, distinct."""
    rows = lakehouse.read_arrow(home, lake, "raw.interaction", where=f"file_date > '{night}' and file_date <= '{night + timedelta(days=FUTURE_DAYS)}'")
    bought = rows.select(["session_id", "item_id"]).group_by(["session_id", "item_id"]).aggregate([])
    small = bought.group_by("session_id").aggregate([("item_id", "count")]).filter(pc.field("item_id_count") <= 30)  # a wholesaler's list says little
    bought = bought.filter(pc.is_in(bought["session_id"], value_set=small["session_id"].combine_chunks()))
    pairs = bought.join(bought, "session_id", right_suffix="_b", join_type="inner")
    return pairs.filter(pc.not_equal(pairs["item_id"], pairs["item_id_b"])).group_by(["item_id", "item_id_b"]).aggregate([])


def recall(release: pa.Table, sizes: list[int], pairs: pa.Table) -> float:
    """Share of future partners among an item's 20 items with most shared codes, mean over items with partners; ties go to the more popular item."""
    live = release.filter(pc.equal(release["status"], "live")).sort_by([("popularity", "descending"), ("item_id", "ascending")])
    codes_NL = np.array(live["codes"].to_pylist())
    weights_NL = np.array(live["weights"].to_pylist())
    ids = live["item_id"].combine_chunks()
    query = pc.index_in(pairs["item_id"], value_set=ids).to_numpy(zero_copy_only=False)
    partner = pc.index_in(pairs["item_id_b"], value_set=ids).to_numpy(zero_copy_only=False)
    asked = np.unique(query[~np.isnan(query)]).astype(int)
    usable = ~np.isnan(query) & ~np.isnan(partner)
    wanted = np.zeros((len(ids), len(ids)), dtype=bool)
    wanted[query[usable].astype(int), partner[usable].astype(int)] = True
    found = []
    for row in asked:  # a bench: a few thousand queries of one matrix line each
        shared_NL = (codes_NL == codes_NL[row]) & (codes_NL < np.array(sizes))
        score_N = (shared_NL * np.minimum(weights_NL, weights_NL[row])).sum(1)
        score_N[row] = -1.0
        nearest = np.argsort(-score_N, kind="stable")[:NEIGHBOURS]
        if partners := int(wanted[row].sum()):
            found.append(wanted[row, nearest].sum() / min(partners, NEIGHBOURS))
    return float(np.mean(found)) if found else float("nan")


def old_readers(work: Work, tokenizer: str, first: date) -> tuple[list[RankerFit], pa.Table]:
    """Rankers trained on the first release's codes, and the rows of later days."""
    home, lake = work.use(tokenizer), config.load(work.profile).lake
    examples = lakehouse.read_arrow(home, lake, "rank.rank_example")
    sizes = lakehouse.read_arrow(home, lake, "sid.generation").to_pylist()[0]["codebook_sizes"]
    data = ranker.rank_data(examples, lakehouse.read_release(home, lake, f"d{first:%Y%m%d}"), sizes)
    fits = [ranker.fit(data, "id_sid", config.TrainRanker(), derive_seed("stability", seed)) for seed in range(READERS)]
    return fits, examples.filter(pc.equal(examples["split"], "test"))


def read_by(fits: list[RankerFit], release: pa.Table, rows: pa.Table) -> list[float]:
    """AUC of each ranker on the rows with the codes of a release."""
    labels = rows["label"].to_numpy()
    made = {"codebook_digest": "", "sid_version": ""}
    readers = [ranker.load_ranker({**one.config, **made}, one.state, release, codebook_digest="", allow_foreign_codebook=True) for one in fits]
    return [evaluation.auc(labels, reader.score(rows)) for reader in readers]


def measure(work: Work, name: str, first: date, fits: list[RankerFit], later: pa.Table) -> list[dict[str, Any]]:
    """One row per night of a branch."""
    home, lake = work.use(name), config.load(work.profile).lake
    releases = [row for row in lakehouse.read_releases(home, lake).to_pylist() if row["status"] == "current"]
    tables = {row["logical_date"]: lakehouse.read_release(home, lake, row["tag"]) for row in releases}
    sizes = {row["generation"]: row["codebook_sizes"] for row in lakehouse.read_arrow(home, lake, "sid.generation").to_pylist()}
    rows, before = [], None
    for row in releases:
        night, table = row["logical_date"], tables[row["logical_date"]]
        pairs = future_pairs(home, lake, night)
        seconds = {path.stem: read_json(path)["seconds"] for path in (home.root / "reports" / row["tag"]).glob("*.json")}
        found: dict[str, Any] = {"branch": name, "night": str(night), "generation": row["generation"], "refit_due": row["refit_due"]}
        found |= {f"since_first_{key}": value for key, value in kept(tables[first], table).items()}
        found |= {f"night_{key}": value for key, value in kept(before, table).items()} if before is not None else {}
        found |= {"collision_rate": read_json(home.root / "reports" / row["tag"] / "assign_sid.json")["metrics"]["collision_rate"]}
        found |= {
            "recall": recall(table, sizes[row["generation"]], pairs),
            "recall_never_update": recall(tables[first], sizes[releases[0]["generation"]], pairs),
        }
        after = later.filter(pc.and_(pc.greater(later["event_ts"], _instant(night, 1)), pc.less(later["event_ts"], _instant(night, 1 + FUTURE_DAYS))))
        losses = [one - other for one, other in zip(read_by(fits, tables[first], after), read_by(fits, table, after), strict=True)]
        found |= {"reader_loss": float(np.mean(losses)), "reader_losses": losses, "reader_rows": len(after)}
        rows.append(found | {"seconds": round(sum(seconds.values()), 1)})
        before = table
    return rows


def _instant(day: date, days: int) -> datetime:
    """The first instant some days later, UTC."""
    return datetime.combine(day + timedelta(days=days), time(), tzinfo=UTC)


def upper_loss(rows: list[dict[str, Any]]) -> float:
    """Upper end of the 95 % interval, over rankers, of the mean AUC loss over nights."""
    by_ranker = np.array([row["reader_losses"] for row in rows]).mean(axis=0)
    return float(by_ranker.mean() + stats.t.ppf(0.975, len(by_ranker) - 1) * stats.sem(by_ranker))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: one line per branch, means over the nights, kept shares at the last one."""
    parts = "(items / mass / head)"
    kept_titles = [f"kept a night {parts}", f"kept since the first {parts}"]
    titles = ["branch", "nights", *kept_titles, "moved a night", "collisions", "R@20", "R@20 never update", "AUC loss of old readers (upper 95 %)", "s a night"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for branch in dict.fromkeys(row["branch"] for row in rows):
        mine = [row for row in rows if row["branch"] == branch and "night_items" in row]
        mean = {key: float(np.nanmean([row[key] for row in mine])) for key in mine[0] if isinstance(mine[0][key], float)}
        views = {"night": mean, "since_first": mine[-1]}
        shares = [" / ".join(f"{values[f'{kind}_{part}']:.3f}" for part in ("items", "mass", "head")) for kind, values in views.items()]
        quality = f"{mean['night_moved']:.0f} | {mean['collision_rate']:.3f} | {mean['recall']:.4f} | {mean['recall_never_update']:.4f}"
        cost = f"{mean['reader_loss']:.4f} ({upper_loss(mine):.4f}) | {mean['seconds']:.0f}"
        lines.append(f"| {branch} | {len(mine)} | {shares[0]} | {shares[1]} | {quality} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, measure everything, write JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="online_retail")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--first", type=date.fromisoformat, default=date(2010, 12, 31))
    parser.add_argument("--last", type=date.fromisoformat, default=date(2011, 1, 18))
    parser.add_argument("--tokenizers", default="ada_sid,rq_kmeans")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".sid/stability.json"))
    given = parser.parse_args()
    work = Work(given.work, given.profile, given.sets)
    tokenizers, policies = ([name for name in text.split(",") if name] for text in (given.tokenizers, given.policies))
    run_nights(work, given.first, given.last, tokenizers, policies)
    rows: list[dict[str, Any]] = []
    for tokenizer in tokenizers:
        fits, later = old_readers(work, tokenizer, given.first)
        rows += [row for policy in policies for row in measure(work, f"{tokenizer}_{policy}", given.first, fits, later)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
