"""Profiles: what loads, what is refused and with which words, what the digest covers."""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.stages import STAGES


def write_profile(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", config.known_profiles())
def test_every_shipped_profile_loads_and_says_what_its_file_says(name: str) -> None:
    loaded = config.load(name)
    assert loaded.name == name
    written = tomllib.loads((config.PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    flat = loaded.flat()
    for section, values in written.items():
        assert section in config.Config.model_fields, f"{name}.toml has an unknown section {section}"
        for key, value in values.items() if isinstance(values, dict) else ():
            if not isinstance(value, dict):
                assert getattr(getattr(loaded, section), key) == value
                assert flat[f"{section}.{key}"] == ([str(day) for day in value] if key == "closed_dates" else str(value) if key == "start" else value)


def test_every_stage_has_a_section() -> None:
    for stage in STAGES:
        assert stage.section in config.Config.model_fields


def test_every_setting_has_a_line_of_description() -> None:
    def fields(model: type[config.Section], prefix: str = "") -> list[str]:
        bare = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                bare += fields(field.annotation, f"{prefix}{name}.")
            elif not (field.description or "").strip():
                bare.append(f"{prefix}{name}")
        return bare

    assert fields(config.Config) == []


@pytest.mark.parametrize(
    ("text", "section", "key", "known"),
    [
        ("[train_tokenizer]\ncodebooksize = 3\n", "train_tokenizer", "codebooksize", "tokenizer"),
        ("[train_tokenizer.ada_sid]\ncodebooksize = 3\n", "train_tokenizer.ada_sid", "codebooksize", "codebook_size"),
        ("[tokenizer]\nsize = 3\n", "(top level)", "tokenizer", "train_tokenizer"),
        ("colour = 'red'\n", "(top level)", "colour", "seed"),
    ],
)
def test_an_unknown_key_is_named_with_its_section_its_file_and_the_known_names(tmp_path: Path, text: str, section: str, key: str, known: str) -> None:
    path = write_profile(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    error = caught.value
    assert f"{key!r}" in error.headline
    assert f"[{section}]" in error.headline
    assert path in error.where
    assert known in error.expected.removeprefix("one of ").split(", ")
    assert error.found == key


@pytest.mark.parametrize(
    ("text", "section", "key"),
    [
        ("[item_popularity]\nwindow_days = '30'\n", "item_popularity", "window_days"),  # a string is not a number
        ("[item_popularity]\nwindow_days = 30.0\n", "item_popularity", "window_days"),
        ("[item_popularity]\nwindow_days = true\n", "item_popularity", "window_days"),
        ("[item_popularity]\nwindow_days = 0\n", "item_popularity", "window_days"),  # out of range
        ("[content_embedding]\nnormalize = 1\n", "content_embedding", "normalize"),
        ("[plan_night]\npolicy = 'thawed'\n", "plan_night", "policy"),
        ("[source]\nstart = '2026-01-01'\n", "source", "start"),  # TOML has dates
        ("[source.options]\nitems = [1]\n", "source.options.items", ""),
        ("[content_cre]\nsources = ['sesion']\n", "content_cre.sources", "0"),  # it would train without these pairs
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_found(tmp_path: Path, text: str, section: str, key: str) -> None:
    path = write_profile(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    error = caught.value
    assert section in error.headline
    assert key in error.headline
    assert path in error.where
    assert error.expected
    assert error.found


def test_attention_heads_must_share_the_width() -> None:
    with pytest.raises(ConfigError, match="6 heads, width 128"):
        config.load("demo", ("train_retriever.tiger.dim=128", "train_retriever.tiger.num_heads=6"))


def test_head_and_tail_must_leave_no_item_in_both() -> None:
    assert config.load("demo", ("item_popularity.head_share=0.5", "item_popularity.tail_share=0.5")).item_popularity.head_share == 0.5
    with pytest.raises(ConfigError, match=r"0\.6 \+ 0\.5"):
        config.load("demo", ("item_popularity.head_share=0.6", "item_popularity.tail_share=0.5"))


def test_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ingest"):
        config.load(write_profile(tmp_path, "ingest = 3\n"))


@pytest.mark.parametrize("content", [b"[broken", b"\xff\xfe\x00", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(str(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", ["no_such_profile", "no/such/file.toml", "", "../config"])
def test_an_unknown_profile_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(name)
    for known in config.known_profiles():
        assert known in caught.value.expected


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("item_popularity.window_days=7", ("item_popularity", "window_days"), 7),
        ("train_tokenizer.ada_sid.codebook_size=12", ("train_tokenizer", "ada_sid", "codebook_size"), 12),
        ("content_embedding.normalize=false", ("content_embedding", "normalize"), False),
        ("train_ranker.arms=['id']", ("train_ranker", "arms"), ["id"]),
        ("content_embedding.text_encoder=none", ("content_embedding", "text_encoder"), "none"),  # a bare word is a string
        ("source.path=a folder/with=equals", ("source", "path"), "a folder/with=equals"),
        ("source.start=2026-02-01", ("source", "start"), date(2026, 2, 1)),
        ("seed=3", ("seed",), 3),
        (" seed =3", ("seed",), 3),
    ],
)
def test_an_override_replaces_one_value(override: str, path: tuple[str, ...], value: object) -> None:
    found: object = config.load("tiny", (override,))
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_the_last_override_of_a_key_counts() -> None:
    assert config.load("tiny", ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize(
    "override",
    ["seed", "=3", "seed.more=3", "item_popularity.window=3", "nothing.at_all=3", "item_popularity.window_days=many"],
)
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        config.load("tiny", (override,))


def test_overrides_leave_the_profile_alone() -> None:
    before = config.load("tiny")
    config.load("tiny", ("item_popularity.window_days=7",))
    assert config.load("tiny") == before


# ---------------------------------------------------------------- digest


def test_the_digest_covers_every_setting_but_where_it_runs() -> None:
    base = config.load("tiny")
    assert len(base.digest()) == 12
    assert config.load("tiny", ("launch.kind=submit", "launch.master=local[7]", "launch.threads=9")).digest() == base.digest()
    others = ["seed=1", "item_popularity.window_days=31", "train_tokenizer.ada_sid.codebook_size=17", "source.options.items=201", "lake.catalog=rest"]
    digests = {config.load("tiny", (other,)).digest() for other in others}
    assert len(digests) == len(others)
    assert base.digest() not in digests


def test_the_digest_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    one = config.load(write_profile(tmp_path, "seed = 4\n[ingest]\nmax_rejected_share = 0.5\nmax_retired_share = 0.25\n")).digest()
    two = config.load(write_profile(tmp_path, "seed = 4\n[ingest]\nmax_retired_share = 0.25\nmax_rejected_share = 0.5\n")).digest()
    assert one == two


def test_a_configuration_is_frozen() -> None:
    loaded = config.load("tiny")
    with pytest.raises(ValidationError):
        loaded.seed = 3
    with pytest.raises(ValidationError):
        loaded.ingest.max_rejected_share = 0.9


def test_the_flat_form_keeps_every_leaf() -> None:
    flat = config.load("tiny").flat()
    assert flat["train_tokenizer.ada_sid.codebook_size"] == 16
    assert flat["source.options.items"] == 200
    assert not any(isinstance(value, dict) and value for value in flat.values())


@pytest.mark.parametrize("address", ["https://shop:hunter22@images.example/p", "s3://bucket/p?secret=hunter22"])
def test_an_image_folder_whose_address_has_a_password_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(ConfigError, match="image_root") as caught:
        config.load("tiny", (f"source.image_root={address}",))
    assert "hunter22" not in str(caught.value)
    plain = "https://images.example:8443/p"
    assert config.load("tiny", (f"source.image_root={plain}",)).source.image_root == plain
