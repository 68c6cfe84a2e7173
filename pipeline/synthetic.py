"""A seeded shop of any size with a known truth: taste clusters, Zipf popularity, daily arrivals, behaviour noise, text and rendered pictures.

Every day is a function of (world, day): how many days are generated changes none of them. All of it is vectorised; only distinct pictures
are drawn one by one. Not here: where the files lie and how they are read (datasets/shop.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.context import derive_seed
from pipeline.log import progress

if TYPE_CHECKING:
    from PIL import Image

DAY_SECONDS = 86_400
NOISE_TIES = ("rarity", "independent", "reversed")
TRUNCATED, ABSENT = "images/truncated.jpg", "images/absent.jpg"
TYPES, TYPE_SHARES = np.array(["click", "cart", "buy"]), np.array([0.8, 0.12, 0.08])

DEPARTMENTS = {
    "kitchen": "kettle teapot saucepan mixing-bowl chopping-board spatula colander cake-tin",
    "garden": "watering-can plant-pot trowel bird-feeder hammock lantern-stake hose seed-tray",
    "stationery": "notebook fountain-pen pencil-case desk-calendar envelope-set stapler ring-binder ruler",
    "toys": "wooden-train jigsaw teddy-bear spinning-top kite doll-house building-blocks marble-run",
    "lighting": "desk-lamp fairy-lights candle-holder lampshade night-light torch pendant-light wall-sconce",
    "bags": "tote-bag backpack wash-bag suitcase shoulder-bag lunch-bag wallet duffel",
    "jewellery": "necklace bracelet earrings brooch ring anklet cufflinks hair-clip",
    "clothing": "jumper scarf raincoat shirt trousers dress cardigan socks",
    "shoes": "trainers sandals ankle-boots slippers loafers wellingtons clogs court-shoes",
    "sports": "yoga-mat football tennis-racket dumbbell swimming-goggles skipping-rope bike-helmet jersey",
    "bathroom": "bath-towel soap-dish shower-curtain toothbrush-holder bath-mat mirror laundry-basket robe",
    "bedroom": "pillowcase duvet-cover blanket alarm-clock mattress-topper bedside-table quilt eye-mask",
    "beauty": "lipstick hand-cream shampoo nail-polish perfume face-mask mascara comb",
    "electronics": "headphones keyboard webcam power-bank loudspeaker mouse tablet-stand charger",
    "pets": "dog-lead cat-bed food-bowl scratching-post fish-tank bird-cage chew-toy grooming-brush",
    "crafts": "knitting-yarn paint-set sewing-kit embroidery-hoop glue-gun canvas ribbon bead-box",
}
BRANDS = ["Alder", "Birch", "Cedar", "Dunlin", "Elm", "Fenwick", "Gorse", "Hazel", "Iris", "Juniper",
          "Kestrel", "Larch", "Maple", "Nettle", "Osprey", "Poplar", "Quill", "Rowan", "Sorrel", "Thistle"]  # fmt: skip
STYLES = ["modern", "rustic", "vintage", "minimal", "playful", "elegant", "striped", "floral"]
COLOURS = {
    "red": (200, 40, 45), "blue": (45, 80, 190), "green": (50, 140, 70), "yellow": (235, 200, 60), "black": (35, 35, 40), "white": (245, 245, 240),
    "orange": (235, 130, 40), "purple": (125, 60, 150), "pink": (235, 140, 170), "brown": (120, 80, 50), "grey": (130, 130, 135), "teal": (40, 140, 145),
}  # fmt: skip
QUALIFIERS = ["classic", "travel", "junior", "deluxe", "outdoor", "compact", "heavy-duty", "handmade"]
MOST = {"clusters": len(DEPARTMENTS) * (len(QUALIFIERS) + 1), "subclusters": 8, "styles": 24}  # what words and pictures can tell apart
EXTRAS = ["A lovely gift", "Limited edition", "Customer favourite", "Free returns", "New this season", "Made to last", "Easy to clean", "Ships in two days"]


@dataclass(frozen=True, kw_only=True)
class World:
    """One shop; equal fields give equal bytes.

    Args:
        items: catalogue on the first day; users, events_per_day: sizes (clean events); days: how many are written.
        clusters, subclusters, styles: the truth's sizes; a taste is for a cluster and a sub-cluster in it, never for a style.
        arrivals_per_day: new items each later day, as a share of `items`; edits_per_day: items with a new text each later day, likewise.
        zipf: exponent of popularity by rank; loyalty: share of a user's sessions in the main cluster, the second gets half the rest.
        noise: largest share of an item's events that go to random users; its mean over items is half of it, however it is tied
            (over events it is less than that for rarity and more for reversed, because popular items have most events).
        noise_tie: what the noise grows with: rarity | independent (neither) | reversed (popularity).
        text_quality, image_quality: share of items whose noun, or picture, shows their own cluster; the rest shows a random one.
        images: pictures at all; image_share: share of items with one; distinct_images: how many are drawn at most; image_size: pixels a side.
        dirty_share: bad, doubled and late rows added to each events file, as a share of the clean ones; above 0 also two bad pictures and
            two bad catalogue rows.
        seed: names the world. start: first day, ISO.
    Raises: ValueError for sizes that cannot be.
    """

    items: int = 1000
    users: int = 500
    days: int = 14
    events_per_day: int = 2000
    clusters: int = 12
    subclusters: int = 4
    styles: int = 6
    arrivals_per_day: float = 0.01
    edits_per_day: float = 0.0
    zipf: float = 0.9
    loyalty: float = 0.7
    noise: float = 0.8
    noise_tie: str = "rarity"
    text_quality: float = 0.9
    image_quality: float = 0.9
    images: bool = True
    image_share: float = 0.95
    distinct_images: int = 500
    image_size: int = 112
    dirty_share: float = 0.01
    seed: int = 0
    start: str = "2026-03-02"
    file_format: str = "csv"

    def __post_init__(self) -> None:
        """Refuse a world that cannot be built."""
        shares = ("arrivals_per_day", "edits_per_day", "loyalty", "noise", "text_quality", "image_quality", "image_share", "dirty_share")
        counts = ("items", "users", "days", "events_per_day", "clusters", "subclusters", "styles", "distinct_images", "image_size")
        bad = [name for name in shares if not 0 <= getattr(self, name) <= 1] + [name for name in counts if getattr(self, name) < 1]
        bad += [] if self.noise_tie in NOISE_TIES else ["noise_tie"]
        bad += [] if self.file_format in ("csv", "parquet") else ["file_format"]
        bad += [f"{name} (at most {most})" for name, most in MOST.items() if getattr(self, name) > most]
        if self.images and self.distinct_images < self.clusters:
            bad.append("distinct_images (fewer than clusters)")
        if bad:
            raise ValueError(f"out of range: {', '.join(bad)}")
        date.fromisoformat(self.start)

    def day(self, number: int) -> date:
        """The date of day 0, 1, ..."""
        return date.fromisoformat(self.start) + timedelta(days=number)

    def generator(self, *stream: object) -> np.random.Generator:
        """Random numbers of one named stream; streams do not touch each other."""
        return np.random.default_rng([self.seed, derive_seed(*stream)])

    @property
    def arrivals(self) -> int:
        """New items on each day after the first."""
        return round(self.items * self.arrivals_per_day)


@dataclass(frozen=True)
class Catalogue:
    """The truth about every item that has arrived, in order of arrival; each array has shape (N,).

    arrival: day number. rarity: quantile in (0, 1), 0 = most popular. weight: popularity, rarity^-zipf. noise: share of events that go to random users.
    The rest picks words and pictures: text_cluster and photo differ from the item's own where quality failed; photo is -1 without a picture.
    """

    arrival: np.ndarray
    cluster: np.ndarray
    subcluster: np.ndarray
    style: np.ndarray
    rarity: np.ndarray
    weight: np.ndarray
    noise: np.ndarray
    brand: np.ndarray
    text_cluster: np.ndarray
    photo: np.ndarray

    def __len__(self) -> int:
        """Number of items that have arrived."""
        return len(self.arrival)

    @property
    def item_id(self) -> np.ndarray:
        """Item ids "i0000000", ..., in order of arrival."""
        return names("i", np.arange(len(self)))


def names(prefix: str, numbers: np.ndarray) -> np.ndarray:
    """Ids of a prefix and seven digits, shape of `numbers`."""
    return np.char.add(prefix, np.char.zfill(numbers.astype(str), 7))


def catalogue(world: World, day: int) -> Catalogue:
    """Every item that has arrived up to day number `day`; a later call only appends."""
    parts = [_arrivals(world, number) for number in range(day + 1)]
    return Catalogue(**{column.name: np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Catalogue)})


def _arrivals(world: World, day: int) -> Catalogue:
    """The items that arrive on one day."""
    count, rng = (world.items if day == 0 else world.arrivals), world.generator("items", day)
    cluster, sub, style = (rng.integers(0, size, count) for size in (world.clusters, world.subclusters, world.styles))
    # On the first day the ranks are a permutation, so popularity is Zipf exactly; later items draw their place among them.
    rarity = (rng.permutation(count) + 0.5) / count if day == 0 else rng.uniform(0.5 / world.items, 1, count)
    tied = {"rarity": rarity, "independent": rng.uniform(size=count), "reversed": 1 - rarity}[world.noise_tie]
    wrong_text, wrong_image = (rng.uniform(size=count) >= quality for quality in (world.text_quality, world.image_quality))
    elsewhere_text, elsewhere_image = rng.integers(0, world.clusters, (2, count))
    shown = photo_index(world, np.where(wrong_image, elsewhere_image, cluster), sub, style, rng.integers(0, 1 << 30, count))
    pictured = world.images & (rng.uniform(size=count) < world.image_share)
    return Catalogue(
        arrival=np.full(count, day),
        cluster=cluster,
        subcluster=sub,
        style=style,
        rarity=rarity,
        weight=rarity**-world.zipf,
        noise=world.noise * tied,
        brand=rng.integers(0, len(BRANDS), count),
        text_cluster=np.where(wrong_text, elsewhere_text, cluster),
        photo=np.where(pictured, shown, -1),
    )


def photo_shape(world: World) -> tuple[int, int, int, int]:
    """How many clusters, shapes, colours and variants the pictures tell apart, given how many may be drawn; clusters always all."""
    left = max(world.distinct_images // world.clusters, 1)
    shapes = min(world.subclusters, left)
    colours = min(world.styles, max(left // shapes, 1))
    return world.clusters, shapes, colours, max(left // (shapes * colours), 1)


def photo_index(world: World, cluster: np.ndarray, sub: np.ndarray, style: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Number of the picture that shows (cluster, sub-cluster, style) in a drawn variant, each shape (N,)."""
    _, shapes, colours, variants = photo_shape(world)
    return ((cluster * shapes + sub % shapes) * colours + style % colours) * variants + draw % variants


@dataclass(frozen=True)
class Users:
    """Tastes: main and second cluster, and the running share of activity, each shape (U,)."""

    main: np.ndarray
    second: np.ndarray
    activity: np.ndarray

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` user numbers by activity."""
        return np.searchsorted(self.activity, rng.uniform(0, self.activity[-1], count), side="right").clip(max=len(self.activity) - 1)


def users(world: World) -> Users:
    """Every user's tastes; activity is log-normal."""
    rng = world.generator("users")
    main, second = rng.integers(0, world.clusters, (2, world.users))
    return Users(main, second, np.cumsum(rng.lognormal(0.0, 1.0, world.users)))


@dataclass(frozen=True)
class Events:
    """Events of one day in order of time; user and item are numbers, second counts from midnight, session within the day; each shape (E,)."""

    user: np.ndarray
    item: np.ndarray
    second: np.ndarray
    event_type: np.ndarray
    session: np.ndarray
    noisy: np.ndarray


def events(world: World, shop: Catalogue, people: Users, day: int) -> Events:
    """The clean events of one day.

    A session has one user and one cluster by the user's taste; each event takes an item of it by popularity, two times in three from the user's
    own sub-cluster. With probability `noise` of its item an event goes to a random user instead, in a session of its own.
    """
    count, rng = world.events_per_day, world.generator("events", day)
    session = np.repeat(np.arange(count), 1 + rng.poisson(2.0, count))[:count]
    sessions = session[-1] + 1
    user = people.draw(rng, sessions)
    cluster = _taste(world, people, user, rng)
    begin = rng.beta(3.0, 2.0, sessions) * (DAY_SECONDS - 3600)
    item = _pick(world, shop, cluster[session], _preferred(world, user, cluster)[session], rng)
    second = np.minimum((begin[session] + _gaps(session, rng)).astype(np.int64), DAY_SECONDS - 1)
    noisy = rng.uniform(size=count) < shop.noise[item]
    order = np.lexsort((item, session, second))
    who = np.where(noisy, people.draw(rng, count), user[session])
    basket = np.where(noisy, sessions + np.arange(count), session)
    kind = TYPES[rng.choice(len(TYPES), count, p=TYPE_SHARES)]
    return Events(who[order], item[order], second[order], kind[order], basket[order], noisy[order])


def _taste(world: World, people: Users, user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cluster of each session, shape of `user`."""
    draw, other = rng.uniform(size=len(user)), rng.integers(0, world.clusters, len(user))
    return np.select([draw < world.loyalty, draw < (1 + world.loyalty) / 2], [people.main[user], people.second[user]], other)


def _preferred(world: World, user: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """The sub-cluster a user likes within a cluster: a fixed mixing of both numbers, so that no (users x clusters) matrix is needed."""
    return ((user * 2_654_435_761 + cluster * 40_503 + world.seed * 97) >> 8) % world.subclusters


def _gaps(session: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Seconds since the session's begin, rising within a session, shape (E,)."""
    steps = np.cumsum(rng.exponential(60.0, len(session)) + 1)
    return steps - steps[np.searchsorted(session, session)]


def _pick(world: World, shop: Catalogue, cluster: np.ndarray, preferred: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An item of each wanted cluster by popularity, shape (E,); an empty sub-cluster falls back to its cluster, an empty cluster to all."""
    leaf = shop.cluster * world.subclusters + shop.subcluster
    order = np.argsort(leaf, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(shop.weight[order])])
    edge = total[np.searchsorted(leaf[order], np.arange(world.clusters * world.subclusters + 1))]
    own = rng.uniform(size=len(cluster)) < 2 / 3
    first = cluster * world.subclusters
    low, high = np.where(own, edge[first + preferred], edge[first]), np.where(own, edge[first + preferred + 1], edge[first + world.subclusters])
    low, high = np.where(high > low, low, edge[first]), np.where(high > low, high, edge[first + world.subclusters])
    low, high = np.where(high > low, low, 0.0), np.where(high > low, high, total[-1])
    place = np.searchsorted(total, low + rng.uniform(size=len(cluster)) * (high - low), side="right") - 1
    return order[place.clip(0, len(order) - 1)]


def events_table(world: World, day: int, found: Events) -> pa.Table:
    """user_id, item_id, event_ts (ISO text in CSV, else TIMESTAMP), event_type, value, session_id: the clean rows, then the dirty ones."""
    item, user = names("i", found.item), names("u", found.user)
    moment = np.datetime64(world.day(day), "s") + found.second.astype("timedelta64[s]")
    session = np.char.add(f"{world.day(day):%Y%m%d}-", found.session.astype(str))
    table = pa.table(
        {
            "user_id": pa.array(user, pa.string()),
            "item_id": pa.array(item, pa.string()),
            "event_ts": pa.array(moment, pa.timestamp("s")),
            "event_type": pa.array(found.event_type, pa.string()),
            "value": pa.array(np.ones(len(item))),
            "session_id": pa.array(session, pa.string()),
        }
    )
    table = pa.concat_tables([table, *_dirty_events(world, day, table)])
    if world.file_format == "parquet":
        return _replaced(table, "event_ts", table["event_ts"].cast(pa.timestamp("us", "UTC")))
    return _replaced(table, "event_ts", pc.coalesce(pc.strftime(table["event_ts"], format="%Y-%m-%dT%H:%M:%SZ"), "not a time"))


def _dirty_events(world: World, day: int, clean: pa.Table) -> list[pa.Table]:
    """Copies of clean rows made bad in six ways: no user, no item, unreadable time, a later day, an earlier day (late, which is legal), doubled."""
    count = math.ceil(clean.num_rows * world.dirty_share / 6)
    if count == 0:
        return []
    drawn = np.sort(world.generator("dirty", day).choice(clean.num_rows, (6, min(count, clean.num_rows // 6)), replace=False), axis=1)
    rows = [clean.take(pa.array(part)) for part in drawn]
    blank, now = pa.nulls(rows[0].num_rows, pa.string()), [part["event_ts"] for part in rows]
    day_seconds = pa.scalar(DAY_SECONDS, pa.duration("s"))
    late = [] if day == 0 else [_replaced(rows[4], "event_ts", pc.subtract(now[4], day_seconds))]
    return [
        _replaced(rows[0], "user_id", blank),
        _replaced(rows[1], "item_id", blank),
        _replaced(rows[2], "event_ts", pa.nulls(rows[2].num_rows, pa.timestamp("s"))),
        _replaced(rows[3], "event_ts", pc.add(now[3], day_seconds)),
        *late,
        rows[5],
    ]


def _replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with another column of that name."""
    return table.set_column(table.schema.get_field_index(name), name, column)


def items_table(world: World, shop: Catalogue, day: int) -> pa.Table:
    """item_id, title, text, category, image_uri of the items that arrive or change on one day; dirty worlds add two bad rows on the first."""
    chosen = np.flatnonzero(shop.arrival == day)
    known, rng = np.flatnonzero(shop.arrival < day), world.generator("edits", day)
    edits = min(round(world.items * world.edits_per_day), len(known))
    edited = np.sort(rng.choice(known, edits, replace=False)) if edits else known[:0]
    rows = np.concatenate([chosen, edited])
    extra = np.concatenate([np.full(len(chosen), -1), rng.integers(0, len(EXTRAS), edits)])
    title, text, category = phrases(shop, rows, extra)
    table = pa.table(
        {
            "item_id": pa.array(shop.item_id[rows], pa.string()),
            "title": title,
            "text": text,
            "category": category,
            "image_uri": pa.array(image_uris(world, shop)[rows], pa.string()),
        }
    )
    if day > 0 or world.dirty_share == 0:
        return table
    return pa.concat_tables([table, table.slice(0, 1), _replaced(table.slice(1, 1), "item_id", pa.nulls(min(1, max(table.num_rows - 1, 0)), pa.string()))])


def phrases(shop: Catalogue, rows: np.ndarray, extra: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Title, text and category of the chosen items; `extra` picks a further sentence, -1 = none; each shape (rows,)."""
    departments, nouns = np.array(list(DEPARTMENTS)), _nouns()
    shown, style = shop.text_cluster[rows], shop.style[rows]
    qualifier = np.array(["", *(f"{word} " for word in QUALIFIERS)])[shown // len(departments)]
    noun = np.char.add(qualifier, nouns[shown % len(departments), shop.subcluster[rows]])
    brand, look, colour = np.array(BRANDS)[shop.brand[rows]], np.array(STYLES)[style % len(STYLES)], np.array(list(COLOURS))[style % len(COLOURS)]
    title = pc.binary_join_element_wise(*map(_strings, (brand, look, colour, noun)), " ")
    text = pc.binary_join_element_wise(*map(_strings, (np.char.capitalize(colour), noun)), "in", _strings(look), "style by", _strings(brand), " ")
    sentence = _strings(np.array([*(f". {part}." for part in EXTRAS), "."])[extra])
    return title, pc.binary_join_element_wise(text, sentence, ""), _strings(departments[shop.cluster[rows] % len(departments)])


def _strings(words: np.ndarray) -> pa.Array:
    """Words as an Arrow column."""
    return pa.array(words, pa.string())


def _nouns() -> np.ndarray:
    """Nouns by department and sub-cluster, shape (departments, SUBCLUSTERS)."""
    return np.char.replace(np.array([row.split() for row in DEPARTMENTS.values()]), "-", " ")


def image_uris(world: World, shop: Catalogue) -> np.ndarray:
    """Relative path of each item's picture, None without one, shape (N,); in a dirty world the first two point at bad files."""
    paths = np.char.add(np.char.add("images/", names("p", shop.photo.clip(min=0))), ".jpg").astype(object)
    paths[shop.photo < 0] = None
    if world.dirty_share > 0:
        first = np.flatnonzero((shop.photo >= 0) & (shop.arrival == 0))[:2]
        paths[first] = np.array([TRUNCATED, ABSENT], dtype=object)[: len(first)]
    return paths


def truth(world: World, shop: Catalogue) -> pa.Table:
    """The known truth by item: arrival DATE, cluster, sub_cluster, style, rarity, weight, noise (share of its events that are random)."""
    return pa.table(
        {
            "item_id": _strings(shop.item_id),
            "arrival": pa.array(np.datetime64(world.day(0), "D") + shop.arrival.astype("timedelta64[D]"), pa.date32()),
            "cluster": pa.array(shop.cluster, pa.int32()),
            "sub_cluster": pa.array(shop.subcluster, pa.int32()),
            "style": pa.array(shop.style, pa.int32()),
            "rarity": pa.array(shop.rarity),
            "weight": pa.array(shop.weight),
            "noise": pa.array(shop.noise),
        }
    )


def until(shop: Catalogue, day: int) -> Catalogue:
    """The items that have arrived up to day number `day`."""
    count = int(np.searchsorted(shop.arrival, day, side="right"))
    return Catalogue(**{column.name: getattr(shop, column.name)[:count] for column in fields(Catalogue)})


def picture(world: World, photo: int) -> Image.Image:
    """The product picture of that number: backdrop by cluster, shape by sub-cluster, colour by style; size, place and turn by variant."""
    from PIL import Image, ImageDraw

    _, shapes, colours, variants = photo_shape(world)
    cluster, shape, colour = photo // (variants * colours * shapes), photo // (variants * colours) % shapes, photo // variants % colours
    rng = world.generator("photo", photo)
    image = Image.fromarray(_backdrop(world, cluster, rng))
    points = _outline(shape, rng) * world.image_size
    ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=list(COLOURS.values())[colour % len(COLOURS)], outline=(20, 20, 20))
    return image


def _backdrop(world: World, cluster: int, rng: np.random.Generator) -> np.ndarray:
    """A pale patterned ground of the cluster's hue with a little grain, uint8, shape (size, size, 3)."""
    y, x = np.mgrid[: world.image_size, : world.image_size] / world.image_size
    step = 4 + cluster // 4 % 5
    pattern = (np.zeros_like(x), (x * step) % 1 < 0.3, ((x * step) % 1 - 0.5) ** 2 + ((y * step) % 1 - 0.5) ** 2 < 0.06, ((x + y) * step) % 1 < 0.3)[
        cluster % 4
    ]
    hue = 2 * np.pi * (cluster / world.clusters + np.array([0, 1, 2]) / 3)
    ground = 200 + 45 * np.cos(hue) - 60 * pattern[..., None] + rng.normal(0, 4, (*x.shape, 1))
    return ground.clip(0, 255).astype(np.uint8)


def _outline(shape: int, rng: np.random.Generator) -> np.ndarray:
    """Corners of a polygon or star in the unit square, shape (corners, 2); each shape number has its own corner count and depth."""
    corners, depth = ((48, 1.0), (4, 1.0), (3, 1.0), (10, 0.45), (6, 1.0), (8, 0.4), (12, 0.75), (5, 1.0))[shape % 8]
    angle = np.arange(corners) * 2 * np.pi / corners + rng.uniform(-0.3, 0.3) - np.pi / 2
    radius = rng.uniform(0.26, 0.38) * np.where(np.arange(corners) % 2 == 0, 1.0, depth)
    return rng.uniform(0.44, 0.56, 2) + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def write(world: World, folder: Path) -> None:
    """events/<day>, items/<day>.csv, images/ and truth.parquet below an empty folder."""
    shop, people = catalogue(world, world.days - 1), users(world)
    for name in ("events", "items", "images"):
        (folder / name).mkdir()
    for day in progress(range(world.days), "shop days", world.days):
        known = until(shop, day)
        _write_table(events_table(world, day, events(world, known, people, day)), folder / "events" / f"{world.day(day)}.{world.file_format}")
        _write_table(items_table(world, known, day), folder / "items" / f"{world.day(day)}.csv")
    pq.write_table(truth(world, shop), folder / "truth.parquet")
    _write_pictures(world, np.unique(shop.photo[shop.photo >= 0]).tolist(), folder)


def _write_table(table: pa.Table, path: Path) -> None:
    """One CSV or Parquet file, by suffix."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pacsv.write_csv(table, path, pacsv.WriteOptions(quoting_style="needed"))


def _write_pictures(world: World, photos: list[int], folder: Path) -> None:
    """One JPEG per distinct picture; a dirty world gets one more, cut in half."""
    for photo in progress(photos, "shop pictures", len(photos)):
        content = jpeg(picture(world, photo))
        (folder / "images" / f"p{photo:07d}.jpg").write_bytes(content)
    if photos and world.dirty_share > 0:
        (folder / TRUNCATED).write_bytes(content[: len(content) // 2])


def jpeg(image: Image.Image) -> bytes:
    """The image as JPEG bytes."""
    stream = BytesIO()
    image.save(stream, "JPEG", quality=88)
    return stream.getvalue()
