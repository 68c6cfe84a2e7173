"""The errors of sidmill, each with what was expected, what was found, where, and the next command to type.

    SidError
    |- ConfigError       no retry   key, section, file
    |- ContractError     no retry   a frame or file lacks the declared columns / grain / dtype / date
    |- GateFailed        no retry   table, audit branch, expectations that failed with observed values
    |- VersionMismatch   no retry   the checkpoint's codebook_digest against the one read
    |- StageFailed       no retry   an exception that nobody foresaw; its traceback is in the log
    |- PublishConflict   retry      main moved: re-cut the branch and rewrite
    |- ResourceLost      retry      a disk, memory, an executor or a connection gave out under a stage or a command
    `- UpstreamMissing   retry      no partition or file for the date

Not here: `ValueError` for bad arguments of a function, `assert` for our own mistakes.
"""

from __future__ import annotations

import errno
import re
import shlex
import traceback
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import ClassVar

from pipeline.redact import scrub

EXIT_DO_NOT_RETRY = 64
EXIT_MAY_RETRY = 75
DEFAULT_PROFILE = "demo"
LONGEST = 500  # of a foreign exception's text; all of it is in the log
GAVE_OUT = re.compile(
    r"No space left on device|Disk quota exceeded|ExecutorLostFailure|ExecutorDeadException|OutOfMemoryError|FetchFailed|SparkContext was shut down"
    r"|Connection (?:refused|reset|aborted|closed)|timed out|Broken pipe|CommitStateUnknown|database is locked|database or disk is full|Py4JNetworkError"
    r"|UnknownHostException|Temporary failure in name resolution|No route to host|Network is unreachable|Service: S3, Status Code: 5\d\d"
    r"|AWS Error (?:NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT)"
)
SCARCE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
# A command of ours up to where the next one or a remark begins; those without a profile (stages, demo, up, study) stay as they are.
COMMAND = re.compile(r"\bsid (?:run|backfill|releases|show|diff|inspect|repair|rollback|pin|maintain|export|report)\b[^;,(]*?(?=\s*(?:[;,(]|$))")


class SidError(Exception):
    """Raised when sidmill refuses to go on; the base of the tree above.

    Args:
        headline: one sentence a person reads first.
        expected: what a good input would have looked like.
        found: what was there instead.
        where: file, table, branch or key.
        next_command: what to type next; empty if there is nothing sensible.
    """

    retry: ClassVar[bool] = False

    def __init__(self, headline: str, *, expected: str = "", found: str = "", where: str = "", next_command: str = "") -> None:
        # Scrubbed here, once: errors are printed, stored in documents and sent to MLflow.
        self.headline, self.expected, self.found, self.where, self.next_command = map(scrub, (headline, expected, found, where, next_command))
        super().__init__(self.headline)

    def __str__(self) -> str:
        """The error as a person reads it."""
        return self.message()

    @property
    def exit_code(self) -> int:
        """75 when a retry may help, 64 when it cannot."""
        return EXIT_MAY_RETRY if self.retry else EXIT_DO_NOT_RETRY

    def message(self, profile: str = "", overrides: Iterable[str] = ()) -> str:
        """The error as a person reads it, one fact a line; the next command is one for the profile and the overrides."""
        facts = [("expected", self.expected), ("found", self.found), ("where", self.where), ("next", for_profile(self.next_command, profile, overrides))]
        return "\n".join([self.headline, *(f"  {name:<9} {text}" for name, text in facts if text)])

    def fields(self) -> dict[str, str]:
        """The error as JSON, for the stage's outcome file."""
        return {
            "class": type(self).__name__,
            "headline": self.headline,
            "expected": self.expected,
            "found": self.found,
            "where": self.where,
            "next_command": self.next_command,
        }


class ConfigError(SidError):
    """Raised when a profile, an override or an environment variable cannot be used."""


class ContractError(SidError):
    """Raised when a file or frame lacks the declared columns, grain, dtype or date."""


class GateFailed(SidError):
    """Raised when expectations fail on an audit branch; main is untouched and the branch stays for `sid inspect`.

    metrics: what was measured on the branch, for the stage's outcome file.
    """

    metrics: Mapping[str, float] = MappingProxyType({})


class VersionMismatch(SidError):
    """Raised when a checkpoint was trained on another codebook than the one read."""


class StageFailed(SidError):
    """Raised when a stage ends by an exception that nobody foresaw."""


class PublishConflict(SidError):
    """Raised when main moved between cutting the audit branch and publishing it."""

    retry = True


class ResourceLost(SidError):
    """Raised when what a stage or a command runs on gave out: a disk, memory, an executor, a connection."""

    retry = True


class UpstreamMissing(SidError):
    """Raised when a partition, release or file that the date needs is not there (yet)."""

    retry = True


def unforeseen(error: Exception, *, what: str = "stage", where: str, next_command: str) -> SidError:
    """A foreign exception as one of ours: ResourceLost where another try may help, else StageFailed; with its class, first line and what gave out."""
    text = "".join(traceback.format_exception_only(error)).strip()  # unlike str(error) it cannot fail: a Java exception's text lies in a JVM that may be gone
    kind = ResourceLost if _gave_out(error, text) else StageFailed
    first, *more = text.splitlines() or [""]  # of a Java exception the first line says only which of our calls it came out of
    telling = [] if GAVE_OUT.search(first) else [line.strip() for line in more if GAVE_OUT.search(line)][:1]
    return kind(
        f"the {what} was ended by {type(error).__name__}",
        expected=f"a {what} that ends, or says why it does not",
        found=" ... ".join(line[:LONGEST] for line in (first, *telling)),
        where=where,
        next_command=next_command,
    )


def for_profile(command: str, profile: str, overrides: Iterable[str] = ()) -> str:
    """The command to type next with the profile and the overrides in force behind each command of ours, but for what it sets itself and the default profile.

    Args:
        overrides: `section.key=value`; without them the command would go on with other settings than those that met the error.
    """
    return COMMAND.sub(lambda found: found[0] + _options(found[0], profile, overrides), command)


def _options(command: str, profile: str, overrides: Iterable[str]) -> str:
    named = "" if profile in ("", DEFAULT_PROFILE) or "--profile" in command else f" --profile {shlex.quote(profile)}"
    others = [override for override in overrides if f"--set {override.partition('=')[0].strip()}=" not in command]
    return named + "".join(f" --set {scrub(shlex.quote(override))}" for override in others)


def _gave_out(error: BaseException | None, text: str) -> bool:
    """Whether an exception, or one it came from, tells of a thing that another try may find whole."""
    scarce = isinstance(error, MemoryError | ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in SCARCE)
    if scarce or GAVE_OUT.search(text):
        return True
    cause = error.__cause__ or error.__context__ if error is not None else None
    return cause is not None and _gave_out(cause, "".join(traceback.format_exception_only(cause)))


def from_fields(fields: dict[str, str]) -> SidError:
    """The error that `SidError.fields` described, rebuilt in another process; an unknown class becomes SidError."""
    kinds = {kind.__name__: kind for kind in SidError.__subclasses__()}
    rest = {name: fields.get(name, "") for name in ("expected", "found", "where", "next_command")}
    return kinds.get(fields.get("class", ""), SidError)(fields.get("headline", "unknown error"), **rest)
