"""The gate: Spark aggregates a branch's new rows once, Great Expectations judges the one-row frame of metrics.

A table's expectations are data, not code: sql/<namespace>/<table>/expectations.json. The column contract is checked before the write
(`lakehouse.check_columns`). Great Expectations never sees the rows themselves, so a gate costs one aggregation whatever the size.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline import lakehouse
from pipeline.config import Config
from pipeline.context import SQL
from pipeline.errors import ConfigError, ContractError, GateFailed

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """One expectation and what was observed."""

    metric: str
    minimum: float | None
    maximum: float | None
    severity: str
    observed: float | None
    passed: bool
    settings: tuple[str, ...] = ()  # section.key of the profile that the bounds come from

    @property
    def rule(self) -> str:
        """The expectation as a person reads it, with the setting to change where a profile sets the bound."""
        bounds = " and ".join(
            text for text in (f">= {self.minimum:g}" if self.minimum is not None else "", f"<= {self.maximum:g}" if self.maximum is not None else "") if text
        )
        return f"{self.metric} {bounds}" + "".join(f" from {setting}" for setting in self.settings)

    def __str__(self) -> str:
        """The expectation and what was observed."""
        return f"{self.rule} (observed {'missing' if self.observed is None else f'{self.observed:g}'})"


@dataclass(frozen=True)
class Audit:
    """The metrics of one branch and how each expectation was judged."""

    table: str
    metrics: dict[str, float]
    judgements: tuple[Judgement, ...]

    def failures(self, severity: str = "fail") -> list[Judgement]:
        """Expectations of a severity that do not hold."""
        return [judgement for judgement in self.judgements if not judgement.passed and judgement.severity == severity]


def audit(
    frame: DataFrame, table: str, *, dates: Sequence[date], equal: Mapping[str, str | int], known: Mapping[str, float], config: Config, branch: str, reason: str
) -> Audit:
    """The audit of a branch's rows of `dates`; warnings are logged.

    Args:
        frame: the branch.
        known: metrics the job already has; they join the frame that is judged.
    Raises: GateFailed, with all metrics, when an expectation of severity `fail` does not hold.
    """
    contract = read_expectations(table)
    metrics = {**_aggregate(_slice(frame, table, dates, equal), contract["metrics"]), **{name: float(value) for name, value in known.items()}}
    result = Audit(table, metrics, judge(metrics, contract["expect"], config, table))
    for warning in result.failures("warn"):
        logger.warning("expectation table=%s branch=%s %s", table, branch, warning)
    failed = result.failures()
    if failed:
        error = GateFailed(
            f"{len(failed)} expectation(s) on {table} do not hold; main is untouched",
            expected="; ".join(judgement.rule for judgement in failed),
            found="; ".join(map(str, failed)),
            where=f"{table}, branch {branch} ({reason})",
            next_command=f"sid inspect {branch}",
        )
        error.metrics = metrics
        raise error
    return result


def observe(frame: DataFrame, table: str, *, dates: Sequence[date], config: Config, known: Mapping[str, float]) -> tuple[Judgement, ...]:
    """Each expectation of a branch judged without raising; for people who look at it.

    Args:
        known: the metrics that the gate judged; without them the rows are measured again, and what only the job could measure stays out.
    """
    contract = read_expectations(table)
    if known:
        return judge(known, contract["expect"], config, table)
    metrics = _aggregate(_slice(frame, table, dates, {}), contract["metrics"])
    return judge(metrics, [rule for rule in contract["expect"] if rule["metric"] in metrics], config, table)


def judge(metrics: Mapping[str, float], expectations: Sequence[Mapping[str, Any]], config: Config, table: str) -> tuple[Judgement, ...]:
    """Each expectation judged by Great Expectations on the one-row frame of metrics.

    A metric that is absent or not a number fails its expectation, except when the expectation says `"optional": true`.
    """
    present = [rule for rule in expectations if rule["metric"] in metrics or not rule.get("optional")]
    bounds = [(_bound(rule.get("min"), config, table), _bound(rule.get("max"), config, table)) for rule in present]
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    passed = _great_expectations(finite, [(rule["metric"], low, high) for rule, (low, high) in zip(present, bounds, strict=True) if rule["metric"] in finite])
    return tuple(
        Judgement(
            metric=rule["metric"],
            minimum=low,
            maximum=high,
            severity=rule.get("severity", "fail"),
            observed=metrics.get(rule["metric"]),
            passed=passed.get((rule["metric"], low, high), False),
            settings=_settings(rule),
        )
        for rule, (low, high) in zip(present, bounds, strict=True)
    )


@cache
def read_expectations(table: str) -> dict[str, Any]:
    """Contents of the table's expectations.json; a table without one has no metrics and no expectations.

    Raises: ContractError for a document with other keys than `metrics` and `expect`.
    """
    namespace, name = table.split(".")
    path = SQL / namespace / name / "expectations.json"
    if not path.is_file():
        return {"metrics": {}, "expect": []}
    content = json.loads(path.read_text(encoding="utf-8"))
    if set(content) != {"metrics", "expect"}:
        raise ContractError("cannot read the expectations", expected='{"metrics": {...}, "expect": [...]}', found=str(sorted(content)), where=str(path))
    return content


def _slice(frame: DataFrame, table: str, dates: Sequence[date], equal: Mapping[str, str | int]) -> DataFrame:
    """The rows of the dates, where the table is partitioned by them, and of the slice."""
    from pyspark.sql import functions as F

    column = next(iter(lakehouse.partition_columns(table)), "")
    if dates and dict(frame.dtypes).get(column) == "date":
        frame = frame.where(F.col(column).isin([F.lit(day).cast("date") for day in dates]))
    for name, value in equal.items():
        frame = frame.where(F.col(name) == F.lit(value))
    return frame


def _aggregate(frame: DataFrame, metrics: Mapping[str, str]) -> dict[str, float]:
    from pyspark.sql import functions as F

    if not metrics:
        return {}
    row = frame.agg(*[F.expr(sql).cast("double").alias(name) for name, sql in metrics.items()]).collect()[0]
    return {name: float(value) for name, value in row.asDict().items() if value is not None}


def _bound(value: Any, config: Config, table: str) -> float | None:
    """A bound as written, or `$section.key` looked up in the configuration."""
    if not isinstance(value, str):
        return None if value is None else float(value)
    found: Any = config
    for name in value.removeprefix("$").split("."):
        found = getattr(found, name, None)
    if found is None:
        raise ConfigError(
            f"expectation names an unknown setting {value!r}", expected="$section.key", found=value, where=f"sql/{table.replace('.', '/')}/expectations.json"
        )
    return float(found)


def _settings(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """section.key of each bound that is written `$section.key`."""
    return tuple(str(rule[side]).removeprefix("$") for side in ("min", "max") if isinstance(rule.get(side), str))


def _great_expectations(
    metrics: Mapping[str, float], rules: Sequence[tuple[str, float | None, float | None]]
) -> dict[tuple[str, float | None, float | None], bool]:
    if not rules:
        return {}
    import pandas as pd

    gx, batch_definition = _validator()
    suite = gx.ExpectationSuite(
        name="metrics",
        expectations=[gx.expectations.ExpectColumnValuesToBeBetween(column=name, min_value=low, max_value=high) for name, low, high in dict.fromkeys(rules)],
    )
    batch = batch_definition.get_batch(batch_parameters={"dataframe": pd.DataFrame([dict(metrics)])})
    passed = {}
    for result in batch.validate(suite).results:
        asked = result.expectation_config.kwargs
        passed[asked["column"], asked.get("min_value"), asked.get("max_value")] = bool(result.success)
    return passed


@cache
def _validator() -> tuple[Any, Any]:
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its imports use modules that Python has deprecated
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        source = context.data_sources.add_pandas("metrics")
        return gx, source.add_dataframe_asset("metrics").add_batch_definition_whole_dataframe("metrics")
