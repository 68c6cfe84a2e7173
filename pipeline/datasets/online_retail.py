"""UCI Online Retail as day files: a folder of <YYYY-MM-DD>.csv with the original columns, one line per product of an invoice.

Here: how its columns and its dirt are read. Not here: the files, which are the user's own (`source.path`).
Credit: D. Chen (2015), Online Retail, UCI Machine Learning Repository, doi 10.24432/C5BW33, CC BY 4.0.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import config
from pipeline.datasets.base import SourceSpec, read_options
from pipeline.datasets.folder import dated_files, source_root

PATTERN = "{date}.csv"
COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
ITEM = "upper(trim(StockCode))"


class OnlineRetail:
    """Online Retail: a year of a British shop, real arrivals of new items, cancellations and dirty rows."""

    name = "online_retail"

    def prepare(self, source: config.Source, data_folder: Path, seed: int) -> SourceSpec:
        """The user's folder as a source; nothing is written and `seed` has no effect.

        Raises: ConfigError without a usable path.
        """
        read_options(source, {})
        root = source_root(source)
        found = dated_files(root, PATTERN)
        return SourceSpec(
            events_path=lambda day: root / f"{day}.csv",
            items_path=None,
            file_format="csv",
            items_format="csv",
            event_columns=COLUMNS,
            item_columns=(),
            event_select={
                "user_id": "nullif(regexp_replace(trim(CustomerID), '[.]0+$', ''), '')",
                "item_id": ITEM,
                "event_ts": "try_to_timestamp(InvoiceDate, 'yyyy-MM-dd HH:mm:ss')",
                "event_type": "'buy'",
                "value": "try_cast(Quantity AS DOUBLE)",
                "session_id": "trim(InvoiceNo)",
            },
            item_select={
                "item_id": ITEM,
                "title": "nullif(trim(Description), '')",
                "text": "nullif(trim(Description), '')",
                "category": "CAST(NULL AS STRING)",
                "image_uri": "CAST(NULL AS STRING)",
            },
            event_rules=(
                ("cancellation", "upper(trim(InvoiceNo)) LIKE 'C%'"),
                ("non_product_code", f"NOT coalesce({ITEM} RLIKE '^[0-9]{{5}}[A-Z]*$', false)"),
                ("non_positive_quantity", "NOT coalesce(try_cast(Quantity AS DOUBLE) > 0, false)"),
                ("non_positive_price", "NOT coalesce(try_cast(UnitPrice AS DOUBLE) > 0, false)"),
            ),
            event_key=("user_id", "item_id", "session_id"),
            catalogue="from_events",
            first_date=min(found, default=None),
            last_date=max(found, default=None),
        )
