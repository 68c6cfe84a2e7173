"""How tables look on a terminal: one place, so that every command looks alike."""

from __future__ import annotations

from rich import box
from rich.table import Table


def table(title: str) -> Table:
    """An empty table with a title and no frame, narrow enough for a terminal of 80 columns."""
    return Table(title=title or None, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
