"""Logging and progress, configured once: one line per fact on stderr, a bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline import redact

Item = TypeVar("Item")
logger = logging.getLogger(__name__)
QUIET_SECONDS = 30.0


def configure(level: int = logging.INFO) -> None:
    """Send sidmill's log lines to stderr; libraries speak from WARNING on."""
    redact.clean_records()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s %(message)s", datefmt="%H:%M:%S")
    for name in ("pipeline", "jobs"):
        logging.getLogger(name).setLevel(level)


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with visible progress: a bar on a terminal, else one log line at most every 30 s."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    spoken = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - spoken >= QUIET_SECONDS:
            spoken = time.monotonic()
            logger.info("%s done=%d total=%d", what, done, total)
