"""The generated shop: its truth shows in its events, its dirt is where it is said to be, its pictures are what their numbers say."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.synthetic import (
    TRUNCATED,
    World,
    catalogue,
    events,
    events_table,
    image_uris,
    items_table,
    jpeg,
    photo_index,
    photo_shape,
    picture,
    truth,
    until,
    users,
    write,
)

WORLD = World(items=2000, users=300, days=3, events_per_day=30_000, clusters=8, subclusters=3, styles=3, distinct_images=48, image_size=48)


def drawn(world: World, day: int = 0):
    shop, people = catalogue(world, day), users(world)
    return shop, people, events(world, shop, people, day)


def test_popularity_is_zipf():
    shop, _, found = drawn(replace(WORLD, noise=0.0, clusters=1, subclusters=1, events_per_day=100_000))
    count = np.bincount(found.item, minlength=len(shop))
    rank = np.argsort(shop.rarity)
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(count[rank[:100]]), 1)[0]
    assert slope == pytest.approx(-WORLD.zipf, abs=0.1)


@pytest.mark.parametrize(("tie", "rare_noisier"), [("rarity", True), ("reversed", False), ("independent", None)])
def test_noise_follows_its_tie(tie: str, rare_noisier: bool | None):
    shop, _, found = drawn(replace(WORLD, noise_tie=tie))
    slope = np.corrcoef(shop.rarity, shop.noise)[0, 1]
    assert slope == pytest.approx({True: 1.0, False: -1.0, None: 0.0}[rare_noisier], abs=0.07)
    assert shop.noise.mean() == pytest.approx(WORLD.noise / 2, abs=0.02)
    assert found.noisy.mean() == pytest.approx(shop.noise[found.item].mean(), abs=0.01)
    rare = shop.rarity[found.item] > 0.5
    expected = {True: 1, False: -1, None: 0}[rare_noisier] * WORLD.noise / 2
    assert found.noisy[rare].mean() - found.noisy[shop.rarity[found.item] < 0.1].mean() == pytest.approx(expected, abs=0.2)


def test_tastes_show_in_clean_events_and_not_in_noisy_ones():
    shop, people, found = drawn(WORLD)
    liked = people.main[found.user] == shop.cluster[found.item]
    assert liked[~found.noisy].mean() > 0.65
    assert liked[found.noisy].mean() < 0.25


def test_sessions_have_one_user_and_clean_ones_one_cluster():
    shop, _, found = drawn(WORLD)
    order = np.argsort(found.session, kind="stable")
    same = np.diff(found.session[order]) == 0
    assert same.sum() > 10_000
    assert np.all(np.diff(found.user[order])[same] == 0)
    assert np.all(np.diff(shop.cluster[found.item[order]])[same] == 0)


def test_seconds_lie_within_the_day_in_order():
    _, _, found = drawn(WORLD)
    assert found.second.min() >= 0
    assert found.second.max() < 86_400
    assert np.all(np.diff(found.second) >= 0)


def test_items_are_bought_only_after_they_arrived():
    shop, people = catalogue(WORLD, 2), users(WORLD)
    first = events(WORLD, until(shop, 0), people, 0)
    last = events(WORLD, shop, people, 2)
    assert first.item.max() < WORLD.items
    assert last.item.max() >= WORLD.items + WORLD.arrivals
    assert np.all(shop.arrival[last.item] <= 2)


def test_empty_clusters_do_not_break_the_draw():
    shop, _, found = drawn(replace(WORLD, items=3, arrivals_per_day=0.0, clusters=40, subclusters=8, distinct_images=40, events_per_day=500))
    assert len(found.item) == 500
    assert found.item.max() < len(shop) == 3


def test_quality_decides_how_many_items_show_another_cluster():
    shop = catalogue(replace(WORLD, text_quality=0.6, image_quality=0.6), 0)
    expected = 0.4 * 7 / 8  # a random cluster is the right one in one of eight cases
    assert (shop.text_cluster != shop.cluster).mean() == pytest.approx(expected, abs=0.04)
    assert catalogue(replace(WORLD, text_quality=1.0), 0).text_cluster.tolist() == shop.cluster.tolist()


def test_dirty_rows_are_the_announced_kinds_and_leave_the_clean_ones():
    world = replace(WORLD, dirty_share=0.012)
    shop, _, found = drawn(world, 1)
    clean, dirty = events_table(replace(world, dirty_share=0.0), 1, found), events_table(world, 1, found)
    assert dirty.slice(0, clean.num_rows).equals(clean)
    extra, each = dirty.slice(clean.num_rows), 60
    assert extra.num_rows == 6 * each
    assert extra["user_id"].null_count == extra["item_id"].null_count == each
    moments = extra["event_ts"].to_pylist()
    assert moments.count("not a time") == each
    assert sum(moment.startswith("2026-03-04") for moment in moments) == each
    assert sum(moment.startswith("2026-03-02") for moment in moments) == each
    assert set(map(str, extra.slice(5 * each).to_pylist())) <= set(map(str, clean.to_pylist()))
    assert len(shop) == WORLD.items + WORLD.arrivals


def test_items_of_a_day_are_its_arrivals_and_edits():
    world = replace(WORLD, edits_per_day=0.01, dirty_share=0.0)
    shop = catalogue(world, 1)
    rows = items_table(world, shop, 1).to_pylist()
    edited = rows[world.arrivals :]
    assert [row["item_id"] for row in rows[: world.arrivals]] == shop.item_id[world.items :].tolist()
    before = {row["item_id"]: row["text"] for row in items_table(world, until(shop, 0), 0).to_pylist()}
    assert len(edited) == 20
    assert all(row["text"].startswith(before[row["item_id"]]) and row["text"] != before[row["item_id"]] for row in edited)


def test_text_names_cluster_colour_and_brand():
    row = items_table(replace(WORLD, dirty_share=0.0, text_quality=1.0), catalogue(WORLD, 0), 0).to_pylist()[0]
    brand, look, colour, noun = row["title"].split(" ", 3)
    assert row["text"] == f"{colour.capitalize()} {noun} in {look} style by {brand}."


@pytest.mark.parametrize(("distinct", "expected"), [(48, (8, 3, 2, 1)), (8, (8, 1, 1, 1)), (24, (8, 3, 1, 1)), (200, (8, 3, 3, 2))])
def test_pictures_never_exceed_their_bound_and_keep_clusters_apart(distinct: int, expected: tuple[int, ...]):
    world = replace(WORLD, distinct_images=distinct)
    assert photo_shape(world) == expected
    shop = catalogue(world, 0)
    photos = photo_index(world, shop.cluster, shop.subcluster, shop.style, np.arange(len(shop)))
    assert len(np.unique(photos)) == np.prod(expected) <= distinct
    np.testing.assert_array_equal(photos // np.prod(expected[1:]), shop.cluster)


def test_pictures_are_reproducible_and_distinct():
    contents = [jpeg(picture(WORLD, photo)) for photo in range(16)]
    assert contents == [jpeg(picture(WORLD, photo)) for photo in range(16)]
    assert len(set(contents)) == 16
    assert Image.open(BytesIO(contents[0])).size == (48, 48)


def test_write_lays_out_a_world_with_two_bad_pictures(tmp_path: Path):
    world = replace(WORLD, items=60, events_per_day=120, days=2, file_format="parquet", distinct_images=8)
    write(world, tmp_path)
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == ["2026-03-02.parquet", "2026-03-03.parquet"]
    assert str(pq.read_schema(tmp_path / "events" / "2026-03-02.parquet").field("event_ts").type) == "timestamp[us, tz=UTC]"
    uris = [uri for uri in image_uris(world, catalogue(world, 1)) if uri is not None]
    assert [uri for uri in uris if not (tmp_path / uri).exists()] == ["images/absent.jpg"]
    with pytest.raises((OSError, UnidentifiedImageError)), Image.open(tmp_path / TRUNCATED) as image:
        image.load()
    assert pq.read_table(tmp_path / "truth.parquet").equals(truth(world, catalogue(world, 1)))


@pytest.mark.parametrize("bad", [{"items": 0}, {"noise": 1.5}, {"noise_tie": "luck"}, {"file_format": "xls"}, {"distinct_images": 5}, {"clusters": 500}])
def test_impossible_worlds_are_refused(bad: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(WORLD, **bad)
