"""Data sets of a study without Spark: events in order, what may be trained on, questions by part, strata, and the known truth of generated shops.

Everything that is trained on (`World.train`, counts, strata, `known_N`) comes from events of the training period alone; a test perturbs all later ones.
Ids decide nowhere: events of one basket or second are dealt out by a hash (decision 49), catalogues are ordered by id but no model reads that order.
Not here: vectors (jobs/study_cells.py). Legend: T events sorted by user and time, U users, N items, Q questions.
"""

# ruff: noqa: N815 - array fields carry shape suffixes

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from pipeline.config import Source
from pipeline.context import Home, derive_seed
from pipeline.errors import ConfigError, ContractError
from pipeline.popularity import strata
from pipeline.study import NEEDS_PATH, DataSet, Part

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TRAIN, VALID, TEST, CONFIRM, UNUSED = 0, 1, 2, 3, -1
DAY = 86_400
RETAIL_DAYS = {CONFIRM: 42, TEST: 42, VALID: 28}  # the last days of Online Retail, latest first
BLOCK_SHARES = (0.1, 0.2)  # movielens: shares of each user's ratings for valid and test
SPLITS = {"movielens": "ratings of one second are a basket"}  # what a data set's digest says beside its files, where its split has changed
HASH_STEPS = 10_000


@dataclass(frozen=True)
class Log:
    """Events sorted by (user, time), before items are numbered.

    Args:
        part_T: TRAIN, VALID, TEST, CONFIRM or UNUSED; a user's training events come first.
        stop_T: where the history of a question ends: the first event of its basket or held-out block.
        tied_T: the event cannot be ordered against the one before it (same day).
        value_T: rating, NaN where there is none; basket_T: equal = no order, None = every event stands alone.
    """

    user_T: NDArray[np.str_]
    item_T: NDArray[np.str_]
    part_T: Ints
    stop_T: Ints
    tied_T: Bools
    value_T: Floats
    basket_T: Ints | None = None


@dataclass(frozen=True)
class Catalogue:
    """What is known of items: ids, texts, category words, pictures (paths), whether the training period knows them, and the true cluster (-1 = unknown)."""

    item_ids: NDArray[np.str_]
    texts: list[str]
    categories: list[str]
    pictures: list[str]
    known_N: Bools
    cluster_N: Ints


@dataclass(frozen=True)
class Asked:
    """Questions: positions of the events asked for, where their histories begin and end, and whether the answer is tied to the event before it."""

    at_Q: Ints
    start_Q: Ints
    stop_Q: Ints
    tied_Q: Bools


@dataclass(frozen=True)
class World:
    """A data set ready for a study; items that the training period knows come first.

    Args:
        user_T / item_T / offset_U: events by number; rows of `catalogue` and of the sorted users.
        count_N: training events per item; stratum_N: head | torso | tail by them.
    """

    catalogue: Catalogue
    user_T: Ints
    item_T: Ints
    part_T: Ints
    stop_T: Ints
    tied_T: Bools
    value_T: Floats
    basket_T: Ints | None
    offset_U: Ints
    shut_U: Bools
    count_N: Ints
    stratum_N: NDArray[np.str_]

    @property
    def num_items(self) -> int:
        """Items of the catalogue, N."""
        return len(self.catalogue.item_ids)

    @property
    def num_known(self) -> int:
        """Items that the training period knows: the first rows."""
        return int(self.catalogue.known_N.sum())

    def train(self) -> tuple[Ints, Ints, Ints | None]:
        """(offsets, items, baskets) of the training events of every user."""
        inside = self.part_T == TRAIN
        lengths_U = np.bincount(self.user_T[inside], minlength=len(self.offset_U) - 1)
        baskets = None if self.basket_T is None else self.basket_T[inside]
        return np.append(0, np.cumsum(lengths_U)), self.item_T[inside], baskets

    def asked(self, part: Part, most: int = 0, seed: int = 0) -> Asked:
        """The questions of a part; users shut away are asked in `confirm` alone.

        Args:
            most: questions at most, drawn by the seed; 0 = all.
        """
        shut_T = self.shut_U[self.user_T]
        inside = {
            "valid": (self.part_T == VALID) & ~shut_T,
            "test": (self.part_T == TEST) & ~shut_T,
            "confirm": (self.part_T == CONFIRM) | ((self.part_T == TEST) & shut_T),
        }[part]
        return self._questions(np.flatnonzero(inside & (self.stop_T > self.offset_U[self.user_T])), most, seed)

    def had(self, asked: Asked) -> Bools:
        """Whether the history of each question holds its answer, (Q,): the user takes the item again."""
        _, first, pair_T = np.unique(self.user_T * self.num_items + self.item_T, return_index=True, return_inverse=True)
        return np.asarray(first[pair_T[asked.at_Q]] < asked.stop_Q)

    def learned(self, latest: int) -> Asked:
        """Training events as questions for rankers: each user's latest ones that have a history."""
        able = np.flatnonzero((self.part_T == TRAIN) & (self.stop_T > self.offset_U[self.user_T]))
        left = np.bincount(self.user_T[able], minlength=len(self.offset_U) - 1)
        after = (np.cumsum(left))[self.user_T[able]] - np.arange(len(able))  # events of the user from this one on
        return self._questions(able[after <= latest], 0, 0)

    def _questions(self, at: Ints, most: int, seed: int) -> Asked:
        if most and len(at) > most:
            at = np.sort(np.random.default_rng(seed).choice(at, most, replace=False))
        return Asked(at, self.offset_U[self.user_T[at]], self.stop_T[at], self.tied_T[at])


def packed(items_T: Ints, start_Q: Ints, stop_Q: Ints) -> tuple[Ints, Ints]:
    """(offsets, items) of events start .. stop - 1 of every question, end to end."""
    length_Q = stop_Q - start_Q
    offset_Q = np.append(0, np.cumsum(length_Q))
    return offset_Q, items_T[np.arange(offset_Q[-1]) + np.repeat(start_Q - offset_Q[:-1], length_Q)]


# ---------------------------------------------------------------- reading


def files_of(data: DataSet, name: str) -> list[Path]:
    """The files of a data set that is the user's own, in order.

    Raises: ConfigError without a path or without the files.
    """
    root = Path(data.path)
    root = root / data.kind if (root / data.kind).is_dir() else root
    pattern = {"amazon_beauty": "*.csv", "online_retail": "????-??-??.csv"}[data.kind]
    found = sorted(root.glob(pattern)) if data.path else []
    if not found:
        raise ConfigError(
            f"data set {name!r} is your own copy and is not there",
            expected=f"a folder with {pattern}",
            found=data.path or "no path",
            where=f"data.{name}.path",
            next_command="sid study PAGE --set source.path=FOLDER, or --only for other data sets",
        )
    return found


def data_digest(data: DataSet, name: str, world: int) -> str:
    """12 hex digits of what the data set is made of: its files, or its options where it is generated or fetched with a known digest."""
    from pipeline.datasets.movielens import WHEEL_SHA256, read_origin

    digest = hashlib.sha256(repr((data.kind, sorted(data.options.items()), world)).encode() + SPLITS.get(data.kind, "").encode())
    if data.kind in NEEDS_PATH:
        for path in files_of(data, name):
            digest.update(path.name.encode() + path.read_bytes())
    elif data.kind == "movielens":
        digest.update((read_origin(Path(data.path)).digest if data.path else WHEEL_SHA256).encode())
    return digest.hexdigest()[:12]


def read_world(data: DataSet, name: str, world: int, home: Home) -> World:
    """The data set, split.

    Raises: ConfigError without its files, ContractError when nobody has a training event.
    """
    log, catalogue = READERS[data.kind](data, name, world, home)
    return prepared(log, catalogue, data)


def prepared(log: Log, catalogue: Catalogue, data: DataSet) -> World:
    """The world of a log: known items first, users by number, a hash says whose questions stay shut.

    Raises: ContractError when nobody has a training event.
    """
    log = _some_users(log, data.max_users)
    if not (log.part_T == TRAIN).any():
        raise ContractError("no event lies in the training period", expected="events", found=f"{len(log.part_T)} events, none to train on", where=data.kind)
    order = np.lexsort((catalogue.item_ids, ~catalogue.known_N))
    catalogue = _taken(catalogue, order)
    users, user_T = np.unique(log.user_T, return_inverse=True)
    sorter = np.argsort(catalogue.item_ids)
    item_T = sorter[np.searchsorted(catalogue.item_ids, log.item_T, sorter=sorter)]
    count_N = np.bincount(item_T[log.part_T == TRAIN], minlength=len(order))
    return World(
        catalogue=catalogue,
        user_T=user_T,
        item_T=item_T,
        part_T=log.part_T,
        stop_T=log.stop_T,
        tied_T=log.tied_T,
        value_T=log.value_T,
        basket_T=log.basket_T,
        offset_U=np.append(0, np.cumsum(np.bincount(user_T))),
        shut_U=_hashed(users, "confirm") < data.confirm_share if data.kind == "amazon_beauty" else np.zeros(len(users), dtype=bool),
        count_N=count_N,
        stratum_N=strata(count_N, catalogue.item_ids, head_share=data.head_share, tail_share=data.tail_share),
    )


def _taken(catalogue: Catalogue, order: Ints) -> Catalogue:
    texts, categories, pictures = (np.asarray(each, dtype=object)[order].tolist() for each in (catalogue.texts, catalogue.categories, catalogue.pictures))
    return Catalogue(catalogue.item_ids[order], texts, categories, pictures, catalogue.known_N[order], catalogue.cluster_N[order])


def _some_users(log: Log, most: int) -> Log:
    """The log of the users with the smallest hashes; 0 keeps all."""
    users, user_T = np.unique(log.user_T, return_inverse=True)
    if not most or len(users) <= most:
        return log
    chosen_U = np.zeros(len(users), dtype=bool)
    chosen_U[np.argsort(_hashed(users, "users"), kind="stable")[:most]] = True
    kept = np.flatnonzero(chosen_U[user_T])
    begin_T = np.searchsorted(user_T, user_T)  # users stand together: the first event of each event's user
    place_T = np.cumsum(chosen_U[user_T]) - 1
    stop_T = place_T[begin_T[kept]] + (log.stop_T[kept] - begin_T[kept])
    parts = {name: value[kept] for name, value in vars(log).items() if isinstance(value, np.ndarray)}
    return replace(log, **{**parts, "stop_T": stop_T})


def _hashed(names: NDArray[np.str_], salt: str) -> Floats:
    """A number in [0, 1) per name that depends on the name alone."""
    return np.array([derive_seed(salt, name) % HASH_STEPS for name in names.tolist()]) / HASH_STEPS


def _starts(*columns_T: NDArray[Any]) -> Ints:
    """First event of the run of equal ones (in all columns) that each event stands in."""
    new = np.append(True, np.any([column_T[1:] != column_T[:-1] for column_T in columns_T], axis=0))
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def _last_two(user_T: NDArray[Any]) -> tuple[Ints, Ints]:
    """(part, stop) of leave-last-two: a user's last event is the test, the one before it the validation; both need two events before them."""
    begin_T = _starts(user_T)
    length_T = np.bincount(begin_T, minlength=len(user_T))[begin_T]
    left_T = begin_T + length_T - 1 - np.arange(len(user_T))
    long_T = length_T >= 4
    return np.select([long_T & (left_T == 0), long_T & (left_T == 1)], [TEST, VALID], TRAIN), np.arange(len(user_T))


def _beauty(data: DataSet, name: str, world: int, home: Home) -> tuple[Log, Catalogue]:
    """Leave-last-two in the canonical order; an answer bought on the day of the event before it is tied."""
    found = {path.stem: path for path in files_of(data, name)}
    if missing := {"interactions", "items"} - found.keys():
        raise ConfigError("amazon_beauty lacks files", expected="interactions.csv, items.csv", found=f"without {sorted(missing)}", where=f"data.{name}.path")
    events, items = _csv(found["interactions"]), _csv(found["items"])
    user_T, item_T = _text(events["user_id"]), _text(events["item_id"])
    order = np.lexsort((events["position"].to_numpy().astype(np.int64), user_T))
    gap_T = pc.fill_null(pc.cast(events["days_since_previous"], pa.float64()), 0.0).to_numpy()[order]
    part_T, stop_T = _last_two(user_T[order])
    words = [text.replace("|", " ") for text in items["categories"].fill_null("").to_pylist()]
    keywords = items["keywords"].fill_null("").to_pylist()
    catalogue = Catalogue(
        item_ids=_text(items["item_id"]),
        texts=[f"{left} {right}".strip() for left, right in zip(keywords, words, strict=True)],
        categories=items["categories"].fill_null("").to_pylist(),
        pictures=[""] * len(words),
        known_N=np.ones(len(words), dtype=bool),
        cluster_N=np.full(len(words), -1),
    )
    return Log(user_T[order], item_T[order], part_T, stop_T, gap_T <= 0, np.full(len(order), np.nan)), catalogue


def _movielens(data: DataSet, name: str, world: int, home: Home) -> tuple[Log, Catalogue]:
    """Per-user time split: the last fifth is the test, the tenth before it the validation, each asked from before its block; a second is a basket.

    A basket across a border belongs to the earlier part, so no answer has been taken together with a rating of its history.
    """
    from pipeline.datasets import movielens

    root = home.folder("data") / "movielens"
    origin = movielens.read_origin(Path(data.path) if data.path else movielens.fetch_wheel(root))
    ratings, films = movielens.read_ratings(origin), movielens.film_rows(movielens.read_films(origin))
    user_T, item_T, seconds_T = _text(ratings["user_id"]), _text(ratings["item_id"]), ratings["seconds"].to_numpy()
    order = np.lexsort((_hashed_rows(item_T, user_T), seconds_T, user_T))
    user_T, item_T, value_T, seconds_T = user_T[order], item_T[order], ratings["rating"].to_numpy()[order], seconds_T[order]
    begin_T, basket_T = _starts(user_T), _starts(user_T, seconds_T)
    length_T = np.bincount(begin_T, minlength=len(user_T))[begin_T]
    test_T = length_T - np.floor(length_T * BLOCK_SHARES[1]).astype(np.int64)
    valid_T = test_T - np.floor(length_T * BLOCK_SHARES[0]).astype(np.int64)
    place_T = basket_T - begin_T  # a rating stands where its basket begins
    part_T = np.select([place_T >= test_T, place_T >= valid_T], [TEST, VALID], TRAIN)
    stop_T = np.where(part_T == TRAIN, basket_T, _starts(user_T, part_T))
    texts, count = films["text"].fill_null("").to_pylist(), len(films)
    kinds = films["category"].fill_null("").to_pylist()
    catalogue = Catalogue(_text(films["item_id"]), texts, kinds, [""] * count, np.ones(count, dtype=bool), np.full(count, -1))
    return Log(user_T, item_T, part_T, stop_T, np.zeros(len(user_T), dtype=bool), value_T, basket_T), catalogue


def _retail(data: DataSet, name: str, world: int, home: Home) -> tuple[Log, Catalogue]:
    """Next basket: a user's first basket in each period is asked from everything before it; the order inside a basket is a hash's."""
    rows = _retail_rows(files_of(data, name))
    user_T, item_T, basket_T = (_text(rows[column]) for column in ("user", "item", "basket"))
    seconds_T = rows["seconds"].to_numpy()
    first_item, text_at = np.unique(item_T[np.argsort(seconds_T, kind="stable")], return_index=True)
    texts = _text(rows["text"])[np.argsort(seconds_T, kind="stable")][text_at]
    period_T = _period(seconds_T)
    known = np.isin(first_item, item_T[period_T == TRAIN])
    deal_T = _hashed_rows(item_T, basket_T)
    order = np.lexsort((deal_T, basket_T, seconds_T, user_T))
    user_T, item_T, period_T = user_T[order], item_T[order], period_T[order]
    number_T = np.unique(basket_T, return_inverse=True)[1][order]
    stop_T, first_T = _starts(user_T, number_T), _starts(user_T, period_T)
    part_T = np.where((period_T == TRAIN) | (stop_T == first_T), period_T, UNUSED)
    count = len(first_item)
    catalogue = Catalogue(first_item, texts.tolist(), [""] * count, [""] * count, known, np.full(count, -1))
    return Log(user_T, item_T, part_T, stop_T, np.zeros(len(order), dtype=bool), np.full(len(order), np.nan), number_T), catalogue


def _retail_rows(paths: list[Path]) -> pa.Table:
    """user, item, basket, text STRING and seconds of the accepted lines; one per user, item and basket."""
    wanted = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
    table = pa.concat_tables([_csv(path, wanted) for path in paths])
    user = pc.replace_substring_regex(pc.utf8_trim_whitespace(table["CustomerID"]), "[.]0+$", "")
    item, basket = pc.utf8_upper(pc.utf8_trim_whitespace(table["StockCode"])), pc.utf8_trim_whitespace(table["InvoiceNo"])
    amounts = [pc.greater(pc.cast(table[name], pa.float64()), 0) for name in ("Quantity", "UnitPrice")]
    good = pc.and_(pc.invert(pc.starts_with(basket, "C")), pc.match_substring_regex(item, "^[0-9]{5}[A-Z]*$"))
    for rule in (*amounts, pc.not_equal(user, "")):
        good = pc.and_(good, rule)
    seconds = pc.cast(pc.cast(pc.strptime(table["InvoiceDate"], "%Y-%m-%d %H:%M:%S", "s"), pa.timestamp("s")), pa.int64())
    rows = pa.table({"user": user, "item": item, "basket": basket, "text": table["Description"].fill_null(""), "seconds": seconds})
    rows = rows.filter(pc.fill_null(good, False))
    merged = rows.group_by(["user", "item", "basket"], use_threads=False).aggregate([("text", "first"), ("seconds", "min")])
    return merged.rename_columns(["user", "item", "basket", "text", "seconds"])


def _period(seconds_T: Ints) -> Ints:
    """Part by day, counted back from the last day."""
    left_T = int(seconds_T.max()) // DAY - seconds_T // DAY
    period_T, reach = np.full(len(seconds_T), TRAIN), 0
    for part, days in RETAIL_DAYS.items():
        period_T[(left_T >= reach) & (left_T < reach + days)] = part
        reach += days
    return period_T


def _hashed_rows(*columns: NDArray[np.str_]) -> Floats:
    """An arbitrary number per row that depends on the row's texts alone, never on their order."""
    from zlib import crc32

    joined = pc.binary_join_element_wise(*[pa.array(column) for column in columns], "|").to_pylist()
    return np.array([crc32(text.encode()) for text in joined], dtype=np.float64)


def _shop(data: DataSet, name: str, world: int, home: Home) -> tuple[Log, Catalogue]:
    """Leave-last-two of a generated shop whose seed is the world's; the truth knows every item's cluster."""
    import pyarrow.parquet as pq

    from pipeline.datasets.shop import Shop

    options = {"file_format": "parquet", "dirty_share": 0.0, **data.options}
    options["seed"] = int(options.get("seed", 0)) + world
    root = Path(Shop().prepare(Source(dataset="shop", options=options), home.folder("data"), 0).image_root)
    truth = pq.read_table(root / "truth.parquet")
    listed = pa.concat_tables([_csv(path, ("item_id", "text", "image_uri")) for path in sorted((root / "items").glob("*.csv"))])
    events = pa.concat_tables([pq.read_table(path, columns=["user_id", "item_id", "event_ts"]) for path in sorted((root / "events").glob("*.parquet"))])
    user_T, item_T = _text(events["user_id"]), _text(events["item_id"])
    order = np.lexsort((_hashed_rows(item_T, user_T), events["event_ts"].to_numpy(), user_T))
    part_T, stop_T = _last_two(user_T[order])
    rows = listed.take(pc.index_in(truth["item_id"], value_set=listed["item_id"].combine_chunks()))
    pictures = [str(root / path) if path else "" for path in rows["image_uri"].fill_null("").to_pylist()]
    catalogue = Catalogue(
        item_ids=_text(truth["item_id"]),
        texts=rows["text"].fill_null("").to_pylist(),
        categories=[""] * len(rows),
        pictures=pictures,
        known_N=np.ones(len(rows), dtype=bool),
        cluster_N=truth["cluster"].to_numpy().astype(np.int64),
    )
    return Log(user_T[order], item_T[order], part_T, stop_T, np.zeros(len(order), dtype=bool), np.full(len(order), np.nan)), catalogue


READERS: Mapping[str, Callable[[DataSet, str, int, Home], tuple[Log, Catalogue]]] = {
    "amazon_beauty": _beauty,
    "movielens": _movielens,
    "online_retail": _retail,
    "shop": _shop,
}


def _csv(path: Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    """The file with every column as text; an empty cell is null.

    Raises: ContractError for a file that cannot be read or lacks a column.
    """
    try:
        with pacsv.open_csv(path) as opened:
            names = opened.schema.names
        types = dict.fromkeys(names, pa.string())
        choice = pacsv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""], include_columns=list(columns or names))
        return pacsv.read_csv(path, convert_options=choice)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ContractError("a file cannot be read", expected=", ".join(columns or ()) or "CSV", found=str(error).splitlines()[0], where=str(path)) from error


def _text(column: pa.ChunkedArray | pa.Array) -> NDArray[np.str_]:
    return np.asarray(pc.fill_null(pc.cast(column, pa.string()), "").to_pylist(), dtype=np.str_)
