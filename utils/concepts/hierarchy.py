"""Concepts and how they build on one another: typed relations on NetworkX, each of them free of cycles.

A relation is said as a sentence, so that it cannot be read backwards: ``relate("multiplication", "requires",
"addition")`` and ``relate("poodle", "is-a", "dog")``. The last word is the parent. The two relations are never mixed:
"requires" drives the order of learning, "is-a" is a taxonomy.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from utils.concepts.hierarchy_order import AcyclicGraph, Cycle, HierarchyError
from utils.concepts.hierarchy_parts import (
    IS_A,
    RELATION_PARTS,
    RELATIONS,
    REQUIRES,
    Concept,
    Fact,
    Relation,
    checked_facts,
    listed_names,
    records,
    sentences,
)
from utils.runtime.optional import require

if TYPE_CHECKING:
    import networkx as nx

NAMED_OF_A_CYCLE = 12
"""Concepts of a cycle that an error names."""


class ConceptHierarchy:
    """Concepts with the relations "requires" and "is-a" between them.

    Each relation is free of cycles at all times. Given edges are stored as given; `reduced` leaves out those that
    follow from others.
    """

    def __init__(self) -> None:
        """Start empty.

        Raises:
            MissingPackageError: networkx is not installed.
        """
        self._concepts: dict[str, Concept] = {}
        self._graphs = {relation: AcyclicGraph() for relation in RELATIONS}

    @classmethod
    def from_relations(cls, relations: Iterable[tuple[str, str, str] | Relation]) -> "ConceptHierarchy":
        """Build from sentences ``(concept, relation, parent)``; concepts are added as they are met.

        Raises:
            HierarchyError: They are no sentences, or contradict themselves; see `relate_all`.
        """
        made, said = cls(), sentences(relations)
        for name in dict.fromkeys(name for one in said for name in (one.parent, one.concept)):
            made.add(name)
        made.relate_all(said)
        return made

    def add(self, name: str, difficulty: float = 0.0, domain: str = "", **facts: Fact) -> Concept:
        """Add a concept and return it.

        Args:
            name: Unique.
            difficulty: Ties in the order of learning are broken by it, lowest first.
            domain: The field that it belongs to.
            **facts: Anything else worth keeping: text, numbers, truth values.

        Raises:
            HierarchyError: It is there already, or a value cannot be used.
        """
        return self.put(Concept(name, difficulty, domain, facts))

    def put(self, concept: Concept) -> Concept:
        """Add a concept that was made before, see `add`."""
        if concept.name in self._concepts:
            raise HierarchyError(
                f"The concept {concept.name!r} is in the hierarchy already.",
                "Every concept is added once.",
                "Relate the one that is there, or remove it first.",
            )
        self._concepts[concept.name] = concept
        for graph in self._graphs.values():
            graph.add_node(concept.name)
        return concept

    def remove(self, name: str) -> None:
        """Remove a concept and its relations; what went through it is no longer implied.

        Raises:
            HierarchyError: It is unknown.
        """
        self.concept(name)
        del self._concepts[name]
        for graph in self._graphs.values():
            graph.remove_node(name)

    def relate(self, concept: str, relation: str, parent: str, **facts: Fact) -> None:
        """Say that a concept requires, or is, another; said twice, the newer facts are kept.

        The cost is that of the stretch between both in the order that is kept, nothing in most cases.

        Raises:
            HierarchyError: A name is unknown, or a cycle would be closed; it is named, and nothing changes.
        """
        graph = self._graph(relation)
        for name in (concept, parent):
            self.concept(name)
        checked = checked_facts(facts, f"{concept!r} {relation} {parent!r}")
        try:
            graph.add_edge(parent, concept, {"facts": checked})
        except Cycle as cycle:
            raise self._cyclic(relation, cycle) from None

    def relate_all(self, relations: Iterable[tuple[str, str, str] | Relation]) -> None:
        """Say many sentences with one check for cycles; all of them or none. One said before stays as it is.

        Raises:
            HierarchyError: One is no sentence, a name is unknown, or a cycle would be closed, which is named; nothing
                changes.
        """
        edges: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {relation: [] for relation in RELATIONS}
        for one in sentences(relations):
            self._graph(one.relation)
            for name in (one.concept, one.parent):
                self.concept(name)
            facts = checked_facts(one.facts, repr(str(one))) if one.facts else {}
            edges[one.relation].append((one.parent, one.concept, {"facts": facts}))
        done: list[tuple[str, list[tuple[str, str, Mapping[str, Any]]]]] = []
        for relation, new in edges.items():
            graph = self._graphs[relation]
            fresh = [edge for edge in new if not graph.graph.has_edge(edge[0], edge[1])]
            try:
                graph.add_edges(fresh)
            except Cycle as cycle:
                for before, added in done:
                    for start, end in dict.fromkeys((start, end) for start, end, _ in added):
                        self._graphs[before].remove_edge(start, end)
                raise self._cyclic(relation, cycle) from None
            done.append((relation, fresh))

    def unrelate(self, concept: str, relation: str, parent: str) -> None:
        """Take a sentence back.

        Raises:
            HierarchyError: It was never said.
        """
        graph = self._graph(relation)
        if not graph.graph.has_edge(self.concept(parent).name, self.concept(concept).name):
            said = ", ".join(self.parents(concept, relation)[:5]) or "nothing"
            raise HierarchyError(
                f"{concept!r} {relation} {parent!r} is not in the hierarchy.",
                f"{concept!r} {relation} {said}.",
                "Name the concept first and its parent last.",
            )
        graph.remove_edge(parent, concept)

    def __len__(self) -> int:
        return len(self._concepts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __contains__(self, name: object) -> bool:
        return name in self._concepts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConceptHierarchy) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def concept(self, name: str) -> Concept:
        """Return what is known about a concept.

        Raises:
            HierarchyError: It is unknown; the nearest names are given.
        """
        try:
            return self._concepts[name]
        except (KeyError, TypeError):
            near = get_close_matches(str(name), self._concepts, n=3, cutoff=0.5)
            known = near or list(self._concepts)[:3]
            raise HierarchyError(
                f"There is no concept {name!r} among {len(self)}.",
                f"{'Near to it' if near else 'There'} are: {', '.join(map(repr, known))}." if known else "It is empty.",
                "Add it first with add(name), or check the spelling.",
            ) from None

    def graph(self, relation: str = REQUIRES) -> "nx.DiGraph[Any]":
        """Return a copy of a relation as a NetworkX graph; edges point from the parent to the concept."""
        copied: nx.DiGraph[Any] = self._graph(relation).graph.copy()
        return copied

    def relations(self, relation: str | None = None) -> list[Relation]:
        """Return the sentences of one relation, or of both, sorted by concept, relation and parent."""
        kinds = RELATIONS if relation is None else (relation,)
        found = [
            Relation(concept, kind, parent, data["facts"])
            for kind in kinds
            for parent, concept, data in self._graph(kind).graph.edges(data=True)
        ]
        return sorted(found, key=lambda one: (one.concept, one.relation, one.parent))

    def parents(self, name: str, relation: str = REQUIRES) -> list[str]:
        """Return what a concept requires, or is, directly, sorted by name."""
        graph = self._graph(relation).graph
        return sorted(graph.pred[self.concept(name).name])

    def children(self, name: str, relation: str = REQUIRES) -> list[str]:
        """Return what requires, or is, the concept directly, sorted by name."""
        graph = self._graph(relation).graph
        return sorted(graph.succ[self.concept(name).name])

    def ancestors(self, name: str, relation: str = REQUIRES) -> list[str]:
        """Return all that a concept requires, or is, directly or through others, sorted by name."""
        graph = self._graph(relation).graph
        return sorted(_networkx().ancestors(graph, self.concept(name).name))

    def descendants(self, name: str, relation: str = REQUIRES) -> list[str]:
        """Return all that requires, or is, the concept, directly or through others, sorted by name."""
        graph = self._graph(relation).graph
        return sorted(_networkx().descendants(graph, self.concept(name).name))

    def levels(self, relation: str = REQUIRES) -> dict[str, int]:
        """Return the level of every concept: 0 without parents, else one more than its highest parent."""
        return self._graph(relation).levels()

    def level(self, name: str, relation: str = REQUIRES) -> int:
        """Return the level of a concept, see `levels`."""
        return self.levels(relation)[self.concept(name).name]

    def learning_order(
        self, relation: str = REQUIRES, goals: Iterable[str] | None = None, known: Iterable[str] = ()
    ) -> list[str]:
        """Return concepts so that each comes after its parents; of those that could be next, the easiest first.

        Args:
            relation: Whose parents come first.
            goals: Only these and what they need; None takes all.
            known: Left out, because they are learned already.

        Raises:
            HierarchyError: A name is unknown.
        """
        graph, networkx = self._graph(relation).graph, _networkx()
        wanted = set(graph)
        if goals is not None:
            wanted = {self.concept(goal).name for goal in listed_names(goals)}
            for goal in list(wanted):
                wanted |= networkx.ancestors(graph, goal)
        wanted -= {self.concept(name).name for name in listed_names(known)}
        # Induced after the ancestors were taken; what is known holds nothing back.
        part = graph if len(wanted) == len(graph) else graph.subgraph(wanted)
        key = {name: (self._concepts[name].difficulty, name) for name in wanted}
        return list(networkx.lexicographical_topological_sort(part, key=key.__getitem__))

    def path(self, start: str, end: str) -> list[Relation] | None:
        """Return the fewest sentences that link two concepts, in either direction and through both relations.

        Returns:
            Sentences as they were said; empty from a concept to itself; None if nothing links them.

        Raises:
            HierarchyError: A name is unknown.
        """
        for name in (start, end):
            self.concept(name)
        came: dict[str, tuple[str, Relation] | None] = {start: None}
        waiting = deque([start])
        while waiting and end not in came:
            node = waiting.popleft()
            for name, said in self._neighbours(node):
                if name not in came:
                    came[name] = (node, said)
                    waiting.append(name)
        if end not in came:
            return None
        way: list[Relation] = []
        step = came[end]
        while step is not None:
            way.append(step[1])
            step = came[step[0]]
        return way[::-1]

    def _neighbours(self, name: str) -> list[tuple[str, Relation]]:
        """Return what a concept is related to, in an order that depends on names alone."""
        found = []
        for kind, held in self._graphs.items():
            found += [(p, Relation(name, kind, p, data["facts"])) for p, data in held.graph.pred[name].items()]
            found += [(c, Relation(c, kind, name, data["facts"])) for c, data in held.graph.succ[name].items()]
        return sorted(found, key=lambda one: (one[0], one[1].relation, one[1].concept))

    def domains(self) -> dict[str, int]:
        """Return how many concepts each domain has, sorted by name."""
        return dict(sorted(Counter(concept.domain for concept in self._concepts.values()).items()))

    def domain(self, name: str) -> "ConceptHierarchy":
        """Return the concepts of a domain, see `restricted`.

        Raises:
            HierarchyError: No concept belongs to it; those that there are are named.
        """
        found = [concept.name for concept in self._concepts.values() if concept.domain == name]
        if not found:
            raise HierarchyError(
                f"No concept belongs to the domain {name!r}.",
                f"There are: {', '.join(repr(one) for one in self.domains() if one) or 'none'}.",
                "Domains are given when a concept is added: add(name, domain=...).",
            )
        return self.restricted(found)

    def restricted(self, names: Iterable[str]) -> "ConceptHierarchy":
        """Return a hierarchy of some concepts that keeps every ancestry among them.

        What leads from one of them to another through concepts left out becomes a relation of its own, with the fact
        ``through``: otherwise a prerequisite would be lost where a path leaves the domain and comes back.

        Raises:
            HierarchyError: A name is unknown.
        """
        chosen = {self.concept(name).name for name in listed_names(names)}
        part = ConceptHierarchy()
        for name, concept in self._concepts.items():
            if name in chosen:
                part.put(concept)
        for kind, held in self._graphs.items():
            graph, said = held.graph, []
            # For every concept left out: the chosen ones above it with none chosen between, and by which parent.
            nearest: dict[str, dict[str, str]] = {}
            for node in held.ordered():
                reach = {parent: "" for parent in graph.pred[node] if parent in chosen}
                for parent in sorted(graph.pred[node]):
                    for found in nearest.get(parent, ()):
                        reach.setdefault(found, parent)
                if node not in chosen:
                    nearest[node] = reach
                    continue
                for parent, by in reach.items():
                    facts = {"through": by} if by else graph.edges[parent, node]["facts"]
                    said.append(Relation(node, kind, parent, facts))
            part.relate_all(said)
        return part

    def reduced(self) -> "ConceptHierarchy":
        """Return the hierarchy without relations that follow from others: its transitive reduction.

        Levels, ancestors and valid orders stay as they are; for a graph without cycles there is exactly one.
        """
        made = ConceptHierarchy()
        for concept in self._concepts.values():
            made.put(concept)
        for kind, held in self._graphs.items():
            edges = _networkx().transitive_reduction(held.graph).edges
            made.relate_all(Relation(c, kind, p, held.graph.edges[p, c]["facts"]) for p, c in edges)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, sorted by name; `from_dict` takes them back."""
        return {
            "concepts": [self._concepts[name].to_dict() for name in sorted(self._concepts)],
            "relations": [relation.to_dict() for relation in self.relations()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ConceptHierarchy":
        """Build from what `to_dict` returned; everything is checked.

        Raises:
            HierarchyError: A part is missing, of another type, unknown, twice there or closes a cycle.
        """
        made = cls()
        for part in records(values, "concepts", ("name", "difficulty", "domain", "facts"), ("name",)):
            made.put(Concept(**part))
        said = []
        for part in records(values, "relations", ("concept", "relation", "parent", "facts"), RELATION_PARTS):
            said.append(Relation(**part))
        if len(set(said)) < len(said):
            twice = next(one for one, count in Counter(said).items() if count > 1)
            raise HierarchyError(
                f"{twice} is there {said.count(twice)} times.", "Every relation is there once.", "Remove the others."
            )
        made.relate_all(said)
        return made

    def __repr__(self) -> str:
        counts = [f"{held.graph.number_of_edges()} {kind}" for kind, held in self._graphs.items()]
        return f"ConceptHierarchy({len(self)} concepts, {', '.join(counts)})"

    def _repr_html_(self) -> str:
        """Show the interactive picture in a notebook."""
        from utils.concepts.hierarchy_view import hierarchy_html

        return hierarchy_html(self)

    def _graph(self, relation: Any) -> AcyclicGraph:
        if not isinstance(relation, str) or relation not in self._graphs:
            raise HierarchyError(
                f"There is no relation {relation!r}.",
                f"There are {' and '.join(map(repr, RELATIONS))}.",
                f"Say it as relate(concept, {REQUIRES!r}, prerequisite) or relate(special, {IS_A!r}, general).",
            )
        return self._graphs[relation]

    @staticmethod
    def _cyclic(relation: str, cycle: Cycle) -> HierarchyError:
        """Name a cycle as a chain of sentences, each concept followed by its parent."""
        names = cycle.nodes[::-1]
        # Begun at the first name of the alphabet, so that the same cycle is always told alike.
        turn = names.index(min(names))
        names = [*names[turn:], *names[:turn]]
        shown = names if len(names) <= NAMED_OF_A_CYCLE else [*names[:8], f"({len(names) - 9} more)", names[-1]]
        chain = f" {relation} ".join([*shown, names[0]])
        return HierarchyError(
            f"A cycle of {len(names)} concept{'s' * (len(names) != 1)} would be closed: {chain}.",
            "A concept cannot stand above itself.",
            "Leave out or turn around one of these relations; what was there is unchanged.",
        )


def _networkx() -> Any:
    return require("networkx", "hold a hierarchy of concepts")
