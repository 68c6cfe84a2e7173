"""Where the lake's catalog and object store are, said once for Spark and for PyIceberg; addresses and secrets come from the environment.

    hadoop   a local folder, no server (the default)        SID_WAREHOUSE
    jdbc     PostgreSQL (or SQLite) holds the pointers      SID_CATALOG_URI, SID_CATALOG_USER, SID_CATALOG_PASSWORD
    rest     a REST catalog                                 SID_CATALOG_URI, SID_CATALOG_TOKEN or SID_CATALOG_CREDENTIAL
    glue     AWS                                            AWS's own variables
An `s3://` warehouse is read and written through S3FileIO and AWS's own variables (AWS_ACCESS_KEY_ID, ...); SID_S3_ENDPOINT names another server than AWS.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote_plus

from pipeline import redact
from pipeline.config import Lake
from pipeline.context import Home
from pipeline.errors import ConfigError

REST_SECRETS = {"token": "SID_CATALOG_TOKEN", "credential": "SID_CATALOG_CREDENTIAL"}
SECRETS = ("jdbc.password", *REST_SECRETS)  # of a catalog's properties
DEFAULT_REGION = "us-east-1"


def for_spark(home: Home, lake: Lake) -> dict[str, str]:
    """Properties of the catalog as Iceberg's Java side names them, secrets included.

    Raises: ConfigError for a missing or unsafe address.
    """
    found = {"type": lake.catalog, "warehouse": warehouse(home, lake)}
    if lake.catalog in ("jdbc", "rest"):
        found["uri"] = address(lake)
    if lake.catalog == "jdbc":
        found["jdbc.schema-version"] = "V1"
        found |= _given({"jdbc.user": "SID_CATALOG_USER", "jdbc.password": "SID_CATALOG_PASSWORD"})
    if lake.catalog == "rest":
        found |= _given(REST_SECRETS)
    if found["warehouse"].startswith("s3://"):
        found |= {"io-impl": "org.apache.iceberg.aws.s3.S3FileIO", "client.region": _region(), **_endpoint()}
    return found | lake.properties


def for_pyiceberg(home: Home, lake: Lake) -> dict[str, str]:
    """Properties of the catalog as PyIceberg names them, secrets included; the embedded folder needs none.

    Raises: ConfigError for a missing or unsafe address.
    """
    found = {"type": "sql" if lake.catalog == "jdbc" else lake.catalog, "warehouse": warehouse(home, lake)}
    if lake.catalog == "rest":
        found |= {"uri": address(lake), **_given(REST_SECRETS)}
    if lake.catalog == "jdbc":
        found |= {"uri": _sqlalchemy(address(lake)), "init_catalog_tables": "false", "pool_pre_ping": "true"}
    if found["warehouse"].startswith("s3://"):
        found |= {"s3.region": _region(), **_endpoint()}
    return found | {name: value for name, value in lake.properties.items() if name != "io-impl"}


def address(lake: Lake) -> str:
    """SID_CATALOG_URI.

    Raises: ConfigError when there is none, or when it carries a password: addresses are logged, secrets are not.
    """
    uri = os.environ.get("SID_CATALOG_URI", "")
    if not uri:
        raise ConfigError(f"a {lake.catalog} catalog needs an address", expected="SID_CATALOG_URI in the environment", found="nothing", where="environment")
    if redact.IN_ADDRESS.search(uri):
        raise ConfigError(
            "the catalog's address carries a password",
            expected="SID_CATALOG_USER and SID_CATALOG_PASSWORD (or SID_CATALOG_TOKEN) beside it",
            found=redact.scrub(uri),
            where="SID_CATALOG_URI",
        )
    return uri


def warehouse(home: Home, lake: Lake) -> str:
    """Where tables lie: a folder or an address.

    Raises: ConfigError for an object store under the `hadoop` catalog, which needs an atomic rename.
    """
    found = home.warehouse
    if lake.catalog == "hadoop" and "://" in found and not found.startswith("file://"):
        raise ConfigError(
            "a folder catalog cannot live in an object store",
            expected="lake.catalog = jdbc, rest or glue",
            found=found,
            where="SID_WAREHOUSE and section [lake]",
        )
    return found


def _sqlalchemy(uri: str) -> str:
    """A JDBC address as SQLAlchemy writes it, with user and password inside."""
    if uri.startswith("jdbc:sqlite:"):
        return re.sub(r"^jdbc:sqlite:([^?]*).*", r"sqlite:///\1", uri)
    user, password = os.environ.get("SID_CATALOG_USER", ""), os.environ.get("SID_CATALOG_PASSWORD", "")
    login = f"{quote_plus(user)}{':' + quote_plus(password) if password else ''}@" if user else ""
    return re.sub(r"^jdbc:postgresql://", lambda _: f"postgresql+psycopg2://{login}", uri)


def _given(names: dict[str, str]) -> dict[str, str]:
    return {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}


def _endpoint() -> dict[str, str]:
    endpoint = os.environ.get("SID_S3_ENDPOINT", "")
    return {"s3.endpoint": endpoint, "s3.path-style-access": "true"} if endpoint else {}


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
