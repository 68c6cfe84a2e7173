"""What the documents name is there: files, tests, make targets, and every `sid` command with its options."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise

import pytest
import typer

from jobs.cli import app
from pipeline import config, study
from pipeline.context import ROOT

PAGES = ("README.md", "docs/operations.md", "docs/results.md")  # the log and the decisions tell of what was
COMMANDS = typer.main.get_command(app).commands
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def quoted(page: str) -> list[str]:
    """Every `...` of a page, and every line of its code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", text), *(line.strip() for block in blocks for line in block.splitlines())]


def typed(page: str) -> list[list[str]]:
    """The words of each `sid` command of a page, without the brackets and dots of shortened ones."""
    return [shlex.split(re.sub(r"\[(--.*?)\]| \.\.\.", r"\1", command)) for command in quoted(page) if re.match("sid [a-z]", command)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_named_is_there(page: str) -> None:
    for place in re.findall(r"\b(?:pipeline|jobs|sql|dags|docker|docs|tests)/[\w/.-]+\.\w+(?:::\w+)?", "\n".join(quoted(page))):
        path, _, name = place.partition("::")
        assert (ROOT / path).is_file(), place
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("page", PAGES)
def test_every_command_named_is_one_with_its_options(page: str) -> None:
    for words in typed(page):
        assert words[1] in COMMANDS, words
        known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} <= known, words
    assert {target for line in quoted(page) for target in re.findall("^make ([a-z][a-z-]*)", line)} <= TARGETS


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_of_a_command_is_one(page: str) -> None:
    """`sid study` has settings of its own."""
    for words in typed(page):
        for option, value in pairwise(words):
            if option == "--set" and words[1] != "study":
                config.load("tiny", (value,))


def test_every_link_to_a_section_leads_to_a_heading() -> None:
    """Headings as a Git host names them: lower case, without punctuation, dashes for blanks."""
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            target = (ROOT / page).parent / path if path else ROOT / page
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{page}: {path}#{anchor}"


def alternatives(pattern: str, chosen: frozenset[str] = frozenset()) -> list[tuple[str, frozenset[str]]]:
    """The pattern once for every choice of its groups, with the names that were chosen."""
    group = re.search(r"\(([^()]*)\)", pattern)
    if group is None:
        return [(pattern, chosen)]
    choices = [(pattern[: group.start()] + choice + pattern[group.end() :], choice) for choice in group[1].split("|")]
    return [each for text, choice in choices for each in alternatives(text, chosen if "/" in choice else chosen | {choice})]


def test_alternatives_are_spelled_out() -> None:
    assert [text for text, _ in alternatives("a/(b|(c|d)/e)/f")] == ["a/b/f", "a/c/e/f", "a/b/f", "a/d/e/f"]


@pytest.mark.parametrize("page", PAGES)
def test_every_alternative_of_a_studys_selection_chooses_a_cell(page: str) -> None:
    for words in typed(page):
        for option, pattern in pairwise(words):
            if option == "--only" and pattern != "REGEX":
                shown = study.load(words[2])
                names = [cell.name for cell in study.grid(shown, {label: "" for label, _, _ in study.worlds(shown)})]
                spelled = alternatives(pattern)
                found = [chosen for text, chosen in spelled if any(re.search(text, name) for name in names)]
                assert found, words
                assert frozenset().union(*(chosen for _, chosen in spelled)) == frozenset().union(*found), words
