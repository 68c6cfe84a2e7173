"""Where a run lives and what it knows: the home folder, the night's manifest, the outcomes of earlier stages.

Light on purpose (standard library and pydantic). Nothing here reads a table, a model or the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config import Config
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.redact import scrub

ROOT = Path(__file__).resolve().parent.parent
SQL = ROOT / "sql"
NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,60}")
RELEASE_TAG = re.compile(r"d\d{8}(_r\d+)?")


@dataclass(frozen=True)
class Home:
    """The state folder (`SID_HOME`, default `.sid/`); deleting it resets everything."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """The home that `SID_HOME` names."""
        home = cls(Path(os.environ.get("SID_HOME", ".sid")).resolve())
        _ = home.namespace  # a wrong one is said now, not when the first stage has run
        return home

    def folder(self, name: str) -> Path:
        """A folder of the home, made on first use: lake, mlartifacts, models, airflow, data, staging, locks, reports."""
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run_folder(self, run_id: str) -> Path:
        """Folder of one run's JSON documents, below staging/."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", run_id)
        path = self.folder("staging") / (name if name.strip(".") else f"_{name}")  # neither `..` nor the folder itself
        path.mkdir(exist_ok=True)
        return path

    @property
    def warehouse(self) -> str:
        """Warehouse of the Iceberg catalog: `SID_WAREHOUSE`, else the local folder lake/."""
        return os.environ.get("SID_WAREHOUSE") or str(self.folder("lake"))

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking address: `MLFLOW_TRACKING_URI`, else a SQLite file."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def namespace(self) -> str:
        """What tells this lake's experiments and models from others' on one MLflow server: `SID_NAMESPACE`, else nothing.

        Raises: ConfigError where it is not a plain name.
        """
        name = os.environ.get("SID_NAMESPACE", "")
        if name and not NAMESPACE.fullmatch(name):
            raise ConfigError("SID_NAMESPACE is not a plain name", expected="at most 60 letters, digits, - and _", found=repr(name[:80]), where="SID_NAMESPACE")
        return name


class Frozen(BaseModel):
    """A JSON document that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedFile(Frozen):
    """One source file the night may read, fixed by digest before anything is loaded.

    status: present | declared_empty | missing. kind: events | items.
    """

    file_date: date
    kind: str
    path: str
    sha256: str = ""
    bytes: int = 0
    status: str = "present"


class Release(Frozen):
    """A row of sid.release as the plan needs it.

    manifest: snapshot of feature.item_feature that shows the rows the release was made from; None where nothing is copied from them.
    """

    tag: str
    logical_date: date
    revision: int
    generation: int
    snapshot_id: int
    manifest: int | None = None


class Plan(Frozen):
    """The night's manifest: what every stage of the night reads, fixed once.

    start: where a new generation begins: cold = nowhere, warm = at the parent's models, anchored = there, and held to their codes; empty = none begins,
        everything is copied from `parent`.
    reuse: tag of a published release with the same fingerprint; every stage then ends as `reused`.
    """

    logical_date: date
    tag: str
    revision: int
    generation: int
    start: Literal["", "cold", "warm", "anchored"]
    reason: str
    parent: Release | None
    files: tuple[PlannedFile, ...]
    input_fingerprint: str
    config_hash: str
    seed: int
    reuse: str = ""

    @property
    def new_generation(self) -> bool:
        """Whether encoder and tokenizer are fitted tonight."""
        return bool(self.start)


@dataclass(frozen=True)
class Context:
    """What a stage knows about its run.

    Args:
        stage: name of the running stage.
        logical_date: D; `cutoff` is the first instant after it, UTC.
        run_id: Airflow run id or CLI run id; stable over retries.
        attempt: 1, 2, ... of this stage in this run.
        reason: why this run exists, lands in the snapshots and in MLflow, without secrets.
        params: run parameters, e.g. {"release": "d20261120"}.
    """

    config: Config
    home: Home
    stage: str
    logical_date: date
    run_id: str
    attempt: int = 1
    reason: str = "nightly"
    params: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Blot secrets out of the reason, once: it is stored in snapshots, documents and MLflow.

        Raises: ConfigError for a release that is no tag: it names folders.
        """
        object.__setattr__(self, "reason", scrub(self.reason))
        release = self.param("release")
        if release and not RELEASE_TAG.fullmatch(release):
            raise ConfigError("not the tag of a release", expected="dYYYYMMDD or dYYYYMMDD_rN", found=release, where="parameter release")

    @property
    def cutoff(self) -> datetime:
        """First instant after the logical date; everything read is strictly earlier."""
        return datetime.combine(self.logical_date + timedelta(days=1), time(), tzinfo=UTC)

    @property
    def key(self) -> str:
        """8 hex digits of (stage, date, run), stable over retries; names the audit branch."""
        text = f"{self.stage}|{self.logical_date}|{self.run_id}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def branch(self) -> str:
        """Name of the stage's audit branch."""
        return f"audit_{self.stage}_{self.logical_date:%Y%m%d}_{self.key}"

    @property
    def staging(self) -> Path:
        """Folder of the run's JSON documents, shared by all its stages."""
        return self.home.run_folder(self.run_id)

    def param(self, name: str) -> str:
        """A run parameter, empty when not given."""
        return dict(self.params).get(name, "")

    def outcome(self, stage: str) -> dict[str, Any]:
        """The outcome document of an earlier stage of this run.

        Raises: UpstreamMissing if that stage has not ended well in this run; ContractError if it ended before the night was planned anew from other inputs.
        """
        path = self.staging / f"{stage}.json"
        if not path.is_file():
            raise UpstreamMissing(
                f"stage {stage} has not ended in this run",
                expected=str(path),
                found="no such file",
                where=f"run {self.run_id}",
                next_command=f"sid run {stage} --date {self.logical_date}",
            )
        found = read_json(path)
        if found.get("status") == "failed":
            raise UpstreamMissing(
                f"stage {stage} failed in this run",
                expected=f"{stage} done",
                found=found["error"]["headline"],
                where=f"run {self.run_id}",
                next_command=f"sid run {stage} --date {self.logical_date}",
            )
        planned = self.fingerprint()
        if planned and found.get("plan", planned) != planned:
            raise ContractError(
                f"stage {stage} ended before the night was planned anew from other inputs",
                expected=f"{stage} of the plan {planned[:8]}",
                found=f"of {found['plan'][:8]}",
                where=f"run {self.run_id}",
                next_command=f"sid run refresh --date {self.logical_date}",
            )
        return found

    def fingerprint(self) -> str:
        """The input fingerprint of the run's manifest, which every outcome of the night carries; empty for a run without one."""
        path = self.staging / "plan_night.json"
        return str(read_json(path).get("outputs", {}).get("input_fingerprint", "")) if path.is_file() else ""

    def plan(self) -> Plan:
        """The manifest that plan_night wrote for this run."""
        return Plan.model_validate(self.outcome("plan_night")["outputs"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: ContractError if the file is no JSON object.
    """
    remove = shlex.join(["rm", str(path)])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ContractError("a document of the run is damaged", expected="JSON", found=str(error), where=str(path), next_command=remove) from error
    if not isinstance(content, dict):
        raise ContractError("a document of the run is damaged", expected="a JSON object", found=type(content).__name__, where=str(path), next_command=remove)
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old or the new document, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True, default=str), encoding="utf-8")
    temporary.replace(path)


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from its parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:4], "big") & 0x7FFFFFFF
