"""A release as one mapped file: what goes in comes out, in any tool that reads Arrow; damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import release_file
from pipeline.errors import ContractError, UpstreamMissing

FACTS = {"tag": "d20260301", "generation": 1, "codebook_digest": "ab", "slots": ["text_0", "behavior_0"], "codebook_sizes": [4, 6]}


def release(codes, weights=None) -> pa.Table:
    codes = [list(row) for row in codes]
    weights = [[1.0] * len(row) for row in codes] if weights is None else weights
    names = [f"i{row:04d}" for row in range(len(codes))]
    return pa.table(
        {
            "item_id": pa.array(names, pa.string()),
            "codes": pa.array(codes, pa.list_(pa.int32())),
            "weights": pa.array(weights, pa.list_(pa.float32())),
            "disambiguator": pa.array([0] * len(codes), pa.int32()),
        }
    )


@settings(deadline=None)  # the first example imports torch
@given(codes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=20), cut=st.integers(0, 20))
def test_what_was_written_is_read_whole_or_sliced(codes, cut, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("release") / "r.arrow"
    rows = release(codes, [[float(row), 0.5] for row in range(len(codes))]).slice(cut)
    found = release_file.read(release_file.write(rows, FACTS, path))
    assert found.facts == FACTS
    assert found.codes_NL.tolist() == rows["codes"].to_pylist()
    assert found.weights_NL.tolist() == rows["weights"].to_pylist()
    assert found.rows.to_pylist() == rows.to_pylist()
    assert (found.codes_NL.shape, found.codes_NL.dtype, found.weights_NL.dtype) == ((len(rows), 2), torch.int32, torch.float32)


def test_rows_of_several_chunks_become_one_matrix(tmp_path: Path) -> None:
    rows = pa.concat_tables([release([(0, 1)]), release([(2, 3), (4, 5)])])
    assert release_file.read(release_file.write(rows, FACTS, tmp_path / "r.arrow")).codes_NL.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_any_reader_of_arrow_opens_it(tmp_path: Path) -> None:
    path = release_file.write(release([(0, 1), (2, 3)]), FACTS, tmp_path / "r.arrow")
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all()
    assert rows["codes"].type == pa.list_(pa.int32(), 2)
    assert json.loads(rows.schema.metadata[release_file.KEY])["tag"] == "d20260301"


def test_two_writings_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = (release_file.write(release([(0, 1)]), FACTS, tmp_path / name) for name in ("a.arrow", "b.arrow"))
    assert first.read_bytes() == second.read_bytes()


def test_writing_into_the_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = release_file.write(release([(0, 1)]), FACTS, tmp_path / "r.arrow")
    release_file.read(path).codes_NL[0, 0] = 3
    assert release_file.read(path).codes_NL[0, 0] == 0


def test_nothing_is_copied(tmp_path: Path) -> None:
    codes = np.zeros((50_000, 2), np.int32)
    found = release_file.read(release_file.write(release(codes.tolist()), FACTS, tmp_path / "r.arrow"))
    assert found.codes_NL.data_ptr() == found.rows["codes"].chunk(0).values.buffers()[1].address


@pytest.mark.parametrize("weights", [[[1.0], [1.0, 1.0]], [[1.0, None], [1.0, 1.0]], [None, [1.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
def test_rows_that_are_no_matrix_are_refused_and_the_old_file_stays(weights, tmp_path: Path) -> None:
    path = release_file.write(release([(0, 1)]), FACTS, tmp_path / "r.arrow")
    before = path.read_bytes()
    with pytest.raises(ContractError, match="weights of release d20260301 are no matrix"):
        release_file.write(release([(0, 1), (2, 3)], weights), FACTS, path)
    assert [file.name for file in tmp_path.iterdir()] == ["r.arrow"]
    assert path.read_bytes() == before


def test_a_file_that_is_not_there_may_come(tmp_path: Path) -> None:
    with pytest.raises(UpstreamMissing, match="no such release file"):
        release_file.read(tmp_path / "r.arrow")


def test_a_file_cut_short_at_any_place_is_refused(tmp_path: Path) -> None:
    path = release_file.write(release([(0, 1), (2, 3)]), FACTS, tmp_path / "r.arrow")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ContractError, match="no whole release file"):
            release_file.read(path)


def other(folder: Path, rows: pa.Table, metadata) -> Path:
    path = folder / "other.arrow"
    with pa.ipc.new_file(path, rows.schema.with_metadata(metadata)) as file:
        file.write_table(rows.replace_schema_metadata(metadata))
    return path


@pytest.mark.parametrize("metadata", [None, {release_file.KEY: "[1"}, {release_file.KEY: json.dumps(FACTS)}])
def test_another_arrow_file_is_refused(metadata, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no whole release file"):
        release_file.read(other(tmp_path, release([(0, 1)]), metadata))  # its lists have no fixed length


def test_lists_of_another_kind_are_refused(tmp_path: Path) -> None:
    rows = pa.table({name: pa.array([[1, 2]], pa.list_(pa.int64(), 2)) for name in ("codes", "weights")})
    with pytest.raises(ContractError, match="int64"):
        release_file.read(other(tmp_path, rows, {release_file.KEY: json.dumps(FACTS)}))
