"""Hierarchies in files: JSON of our own and GraphML that other programs read. What is read is not trusted.

A JSON file carries a hash of its content, so that damage and changes by hand are noticed. GraphML is for exchange:
other programs write and change it, so that it carries none.

Unusual: a GraphML file passes through the XML parser twice, because networkx reads it with one that resolves entities.
The first pass keeps nothing, and refuses document types (in which entities are declared), depth and numbers of elements
that no hierarchy needs.
"""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn
from xml.parsers import expat

from utils.concepts.checks import check_kind
from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_parts import RELATIONS, Concept, Relation
from utils.runtime.files import checked_path, own_hash, saving, write_atomic
from utils.runtime.optional import require

FORMAT, VERSION = "seedbed-concept-hierarchy", 2
MOST_BYTES, MOST_ELEMENTS, DEEPEST = 64 << 20, 4_000_000, 32
"""Of a file: its size, its XML elements and how deep they may be nested."""
NEEDED = {"node": ("id",), "edge": ("source", "target")}
"""Attributes of XML elements without which they name nothing."""
MOST_DIGITS = 20
"""Of a whole number in a file."""
KINDS = (".json", ".graphml")
OWN = ("difficulty", "domain", "facts")
"""Attributes of a node in GraphML; others become facts."""


def save_hierarchy(hierarchy: ConceptHierarchy, path: str | Path) -> Path:
    """Write a hierarchy as ``.json`` or ``.graphml``, whole or not at all, and return the path.

    In GraphML an edge points from the parent to the concept, and its attribute ``relation`` has the relation; it is for
    exchange with other programs, and a change of such a file is not noticed.

    Raises:
        HierarchyError: It is no hierarchy, the path has another ending, or the file cannot be written.
    """
    check_kind(hierarchy, ConceptHierarchy, "hierarchy", "Make one with ConceptHierarchy().", HierarchyError)
    with saving(path, "the hierarchy", HierarchyError) as file:
        if _kind(file) == ".json":
            values = {"format": FORMAT, "version": VERSION, **hierarchy.to_dict()}
            write_atomic(file, json.dumps(values | {"sha256": own_hash(values)}, indent=1) + "\n")
        else:
            write_atomic(file, _to_graphml(hierarchy))
    return file


def load_hierarchy(path: str | Path, relation: str | None = None) -> ConceptHierarchy:
    """Read a hierarchy from ``.json`` or ``.graphml``; everything in it is checked.

    Args:
        path: The file.
        relation: What edges mean in a GraphML file of another program that does not say so.

    Raises:
        HierarchyError: It is missing, too large, damaged or changed, no hierarchy, or contradicts itself.
    """
    path = checked_path(path, "the hierarchy", HierarchyError)
    kind = _kind(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise HierarchyError(
            f"{path} cannot be read ({error.strerror or error}).",
            "A file that save_hierarchy wrote was expected.",
            "Check the path.",
        ) from None
    if len(content) > MOST_BYTES:
        raise HierarchyError(
            f"{path} has more than {MOST_BYTES >> 20} MiB.",
            "No hierarchy of a readable size needs as much.",
            "Save a part of it: domain(name) or restricted(names).",
        )
    return _from_json(content, path) if kind == ".json" else _from_graphml(content, path, relation)


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise HierarchyError(
            f"{path.name} ends in {kind or 'nothing'!r}.",
            f"Hierarchies are kept as {' or '.join(KINDS)}.",
            "Choose a name with one of these endings.",
        )
    return kind


def _damaged(path: Path, why: str) -> NoReturn:
    raise HierarchyError(
        f"{path} is damaged or no hierarchy: {why}.",
        "A file as save_hierarchy writes it was expected.",
        "Save it again, or take it from where it came.",
    ) from None


def _from_json(content: bytes, path: Path) -> ConceptHierarchy:
    """Read JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a name is there twice in one object")
        return made

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(digits)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        values = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_int=whole, parse_constant=refuse
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        _damaged(path, str(error)[:200] or type(error).__name__)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        _damaged(path, f"it does not say that it is a {FORMAT}")
    if values.get("version") != VERSION:
        raise HierarchyError(
            f"{path} has version {str(values.get('version'))[:40]!r} of the format.",
            f"This program reads version {VERSION}; files of version 1 carry no hash, so that no change is noticed.",
            "Use the Seedbed that wrote it, or a newer one; from an older one save it as GraphML and read that.",
        )
    if "sha256" not in values:
        _damaged(path, "it carries no hash of its content")
    if values["sha256"] != own_hash(values):
        _damaged(path, "it was changed after it was written: its hash is another")
    return ConceptHierarchy.from_dict(values)


def _to_graphml(hierarchy: ConceptHierarchy) -> bytes:
    """Return GraphML."""
    networkx = require("networkx", "write GraphML")
    graph = networkx.MultiDiGraph(format=FORMAT, version=VERSION)
    for name in sorted(hierarchy):
        concept = hierarchy.concept(name)
        facts = json.dumps(dict(concept.facts))
        graph.add_node(name, difficulty=concept.difficulty, domain=concept.domain, facts=facts)
    for one in hierarchy.relations():
        facts = json.dumps(dict(one.facts))
        graph.add_edge(one.parent, one.concept, key=one.relation, relation=one.relation, facts=facts)
    written = io.BytesIO()
    networkx.readwrite.graphml.write_graphml_xml(graph, written)
    return written.getvalue()


def check_xml(content: bytes) -> None:
    """Look through an XML document without keeping any of it.

    Raises:
        ValueError: It has a document type, is nested too deeply, has too many elements, or one without its name.
        xml.parsers.expat.ExpatError: It is not well formed.
    """
    parser = expat.ParserCreate()
    depth, elements = 0, 0

    def begin(name: str, given: Mapping[str, str]) -> None:
        nonlocal depth, elements
        # networkx would call what has no name "None".
        lost = [one for one in NEEDED.get(name.rpartition(":")[2], ()) if one not in given]
        if lost:
            raise ValueError(f"there is a {name} without {lost[0]}")
        depth, elements = depth + 1, elements + 1
        if depth > DEEPEST or elements > MOST_ELEMENTS:
            raise ValueError(f"more than {DEEPEST} levels or {MOST_ELEMENTS:,} elements")

    def end(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type, with which entities could be declared")

    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.Parse(content, True)


def _from_graphml(content: bytes, path: Path, relation: str | None) -> ConceptHierarchy:
    """Read GraphML."""
    networkx = require("networkx", "read GraphML")
    try:
        check_xml(content)
        with warnings.catch_warnings():
            # Ports and untyped keys of other programs; neither matters here.
            warnings.simplefilter("ignore")
            graph = networkx.read_graphml(io.BytesIO(content), force_multigraph=True)
    except (
        networkx.NetworkXError,
        expat.ExpatError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        SyntaxError,
    ) as e:
        _damaged(path, f"{type(e).__name__}: {str(e)[:200]}")
    except StopIteration:
        _damaged(path, "it has no graph")
    if not graph.is_directed():
        _damaged(path, "its edges have no direction")
    made, said = ConceptHierarchy(), []
    for name, data in graph.nodes(data=True):
        facts = {**{key: value for key, value in data.items() if key not in OWN}, **_facts(data, path)}
        made.put(Concept(name, data.get("difficulty", 0.0), data.get("domain", ""), facts))
    for parent, concept, data in graph.edges(data=True):
        kind = data.get("relation", relation)
        if kind not in RELATIONS:
            raise HierarchyError(
                f"The edge from {parent!r} to {concept!r} in {path} has the relation {kind!r}.",
                f"Expected {' or '.join(map(repr, RELATIONS))}, with the edge from the parent to the concept.",
                "Give what the edges mean: load_hierarchy(path, relation=...).",
            )
        said.append(Relation(concept, kind, parent, _facts(data, path)))
    if len(set(said)) < len(said):
        _damaged(path, "a relation is there twice")
    made.relate_all(said)
    return made


def _facts(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the facts that an attribute holds as JSON."""
    try:
        facts = json.loads(data.get("facts", "{}"))
    except (ValueError, TypeError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        _damaged(path, f"the facts {str(data.get('facts'))[:60]!r} are no JSON object")
    return facts
