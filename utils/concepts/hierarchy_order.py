"""A directed graph that stays free of cycles while it grows, on NetworkX.

Unusual: a valid order of all nodes is kept at all times (Pearce and Kelly, "A dynamic topological sort algorithm for
directed acyclic graphs", 2006). An edge that agrees with the order closes no cycle, so most edges cost nothing; another
one is searched for only between the places of its two ends.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.runtime.errors import SeedbedError
from utils.runtime.optional import require

if TYPE_CHECKING:
    import networkx as nx


class HierarchyError(SeedbedError):
    """A hierarchy that contradicts itself, a concept that is not in it, or a file that holds none."""


class Cycle(Exception):
    """What was to be added would close a cycle; `nodes` has them in the direction of the edges, each once."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        """Keep the nodes."""
        self.nodes = list(nodes)
        super().__init__(f"a cycle of {len(self.nodes)} nodes")


class AcyclicGraph:
    """A `networkx.DiGraph` and an order of its nodes in which every edge points onward."""

    def __init__(self) -> None:
        """Start empty.

        Raises:
            MissingPackageError: networkx is not installed.
        """
        self._networkx: Any = require("networkx", "hold a hierarchy of concepts")
        self.graph: nx.DiGraph[Any] = self._networkx.DiGraph()
        """The nodes and edges; change them through this class only."""
        self._place: dict[Any, int] = {}
        self._first, self._last = 0, -1

    def add_node(self, node: Hashable) -> None:
        """Add a node without edges; nothing happens if it is there."""
        if node not in self._place:
            self.graph.add_node(node)
            self._last += 1
            self._place[node] = self._last

    def remove_node(self, node: Hashable) -> None:
        """Remove a node and its edges; those that remain keep their order."""
        self.graph.remove_node(node)
        del self._place[node]

    def remove_edge(self, start: Hashable, end: Hashable) -> None:
        """Remove an edge; without it the order still holds."""
        self.graph.remove_edge(start, end)

    def add_edge(self, start: Hashable, end: Hashable, facts: Mapping[str, Any]) -> None:
        """Add an edge between two nodes of the graph.

        Raises:
            Cycle: `end` leads to `start` already; the graph is left as it was.
        """
        if start == end:
            raise Cycle([start])
        if self._place[start] > self._place[end]:
            if not self.graph.pred[start]:
                self._first -= 1
                self._place[start] = self._first
            elif not self.graph.succ[end]:
                self._last += 1
                self._place[end] = self._last
            else:
                self._reorder(start, end)
        self.graph.add_edge(start, end, **facts)

    def _reorder(self, start: Any, end: Any) -> None:
        """Move what leads to `start` before what `end` leads to, using the places that both have now."""
        place, low, high = self._place, self._place[end], self._place[start]
        came: dict[Any, Any] = {end: None}
        waiting = [end]
        while waiting:
            node = waiting.pop()
            for after in self.graph.succ[node]:
                if after == start:
                    way = [start, node]
                    while (node := came[node]) is not None:
                        way.append(node)
                    raise Cycle(way[::-1])
                if place[after] < high and after not in came:
                    came[after] = node
                    waiting.append(after)
        before = {start}
        waiting = [start]
        while waiting:
            for node in self.graph.pred[waiting.pop()]:
                if place[node] > low and node not in before:
                    before.add(node)
                    waiting.append(node)
        moved = sorted(before, key=place.__getitem__) + sorted(came, key=place.__getitem__)
        for node, value in zip(moved, sorted(place[node] for node in moved), strict=True):
            place[node] = value

    def add_edges(self, edges: Iterable[tuple[Any, Any, Mapping[str, Any]]]) -> None:
        """Add many edges with one check, in time linear in the size of the graph; all of them or none.

        Raises:
            Cycle: They would close one; the graph is left as it was.
        """
        new = [(start, end, dict(facts)) for start, end, facts in edges if not self.graph.has_edge(start, end)]
        self.graph.add_edges_from(new)
        waits = {node: degree for node, degree in self.graph.in_degree() if degree}
        ready = [node for node in self.graph if node not in waits]
        for node in ready:
            for after in self.graph.succ[node]:
                waits[after] -= 1
                if not waits[after]:
                    del waits[after]
                    ready.append(after)
        if waits:
            cycle = self._cycle_among(waits)
            self.graph.remove_edges_from([(start, end) for start, end, _ in new])
            raise Cycle(cycle)
        self._place = {node: number for number, node in enumerate(ready)}
        self._first, self._last = 0, len(ready) - 1

    def _cycle_among(self, nodes: Mapping[Any, int]) -> list[Any]:
        """Return a cycle among nodes each of which has a predecessor among them: walk back until one comes again."""
        node = next(iter(nodes))
        seen: dict[Any, int] = {}
        while node not in seen:
            seen[node] = len(seen)
            node = next(before for before in self.graph.pred[node] if before in nodes)
        return [one for one, number in seen.items() if number >= seen[node]][::-1]

    def ordered(self) -> list[Any]:
        """Return all nodes in an order in which every edge points onward."""
        return sorted(self._place, key=self._place.__getitem__)

    def levels(self) -> dict[Any, int]:
        """Return for every node the number of edges of the longest path that ends in it, in O(nodes + edges)."""
        layers = self._networkx.topological_generations(self.graph)
        return {node: level for level, layer in enumerate(layers) for node in layer}
