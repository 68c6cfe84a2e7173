"""Text without secrets: what the environment keeps secret must reach no log, no error, no MLflow run and no snapshot.

Secrets come from the environment only. A variable is secret when its name says so; of an address only the password is.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "***"
SECRET_NAME = re.compile(r"(?i)secret|passw|token(?!iz)|credential|access_?key|private_?key|fernet|webhook|api_?key")
PLAIN_NAME = re.compile(r"(?i)_(?:FILE|PATH|DIR|FOLDER|URI|URL|ID|ADMINS|USERS)$")  # places and names, e.g. where a password file lies
IN_ADDRESS = re.compile(r"(?i)(://[^/\s:@]*:)[^/\s@]+(?=@)|([?&;](?:password|token|secret)=)[^&;\s'\"]+")
SHORTEST = 6  # a shorter value would blot out innocent words
FLAG = "sid_redacted"


def secret_values() -> list[str]:
    """Every secret of the environment, also as it looks inside an address or a JSON text, longest first."""
    found = {form for value in _secrets() for form in (value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]) if len(value) >= SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


def scrub(text: str) -> str:
    """The text with every secret value and every password inside an address blotted out."""
    for value in secret_values():
        text = text.replace(value, MASK)
    return IN_ADDRESS.sub(lambda found: f"{found.group(1) or found.group(2)}{MASK}", text)


def holds_secret(text: str) -> bool:
    """Whether scrubbing would change the text."""
    return scrub(text) != text


def clean_records() -> None:
    """From now on, every log record of sidmill is scrubbed when it is made, whichever handler prints it."""
    make = logging.getLogRecordFactory()
    if getattr(make, FLAG, False):
        return

    def scrubbed(*args: object, **kwargs: object) -> logging.LogRecord:
        """A record without secrets, when sidmill made it."""
        record = make(*args, **kwargs)
        if str(record.name).partition(".")[0] in ("pipeline", "jobs"):  # logging.makeLogRecord gives no name
            record.msg, record.args = scrub(record.getMessage()), ()
        return record

    setattr(scrubbed, FLAG, True)
    logging.setLogRecordFactory(scrubbed)


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not PLAIN_NAME.search(name):
            yield value.strip()
        if "://" in value:
            yield from _password(value)


def _password(address: str) -> Iterator[str]:
    try:
        found = urlsplit(address.removeprefix("jdbc:")).password
    except ValueError:  # not an address after all
        return
    if found:
        yield unquote(found)
