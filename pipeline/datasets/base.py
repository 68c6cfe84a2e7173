"""What every data set gives the ingest job: where its day files are, how their columns become ours, which rows are bad, which days are closed.

Not here: reading rows (jobs/ingest.py does, with Spark) and the rules all sets share (missing ids, unreadable times, future events).
A data set is one file beside this one plus one line in `pipeline.datasets.DATASETS`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pipeline import config
from pipeline.context import PlannedFile, read_json, write_json
from pipeline.errors import ConfigError, ContractError, UpstreamMissing

FileFormat = Literal["csv", "jsonl", "parquet"]
Kind = Literal["events", "items"]
Status = Literal["present", "declared_empty", "missing"]

EVENT_COLUMNS = ("user_id", "item_id", "event_ts", "event_type", "value", "session_id")
ITEM_COLUMNS = ("item_id", "title", "text", "category", "image_uri", "text_vector", "image_vector")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MANIFEST = "prepared.json"
BLOCK_BYTES = 65_536
LINE_BYTES = 4_194_304  # a JSON line may hold vectors


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """How one data set's day files become raw.interaction and raw.item.

    Expressions are Spark SQL over the FILE's columns. CSV and JSONL files are read with every column as STRING (`schema_ddl`), Parquet with its own types.

    Args:
        events_path: day -> events file; the file need not exist (`day_status`).
        items_path: day -> catalogue file; None = no catalogue files (catalogue is `from_events`).
        event_columns: columns the events file must have.
        item_columns: columns the catalogue file must have; with `from_events` unused.
        event_select: our column (EVENT_COLUMNS) -> expression; all six are present, values are already of our type or null.
        item_select: our column (ITEM_COLUMNS) -> expression; over the items file, or over the events file with `from_events`.
        event_rules: (reason code, expression that is true for a BAD row), the first match names the row's reason; null counts as false.
        item_rules: the same for catalogue rows; with `from_events` there are none, items come from the rows that were accepted as events.
        event_key: our columns; rows of one file equal on them are duplicates, one is kept.
        image_root: folder or URI that relative image_uri values are joined to, and that complete ones begin with; empty = the set has no images.
        catalogue: snapshot | delta | from_events.
        first_date: first day with a file, None while there is none.
        last_date: last regular day known now; None = unknown.
        finished: True = no regular file will ever come after `last_date`.
        holdout_date: day whose file holds only events kept back for evaluation (they arrive late), after `last_date`; None = no such file.
        empty_days: days the data set itself knows to be without events.
    """

    events_path: Callable[[date], Path]
    items_path: Callable[[date], Path] | None
    file_format: FileFormat
    items_format: FileFormat
    event_columns: tuple[str, ...]
    item_columns: tuple[str, ...]
    event_select: Mapping[str, str]
    item_select: Mapping[str, str]
    event_rules: tuple[tuple[str, str], ...] = ()
    item_rules: tuple[tuple[str, str], ...] = ()
    event_key: tuple[str, ...] = ("user_id", "item_id", "event_ts")
    image_root: str = ""
    catalogue: Literal["snapshot", "delta", "from_events"] = "delta"
    first_date: date | None
    last_date: date | None = None
    finished: bool = False
    holdout_date: date | None = None
    empty_days: frozenset[date] = field(default_factory=frozenset)

    def path(self, day: date, kind: Kind) -> Path:
        """The file of one day.

        Raises: ValueError for items of a data set without catalogue files.
        """
        if kind == "events":
            return self.events_path(day)
        if self.items_path is None:
            raise ValueError("this data set has no catalogue files")
        return self.items_path(day)

    def format(self, kind: Kind) -> FileFormat:
        """The format of the files of one kind."""
        return self.file_format if kind == "events" else self.items_format

    def columns(self, kind: Kind) -> tuple[str, ...]:
        """The columns the files of one kind must have."""
        return self.event_columns if kind == "events" else self.item_columns

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of file a day has."""
        return ("events",) if self.items_path is None else ("events", "items")


class Dataset(Protocol):
    """A source of day files."""

    name: str

    def prepare(self, source: config.Source, data_folder: Path, seed: int) -> SourceSpec:
        """The files' description, after they were fetched or generated into `data_folder`/<name> where the set is not the user's own.

        Idempotent and atomic: a second call with the same arguments changes nothing, a killed one leaves no half of a folder that a later one would read.
        Raises: ConfigError for an unusable `source`; ContractError for a damaged copy; UpstreamMissing if it cannot be fetched.
        """
        ...


def schema_ddl(spec: SourceSpec, kind: Kind) -> str | None:
    """Spark DDL with every declared column as STRING, for reading JSONL; None where the file's own header or schema is used (CSV, Parquet)."""
    if spec.format(kind) != "jsonl":
        return None
    return ", ".join(f"{quoted(column)} STRING" for column in spec.columns(kind))


def quoted(column: str) -> str:
    """A column name as a Spark SQL identifier.

    Raises: ConfigError for a name with a backtick or a control character.
    """
    if not column or "`" in column or not column.isprintable():
        raise ConfigError("a column name cannot be used", expected="a printable name without backticks", found=repr(column), where="source.*_columns")
    return f"`{column}`"


def day_status(spec: SourceSpec, source: config.Source, day: date, kind: Kind = "events") -> Status:
    """Whether the day's file is there, is known to be empty, or is missing.

    A file that exists is always present. After the last day of a finished data set nothing is declared empty.
    """
    if spec.path(day, kind).is_file():
        return "present"
    if spec.finished and spec.last_date is not None and day > spec.last_date:
        return "missing"
    closed = day in spec.empty_days or day in source.closed_dates or WEEKDAYS[day.weekday()] in source.closed_weekdays
    return "declared_empty" if closed or source.absent == "declared_empty" else "missing"


def days(source: config.Source, spec: SourceSpec, end: date) -> list[date]:
    """Every day of the calendar up to and including `end`, closed days too.

    Raises: UpstreamMissing without any file; ContractError if `end` lies before the data; ConfigError for a weekday that does not exist.
    """
    unknown = sorted(set(source.closed_weekdays) - set(WEEKDAYS))
    if unknown:
        raise ConfigError("an unknown weekday", expected=", ".join(WEEKDAYS), found=", ".join(unknown), where="source.closed_weekdays")
    if spec.first_date is None:
        raise UpstreamMissing("no day file is there", expected=str(spec.path(end, "events")), found="none", where=f"data set {source.dataset}")
    start = max(source.start, spec.first_date)
    if end < start:
        raise ContractError("the date lies before the data", expected=f"{start} or later", found=str(end), where=f"data set {source.dataset}")
    return [start + timedelta(days=offset) for offset in range((end - start).days + 1)]


def planned_file(spec: SourceSpec, source: config.Source, day: date, kind: Kind) -> PlannedFile:
    """One file of one day with digest, size and status; an absent file has an empty digest."""
    path, status = spec.path(day, kind), day_status(spec, source, day, kind)
    if status != "present":
        return PlannedFile(file_date=day, kind=kind, path=str(path), status=status)
    return PlannedFile(file_date=day, kind=kind, path=str(path), sha256=file_digest(path), bytes=path.stat().st_size, status=status)


def file_digest(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_header(path: Path, file_format: FileFormat, columns: tuple[str, ...]) -> None:
    """Nothing, when the file is what its format says, to its last byte if it is a text file, and has the columns; more columns are allowed.

    A JSONL file of zero bytes is a day without rows; a CSV file needs its header.
    Raises: ContractError naming the missing columns, or saying why the file cannot be read.
    """
    found = columns_of(path, file_format)
    if file_format != "parquet":
        _check_text(path)
    missing = [column for column in columns if found is not None and column not in found]
    if missing:
        raise ContractError(
            f"a {file_format} file lacks columns: {', '.join(missing)}", expected=", ".join(columns), found=", ".join(found or ()), where=str(path)
        )


def columns_of(path: Path, file_format: FileFormat) -> list[str] | None:
    """Names of a file's columns; None for an empty JSONL file.

    Raises: ContractError saying why the file cannot be read.
    """
    return _parquet_columns(path) if file_format == "parquet" else _text_columns(path, file_format)


def _parquet_columns(path: Path) -> list[str]:
    """Top-level column names of a Parquet file."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ContractError("a file is not readable as Parquet", expected="a Parquet file", found=str(error).splitlines()[0], where=str(path)) from error


def _text_columns(path: Path, file_format: FileFormat) -> list[str] | None:
    """Column names in the first line of a text file; None for an empty JSONL file."""
    line = _first_line(path)
    if not line:
        if file_format == "jsonl":
            return None
        raise ContractError("a CSV file is empty", expected="a header line", found="no text", where=str(path))
    return _header(line, path) if file_format == "csv" else _json_keys(line, path)


def _header(line: str, path: Path) -> list[str]:
    """Column names of a CSV header."""
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise ContractError("a CSV file has no readable header", expected="column names", found=str(error), where=str(path)) from error


def _json_keys(line: str, path: Path) -> list[str]:
    """Keys of the first JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ContractError("a file is not JSON Lines", expected="one JSON object a line", found=str(error), where=str(path)) from error
    if not isinstance(row, dict):
        raise ContractError("a file is not JSON Lines", expected="one JSON object a line", found=f"a {type(row).__name__}", where=str(path))
    return list(row)


def has_rows(path: Path, file_format: FileFormat) -> bool:
    """Whether a file whose columns were checked holds more than its header; text files are read up to their first row."""
    if file_format == "parquet":
        import pyarrow.parquet as pq

        return bool(pq.read_metadata(path).num_rows)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        if file_format == "csv":
            next(csv.reader(stream), None)
        return any(line.strip() for line in stream)


def _first_line(path: Path) -> str:
    """First line of a UTF-8 text file without its end, empty for an empty file."""
    with path.open("rb") as stream:
        head = stream.read(BLOCK_BYTES)
        stream.seek(0)
        line = stream.readline(LINE_BYTES)
    if b"\0" in head:
        raise ContractError("a text file is binary", expected="text in UTF-8", found="NUL bytes", where=str(path))
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1, error) from error


def _check_text(path: Path) -> None:
    """Nothing, when all of a text file is UTF-8: Spark would read another character for every byte that is not, and say nothing."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1  # incremental: a block may end inside a character
    with path.open("rb") as stream:
        for block in itertools.chain(iter(partial(stream.read, BLOCK_BYTES), b""), [b""]):
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line + error.object.count(b"\n", 0, error.start), error) from error
            line += block.count(b"\n")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ContractError:
    return ContractError(
        "a text file is not UTF-8",
        expected="text in UTF-8",
        found=f"byte 0x{error.object[error.start]:02x} in line {line} ({error.reason})",
        where=str(path),
        next_command="sid run refresh --date D  (with the file written in UTF-8)",
    )


def prepared_folder(root: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Folder `root`/`key`, made by `make` when it is not there yet and checked against its own digests when it is.

    `make` fills an unnamed neighbour, which is renamed when complete.
    Raises: ContractError if files of a finished folder were changed or lost.
    """
    folder = root / key
    if not (folder / MANIFEST).is_file():
        _make(folder, make)
    expected, found = read_json(folder / MANIFEST), digests(folder)
    if expected != found:
        changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ContractError(
            "prepared files were changed",
            expected="the files as they were made",
            found=f"{len(changed)} changed, first {changed[0]}",
            where=str(folder),
            next_command=shlex.join(["rm", "-r", str(folder)]),
        )
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a neighbour of `folder`, seal it with its digests, and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    try:
        make(half)
        write_json(half / MANIFEST, digests(half))
        half.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # another process was faster: its folder is the same
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder, the manifest itself left out."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST}


def options_key(*parts: object) -> str:
    """12 hex digits that name one way of preparing a data set."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12]


def read_options(source: config.Source, defaults: Mapping[str, int | float | str | bool]) -> dict[str, int | float | str | bool]:
    """The data set's options over their defaults; a whole number is taken for a real one.

    Raises: ConfigError for an unknown option or another type than the default's.
    """
    unknown = sorted(source.options.keys() - defaults.keys())
    if unknown:
        raise ConfigError("an unknown option of the data set", expected=", ".join(sorted(defaults)), found=", ".join(unknown), where="source.options")
    return {name: _typed(name, source.options.get(name, default), default) for name, default in defaults.items()}


def _typed(name: str, value: int | float | str | bool, default: int | float | str | bool) -> int | float | str | bool:
    """The option as the default's type."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ConfigError("an option has the wrong type", expected=type(default).__name__, found=repr(value), where=f"source.options.{name}")
    return value
