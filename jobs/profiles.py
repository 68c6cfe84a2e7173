"""The profile that made a lake, remembered in its home: what a command that names none is run with, so that nobody sweeps a lake by another lake's rules.

`SID_HOME/profile.json` is written by the first stage of a refresh, whoever starts it (the command line, Airflow), and never changed after that:
delete or edit the file to hand the lake to another profile. Overrides (`--set`) are not remembered.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

from pipeline.context import Home, read_json, write_json
from pipeline.errors import DEFAULT_PROFILE, ConfigError, ContractError

logger = logging.getLogger(__name__)
NAME = "profile.json"


def remember(home: Home, profile: str) -> None:
    """Note the profile, unless the home has one; a path is kept absolute. A home that cannot be written to is told, the stage's work stands."""
    path = home.root / NAME
    if path.is_file():
        return
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        write_json(path, {"profile": _placed(profile)})
    except OSError as error:
        logger.warning("the profile %s could not be remembered: %s", profile, error)


def remembered(home: Home) -> str:
    """The profile that made the lake; empty when there is none yet.

    Raises: ConfigError for a file that names none: without the file, the lake would be swept by the default profile's rules.
    """
    path = home.root / NAME
    if not path.is_file():
        return ""
    try:
        content = read_json(path)
    except ContractError as damaged:
        raise _nameless(path, damaged.found) from damaged
    profile = content.get("profile")
    if not profile or not isinstance(profile, str):
        raise _nameless(path, json.dumps(content))
    return profile


def _nameless(path: Path, found: str) -> ConfigError:
    return ConfigError(
        "the home does not say which profile made its lake",
        expected='{"profile": "NAME"}',
        found=found,
        where=str(path),
        next_command=f"""echo '{{"profile": "NAME"}}' > {shlex.quote(str(path))}  (with the profile that made the lake)""",
    )


def default(home: Home) -> str:
    """The profile of a command or DAG run that names none."""
    return remembered(home) or DEFAULT_PROFILE


def check_same(home: Home, profile: str, where: str) -> None:
    """Nothing, when the lake was made with this profile or is not made yet.

    Raises: ConfigError naming both; only `--profile`, typed, says that another one is meant.
    """
    known = remembered(home)
    if known and known != _placed(profile):
        raise ConfigError(
            f"this lake was made with the profile {known}, not with {profile}",
            expected=f"--profile {known}, or --profile {profile} if that is what you mean",
            found=f"{profile} from {where}",
            where=str(home.root / NAME),
        )


def _placed(profile: str) -> str:
    return str(Path(profile).resolve()) if profile.endswith(".toml") else profile
