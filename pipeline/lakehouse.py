"""The lake: creating tables, audit branches, the one publish commit, reading at a snapshot or a release.

Writing and publishing go through Spark, reading without a JVM through PyIceberg. Nothing else in sidmill touches references.
Correctness rests on `publish` being ONE metadata commit; the file lock only spares a local folder needless conflicts.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import catalog
from pipeline.config import Lake
from pipeline.context import SQL, Home
from pipeline.errors import ConfigError, ContractError, PublishConflict, ResourceLost, UpstreamMissing

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table as IcebergTable
    from pyiceberg.table.snapshots import Snapshot
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)
CATALOG = "lake"
NAME = re.compile(r"^[a-z][a-z0-9_]*$")
REFERENCE = re.compile(r"^[A-Za-z0-9_]+$")
SCHEMA_VERSION = "sid.schema_version"
UNREACHABLE = "the catalog cannot be reached"
REFUSING = frozenset({"UnauthorizedError", "ForbiddenError", "OAuthError", "InsufficientPrivilege"})  # REST catalogs and PostgreSQL, of a login's rights
MIGRATION = re.compile(r"^(\d{3})_[a-z0-9_]+\.sql$")
_EPOCH = date(1970, 1, 1).toordinal()
# What Iceberg throws when main is no ancestor of the branch any more, or was committed to at the same moment.
CONFLICTS = frozenset({"CommitFailedException", "ValidationException", "IllegalArgumentException"})
MAX_CAUSES = 10
PATIENCE_SECONDS = 30.0  # a lock is waited for without an end; after this it is said
ADDITIVE = re.compile(r"ALTER TABLE (\S+) ADD COLUMNS? \((.*)\)", re.DOTALL)


# ---------------------------------------------------------------- tables


def table_names() -> list[str]:
    """Every table of the house, `namespace.name`, from the folders under sql/."""
    return sorted(f"{path.parent.parent.name}.{path.parent.name}" for path in SQL.glob("*/*/table.sql"))


def create_tables(spark: SparkSession) -> None:
    """Make every table that is not there yet, each with an empty first snapshot (a table without one cannot be branched); migrate the others."""
    namespaces = sorted({name.split(".")[0] for name in table_names()})
    for namespace in namespaces:
        spark.sql(f"CREATE NAMESPACE IF NOT EXISTS {CATALOG}.{_checked(namespace)}")
    known = {f"{namespace}.{row.tableName}" for namespace in namespaces for row in spark.sql(f"SHOW TABLES IN {CATALOG}.{namespace}").collect()}
    for name in table_names():
        if name not in known:
            namespace, table = name.split(".")
            spark.sql((SQL / namespace / table / "table.sql").read_text(encoding="utf-8"))
        migrate(spark, name)  # of a new table, whose table.sql has every column, only its version is noted
        if snapshot(spark, name) is None:  # a kill between the two statements leaves a table without a snapshot
            _loaded(spark, name).newFastAppend().commit()


def migrations(table: str) -> list[tuple[int, Path]]:
    """(number, file) of sql/<namespace>/<table>/migrations/NNN_name.sql, in order.

    Raises: ConfigError when the numbers are not 1, 2, 3, ...
    """
    folder = SQL / table.replace(".", "/") / "migrations"
    found = [(int(match.group(1)), path) for path in sorted(folder.glob("*.sql")) if (match := MIGRATION.fullmatch(path.name))]
    if [number for number, _ in found] != list(range(1, len(list(folder.glob("*.sql"))) + 1)):
        raise ConfigError(
            f"the migrations of {table} are not numbered 1, 2, 3, ...",
            expected="001_name.sql, 002_name.sql, ...",
            found=", ".join(path.name for path in sorted(folder.glob("*.sql"))),
            where=str(folder),
        )
    return found


def is_ready(home: Home, lake: Lake, table: str) -> bool:
    """Whether the table exists with a first snapshot and has every migration, without a JVM."""
    newest = len(migrations(table))
    try:
        found = open_table(home, lake, table)
    except UpstreamMissing:
        return False
    return found.current_snapshot() is not None and int(found.properties.get(SCHEMA_VERSION, 0)) >= newest


def migrate(spark: SparkSession, table: str) -> int:
    """Number of migrations the table was behind; each is one additive statement, noted in the table property `sid.schema_version`.

    A kill between the statement and the note is met by the next call: columns that are there with the right type are not added twice.
    Raises: ConfigError for a statement that is not additive; ContractError when a column exists with another type.
    """
    files = migrations(table)
    if not files:
        return 0
    properties = {row.key: row.value for row in spark.sql(f"SHOW TBLPROPERTIES {_full(table)}").collect()}
    pending = [(number, path) for number, path in files if number > int(properties.get(SCHEMA_VERSION, 0))]
    for number, path in pending:
        _add_columns(spark, table, path)
        spark.sql(f"ALTER TABLE {_full(table)} SET TBLPROPERTIES ('{SCHEMA_VERSION}' = '{number:d}')")
        logger.info("migrated table=%s version=%d file=%s", table, number, path.name)
    return len(pending)


def _add_columns(spark: SparkSession, table: str, path: Path) -> None:
    """Run one migration unless its columns are there already."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    text = re.sub(r"(?m)^\s*--.*$", "", path.read_text(encoding="utf-8")).strip().rstrip(";")
    parts = ADDITIVE.fullmatch(text)
    if parts is None or parts.group(1) != table or ";" in text or re.search(r"(?i)\bnot\s+null\b", text):
        raise ConfigError(
            f"a migration of {table} is not additive",
            expected=f"one statement: ALTER TABLE {table} ADD COLUMNS (name TYPE COMMENT 'what', ...), each column nullable",
            found=text[:120],
            where=str(path),
        )
    wanted = {field.name: field.dataType.simpleString() for field in spark.createDataFrame([], parts.group(2)).schema.fields}
    found = _columns(spark, table, wanted)
    if not found:
        try:
            spark.sql(text)
            return
        except (PySparkException, Py4JJavaError):
            found = _columns(spark, table, wanted)
            if not found:  # else another process ran the statement at the same moment: the catalog of a server has no locks
                raise
    if found != wanted:
        raise ContractError(f"{table} has columns of a migration with another type", expected=str(wanted), found=str(found), where=str(path))


def _columns(spark: SparkSession, table: str, wanted: Container[str]) -> dict[str, str]:
    """Column -> type of the wanted columns that the table has now."""
    return {field.name: field.dataType.simpleString() for field in spark.table(_full(table)).schema.fields if field.name in wanted}


def snapshot(spark: SparkSession, table: str, reference: str = "main") -> int | None:
    """Snapshot id that a branch or tag of the table points at; None when there is no such reference."""
    found = _loaded(spark, table).snapshot(reference)  # the table's metadata: a query of its `.refs` takes ten times as long
    return None if found is None else int(found.snapshotId())


def references(spark: SparkSession, table: str) -> dict[str, int]:
    """Name -> snapshot id of every branch and tag of the table."""
    return {str(name): int(reference.snapshotId()) for name, reference in _loaded(spark, table).refs().items()}


def read_frame(spark: SparkSession, table: str, snapshot_id: int | None) -> DataFrame:
    """The table's rows at a snapshot, with nulls in the columns that were added since; None reads main as it is now."""
    from pyspark.sql import functions as F

    now = spark.table(_full(table))
    if snapshot_id is None:
        return now
    rows = spark.read.option("snapshot-id", snapshot_id).format("iceberg").load(_full(table))
    added = {field.name: F.lit(None).cast(field.dataType) for field in now.schema.fields if field.name not in rows.columns}
    return rows.withColumns(added) if added else rows


def read_release_frame(spark: SparkSession, snapshot_id: int, day: date) -> DataFrame:
    """Rows of sid.item_sid at a snapshot and of its date, never one without the other; `read_release` of Spark stages."""
    from pyspark.sql import functions as F

    return read_frame(spark, "sid.item_sid", snapshot_id).where(F.col("logical_date") == F.lit(day))


def read_branch(spark: SparkSession, table: str, branch: str) -> DataFrame:
    """The table's rows on a branch or at a tag."""
    found = snapshot(spark, table, branch)
    if found is None:
        raise UpstreamMissing(f"no branch or tag {branch!r} on {table}", expected=branch, found=", ".join(references(spark, table)), where=table)
    return read_frame(spark, table, found)


def read_added(spark: SparkSession, table: str, base: int, head: int) -> DataFrame:
    """The rows that appends put between two snapshots, without reading the rest."""
    return spark.read.option("start-snapshot-id", base).option("end-snapshot-id", head).format("iceberg").load(_full(table))


def partition_columns(table: str) -> tuple[str, ...]:
    """Partition columns that sql/<namespace>/<table>/table.sql declares, empty for an unpartitioned table."""
    namespace, name = table.split(".")
    found = re.search(r"PARTITIONED BY \(([^)]*)\)", (SQL / namespace / name / "table.sql").read_text(encoding="utf-8"))
    return tuple(column.strip() for column in found.group(1).split(",")) if found else ()


def rows_digest(frame: DataFrame) -> str:
    """sha256 over the frame's rows, whatever their order, files or partitioning; columns count by name.

    Rows are hashed one by one, sorted inside 4,096 hash buckets by Spark, and the bucket digests are joined in order,
    so no process ever holds all rows.
    """
    from pyspark.sql import functions as F

    row = F.sha2(F.to_json(F.struct(*sorted(frame.columns)), {"ignoreNullFields": "false"}), 256)
    buckets = (
        frame.select(row.alias("h"))
        .groupBy(F.substring("h", 1, 3).alias("b"))
        .agg(F.sha2(F.concat_ws("", F.sort_array(F.collect_list("h"))), 256).alias("d"))
        .collect()
    )
    return hashlib.sha256("".join(bucket.d for bucket in sorted(buckets)).encode()).hexdigest()


# ---------------------------------------------------------------- writing: branch, replace, publish


@contextmanager
def table_locks(home: Home, lake: Lake, tables: Iterable[str]) -> Iterator[None]:
    """Hold a file lock per table (embedded catalog only), taken in name order so that two stages never wait for each other."""
    if lake.catalog != "hadoop":
        yield
        return
    from contextlib import ExitStack

    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        for table in sorted(set(tables)):
            lock = FileLock(home.folder("locks") / f"{table}.lock")
            try:
                stack.enter_context(lock.acquire(timeout=PATIENCE_SECONDS))
            except Timeout:
                logger.warning("waiting for another process that writes table=%s lock=%s", table, lock.lock_file)
                stack.enter_context(lock.acquire())
        yield


def cut_branch(spark: SparkSession, table: str, branch: str) -> int | None:
    """Cut an audit branch from main, dropping what an earlier try left; returns main's snapshot id.

    Raises: PublishConflict when somebody else committed to the table at the same moment.
    """
    name = _checked_reference(branch)
    with _meeting_nobody(table):
        if snapshot(spark, table, name) is not None:
            spark.sql(f"ALTER TABLE {_full(table)} DROP BRANCH {name}")
        spark.sql(f"ALTER TABLE {_full(table)} CREATE BRANCH {name}")
    return snapshot(spark, table)


def drop_branch(spark: SparkSession, table: str, branch: str) -> None:
    """Drop a branch if it is there.

    Raises: PublishConflict when somebody else committed to the table at the same moment.
    """
    with _meeting_nobody(table):
        spark.sql(f"ALTER TABLE {_full(table)} DROP BRANCH IF EXISTS {_checked_reference(branch)}")


def check_columns(frame: DataFrame, spark: SparkSession, table: str) -> DataFrame:
    """The frame with its columns in the table's order.

    Raises: ContractError when a column is missing, unknown or of another type.
    """
    declared = {field.name: field.dataType.simpleString() for field in spark.table(_full(table)).schema.fields}
    found = {field.name: field.dataType.simpleString() for field in frame.schema.fields}
    if declared != found:
        wrong = sorted(
            {f"{name}: {found.get(name, 'missing')}" for name in declared if found.get(name) != declared[name]}
            | {f"{name}: unknown" for name in found if name not in declared}
        )
        expected = ", ".join(f"{name} {kind}" for name, kind in declared.items())
        raise ContractError(
            f"the frame does not have the columns of {table}", expected=expected, found="; ".join(wrong), where=f"sql/{table.replace('.', '/')}/table.sql"
        )
    return frame.select(*declared)


def replace(frame: DataFrame, table: str, branch: str, *, dates: Sequence[date], equal: Mapping[str, str | int], properties: Mapping[str, str]) -> None:
    """Replace the partitions `dates` (and `equal`, or `equal` alone) of a branch by the frame's rows; an empty frame empties them.

    Raises: ContractError when a row carries another date: it would be written beside the partitions that were replaced.
    """
    from pyspark.sql import functions as F

    column = partition_columns(table)[0]
    conditions = [F.col(name) == F.lit(value) for name, value in equal.items()]
    if dates:
        wanted = [F.lit(day).cast("date") for day in dates]
        stray = F.raise_error(F.concat(F.lit(f"stray row: {column}="), F.coalesce(F.col(column).cast("string"), F.lit("null")))).cast("date")
        frame = frame.withColumn(column, F.when(F.col(column).isin(wanted), F.col(column)).otherwise(stray))
        conditions.append(F.col(column).isin(wanted))
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    writer = _writer(frame, table, branch, properties)
    try:
        writer.overwrite(reduce(and_, conditions))
    except (PySparkException, Py4JJavaError) as error:
        if "stray row:" not in str(error):
            raise
        found = re.search(r"stray row: \S+", str(error))
        raise ContractError(
            f"a row for {table} carries another date", expected=f"{column} in {sorted(map(str, dates))}", found=found.group(0) if found else "", where=branch
        ) from error


def replace_all(frame: DataFrame, table: str, branch: str, properties: Mapping[str, str]) -> None:
    """Replace every row of a branch in one commit."""
    from pyspark.sql import functions as F

    _writer(frame, table, branch, properties).overwrite(F.lit(True))


def append(frame: DataFrame, table: str, branch: str, properties: Mapping[str, str]) -> None:
    """Append the frame's rows to a branch."""
    _writer(frame, table, branch, properties).append()


def publish(spark: SparkSession, table: str, branch: str, tag: str = "", expect: int | None = None) -> int:
    """Make a branch the new main, tag it and remove the branch, in ONE metadata commit; returns the snapshot id.

    Args:
        expect: the snapshot that was audited; None publishes what the branch shows.
    Raises: PublishConflict when main moved since the branch was cut, or the branch since it was audited; every reference is then as it was.
        Other errors of Java, a full disk say, as they come.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    name = _checked_reference(branch)
    iceberg = _loaded(spark, table)
    target = iceberg.snapshot(name)
    if target is None:
        raise UpstreamMissing(f"no branch {name} on {table}", expected=name, found=", ".join(references(spark, table)), where=table)
    if expect is not None and int(target.snapshotId()) != expect:  # another try of the same run wrote it or cut it anew
        raise PublishConflict(
            f"{name} of {table} moved since it was audited",
            expected=f"snapshot {expect}",
            found=str(target.snapshotId()),
            where=f"{table} {name}",
        )
    if tag and iceberg.refs().containsKey(_checked_reference(tag)):
        raise ContractError(
            f"tag {tag} of {table} exists and is never moved", expected="a tag that is not there yet", found=tag, where=table, next_command="sid releases"
        )
    try:
        change = iceberg.manageSnapshots().fastForwardBranch("main", name)
        if tag:
            change = change.createTag(tag, target.snapshotId())
        change.removeBranch(name).commit()
    except (Py4JJavaError, PySparkException) as error:
        kinds, found = _java_causes(error)
        if not CONFLICTS & set(kinds):
            raise
        raise PublishConflict(
            f"main of {table} moved while {name} was audited",
            expected="main as it was when the branch was cut",
            found=found,
            where=f"{table} {name}",
        ) from error
    logger.info("published table=%s branch=%s tag=%s snapshot=%d", table, name, tag or "-", target.snapshotId())
    return int(target.snapshotId())


def _java_causes(error: Exception) -> tuple[list[str], str]:
    """(class names of the Java exception behind an error and of its causes, without packages; its first line)."""
    thrown = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    first = str(thrown if thrown is not None else error).splitlines()[0]
    kinds: list[str] = []
    while thrown is not None and len(kinds) < MAX_CAUSES:
        kinds.append(str(thrown.getClass().getSimpleName()))
        thrown = thrown.getCause()
    return kinds, first


def _writer(frame: DataFrame, table: str, branch: str, properties: Mapping[str, str]) -> Any:
    writer = frame.writeTo(f"{_full(table)}.branch_{_checked_reference(branch)}")
    for name, value in properties.items():
        writer = writer.option(f"snapshot-property.{name}", value)
    return writer


# ---------------------------------------------------------------- upkeep: what is held, what may go


@dataclass(frozen=True, kw_only=True)
class History:
    """A table's snapshots and what points at them: `committed` id -> instant (UTC), `branches` and `tags` name -> id."""

    committed: Mapping[int, datetime]
    branches: Mapping[str, int]
    tags: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A data or delete file: bytes, the values of its partition as text, e.g. ("2026-11-20",), and the snapshot that added it."""

    bytes: int
    partition: tuple[str, ...]
    added: int | None = None


def history(home: Home, lake: Lake, table: str) -> History:
    """Snapshots, branches and tags of a table, without a JVM.

    Raises: UpstreamMissing when the table does not exist yet.
    """
    metadata = open_table(home, lake, table).metadata
    kinds: dict[str, dict[str, int]] = {"branch": {}, "tag": {}}
    for name, reference in metadata.refs.items():
        kinds[str(reference.snapshot_ref_type.value)][name] = int(reference.snapshot_id)
    committed = {int(one.snapshot_id): datetime.fromtimestamp(one.timestamp_ms / 1000, UTC) for one in metadata.snapshots}
    return History(committed=committed, branches=kinds["branch"], tags=kinds["tag"])


def histories(home: Home, lake: Lake) -> dict[str, History]:
    """Table -> its history, of those tables of the house that are there."""
    found = {}
    for table in table_names():
        with suppress(UpstreamMissing):
            found[table] = history(home, lake, table)
    return found


@dataclass(frozen=True)
class Commit:
    """A snapshot of main.

    Args:
        at: when it was written, milliseconds since 1970.
        origin: what it says of the stage that wrote it (`sid.*`), among other things.
    """

    at: int
    origin: Mapping[str, str]


def main_commits(home: Home, lake: Lake, table: str) -> list[Commit]:
    """The snapshots of main that are kept, newest first, without a JVM.

    Raises: UpstreamMissing when the table does not exist yet.
    """
    iceberg = open_table(home, lake, table)
    commits, found = [], iceberg.current_snapshot()
    while found is not None:
        commits.append(Commit(at=found.timestamp_ms, origin=_origin(found)))
        found = iceberg.snapshot_by_id(found.parent_snapshot_id) if found.parent_snapshot_id else None
    return commits


def origin(home: Home, lake: Lake, table: str, snapshot_id: int) -> Mapping[str, str]:
    """What a snapshot says of the stage that wrote it (`sid.*`), among other things, without a JVM; nothing when it was swept away.

    Raises: UpstreamMissing when the table does not exist yet.
    """
    found = open_table(home, lake, table).snapshot_by_id(snapshot_id)
    return {} if found is None else _origin(found)


def _origin(found: Snapshot) -> Mapping[str, str]:
    return found.summary.additional_properties if found.summary else {}


def files_at(home: Home, lake: Lake, table: str, snapshot_ids: Iterable[int]) -> dict[str, StoredFile]:
    """Path -> file of everything that any of the snapshots shows, without a JVM; each manifest is read once."""
    iceberg = open_table(home, lake, table)
    shown = [found for one in snapshot_ids if (found := iceberg.snapshot_by_id(one)) is not None]
    manifests = {manifest.manifest_path: manifest for one in shown for manifest in one.manifests(iceberg.io)}
    entries = (entry for manifest in manifests.values() for entry in manifest.fetch_manifest_entry(iceberg.io, discard_deleted=True))
    days = [field.field_type.__class__.__name__ == "DateType" for field in iceberg.spec().partition_type(iceberg.schema()).fields]
    return {
        entry.data_file.file_path: StoredFile(
            bytes=int(entry.data_file.file_size_in_bytes), partition=_partition(entry.data_file.partition, days), added=entry.snapshot_id
        )
        for entry in entries
    }


def _partition(record: Any, days: Sequence[bool]) -> tuple[str, ...]:
    """The partition's values as text; a day is stored as days since 1970."""
    values = [record[place] for place in range(len(days))]
    return tuple(str(date.fromordinal(_EPOCH + value) if is_day and isinstance(value, int) else value) for value, is_day in zip(values, days, strict=True))


def create_tag(spark: SparkSession, table: str, tag: str, snapshot_id: int) -> None:
    """Tag a snapshot, one commit.

    Raises: ContractError when the tag exists: tags are never moved; PublishConflict when somebody else committed to the table at the same moment.
    """
    if snapshot(spark, table, _checked_reference(tag)) is not None:
        raise ContractError(f"tag {tag} of {table} exists and is never moved", expected="a tag that is not there yet", found=tag, where=table)
    with _meeting_nobody(table):
        _loaded(spark, table).manageSnapshots().createTag(tag, int(snapshot_id)).commit()


def put_tag(spark: SparkSession, table: str, tag: str, snapshot_id: int) -> None:
    """Make a tag point at a snapshot, one commit, or none when it does already; for what follows from a release, never for a release's own tag.

    Raises: PublishConflict when somebody else committed to the table at the same moment.
    """
    found = snapshot(spark, table, _checked_reference(tag))
    if found == snapshot_id:
        return
    change = _loaded(spark, table).manageSnapshots()
    with _meeting_nobody(table):
        (change.createTag if found is None else change.replaceTag)(tag, int(snapshot_id)).commit()


def drop_references(spark: SparkSession, table: str, *, tags: Iterable[str] = (), branches: Iterable[str] = ()) -> None:
    """Drop tags and branches in one commit; their snapshots stay until they are expired.

    Raises: PublishConflict when somebody else committed to the table at the same moment.
    """
    change = _loaded(spark, table).manageSnapshots()
    for tag in tags:
        change = change.removeTag(_checked_reference(tag))
    for branch in branches:
        change = change.removeBranch(_checked_reference(branch))
    with _meeting_nobody(table):
        change.commit()


@contextmanager
def _meeting_nobody(table: str, met: Container[str] = ("CommitFailedException",)) -> Iterator[None]:
    """A change of a table that somebody else's commit ends: only an embedded lake has locks that keep others away.

    Args:
        met: Java exceptions that tell of somebody else; a change of references is tried once.
    Raises: PublishConflict when somebody else committed to the table at the same moment.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        kinds, said = _java_causes(error)
        if not any(kind in met for kind in kinds):
            raise
        raise PublishConflict(f"{table} was committed to while it was changed", expected="nobody else", found=said, where=table) from error


def delete_partitions(spark: SparkSession, table: str, days: Sequence[date], properties: Mapping[str, str]) -> None:
    """Drop whole days from main in one metadata commit; no file is rewritten and snapshots before it still show them."""
    expressions = spark._jvm.org.apache.iceberg.expressions.Expressions  # type: ignore[union-attr]
    column = partition_columns(table)[0]
    condition = reduce(getattr(expressions, "or"), [expressions.equal(column, str(day)) for day in days])
    change = _loaded(spark, table).newDelete().deleteFromRowFilter(condition)
    for name, value in properties.items():
        change = change.set(name, value)
    change.commit()


def expire_snapshots(spark: SparkSession, table: str, older: datetime) -> int:
    """Number of files deleted with the snapshots committed before `older` that no branch or tag holds; the newest of main always stays."""
    row = _call(spark, "expire_snapshots", table, f"older_than => TIMESTAMP '{older:%Y-%m-%d %H:%M:%S}'")[0]
    return sum(value or 0 for value in row.asDict().values())


def remove_orphans(spark: SparkSession, table: str, *, dry_run: bool) -> dict[str, int]:
    """Path -> bytes of files in the table's folder that no snapshot knows and that are at least three days old (Iceberg's own guard), removed unless dry."""
    files = _loaded(spark, table).io()
    in_store = not str(_loaded(spark, table).location()).startswith(("/", "file:"))
    listing = ", prefix_listing => true" if in_store else ""  # an object store is listed by the table's own FileIO, not by a file system of Hadoop's
    found = sorted(row.orphan_file_location for row in _call(spark, "remove_orphan_files", table, f"dry_run => true{listing}"))
    sizes = {path: int(files.newInputFile(path).getLength()) for path in found}
    if found and not dry_run:
        _call(spark, "remove_orphan_files", table, f"dry_run => false{listing}")
    return sizes


def compact(spark: SparkSession, table: str, from_files: int) -> int:
    """Number of small files that were joined into larger ones, in partitions with at least `from_files` of them; the rows are the same.

    Raises: PublishConflict when a day whose files were being joined was written anew meanwhile.
    """
    with _meeting_nobody(table, ("CommitFailedException", "ValidationException")):
        row = _call(spark, "rewrite_data_files", table, f"options => map('min-input-files', '{from_files:d}')")[0]
    return int(row.rewritten_data_files_count)


def _call(spark: SparkSession, procedure: str, table: str, argument: str) -> list[Any]:
    """Rows of an Iceberg procedure, whose grammar knows no parameters: the table's name is checked, `argument` holds numbers and instants only."""
    return spark.sql(f"CALL {CATALOG}.system.{_checked(procedure)}(table => '{_full(table).removeprefix(f'{CATALOG}.')}', {argument})").collect()


def _loaded(spark: SparkSession, table: str) -> Any:
    return spark._jvm.org.apache.iceberg.spark.Spark3Util.loadIcebergTable(spark._jsparkSession, _full(table))  # type: ignore[union-attr]


# ---------------------------------------------------------------- reading without a JVM


def open_table(home: Home, lake: Lake, table: str) -> IcebergTable:
    """The table through PyIceberg.

    The embedded catalog opens the highest complete metadata file, never the version hint, which can be one behind after a kill.
    Raises: UpstreamMissing when the table does not exist yet; ResourceLost when the catalog's server does not answer; ConfigError when it refuses the login.
    """
    from pyiceberg.table import StaticTable

    if lake.catalog == "hadoop":
        return StaticTable.from_metadata(str(_newest_metadata(home, table)))
    return _load_table(tuple(sorted(catalog.for_pyiceberg(home, lake).items())), table)


def _load_table(properties: tuple[tuple[str, str], ...], table: str) -> IcebergTable:
    """The table as a catalog server knows it now.

    Raises: UpstreamMissing when the table does not exist yet; ResourceLost when the server does not answer, ConfigError when it refuses the login: neither must
        be taken for an empty lake.
    """
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError, NotInstalledError, RESTError
    from requests.exceptions import RequestException
    from sqlalchemy.exc import DBAPIError

    try:
        return _server(properties).load_table(table)
    except NotInstalledError as error:
        raise ConfigError(
            "a package of this catalog is not installed", expected="pip install 'sidmill[glue]'", found=str(error), where="section [lake], catalog"
        ) from error
    except (NoSuchTableError, NoSuchNamespaceError, DBAPIError, RESTError, RequestException) as error:
        cause = getattr(error, "orig", error)
        kind, found = type(cause).__name__, next(iter(str(cause).splitlines()), "")
        # UndefinedTable (PostgreSQL) and "no such table" (SQLite): the catalog's own tables are not made yet.
        if isinstance(error, NoSuchTableError | NoSuchNamespaceError) or kind == "UndefinedTable" or "no such table" in found:
            where = dict(properties)["warehouse"]
            raise UpstreamMissing(
                f"table {table} does not exist yet", expected=table, found=found, where=where, next_command="sid run refresh --date D"
            ) from error
        if kind in REFUSING:
            raise ConfigError("the catalog refuses the login", expected="one that may read its tables", found=found or kind, where="SID_CATALOG_*") from error
        raise ResourceLost(UNREACHABLE, expected="an answering catalog", found=found or kind, where="SID_CATALOG_URI") from error


@functools.lru_cache(maxsize=4)
def _server(properties: tuple[tuple[str, str], ...]) -> Catalog:
    """A client of the catalog server, one per process and address."""
    from pyiceberg.catalog import load_catalog

    return load_catalog(CATALOG, **dict(properties))


def read_arrow(
    home: Home,
    lake: Lake,
    table: str,
    *,
    snapshot_id: int | None = None,
    columns: Sequence[str] = ("*",),
    where: str = "",
    among: Mapping[str, Iterable[str]] | None = None,
) -> pa.Table:
    """Rows of a table at a snapshot (None = main now) as Arrow.

    Args:
        where: PyIceberg row filter; empty reads all rows.
        among: column -> its values of the rows to keep, of a list column those that hold one; only those rows are held in memory. Texts and lists are then of
            Arrow's large types.
    """
    from pyiceberg.expressions import AlwaysTrue

    scan = open_table(home, lake, table).scan(row_filter=where or AlwaysTrue(), selected_fields=tuple(columns), snapshot_id=snapshot_id)
    return scan.to_arrow() if among is None else _kept(scan.to_arrow_batch_reader(), among)


def _kept(reader: pa.RecordBatchReader, among: Mapping[str, Iterable[str]]) -> pa.Table:
    """The rows whose columns have or hold one of the values, batch by batch."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = {name: reader.schema.field(name).type for name in among}
    values = {name: pa.array(sorted(set(wanted)), getattr(kinds[name], "value_type", kinds[name])) for name, wanted in among.items()}

    def holds(column: pa.Array, wanted: pa.Array) -> pa.Array:
        """Which rows have one of the values."""
        if column.type == wanted.type:
            return pc.is_in(column, value_set=wanted)
        rows = pc.list_parent_indices(column).filter(pc.is_in(pc.list_flatten(column), value_set=wanted))
        return pc.is_in(pa.array(np.arange(len(column)), rows.type), value_set=rows)

    def kept() -> Iterator[pa.RecordBatch]:
        """Each batch without the other rows, so that they are never together in memory."""
        for batch in reader:
            yield batch.filter(reduce(pc.and_, (holds(batch.column(name), wanted) for name, wanted in values.items())))

    return pa.Table.from_batches(kept(), reader.schema)


def current_snapshot(home: Home, lake: Lake, table: str) -> int | None:
    """Snapshot id of main through PyIceberg."""
    found = open_table(home, lake, table).current_snapshot()
    return found.snapshot_id if found else None


def read_releases(home: Home, lake: Lake) -> pa.Table:
    """All rows of sid.release, ordered by date and revision; an empty table when the lake is empty."""
    import pyarrow as pa

    try:
        rows = read_arrow(home, lake, "sid.release")
    except UpstreamMissing:
        return pa.table({name: [] for name in ("tag", "logical_date", "revision", "generation", "status")})
    return rows.sort_by([("logical_date", "ascending"), ("revision", "ascending")])


def read_release(home: Home, lake: Lake, tag: str, columns: Sequence[str] = ("*",)) -> pa.Table:
    """Rows of one release, sorted by item_id: its tag AND its date, never one without the other.

    Raises: UpstreamMissing for a tag that sid.release does not know; ContractError for one whose rows have been swept away.
    """
    import pyarrow.compute as pc

    releases = read_releases(home, lake)
    row = releases.filter(pc.equal(releases["tag"], tag)).to_pylist() if releases.num_rows else []
    if not row:
        known = ", ".join(releases["tag"].to_pylist()[-5:]) if releases.num_rows else "none"
        raise UpstreamMissing(
            f"no release {tag!r}", expected=f"a tag of sid.release, e.g. {known}", found=tag, where="sid.release", next_command="sid releases"
        )
    if open_table(home, lake, "sid.item_sid").snapshot_by_id(row[0]["snapshot_id"]) is None:
        raise ContractError(
            f"release {tag} has expired",
            expected="a release that is not older than maintain.release_days, or pinned",
            found="its rows were swept away",
            where="sid.item_sid",
            next_command="sid releases",
        )
    rows = read_arrow(home, lake, "sid.item_sid", snapshot_id=row[0]["snapshot_id"], columns=columns, where=f"logical_date == '{row[0]['logical_date']}'")
    return rows.sort_by("item_id") if "item_id" in rows.column_names else rows


def _newest_metadata(home: Home, table: str) -> Path:
    namespace, name = table.split(".")
    folder = Path(home.warehouse.removeprefix("file://")) / _checked(namespace) / _checked(name) / "metadata"
    versions = {int(found.group(1)): path for path in folder.glob("v*.metadata.json") if (found := re.fullmatch(r"v(\d+)\.metadata\.json", path.name))}
    if not versions:
        raise UpstreamMissing(
            f"table {table} does not exist yet",
            expected=str(folder / "v1.metadata.json"),
            found="nothing",
            where=str(folder),
            next_command="sid run refresh --date D",
        )
    return versions[max(versions)]


def _full(table: str) -> str:
    namespace, name = table.split(".")
    return f"{CATALOG}.{_checked(namespace)}.{_checked(name)}"


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a table or namespace name", expected="lower case letters, digits and _", found=name, where="lakehouse")
    return name


def _checked_reference(name: str) -> str:
    if not REFERENCE.fullmatch(name):
        raise ConfigError(f"{name!r} is not a branch or tag name", expected="letters, digits and _", found=name, where="lakehouse")
    return name
