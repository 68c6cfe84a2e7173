"""A user's own day files: CSV, JSON Lines or Parquet below one folder, columns named in the profile.

Here: patterns, column mapping, and their checks. Not here: reading rows, and the rules all sets share (jobs/ingest.py).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path, PurePosixPath

from pipeline import config
from pipeline.datasets import base
from pipeline.datasets.base import EVENT_COLUMNS, ITEM_COLUMNS, FileFormat, SourceSpec, quoted, read_options
from pipeline.errors import ConfigError

SUFFIXES: Mapping[str, FileFormat] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
REQUIRED_EVENT_COLUMNS = ("user_id", "item_id", "event_ts")
VECTORS = ("text_vector", "image_vector")
EVENT_TYPES = ("click", "cart", "buy", "rating")
TIMES = {
    "iso": "try_to_timestamp(CAST({0} AS STRING))",
    "epoch_seconds": "timestamp_micros(CAST(round(try_cast({0} AS DECIMAL(20, 6)) * 1000000) AS BIGINT))",
    "epoch_milliseconds": "timestamp_micros(CAST(round(try_cast({0} AS DECIMAL(20, 3)) * 1000) AS BIGINT))",
}
OPTIONS: dict[str, int | float | str | bool] = {"time_format": "iso", "event_type": "click"}


class Folder:
    """A user's own events, catalogue and images."""

    name = "folder"

    def prepare(self, source: config.Source, data_folder: Path, seed: int) -> SourceSpec:
        """The user's folder as a source; nothing is written and `seed` has no effect.

        Options: time_format = iso | epoch_seconds | epoch_milliseconds; event_type = the type of every event where no column says it.
        Raises: ConfigError naming the key that cannot be used.
        """
        root = source_root(source)
        events, from_events = checked_pattern(root, source.events_pattern, "events_pattern"), source.catalogue == "from_events"
        items = None if from_events else checked_pattern(root, source.items_pattern, "items_pattern")
        item_format = file_format(items or events)
        found = dated_files(root, events)
        event_map = column_map(source.event_columns or named_alike(root, events, EVENT_COLUMNS), EVENT_COLUMNS, REQUIRED_EVENT_COLUMNS, "event_columns")
        item_map = column_map(source.item_columns or named_alike(root, items or events, ITEM_COLUMNS), ITEM_COLUMNS, ("item_id",), "item_columns")
        return SourceSpec(
            events_path=lambda day: root / events.replace("{date}", day.isoformat()),
            items_path=None if items is None else lambda day: root / items.replace("{date}", day.isoformat()),
            file_format=file_format(events),
            items_format=item_format,
            event_columns=tuple(dict.fromkeys([*event_map.values(), *(item_map.values() if from_events else ())])),
            item_columns=() if from_events else tuple(dict.fromkeys(item_map.values())),
            event_select=event_expressions(event_map, source),
            item_select=item_expressions(item_map, item_format),
            event_rules=vector_rules(item_map, item_format) if from_events else (),
            item_rules=() if from_events else vector_rules(item_map, item_format),
            event_key=("user_id", "item_id", "event_ts", *(name for name in ("event_type", "session_id") if name in event_map)),
            image_root=image_root(root, source.image_root),
            catalogue=source.catalogue,
            first_date=min(found, default=None),
            last_date=max(found, default=None),
        )


def source_root(source: config.Source) -> Path:
    """The resolved folder that `source.path` names.

    Raises: ConfigError if it is empty or no folder.
    """
    root = Path(source.path)
    if not source.path or not root.is_dir():
        raise ConfigError(
            f"data set {source.dataset} needs a folder",
            expected="an existing folder",
            found=str(root.resolve()) if source.path else "nothing",
            where="source.path",
            next_command="sid run refresh --date D --set source.path=FOLDER",
        )
    return root.resolve()


def checked_pattern(root: Path, pattern: str, key: str) -> str:
    """The pattern, when it holds {date} once and stays below `root`, links followed.

    Raises: ConfigError naming the key.
    """
    place, where = PurePosixPath(pattern), f"source.{key}"
    if pattern.count("{date}") != 1 or "{" in pattern.replace("{date}", ""):
        raise ConfigError("a file pattern must hold {date} once", expected="e.g. events/{date}.csv", found=repr(pattern), where=where)
    if place.is_absolute() or ".." in place.parts:
        raise ConfigError("a file pattern leaves the data folder", expected=f"a path below {root}", found=pattern, where=where)
    file_format(pattern, where=where)
    for path in root.glob(glob.escape(pattern).replace("{date}", "*")):
        if not path.resolve().is_relative_to(root):
            raise ConfigError("a file leaves the data folder through a link", expected=f"a path below {root}", found=str(path.resolve()), where=where)
    return pattern


def file_format(pattern: str, where: str = "source") -> FileFormat:
    """The format that the pattern's suffix names.

    Raises: ConfigError for another suffix.
    """
    suffix = PurePosixPath(pattern).suffix
    if suffix not in SUFFIXES:
        raise ConfigError("an unknown file format", expected=", ".join(SUFFIXES), found=suffix or repr(pattern), where=where)
    return SUFFIXES[suffix]


def dated_files(root: Path, pattern: str) -> list[date]:
    """The days that have a file now, in order; none once all files are archived."""
    head, tail = (re.escape(part) for part in pattern.split("{date}"))
    shape = re.compile(rf"{head}(\d{{4}}-\d{{2}}-\d{{2}}){tail}")
    names = (path.relative_to(root).as_posix() for path in root.glob(glob.escape(pattern).replace("{date}", "*")))
    return sorted(date.fromisoformat(match[1]) for match in map(shape.fullmatch, names) if match)


def named_alike(root: Path, pattern: str, known: tuple[str, ...]) -> dict[str, str]:
    """Columns of the first CSV or Parquet day file that bear our names, mapped to themselves: what a profile without a mapping means.

    JSON Lines may leave keys out, so one file says too little there: their optional columns are mapped in the profile.
    """
    fmt = file_format(pattern)
    files = sorted(root.glob(glob.escape(pattern).replace("{date}", "*")))
    columns = base.columns_of(files[0], fmt) if files and fmt != "jsonl" else None
    return {name: name for name in known if name in (columns or ())}


def column_map(given: Mapping[str, str], known: tuple[str, ...], required: tuple[str, ...], key: str) -> dict[str, str]:
    """Our column -> theirs; a required column that is not mapped keeps its name.

    Raises: ConfigError for a column of ours that does not exist or one of theirs that cannot be quoted.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError("an unknown column is mapped", expected=", ".join(known), found=", ".join(unknown), where=f"source.{key}")
    mapped = {**{name: name for name in required}, **given}
    for theirs in mapped.values():
        quoted(theirs)
    return mapped


def event_expressions(mapped: Mapping[str, str], source: config.Source) -> dict[str, str]:
    """Spark SQL expression of each column of raw.interaction.

    Raises: ConfigError for an unknown option value.
    """
    options = read_options(source, OPTIONS)
    time_format, event_type = str(options["time_format"]), str(options["event_type"])
    for name, value, known in (("time_format", time_format, tuple(TIMES)), ("event_type", event_type, EVENT_TYPES)):
        if value not in known:
            raise ConfigError("an option has an unknown value", expected=", ".join(known), found=value, where=f"source.options.{name}")
    given_type = _string(mapped.get("event_type"))
    return {
        "user_id": _string(mapped["user_id"]),
        "item_id": _string(mapped["item_id"]),
        "event_ts": TIMES[time_format].format(quoted(mapped["event_ts"])),
        "event_type": f"coalesce({given_type}, '{event_type}')" if "event_type" in mapped else f"'{event_type}'",
        "value": f"try_cast({quoted(mapped['value'])} AS DOUBLE)" if "value" in mapped else "CAST(1 AS DOUBLE)",
        "session_id": _string(mapped.get("session_id")),
    }


def item_expressions(mapped: Mapping[str, str], fmt: FileFormat) -> dict[str, str]:
    """Spark SQL expression of each column of raw.item that the source can fill; without a text column the title is the text."""
    texts = {name: _string(mapped.get(name)) for name in ("item_id", "title", "text", "category", "image_uri")}
    if "text" not in mapped:
        texts["text"] = texts["title"]
    return {**texts, **{name: _vector(mapped[name], fmt) for name in VECTORS if name in mapped}}


def vector_rules(mapped: Mapping[str, str], fmt: FileFormat) -> tuple[tuple[str, str], ...]:
    """One rule per given vector: it must be a list of finite numbers."""
    rules = []
    for column in (mapped[name] for name in VECTORS if name in mapped):
        vector = _vector(column, fmt)
        finite = f"size({vector}) > 0 AND forall({vector}, x -> x IS NOT NULL AND NOT isnan(x) AND abs(x) < float('infinity'))"
        rules.append(("bad_vector", f"{quoted(column)} IS NOT NULL AND NOT coalesce({finite}, false)"))
    return tuple(rules)


def _string(column: str | None) -> str:
    """A trimmed text, null when empty or when there is no such column."""
    return "CAST(NULL AS STRING)" if column is None else f"nullif(trim(CAST({quoted(column)} AS STRING)), '')"


def _vector(column: str, fmt: FileFormat) -> str:
    """An array of floats; text files hold it as a JSON list."""
    if fmt == "parquet":
        return f"CAST({quoted(column)} AS ARRAY<FLOAT>)"
    # Not from_json(.., 'ARRAY<FLOAT>'): Spark 3.5 ends the whole job on an element that is no number instead of giving null.
    return f"transform(from_json({quoted(column)}, 'ARRAY<STRING>'), x -> try_cast(x AS FLOAT))"


def image_root(root: Path, given: str) -> str:
    """Folder or URI that relative image paths are joined to; a folder must lie below `root`.

    Raises: ConfigError for a folder elsewhere, or an address of a protocol that cannot be read here.
    """
    if "://" in given:
        return image_address(given)
    path = (root / given).resolve()
    if not path.is_relative_to(root):
        raise ConfigError("the image folder leaves the data folder", expected=f"a folder below {root}, or a URI", found=str(path), where="source.image_root")
    return str(path)


def image_address(given: str) -> str:
    """The address of an image store, when fsspec has a driver for its protocol; said before Spark starts, not by its workers.

    Raises: ConfigError for a protocol of this machine's files, an unknown one, or one whose driver is not installed.
    """
    import fsspec

    scheme = given.partition("://")[0]
    try:
        if scheme in ("file", "local"):
            raise ValueError("a local folder is written without a protocol, below source.path")
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            "images cannot be read from this address",
            expected="a protocol of fsspec with its driver installed, e.g. https, s3, gs",
            found=f"{scheme}: {error}",
            where="source.image_root",
        ) from error
    return given
