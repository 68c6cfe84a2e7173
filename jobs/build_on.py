"""Whether tonight's rows of a table may be built on those of the night before: only while they are what reading everything again would give.

feature.item_popularity and feature.user_sequence are functions of the files up to their night, which raw.source_file names by digest and count. Their rows
carry the digest of that list and of the table's definition, `inputs_sha256`. Where the night before carries the digest that the ledger gives for it now, only
tonight's files are read beside its rows; a late, corrected or emptied file changes the digest, and everything is read. Both ways give the same rows: no order
of nights can be seen in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from pipeline.context import SQL

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from jobs.inputs import Inputs

Files = Sequence[tuple[str, ...]]
LONG_AGO = date(1900, 1, 1)  # before any file


@dataclass(frozen=True)
class Ground:
    """What a table's rows of tonight begin with.

    Args:
        inputs_sha256: digest that tonight's rows carry.
        rows: the table's rows of the night before; none where everything is read again.
        after: files later than this day are not in `rows` yet.
    """

    inputs_sha256: str
    rows: DataFrame
    after: date


def ground(inputs: Inputs, table: str, night: date, *settings: object) -> Ground:
    """The night before, where its digest still holds.

    Args:
        settings: what else the table's rows are a function of.
    """
    from pyspark.sql import functions as F

    ledger = inputs.frame("raw.source_file").where(F.col("file_date") <= F.lit(night))
    files = [tuple(map(str, row)) for row in ledger.select("file_date", "kind", "sha256", "rows_in", "rejected").collect()]
    definition = [path.read_text(encoding="utf-8") for path in sorted((SQL / table.replace(".", "/")).glob("*.sql"))]
    settings = (*definition, *settings)  # rows of another definition are no ground
    before, stored = night - timedelta(days=1), inputs.frame(table)
    rows = stored.where(F.col("logical_date") == F.lit(before))
    known = "inputs_sha256" in rows.columns  # a snapshot shows the columns it was written with: rows from before there was a digest are no ground
    found = known and not (rows := rows.where(F.col("inputs_sha256") == digest(files, before, *settings))).isEmpty()
    return Ground(digest(files, night, *settings), rows if found else stored.limit(0), before if found else LONG_AGO)


def digest(files: Files, night: date, *settings: object) -> str:
    """sha256 over the files up to a night, whatever their order, and the settings.

    Args:
        files: (file_date, kind, sha256, rows_in, rejected) as text.
    """
    known = sorted(file for file in files if file[0] <= str(night))
    return hashlib.sha256(json.dumps([known, *map(str, settings)]).encode()).hexdigest()
