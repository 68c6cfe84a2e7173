"""A day of the shop is a function of (world, day): neither the number of days nor the dirt nor the run changes it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.synthetic import Catalogue, World, catalogue, events, events_table, items_table, until, users

worlds = st.builds(
    World,
    items=st.integers(1, 60),
    users=st.integers(1, 20),
    events_per_day=st.integers(1, 80),
    clusters=st.integers(1, 12),
    subclusters=st.integers(1, 4),
    styles=st.integers(1, 4),
    arrivals_per_day=st.floats(0, 0.5),
    edits_per_day=st.floats(0, 0.5),
    noise=st.floats(0, 1),
    noise_tie=st.sampled_from(["rarity", "independent", "reversed"]),
    distinct_images=st.integers(12, 40),
    image_share=st.floats(0, 1),
    dirty_share=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
    file_format=st.sampled_from(["csv", "parquet"]),
)
few = settings(max_examples=40, deadline=None)


@few
@given(world=worlds, day=st.integers(0, 3), more=st.integers(1, 3))
def test_a_day_does_not_depend_on_later_days(world: World, day: int, more: int):
    short, long = catalogue(world, day), until(catalogue(world, day + more), day)
    for column in fields(Catalogue):
        np.testing.assert_array_equal(getattr(short, column.name), getattr(long, column.name))
    people, longer = users(world), users(replace(world, days=world.days + more))
    one = events_table(world, day, events(world, short, people, day))
    assert one.equals(events_table(world, day, events(world, long, longer, day)))
    assert items_table(world, short, day).equals(items_table(world, long, day))


@few
@given(world=worlds, day=st.integers(0, 3))
def test_events_name_known_items_and_users(world: World, day: int):
    shop = catalogue(world, day)
    found = events(world, shop, users(world), day)
    assert len(found.item) == world.events_per_day
    assert found.item.min() >= 0
    assert found.item.max() < len(shop)
    assert found.user.min() >= 0
    assert found.user.max() < world.users


@few
@given(world=worlds, day=st.integers(0, 2))
def test_dirt_is_added_and_changes_nothing_else(world: World, day: int):
    found = events(world, catalogue(world, day), users(world), day)
    clean = events_table(replace(world, dirty_share=0.0), day, found)
    assert events_table(world, day, found).slice(0, clean.num_rows).equals(clean)
    assert clean["user_id"].null_count == clean["item_id"].null_count == 0
