"""The errors of sidmill, each with what was expected, what was found, where, and the next command to type.

    SidError
    |- ConfigError       no retry   key, section, file
    |- ContractError     no retry   a frame or file lacks the declared columns / grain / dtype / date
    |- GateFailed        no retry   table, audit branch, expectations that failed with observed values
    |- VersionMismatch   no retry   the checkpoint's codebook_digest against the one read
    |- PublishConflict   retry      main moved: re-cut the branch and rewrite
    `- UpstreamMissing   retry      no partition or file for the date

Not here: `ValueError` for bad arguments of a function, `assert` for our own mistakes.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.redact import scrub

EXIT_DO_NOT_RETRY = 64
EXIT_MAY_RETRY = 75


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
        super().__init__(self.message())

    @property
    def exit_code(self) -> int:
        """75 when a retry may help, 64 when it cannot."""
        return EXIT_MAY_RETRY if self.retry else EXIT_DO_NOT_RETRY

    def message(self) -> str:
        """The error as a person reads it, one fact a line."""
        facts = [("expected", self.expected), ("found", self.found), ("where", self.where), ("next", self.next_command)]
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
    """Raised when expectations fail on an audit branch; main is untouched and the branch stays for `sid inspect`."""


class VersionMismatch(SidError):
    """Raised when a checkpoint was trained on another codebook than the one read."""


class PublishConflict(SidError):
    """Raised when main moved between cutting the audit branch and publishing it."""

    retry = True


class UpstreamMissing(SidError):
    """Raised when a partition, release or file that the date needs is not there (yet)."""

    retry = True


def from_fields(fields: dict[str, str]) -> SidError:
    """The error that `SidError.fields` described, rebuilt in another process; an unknown class becomes SidError."""
    kinds = {kind.__name__: kind for kind in (ConfigError, ContractError, GateFailed, VersionMismatch, PublishConflict, UpstreamMissing)}
    rest = {name: fields.get(name, "") for name in ("expected", "found", "where", "next_command")}
    return kinds.get(fields.get("class", ""), SidError)(fields.get("headline", "unknown error"), **rest)
