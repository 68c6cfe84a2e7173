"""Who is told when a stage fails or a night is late: the log always, and a webhook when SID_ALERT_WEBHOOK names one.

The payload says what a person needs at 3 a.m. (DAG, task, date, table, audit branch, failed expectations, next command) and nothing secret: every text is
scrubbed. An alert that cannot be delivered is logged and never makes the failure worse.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import timedelta
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from pipeline import redact
from pipeline.context import Home, read_json
from pipeline.errors import ConfigError, SidError, for_profile

logger = logging.getLogger(__name__)
WEBHOOK = "SID_ALERT_WEBHOOK"
TIMEOUT_SECONDS = 5.0
ON_BRANCH = re.compile(r"^(?P<table>[a-z_]+\.[a-z_]+), branch (?P<branch>[A-Za-z0-9_]+)")


def night_limit() -> timedelta:
    """Time from the queueing of a night to the alert that it is late: SID_DEADLINE_MINUTES, else six hours.

    Raises: ConfigError when the variable is no number of minutes.
    """
    text = os.environ.get("SID_DEADLINE_MINUTES") or "360"
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ConfigError("not a number of minutes", expected="1 to 999999", found=text, where="SID_DEADLINE_MINUTES")
    return timedelta(minutes=int(text))


def on_failure(context: Mapping[str, Any]) -> None:
    """Tell about a task that failed for good; Airflow calls it after the last try."""
    deliver(failure(context))


async def on_missed_deadline(context: Mapping[str, Any] | None = None) -> None:
    """Tell about a run that is late; Airflow's triggerer calls it."""
    run = dict((context or {}).get("dag_run") or {})
    deadline = dict((context or {}).get("deadline") or {})
    payload = {
        "event": "deadline_missed",
        "dag": str(run.get("dag_id", "")),
        "run_id": str(run.get("dag_run_id") or run.get("run_id") or ""),
        "date": str(run.get("logical_date") or "")[:10],
        "state": str(run.get("state", "")),
        "deadline": str(deadline.get("deadline_time", "")),
        "next_command": f"airflow tasks states-for-dag-run {run.get('dag_id', 'sid_refresh')} {run.get('dag_run_id') or run.get('run_id') or 'RUN'}",
    }
    await asyncio.to_thread(deliver, payload)


def failure(context: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of a failed task, from Airflow's context and the outcome document that the stage left."""
    task, run = context["ti"], f"{context['run_id']}__{context['ti'].dag_id}"
    error = _refused(context.get("exception")) or _outcome_error(run, task.task_id) or _raised(context.get("exception"))
    on_branch = ON_BRANCH.match(error.get("where", ""))
    gate = error.get("class") == "GateFailed"
    params = context.get("params") or {}
    return {
        "event": "task_failed",
        "dag": task.dag_id,
        "task": task.task_id,
        "run_id": context["run_id"],
        "try": task.try_number,
        "date": str(params.get("date") or context.get("data_interval_start") or context.get("logical_date") or "")[:10],
        "profile": str(params.get("profile", "")),
        "table": on_branch["table"] if on_branch else "",
        "audit_branch": on_branch["branch"] if on_branch else "",
        "failed_expectations": error.get("found", "").split("; ") if gate else [],
        **{name: error.get(name, "") for name in ("class", "headline", "expected", "found", "where")},
        "next_command": for_profile(error.get("next_command", ""), str(params.get("profile", "")), params.get("overrides") or ()),
    }


def deliver(payload: Mapping[str, Any]) -> bool:
    """Whether the webhook took the payload; False as well when there is none. Never raises: an alert must not add a failure."""
    body = redact.scrub(json.dumps(dict(payload), default=str))
    logger.error("alert %s", body)
    try:
        address = webhook()
    except ConfigError as error:
        logger.error("alert not sent: %s", error)
        return False
    return bool(address) and _post(address, body.encode())


def webhook() -> str:
    """SID_ALERT_WEBHOOK, empty without one.

    Raises: ConfigError unless it is https, or http on loopback; the address itself is not repeated: it holds the receiver's token.
    """
    address = os.environ.get(WEBHOOK, "")
    parts = urlsplit(address)
    if not address or (parts.scheme == "https" and parts.hostname) or (parts.scheme == "http" and _loopback(parts.hostname or "")):
        return address
    raise ConfigError("the webhook's address is not safe", expected="https, or http on loopback", found=f"{parts.scheme or 'no'} scheme", where=WEBHOOK)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A receiver that sends us elsewhere is not followed: elsewhere was not checked."""

    def redirect_request(self, *given: Any, **named: Any) -> None:
        """No further request."""


def _post(address: str, body: bytes) -> bool:
    wanted = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")  # noqa: S310  scheme checked by webhook()
    opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if address.startswith("http:") else []))
    try:
        with opener.open(wanted, timeout=TIMEOUT_SECONDS) as answer:
            return 200 <= answer.status < 300
    except (OSError, HTTPException, ValueError) as error:
        logger.error("alert not sent: %s", type(error).__name__)
        return False


def _outcome_error(run: str, stage: str) -> dict[str, str]:
    """The error of the stage's outcome document, empty without one."""
    try:
        path = Home.from_environment().run_folder(run) / f"{stage}.json"
        return dict(read_json(path).get("error") or {}) if path.is_file() else {}
    except SidError as error:
        return error.fields()
    except OSError as full:  # the home cannot be looked at, perhaps the very thing to tell about
        logger.error("the outcome of %s cannot be read: %s", stage, full)
        return {}


def _refused(error: object) -> dict[str, str]:
    """The SidError behind the exception of this try, empty without one: a document may be that of an earlier try, which this one never came to replace."""
    cause = getattr(error, "__cause__", None)
    return cause.fields() if isinstance(cause, SidError) else {}


def _raised(error: object) -> dict[str, str]:
    """What is known of a failure that left no document: the first line of the exception."""
    lines = str(error or "").splitlines()
    return {"class": type(error).__name__, "headline": lines[0][:500] if lines else "the process ended", "next_command": "see the task's log"}
