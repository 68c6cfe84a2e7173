"""The seeded shop as a data set: day files, catalogue deltas and pictures written once per world, with the truth beside them.

Here: options and file layout. Not here: how a world is drawn, see pipeline/synthetic.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.datasets.base import EVENT_COLUMNS, SourceSpec, options_key, prepared_folder, read_options
from pipeline.errors import ConfigError
from pipeline.synthetic import World, write

LAYOUT = 1  # raise when equal options give other files, so that old folders are not taken for new ones
ITEM_FIELDS = ("item_id", "title", "text", "category", "image_uri")


class Shop:
    """A generated shop; `source.options` are the fields of `synthetic.World`."""

    name = "shop"

    def prepare(self, source: config.Source, data_folder: Path, seed: int) -> SourceSpec:
        """Day files under `data_folder`/shop; the world depends on option `seed` alone, so that a run's `seed` may vary over one world.

        truth.parquet lies beside the day folders.
        Raises: ConfigError for an option that does not exist or is out of range.
        """
        world = world_of(source)
        key = options_key(LAYOUT, sorted(asdict(world).items()))
        return describe(prepared_folder(data_folder / self.name, key, lambda folder: write(world, folder)), world)


def world_of(source: config.Source) -> World:
    """The world that the options describe.

    Raises: ConfigError for an option that does not exist or is out of range.
    """
    options: dict[str, Any] = read_options(source, asdict(World()))
    try:
        return World(**options)
    except ValueError as error:
        raise ConfigError("the shop cannot be built", expected="see pipeline.synthetic.World", found=str(error), where="source.options") from error


def describe(folder: Path, world: World) -> SourceSpec:
    """The prepared folder as a source."""
    moment = "event_ts" if world.file_format == "parquet" else "try_to_timestamp(event_ts)"
    return SourceSpec(
        events_path=lambda day: folder / "events" / f"{day}.{world.file_format}",
        items_path=lambda day: folder / "items" / f"{day}.csv",
        file_format="parquet" if world.file_format == "parquet" else "csv",
        items_format="csv",
        event_columns=EVENT_COLUMNS,
        item_columns=ITEM_FIELDS,
        event_select={**{name: name for name in EVENT_COLUMNS}, "event_ts": moment, "value": "try_cast(value AS DOUBLE)"},
        item_select={name: name for name in ITEM_FIELDS},
        event_key=("user_id", "item_id", "event_ts"),
        image_root=str(folder),
        catalogue="delta",
        first_date=world.day(0),
        last_date=world.day(world.days - 1),
        finished=True,
    )
