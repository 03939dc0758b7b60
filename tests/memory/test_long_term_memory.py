import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.memory.references import WAYS, Reference, agrees, points
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.vector_checks import BLOCK
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import ConfigError, DataError, MissingPackageError

METRICS = ("cosine", "l2")


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def filled(config, metric="cosine", count=60):
    memory = LongTermMemory(metric=metric, config=config)
    table = points(count)
    memory.add(table[: count // 2], [{"row": row, "even": row % 2 == 0} for row in range(count // 2)], domain="a")
    memory.add(table[count // 2 :], [{"row": row} for row in range(count // 2, count)], domain="b")
    reference = Reference(metric)
    for row in range(count):
        about = {"row": row, "even": row % 2 == 0} if row < count // 2 else {"row": row}
        reference.held[row] = (table[row], "a" if row < count // 2 else "b", about)
    return memory, reference


@pytest.mark.parametrize("metric", METRICS)
def test_search_is_exact_within_every_filter(way, metric):
    memory, reference = filled(way, metric)
    queries = points(7, seed=1)
    for domain, where in ((None, None), ("a", None), ("b", None), ("a", {"even": True}), (None, {"row": 31})):
        for k in (1, 9, 60, 61):
            found = memory.search(queries, k, domain, where)
            assert all(
                agrees(found, row, reference.scores(query, domain, where), k) for row, query in enumerate(queries)
            )
            assert found.exact or way.exact_up_to == 40
    assert memory.search(queries, 3, ["a", "b"]).ids.tolist() == memory.search(queries, 3).ids.tolist()
    odd = memory.search(queries, 30, where=lambda about: about["row"] % 2 == 1)
    assert all(key % 2 for key in odd.ids.ravel()) and odd.candidates == 30 and odd.complete


@pytest.mark.parametrize("metric", METRICS)
def test_faiss_and_torch_agree(metric):
    table, queries = points(3000, 24), points(40, 24, seed=1)
    answers = []
    for config in (WAYS["flat"], WAYS["torch"]):
        memory = LongTermMemory(metric=metric, config=config)
        memory.add(table)
        memory.delete(np.arange(0, 3000, 7))
        answers.append(memory.search(queries, 20))
    one, other = answers
    assert (one.ids == other.ids).mean() > 0.99 and np.allclose(one.scores, other.scores, rtol=1e-4, atol=1e-5)
    assert one.method.startswith("FAISS, exact") and other.method.startswith("torch, exact")


def test_vectors_far_from_zero_are_told_apart(way):
    memory, table = LongTermMemory(metric="l2", config=way), points(300, 16) + np.float32(1000)
    memory.add(table)
    queries = points(30, 16, seed=1) + np.float32(1000)
    true = ((queries.astype(float)[:, None] - table.astype(float)) ** 2).sum(-1)
    found = memory.search(queries, 5)
    assert found.ids.tolist() == np.argsort(true, 1)[:, :5].tolist()
    assert np.allclose(found.scores, np.sort(true, 1)[:, :5], rtol=1e-5)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("metric", METRICS)
def test_any_sequence_of_changes_is_as_in_a_dict(tmp_path_factory, way, metric, data):
    memory, reference = LongTermMemory(3, metric, config=way), Reference(metric)
    entry = st.integers(-3, 3)
    vector = st.tuples(entry, entry, entry).filter(any).map(lambda v: np.array(v, dtype=np.float32))
    directory, chosen = tmp_path_factory.mktemp("memory"), 0
    for _ in range(data.draw(st.integers(3, 12))):
        present = sorted(reference.held)
        step = data.draw(st.sampled_from(["add", "add", "named", "update", "describe", "delete", "search", "save"]))
        some = data.draw(st.lists(st.sampled_from(present), unique=True, max_size=9)) if present else []
        if step in ("add", "named"):
            rows = data.draw(st.lists(vector, min_size=1, max_size=25))
            ids, home, about = None, data.draw(st.sampled_from("xy")), {"n": data.draw(st.integers(0, 2))}
            if step == "named":
                free = st.integers(0, 400).filter(lambda key: key not in reference.held)
                ids = data.draw(st.lists(free, unique=True, min_size=len(rows), max_size=len(rows)))
            given_ids = memory.add(np.stack(rows), about, ids, home).tolist()
            assert given_ids == (ids or list(range(chosen, chosen + len(rows))))
            chosen = max(chosen, max(given_ids) + 1)
            reference.held |= {key: (row, home, about) for key, row in zip(given_ids, rows, strict=True)}
        elif step == "update" and some:
            rows = [data.draw(vector) for _ in some]
            memory.update(some, vectors=np.stack(rows))
            reference.held |= {key: (row, *reference.held[key][1:]) for key, row in zip(some, rows, strict=True)}
        elif step == "describe" and some:
            memory.update(some, metadata={"n": 7}, domain="z")
            reference.held |= {key: (reference.held[key][0], "z", {"n": 7}) for key in some}
        elif step == "delete":
            memory.delete(some)
            for key in some:
                del reference.held[key]
        elif step == "save":
            memory.save(directory)
            memory = LongTermMemory.load(directory)
        else:
            query, k = data.draw(vector), data.draw(st.integers(1, 30))
            homes = [None, *memory.domains]
            home, where = data.draw(st.sampled_from(homes)), data.draw(st.sampled_from([None, {"n": 1}]))
            assert agrees(memory.search(query, k, home, where), 0, reference.scores(query, home, where), k, 1e-5)
        assert len(memory) == len(reference.held) and memory.ids().tolist() == sorted(reference.held)
    if len(memory):
        records = memory.get(memory.ids())
        for key, unit, home, about in zip(records.ids, records.vectors, records.domains, records.metadata, strict=True):
            vector, *rest = reference.held[int(key)]
            expected = vector if metric == "l2" else vector / np.linalg.norm(vector)
            assert np.allclose(unit, expected, atol=1e-6) and rest == [home, about]


def test_lists_measure_their_recall_and_read_more_where_a_list_holds_too_little():
    table = points(900, 16)
    memory = LongTermMemory(config=IndexConfig("faiss", exact_up_to=300))
    memory.add(table[:300])
    assert memory.recall is None and "every candidate" in memory.method
    memory.add(table[300:500])
    first = memory.recall
    assert first.k == 10 and first.queries == 100 and 0.9 < first.low <= first.value <= first.high <= 1
    memory.add(table[500:])
    assert memory.recall is first, "measured again when the vectors have doubled"
    found = memory.search(table[:50], 400)
    assert found.exact or (found.recall.k == 640 and "inverted lists; recall at 640" in found.method)
    few = memory.search(table[:50], 10)
    assert not few.exact and few.recall is memory.recall and "inverted lists; recall at 10" in few.method
    assert found.ids.shape == (50, 400) and (found.ids >= 0).all()
    assert memory.measured_recall(points(50, 16, seed=5)).value > 0.8
    assert memory.measured_recall(points(50, 16, seed=5), 100).value > 0.95, (
        "how many lists are read is measured for as many neighbours"
    )
    filtered = memory.search(table[:50], 3, where=lambda about: not about)
    assert filtered.candidates == 900 and not filtered.exact, "all pass: that is no filter"
    memory.update([0], metadata={"first": True})
    filtered = memory.search(table[:50], 3, where=lambda about: not about)
    assert filtered.exact and filtered.recall is None and "every candidate" in filtered.method
    assert filtered.ids[1:, 0].tolist() == list(range(1, 50))
    memory.delete(np.arange(650))
    assert memory.search(table[-5:], 3).exact and memory.search(table[-5:], 1).ids.ravel().tolist() == list(
        range(895, 900)
    )
    memory.add(points(900, 16, seed=3))
    assert memory.recall is not first


def test_one_call_that_is_larger_than_flat_and_a_learned_index_of_equal_vectors():
    memory = LongTermMemory(config=IndexConfig("faiss", exact_up_to=50))
    memory.add(np.ones((200, 4)))
    assert len(memory) == 200 and memory.search(np.ones(4), 200).ids.shape == (1, 200)


@pytest.mark.parametrize(
    "queries",
    [
        torch.ones(2, 8, requires_grad=True),
        torch.ones(2, 8, dtype=torch.bfloat16),
        np.ones((2, 8), dtype=">f8"),
        np.ones((2, 16), dtype=np.float16)[:, ::2],
        [[1.0] * 8] * 2,
        [[1] * 8] * 2,
        [torch.ones(8), torch.ones(8)],
        np.ones((4, 8), dtype=np.float32)[::-2],
    ],
    ids=str,
)
def test_vectors_of_every_kind(queries):
    memory = LongTermMemory(8)
    memory.add(queries)
    assert len(memory) == 2 and memory.search(queries, 1).scores == pytest.approx(1)
    assert memory.search(queries[0], 2).ids.shape == (1, 2), "one vector is one query"


def test_what_is_given_and_what_is_answered_stays_as_it_is():
    memory = LongTermMemory(metric="l2")
    mine, about = points(3), [{"list": [1]}, None, {"x": {"y": 1.5}}]
    ids = memory.add(mine, about)
    mine[:] = 0
    about[0]["list"].append(2)
    ids[:] = 77
    found = memory.search(points(3), 3)
    found.metadata[0][0]["list"].append(3)
    found[0][0].metadata["list"].append(4)
    memory.get([0]).metadata[0]["list"].append(5)
    assert memory.get([0]).metadata[0] == {"list": [1]} and memory.ids().tolist() == [0, 1, 2]
    memory.update([0], metadata={"new": 1})
    memory.delete([1])
    assert found[0][0].metadata == {"list": [1]} and found.ids[0, 0] == 0 and memory.metadata([0]) == [{"new": 1}]
    with pytest.raises(ValueError, match="read-only"):
        found.ids[0] = 5


def test_answers_say_what_they_are():
    memory, _ = filled(WAYS["flat"])
    found = memory.search(points(2, seed=1), 70)
    assert len(found) == 2 and found.found == 60 and not found.complete
    assert found.note == "60 found for k = 70: no more memories fit" and "60 of 60 memories" in str(found)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain and plain["domains"][0][0] in "ab"
    assert [match.id for match in next(iter(found))] == found.ids[0].tolist()
    page = found._repr_html_()
    assert "<th>cosine</th>" in page and "and 100 rows or more" in page
    bare = memory.search(points(1), 2, with_metadata=False)
    assert bare.metadata == [[{}, {}]] and bare[0][0].metadata == {} and bare.note == "" and bare.complete
    none = memory.search(points(1), 2, where={"row": 999})
    assert none.ids.shape == (1, 0) and "no memory fits" in none.note and none[0] == []
    assert memory.search(np.empty((0, 8), dtype=np.float32)).ids.shape == (0, 5)
    records = memory.get([3, 1])
    assert records.ids.tolist() == [3, 1] and len(records) == 2 and records.to_dict()["domains"] == ["a", "a"]
    assert "row: 3" in records._repr_html_()
    memory.add(points(1), {"text": "<b>" * 100}, domain="<i>")
    assert "<b><b>" not in memory.search(points(1), 2)._repr_html_() and "..." in memory.search(points(1))._repr_html_()


def test_a_memory_says_what_it_is():
    memory, _ = filled(WAYS["flat"])
    plain = memory.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["memories"] == 60 and plain["domains"] == {"a": 30, "b": 30} and plain["bytes"] == 60 * (8 * 4 + 8)
    assert repr(memory) == "LongTermMemory(60 memories of width 8, cosine; FAISS, exact: every candidate is compared)"
    for number in range(50):
        memory.add(points(1), domain=f"<{number}>")
    page = memory._repr_html_()
    assert "domain &lt;0&gt;" in page and "more domains" in page and "none: vectors are given" in page
    assert "of any width" in repr(LongTermMemory()) and "not known yet" in LongTermMemory()._repr_html_()
    assert 3 in memory and 999 not in memory and True not in memory and "3" not in memory


def test_an_empty_memory_answers_nothing():
    memory = LongTermMemory()
    for found in (memory.search([1.0, 2.0]), memory.search([1.0, 2.0], 3, "nowhere", {"a": 1})):
        assert found.ids.shape == (1, 0) and "there are none" in found.note and found.domains == [[]]
    assert memory.add(np.empty((0, 4), dtype=np.float32)).tolist() == [] and memory.dimension is None
    assert (
        memory.ids().tolist() == [] and memory.domains == {} and memory.search([1.0], where=lambda _: True).found == 0
    )
    memory.delete([])
    memory.update([], metadata={})
    assert memory.get([]).vectors.shape[0] == 0
    with pytest.raises(DataError, match=r"There are 1 queries and 0 memories\. Expected one of each at least"):
        memory.measured_recall([1.0])


def test_torch_keeps_and_moves_blocks(monkeypatch):
    monkeypatch.setattr("utils.memory.exact_search.BLOCK", 4)
    monkeypatch.setattr("utils.memory.exact_search.PAIRS", 6)
    memory, reference = filled(WAYS["torch"], "l2", 30)
    assert BLOCK == 16_384 and memory.nbytes == 8 * 4 * 8 * 4 + 30 * 8
    gone = [0, 1, 2, 3, 29, 28, 14]
    memory.delete(gone)
    for key in gone:
        del reference.held[key]
    assert all(agrees(memory.search(query, 25), 0, reference.scores(query), 25) for query in points(3, seed=1))
    memory.delete(memory.ids())
    assert len(memory) == 0 and memory.nbytes == 0


def test_torch_answers_without_faiss_and_faiss_is_asked_for_by_name(run_python):
    code = """
        from utils.memory.long_term_memory import LongTermMemory
        from utils.memory.vector_index import IndexConfig
        memory = LongTermMemory()
        memory.add([[1.0, 0.0], [0.0, 1.0]], [{"a": 1}, {"a": 2}])
        print(memory.search([0.1, 0.9], 1)[0][0].metadata, memory.method)
        try:
            LongTermMemory(config=IndexConfig("faiss"))
        except ImportError as error:
            print(error)
    """
    said = run_python(code, blocked=("faiss",)).stdout
    assert "{'a': 2} torch, exact: every candidate is compared" in said
    assert "pip install faiss-cpu" in said and "search a long-term memory" in said


def test_missing_faiss_is_an_error_of_ours(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingPackageError, match="faiss-cpu cannot be imported"):
        LongTermMemory(config=IndexConfig("faiss"))
    assert LongTermMemory().method.startswith("torch")


def test_threads_of_faiss_are_left_alone():
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    memory, _ = filled(WAYS["lists"])
    memory.search(points(3), 3)
    assert faiss.omp_get_max_threads() == before


def test_threads_wait_for_each_other():
    memory = LongTermMemory(8, config=WAYS["flat"])
    failed = []

    def work(seed):
        try:
            for step in range(20):
                ids = memory.add(points(5, seed=seed * 100 + step))
                memory.search(points(2), 3)
                memory.delete(ids[:2])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(memory) == 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 0}, "The dimension of the memory is 0"),
        ({"dimension": True}, "The dimension of the memory is True"),
        ({"config": "torch"}, "The settings are of the type str. Expected a.* IndexConfig, a mapping"),
        ({"metric": "dot"}, "The metric of the memory is 'dot'. Expected one of cosine, l2"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LongTermMemory(**arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "gpu"}, "one of auto, faiss, torch"),
        ({"exact_up_to": 0}, "a whole number, at least 1"),
        ({"target_recall": 1.5}, "a number above 0, at most 1. 0.95 is usual"),
        ({"seed": 1.5}, "The seed of the index is 1.5"),
    ],
)
def test_settings_of_the_index_that_cannot_be(setting, message):
    with pytest.raises(ConfigError, match=message):
        IndexConfig(**setting)


@pytest.mark.parametrize("moment", ["add", "measure", "entries"])
def test_an_interrupt_leaves_the_memory_as_it_was(way, moment, monkeypatch):
    memory, reference = filled(way, count=30)
    monkeypatch.setattr("utils.memory.long_term_memory.PART", 20)
    kind, calls = type(memory._index), []

    def stopped(original, when):
        def call(*given):
            calls.append(original(*given))
            if len(calls) == when:
                raise KeyboardInterrupt
            return calls[-1]

        return call

    with monkeypatch.context() as patch:
        if moment == "measure":
            patch.setattr("utils.memory.vector_index.chosen_probes", stopped(lambda *_: (1, None), 1))
        elif moment == "add":
            patch.setattr(kind, "add", stopped(kind.add, 2))
        else:
            patch.setattr(type(memory._store), "add", stopped(lambda *_: None, 1))
        if moment == "measure" and way is not WAYS["lists"]:
            memory.add(points(50, seed=2))
            return
        with pytest.raises(KeyboardInterrupt):
            memory.add(points(50, seed=2))
    assert len(memory) == 30 and len(memory._index) == 30
    assert all(agrees(memory.search(query, 9), 0, reference.scores(query), 9) for query in points(3, seed=1))
    assert memory.search(points(3), 9).exact
    memory.add(points(50, seed=2))
    assert memory.search(points(50, seed=2), 1).ids.ravel().tolist() == list(range(30, 80))


def test_index_and_metadata_out_of_step(tmp_path):
    memory, _ = filled(WAYS["flat"])
    memory._index.remove(np.array([3]))
    for call in (lambda: memory.search(points(1)), lambda: memory.save(tmp_path)):
        with pytest.raises(DataError, match="The index holds 59 vectors, and there are ids for 60"):
            call()


def test_filters_of_ids_that_lie_far_apart(way):
    memory, table = LongTermMemory(config=way), points(80)
    ids = np.arange(80) * 10**16
    memory.add(table, [{"third": row % 3 == 0} for row in range(80)], ids)
    found = memory.search(table[:9], 27, where={"third": True})
    assert found.complete and sorted(found.ids[0].tolist()) == ids[::3].tolist()
    assert found.ids[::3, 0].tolist() == ids[:9:3].tolist() and found.exact
