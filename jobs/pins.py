"""Who holds which release: a pin is a tag of its own on sid.item_sid, `pin_<release>__<name>`, at the release's snapshot.

Iceberg keeps what a tag points at, so the pin and what it protects are one commit and cannot disagree after a kill; sid.release, which says what is
published, is not touched by people who read it. Several names may hold one release; `sid maintain` counts a pinned release as live.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline import lakehouse
from pipeline.config import Config
from pipeline.context import Home
from pipeline.errors import ConfigError, ContractError, UpstreamMissing

TABLE = "sid.item_sid"
PIN = re.compile(r"^pin_(d\d{8}(?:_r\d+)?)__([A-Za-z0-9_]+)$")
NAME = re.compile(r"^[A-Za-z0-9_]{1,40}$")


def name_of(tag: str, by: str) -> str:
    """Name of the pin.

    Raises: ConfigError for a name that cannot be part of a tag.
    """
    if not NAME.fullmatch(by):
        raise ConfigError("not a name for a pin", expected="1 to 40 letters, digits and _", found=by, where="--by")
    return f"pin_{tag}__{by}"


def by_release(tags: Iterable[str]) -> dict[str, list[str]]:
    """Release -> names that hold it, sorted; from the names of all tags of sid.item_sid."""
    found: dict[str, list[str]] = {}
    for name in sorted(tags):
        if match := PIN.fullmatch(name):
            found.setdefault(match.group(1), []).append(match.group(2))
    return found


def held_tags(home: Home, config: Config) -> Mapping[str, int]:
    """Tag -> snapshot id on sid.item_sid, pins among them, without a JVM; empty when there is no lake."""
    try:
        return lakehouse.history(home, config.lake, TABLE).tags
    except UpstreamMissing:
        return {}


def pin(lake: tuple[Home, Config], tag: str, by: str, *, release: bool = False) -> list[dict[str, Any]]:
    """Hold a release for `by`, or let it go; doing it twice changes nothing. One row: the release and who holds it now.

    Raises: ContractError for a release that is not published or has expired.
    """
    from pipeline import spark as gate

    home, config = lake
    name, tags = name_of(tag, by), held_tags(home, config)
    if not release and tag not in _published(home, config, tags):
        known = ", ".join(_published(home, config, tags)[-10:]) or "none"
        raise ContractError(f"release {tag!r} cannot be pinned", expected=f"one of: {known}", found=tag, where="sid.release", next_command="sid releases")
    if release is (name in tags):
        spark = gate.session(home, config.lake, config.launch)
        with lakehouse.table_locks(home, config.lake, [TABLE]):
            if release:
                lakehouse.drop_references(spark, TABLE, tags=[name])
            else:
                lakehouse.create_tag(spark, TABLE, name, tags[tag])
    return [{"tag": tag, "pinned_by": by_release(held_tags(home, config)).get(tag, [])}]


def _published(home: Home, config: Config, tags: Mapping[str, int]) -> list[str]:
    """Releases whose rows are there."""
    return [tag for tag in lakehouse.read_releases(home, config.lake)["tag"].to_pylist() if tag in tags]
