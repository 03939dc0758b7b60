import random
import time

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.concepts.hierarchy_order import AcyclicGraph, Cycle

EDGES = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=60)


def empty(nodes):
    graph = AcyclicGraph()
    for node in range(nodes):
        graph.add_node(node)
    return graph


def is_cycle(edges, nodes):
    return all(edge in edges for edge in zip(nodes, [*nodes[1:], nodes[0]], strict=True))


@settings(max_examples=200, deadline=None)
@given(edges=EDGES, many=EDGES)
def test_the_order_holds_after_every_edge_and_refusals_are_right(edges, many):
    graph, plain = empty(12), nx.DiGraph()
    plain.add_nodes_from(range(12))
    for start, end in edges:
        closes = start == end or nx.has_path(plain, end, start)
        if closes:
            with pytest.raises(Cycle) as caught:
                graph.add_edge(start, end, {})
            assert is_cycle({*plain.edges, (start, end)}, caught.value.nodes)
        else:
            graph.add_edge(start, end, {})
            plain.add_edge(start, end)
        place = {node: number for number, node in enumerate(graph.ordered())}
        assert all(place[one] < place[two] for one, two in graph.graph.edges)
        assert set(graph.graph.edges) == set(plain.edges)
    together = nx.DiGraph([*plain.edges, *many])
    if nx.is_directed_acyclic_graph(together):
        graph.add_edges((start, end, {}) for start, end in many)
        plain.add_edges_from(many)
    else:
        with pytest.raises(Cycle) as caught:
            graph.add_edges((start, end, {}) for start, end in many)
        assert is_cycle(set(together.edges), caught.value.nodes)
    assert set(graph.graph.edges) == set(plain.edges), "all of them or none"
    place = {node: number for number, node in enumerate(graph.ordered())}
    assert all(place[one] < place[two] for one, two in graph.graph.edges)
    lengths = dict.fromkeys(plain, 0)
    for node in nx.topological_sort(plain):
        lengths[node] = max((lengths[one] + 1 for one in plain.pred[node]), default=0)
    assert graph.levels() == lengths


def test_nodes_and_edges_can_go_again():
    graph = empty(4)
    for start, end in ((3, 2), (2, 1), (1, 0)):
        graph.add_edge(start, end, {})
    with pytest.raises(Cycle):
        graph.add_edge(0, 3, {})
    graph.remove_edge(2, 1)
    graph.add_edge(0, 3, {})
    assert graph.ordered() == [1, 0, 3, 2]
    graph.remove_node(0)
    graph.add_edge(3, 1, {})
    assert set(graph.graph.edges) == {(3, 2), (3, 1)}


def test_a_long_chain_against_the_order_is_quick():
    graph = empty(20_000)
    started = time.process_time()
    for node in range(19_999):
        graph.add_edge(node + 1, node, {})
    assert time.process_time() - started < 3, "a search over what is there for every edge takes minutes"
    with pytest.raises(Cycle) as caught:
        graph.add_edge(0, 19_999, {})
    assert len(caught.value.nodes) == 20_000


def test_edges_in_any_order_are_quick():
    dice = random.Random(0)
    names = list(range(10_000))
    dice.shuffle(names)
    graph = empty(10_000)
    started = time.process_time()
    for _ in range(10_000):
        low, high = sorted(dice.sample(range(10_000), 2))
        graph.add_edge(names[low], names[high], {})
    assert time.process_time() - started < 3
