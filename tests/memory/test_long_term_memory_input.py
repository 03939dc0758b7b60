"""What may not enter a memory, and that nothing of it enters."""

import json

import numpy as np
import pytest
import torch

from tests.memory.references import WAYS, points
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.vector_checks import LAST_ID, as_metadata
from utils.runtime.errors import ConfigError, DataError


def spoiled(value, dtype=np.float32):
    table = points(9).astype(dtype)
    table[2, 3] = value
    return table


@pytest.fixture(params=WAYS)
def memory(request):
    memory = LongTermMemory(8, config=WAYS[request.param])
    memory.add(points(50), [{"row": row} for row in range(50)])
    return memory


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (spoiled(np.nan), "1 of 9 .* hold entries that are not finite in float32: number 2"),
        (spoiled(-np.inf), "not finite"),
        (spoiled(1e60, np.float64), "not finite in float32"),
        (np.full((9, 8), np.nan), "9 of 9 .*: numbers 0, 1, 2, 3, 4, \\.\\.\\."),
        (points(9) * 0, "9 of 9 .* are zero"),
        (points(9, 7), "are 7 wide. Expected 8, as the memory is"),
        (points(8).reshape(2, 4, 8), "of the shape \\[2, 4, 8\\]"),
        (np.empty((3, 0), dtype=np.float32), "of the shape \\[3, 0\\]"),
        (np.float32(3), "of the type float32"),
        (np.ones((2, 8), dtype=np.int64), "of the dtype int64. .*Turn texts, images or token ids into vectors"),
        (np.ones((2, 8), dtype=bool), "of the dtype bool"),
        (np.ones((2, 8), dtype=complex), "of the dtype complex128"),
        (np.array([["a"] * 8]), "of the dtype <U1"),
        (np.ma.masked_array(points(2)), "of the type MaskedArray"),
        (torch.ones(2, 8).to_sparse(), "sparse or has no values"),
        (torch.ones(2, 8, device="meta"), "sparse or has no values"),
        (torch.ones(2, 8, dtype=torch.int64), "of the dtype int64"),
        ([[1.0, 2.0], [3.0]], "lists that make no table"),
        ([torch.ones(8), torch.ones(7)], "tensors of unlike length"),
        ("a text", "of the type str"),
        (["a text"], "of the dtype <U6"),
        ({"x": 1}, "of the type dict"),
    ],
)  # fmt: skip
def test_vectors_that_are_refused(vectors, message):
    memory = LongTermMemory(8)
    memory.add(points(3))
    for call in (memory.add, memory.search, lambda given: memory.update([0, 1], given)):
        with pytest.raises(DataError, match=message):
            call(vectors)
    assert memory.ids().tolist() == [0, 1, 2] and len(memory._index) == 3


def test_a_query_of_a_memory_says_so():
    with pytest.raises(DataError, match="1 of 9 queries hold entries"):
        LongTermMemory().search(spoiled(np.nan))


def test_lengths_at_the_edge_of_float32():
    near = points(9)
    memory = LongTermMemory()
    memory.add(near)
    for scale in (1e-38, 1e-25, 1e-18, 1e15, 1e25, 1e37):
        found = memory.search(near.astype(np.float64) * scale, 1)
        assert found.ids.ravel().tolist() == list(range(9)) and found.scores == pytest.approx(1, abs=1e-3)
    flat = LongTermMemory(metric="l2")
    flat.add(points(9) * np.float32(5e17))
    assert np.isfinite(flat.search(-points(9) * np.float32(5e17), 9).scores).all()
    flat.add(np.zeros((1, 8)))
    assert flat.search(np.zeros(8), 1).ids.tolist() == [[9]]
    with pytest.raises(DataError, match="9 of 9 vectors are longer than 3e[+]18.*Scale them down"):
        flat.add(points(9) * np.float32(1e19))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1], "some twice: number 1"),
        ([3, 51], "1 of 2 ids are in the memory already: \\[3\\]"),
        ([-1, 51], "Expected whole numbers from 0"),
        ([51, LAST_ID + 1], "Expected whole numbers from 0"),
        ([51, 2**80], "Expected whole numbers from 0"),
        ([51.0, 52.0], "Expected whole numbers from 0"),
        ([True, False], "Expected whole numbers from 0"),
        (["a", "b"], "Keep names of your own in the metadata"),
        ([[51], [52]], "in one dimension"),
        ([[51], [52, 53]], "in one dimension"),
        ([51], "There are 1 ids for 2 memories"),
        (None, ""),
    ],
)  # fmt: skip
def test_ids_that_are_refused(memory, ids, message):
    if ids is None:
        assert memory.add(points(2), ids=torch.tensor([90, 60])).tolist() == [90, 60]
        assert memory.add(points(1), ids=70) == [70] and memory.add(points(1)).tolist() == [91]
        return
    with pytest.raises(DataError, match=message):
        memory.add(points(2), ids=ids)
    assert len(memory) == 50 and memory.add(points(1)).tolist() == [50]


def test_ids_run_out():
    memory = LongTermMemory()
    memory.add(points(1), ids=[LAST_ID])
    with pytest.raises(DataError, match="No 1 ids are left"):
        memory.add(points(1))
    assert memory.search(points(1), 5).ids.tolist() == [[LAST_ID]]


@pytest.mark.parametrize("call", ["get", "delete", "update", "metadata"])
def test_ids_that_are_not_there(memory, call):
    more = {"metadata": {"new": 1}, "vectors": points(2)} if call == "update" else {}
    with pytest.raises(DataError, match=r"1 of 2 ids are not in the memory: \[77\]\. Expected ids of its 50 memories"):
        getattr(memory, call)([3, 77], **more)
    assert len(memory) == 50 and memory.metadata([3]) == [{"row": 3}]
    with pytest.raises(DataError, match="There are 1 vectors for 2 ids"):
        memory.update([3, 4], vectors=points(1))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([{}], "There are metadata for 1 memories, and 2 memories"),
        ("text", "The metadata are of the type str"),
        (7, "The metadata are of the type int"),
        ([{}, 7], "number 1 is of the type int"),
        ([{}, {"a": float("nan")}], "number 1 holds what is no JSON value"),
        ([{"a": float("inf")}, {}], "number 0 holds what is no JSON value"),
        ([{}, {"a": (1, 2)}], "tuples with list"),
        ([{}, {1: "a"}], "texts as keys"),
        ([{}, {"a": torch.ones(1)}], "tensors with tolist"),
        ([{}, {"a": {"b": {1, 2}}}], "no JSON value"),
        ([{}, {"a": b"bytes"}], "no JSON value"),
    ],
)  # fmt: skip
def test_metadata_that_is_refused(memory, metadata, message):
    with pytest.raises(DataError, match=message):
        memory.add(points(2), metadata)
    with pytest.raises(DataError, match=message):
        memory.update([0, 1], metadata=metadata)
    nested = []
    nested.append(nested)
    with pytest.raises(DataError, match="no JSON value"):
        memory.add(points(1), {"a": nested})
    assert len(memory) == 50 and memory.metadata([0]) == [{"row": 0}]


class Text(str):
    """What JSON returns as another type."""


def test_metadata_are_copies_of_plain_types():
    flat = {"a": "é", "b": 10**20, "c": -1.5, "d": True, "e": None, "f": 0.0}
    for given in ({}, flat, {"a": Text("b"), Text("c"): 1}, {"big": 1e308}, {"wide": 10**400}, {"deep": [{"a": [1]}]}):
        one, two, none = as_metadata([given, given, None], 3)
        assert one == two == given and none == {} and one is not given and one is not two
        assert [*map(type, one)] == [str] * len(one) and Text not in map(type, one.values())
        assert json.loads(json.dumps(one)) == one
    assert as_metadata(flat, 2) == [flat, flat] and as_metadata([], 0) == []
    for bad in (float("nan"), float("-inf"), 10**5000, {1: 2}, np.float32(1), 1j):
        for others in ([], [flat], [{"b": 10**400}], [{"b": 1e308}]):
            with pytest.raises(DataError, match=f"number {len(others)} holds what is no JSON value"):
                as_metadata([*others, {"a": 1.0, "b": bad}], len(others) + 1)


def test_conditions(memory):
    memory.add(points(3), [{"flag": True}, {"flag": 1}, {"flag": None}], domain="flags")
    assert memory.ids(where={"flag": True}).tolist() == [50] and memory.ids(where={"flag": 1}).tolist() == [51]
    assert memory.ids(where={"flag": None}).tolist() == [52] and memory.ids(where={"row": 3, "flag": 1}).size == 0
    assert memory.ids("flags", {}).tolist() == [50, 51, 52] and memory.ids("flags", {"row": 1}).size == 0
    with pytest.raises(DataError, match="no domain 'flag'. Expected one of its 2: flags. Leave the domain out"):
        memory.search(points(1), domain="flag")
    with pytest.raises(DataError, match="no domain '7'"):
        memory.search(points(1), domain=7)
    with pytest.raises(DataError, match="no domain of no name"):
        memory.search(points(1), domain=[])
    with pytest.raises(DataError, match="failed for the metadata of 0: KeyError: 'flag'"):
        memory.search(points(1), where=lambda about: about["flag"])
    with pytest.raises(DataError, match="failed for the metadata of 0: AttributeError"):
        memory.search(points(1), where=lambda about: about.update(row=1))
    for where in ([("row", 1)], {1: 2}, 7):
        with pytest.raises(DataError, match="Expected a mapping from keys"):
            memory.search(points(1), where=where)
    memory.delete(memory.ids("flags"))
    with pytest.raises(DataError, match="no domain 'flags'"):
        memory.ids("flags")


def test_other_arguments_that_are_refused(memory):
    for k in (0, -1, 1.5, True, None):
        with pytest.raises(
            ConfigError, match="The number k of memories to find is .*. Expected a whole number, at least 1. Ask for"
        ):
            memory.search(points(1), k)
    for domain in ("", " ", 3, None):
        with pytest.raises(DataError, match="Expected a name"):
            memory.add(points(1), domain=domain)
    with pytest.raises(DataError, match="Nothing is given. Expected one of them"):
        memory.add()
    with pytest.raises(DataError, match="Both items and vectors are given"):
        memory.search(points(1), vectors=points(1))
    assert len(memory) == 50
