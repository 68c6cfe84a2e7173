"""What each part of the study asks on small made files, how often a part may be opened, and what is looked at before it is."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from jobs import study as command
from jobs import study_cells, study_data
from jobs.study_data import World
from pipeline import study, tracking
from pipeline.context import Home, derive_seed
from pipeline.errors import ConfigError
from pipeline.study import DataSet

SHARE = 0.4  # of users whose questions stay shut


@dataclass(frozen=True)
class Bought:
    """What a made user bought, oldest first, and the days since the purchase before, None = not told."""

    items: list[str]
    gaps: list[int | None]


def shoppers(seed: int = 0) -> dict[str, Bought]:
    """40 users of 1 to 14 events; one item may come again."""
    drawn, found = random.Random(seed), {}
    for user in range(40):
        count = 1 + user % 14
        items = [f"B{drawn.randrange(25):03d}" for _ in range(count)]
        found[f"A{user:02d}"] = Bought(items, [None, *drawn.choices([0, 0, 1, 30], k=count - 1)])
    return found


def beauty(folder: Path, bought: dict[str, Bought]) -> World:
    """The data set of two CSV files, whose lines come in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{user},{item},{place},{'' if gap is None else gap}"
        for user, log in bought.items()
        for place, (item, gap) in enumerate(zip(log.items, log.gaps, strict=True))
    ]
    random.Random(1).shuffle(lines)
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,position,days_since_previous", *lines]) + "\n", encoding="utf-8")
    goods = [f"B{item:03d},Beauty|Kind {item % 3},word{item}" for item in range(25)]
    (folder / "items.csv").write_text("\n".join(["item_id,categories,keywords", *goods]) + "\n", encoding="utf-8")
    return study_data.read_world(DataSet(kind="amazon_beauty", path=str(folder), confirm_share=SHARE), "beauty", 0, Home(folder))


def shut(user: str) -> bool:
    return derive_seed("confirm", user) % 10_000 / 10_000 < SHARE


def told(world: World, part: study.Part) -> list[tuple[str, list[str], str, bool]]:
    """(user, history, answer, tied) of every question, users in order."""
    users, ids = sorted(shoppers()), world.catalogue.item_ids[world.item_T].tolist()
    asked = world.asked(part)
    return [
        (users[world.user_T[at]], ids[start:stop], ids[at], bool(tied))
        for at, start, stop, tied in zip(asked.at_Q, asked.start_Q, asked.stop_Q, asked.tied_Q, strict=True)
    ]


def test_each_part_asks_its_own_users_for_what_came_after_all_they_bought(tmp_path: Path) -> None:
    bought = shoppers()
    world = beauty(tmp_path, bought)
    for part, back in (("valid", 2), ("test", 1), ("confirm", 1)):
        wanted = []
        for user, log in sorted(bought.items()):
            if len(log.items) >= 4 and shut(user) == (part == "confirm"):
                at = len(log.items) - back
                wanted.append((user, log.items[:at], log.items[at], not log.gaps[at]))  # bought on the day of the one before: which came first is not known
        assert len(wanted) > 5
        assert {tied for *_, tied in wanted} == {True, False}
        assert told(world, part) == wanted
    parts = {part: set(world.asked(part).at_Q.tolist()) for part in ("valid", "test", "confirm")}
    assert not (parts["valid"] & parts["test"]) | (parts["valid"] & parts["confirm"]) | (parts["test"] & parts["confirm"])
    trained = set(np.flatnonzero(world.part_T == study_data.TRAIN).tolist())
    assert not trained & set.union(*parts.values())


def test_answers_of_later_parts_change_nothing_that_is_learnt_or_asked_before(tmp_path: Path) -> None:
    """Whoever reads ahead tells the two worlds apart: the last purchases of all users are others."""
    bought = shoppers()
    other = {user: replace(log, items=[*log.items[:-1], "B007"]) if len(log.items) >= 4 else log for user, log in bought.items()}
    one, two = beauty(tmp_path / "one", bought), beauty(tmp_path / "two", other)
    assert told(one, "valid") == told(two, "valid")
    assert [row[:2] for row in told(one, "confirm")] == [row[:2] for row in told(two, "confirm")]
    assert told(one, "confirm") != told(two, "confirm")
    np.testing.assert_array_equal(one.count_N, two.count_N)
    for a, b in zip(one.train()[:2], two.train()[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_tied_and_repeated_answers_stand_in_slices_of_their_own(tmp_path: Path) -> None:
    world = beauty(tmp_path, shoppers())
    page = study.parse({"data": {"beauty": {"kind": "amazon_beauty", "path": str(tmp_path)}}, "arms": {"ids": {"tokenizer": "none"}}}, where="here")
    cell = study.grid(page, {"beauty": "digest"}, "confirm")[0]
    asked = study_cells.questions(study_cells.Job(page, cell, world, study_cells.Store(tmp_path), "confirm"))
    tied = np.array([row[3] for row in told(world, "confirm")])
    again = np.array([answer in history for _, history, answer, _ in told(world, "confirm")])
    assert (again & ~tied).any()
    np.testing.assert_array_equal(asked.masks["all"], ~tied & ~again)
    np.testing.assert_array_equal(asked.masks["all_with_ties"], ~again)
    np.testing.assert_array_equal(asked.masks["all_with_repeats"], ~tied)
    assert not any((mask & (tied | again)).any() for name, mask in asked.masks.items() if not name.startswith("all_with"))


def test_movielens_asks_for_blocks_from_before_them(tmp_path: Path) -> None:
    drawn, rated = random.Random(3), {}
    for user, count in (("1", 20), ("2", 9), ("3", 4)):
        rated[user] = [(1000 + place // 2, str(film), 1 + film % 5) for place, film in enumerate(drawn.sample(range(1, 31), count))]  # two in a second
    lines = [f"{user}\t{film}\t{stars}\t{second}" for user, log in rated.items() for second, film, stars in log]
    drawn.shuffle(lines)
    (tmp_path / "ml-100k.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines]) + "\n", encoding="utf-8")
    films = [f"{film}\tFilm {film}\t1990\tDrama" for film in range(1, 31)]
    (tmp_path / "ml-100k.item").write_text("\n".join(["item_id:token\tmovie_title\trelease_year\tclass", *films]) + "\n", encoding="utf-8")
    world = study_data.read_world(DataSet(kind="movielens", path=str(tmp_path)), "films", 0, Home(tmp_path))
    ids = world.catalogue.item_ids[world.item_T].tolist()
    for part in ("valid", "test"):
        wanted = []
        for log in rated.values():
            films_of, count = [film for _, film, _ in log], len(log)
            test = count - count // 5
            bounds = (test, count) if part == "test" else (test - count // 10, test)
            first, last = (place + place % 2 for place in bounds)  # a second across the border is the earlier part's
            wanted += [(sorted(films_of[:first]), film) for film in films_of[first:last]]
        asked = world.asked(part)
        found = [(sorted(ids[start:stop]), ids[at]) for at, start, stop in zip(asked.at_Q, asked.start_Q, asked.stop_Q, strict=True)]
        assert sorted(found) == sorted(wanted)
    assert not len(world.asked("confirm").at_Q)
    assert len(world.asked("test").at_Q) == 4 + 1


def test_movielens_seconds_are_baskets_whose_order_no_id_decides(tmp_path: Path) -> None:
    seconds = {str(film): 1000 + film // 10 for film in range(1, 40)}  # ten films a second
    origin = ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *(f"1\t{film}\t4\t{second}" for film, second in seconds.items())]
    (tmp_path / "ml-100k.inter").write_text("\n".join(origin) + "\n", encoding="utf-8")
    films = ["item_id:token\tmovie_title\trelease_year\tclass", *(f"{film}\tFilm {film}\t1990\tDrama" for film in seconds)]
    (tmp_path / "ml-100k.item").write_text("\n".join(films) + "\n", encoding="utf-8")
    world = study_data.read_world(DataSet(kind="movielens", path=str(tmp_path)), "films", 0, Home(tmp_path))
    ids = [int(each) for each in world.catalogue.item_ids[world.item_T].tolist()]
    assert world.basket_T is not None
    for at in range(len(ids)):
        basket = np.flatnonzero(world.basket_T == world.basket_T[at])
        assert {ids[other] for other in basket} == {film for film in range(1, 40) if film // 10 == ids[at] // 10}
        if world.part_T[at] == study_data.TRAIN:
            assert world.stop_T[at] == basket[0]
    assert all(ids[basket.min() : basket.max() + 1] != sorted(ids[basket.min() : basket.max() + 1]) for basket in (np.arange(9), np.arange(9, 19)))


# ---------------------------------------------------------------- opening a part


def at_commit(monkeypatch: pytest.MonkeyPatch, sha: str) -> None:
    monkeypatch.setenv("SID_GIT_SHA", sha)
    tracking.git_sha.cache_clear()


@pytest.fixture
def todo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[command.Plan]:
    """A study without cells, at commit `one`."""
    at_commit(monkeypatch, "one")
    yield command.Plan(study.load("study-smoke"), [], {}, "test", Home(tmp_path / "home"), "")
    tracking.git_sha.cache_clear()


def openings(plan: command.Plan) -> dict[str, list[str]]:
    path = plan.home.folder("study") / "openings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def test_a_part_is_opened_as_often_as_the_page_says_and_a_rerun_does_not_count(todo: command.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for commit in ("one", "one", "two", "two", "three"):
        at_commit(monkeypatch, commit)
        found.append(command.open_part(todo))
    assert found == [1, 1, 2, 2, 3]
    before = openings(todo)
    at_commit(monkeypatch, "four")
    with pytest.raises(ConfigError, match="was opened before") as caught:
        command.open_part(todo)
    assert caught.value.expected == "at most 3 times"
    assert openings(todo) == before
    at_commit(monkeypatch, "two")
    assert command.open_part(todo) == 3, "what was opened may be read again"


def test_the_confirmation_part_is_opened_once_and_counted_by_itself(todo: command.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    command.open_part(todo)
    confirm = replace(todo, part="confirm")
    assert [command.open_part(confirm), command.open_part(confirm)] == [1, 1]
    at_commit(monkeypatch, "two")
    with pytest.raises(ConfigError, match="the confirm part was opened before"):
        command.open_part(confirm)
    assert command.open_part(todo) == 2
    assert {name: len(each) for name, each in openings(todo).items()} == {"study-smoke/test": 2, "study-smoke/confirm": 1}


def test_another_configuration_at_the_same_commit_is_another_opening(todo: command.Plan) -> None:
    confirm = replace(todo, part="confirm")
    command.open_part(confirm)
    with pytest.raises(ConfigError, match="was opened before"):
        command.open_part(replace(confirm, page=study.load("study-smoke", ["train_tokenizer.ada_sid.codebook_size=25"])))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit with a file in each folder."""
    root = tmp_path / "checkout"
    for name in ("jobs/a.py", "pipeline/b.py", "docs/c.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("old\n", encoding="utf-8")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    monkeypatch.delenv("SID_GIT_SHA", raising=False)
    monkeypatch.setattr(tracking, "ROOT", root)
    tracking.git_sha.cache_clear()
    return root


@pytest.mark.parametrize("changed", ["jobs/a.py", "pipeline/b.py", "pipeline/new.py"])
def test_a_part_is_not_opened_by_code_that_is_not_committed(todo: command.Plan, checkout: Path, changed: str) -> None:
    sha = tracking.git_sha()
    assert len(sha) == 40
    assert tracking.committed_sha() == sha
    (checkout / "docs" / "c.md").write_text("new\n", encoding="utf-8")
    assert tracking.committed_sha() == sha, "words decide nothing"
    (checkout / changed).write_text("new\n", encoding="utf-8")
    assert tracking.git_sha() == sha
    with pytest.raises(ConfigError, match="not as committed") as caught:
        command.open_part(todo)
    assert changed in caught.value.found
    assert "git commit" in caught.value.next_command
    assert not openings(todo)


def test_a_part_is_not_opened_at_an_unknown_commit(todo: command.Plan, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ROOT", checkout / "docs")  # no checkout here
    tracking.git_sha.cache_clear()
    assert tracking.git_sha() == "unknown"
    for given in (None, "unknown", ""):
        if given is not None:
            at_commit(monkeypatch, given)
        with pytest.raises(ConfigError, match="commit is not known") as caught:
            command.open_part(todo)
        assert "SID_GIT_SHA" in caught.value.next_command
    assert not openings(todo)


@pytest.mark.parametrize("content", [None, b"# Results\n", b"<!-- study:study-smoke -->\n", b"\xff\xfe"], ids=["no file", "no markers", "half", "no text"])
def test_a_results_file_without_a_place_is_refused_before_a_part_is_opened_or_a_cell_runs(
    todo: command.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    results, ran = tmp_path / "results.md", []
    monkeypatch.setattr(command, "execute", lambda *given: ran.append(given))
    if content is not None:
        results.write_bytes(content)
    with pytest.raises(ConfigError, match="results file") as caught:
        command.run(todo, jobs=1, out=tmp_path / "out", results=results)
    assert caught.value.where == str(results)
    assert not openings(todo)
    assert not ran
