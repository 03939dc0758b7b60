import contextlib
import json

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.concepts import hierarchy_files
from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_files import load_hierarchy, save_hierarchy
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_parts import Concept, Relation
from utils.runtime.errors import SeedbedError
from utils.runtime.files import own_hash

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FACTS = st.dictionaries(
    TEXT.filter(lambda text: text.strip() == text != "" and text.isprintable()),
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    max_size=3,
)
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)
HEAD = '<?xml version="1.0"?>'
XMLNS = 'xmlns="http://graphml.graphdrawing.org/xmlns"'
GRAPH, CLOSE = '<graph edgedefault="directed">', "</graph></graphml>"
OPEN = f"<graphml {XMLNS}>{GRAPH}"


def example():
    made = ConceptHierarchy()
    made.add("a <b> & \"c\" 'é' 面", 1.5, "x & y", note="line\nbreak\ttab <i>", number=3, nothing=None, yes=True)
    made.add("child", 0.1)
    made.relate("child", "requires", next(iter(made)), source="<me>")
    made.relate("child", "is-a", next(iter(made)))
    return made


@pytest.mark.parametrize("kind", ["json", "graphml"])
def test_what_was_saved_is_read(tmp_path, kind):
    path = save_hierarchy(example(), tmp_path / "new" / f"h.{kind}")
    again = load_hierarchy(path)
    assert again == example()
    assert type(again.concept("child").difficulty) is float
    assert save_hierarchy(again, tmp_path / f"again.{kind}").read_bytes() == path.read_bytes()
    empty = save_hierarchy(ConceptHierarchy(), tmp_path / f"empty.{kind}")
    assert len(load_hierarchy(empty)) == 0


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, unique=True, min_size=2, max_size=4), facts=FACTS, difficulty=st.floats(-1e9, 1e9))
def test_both_formats_keep_everything(tmp_path_factory, names, facts, difficulty):
    folder = tmp_path_factory.mktemp("h")
    made = ConceptHierarchy()
    for name in names:
        made.put(Concept(name, difficulty, names[0], facts))
    made.relate_all([Relation(names[1], "is-a", names[0], facts)])
    for kind in ("json", "graphml"):
        assert load_hierarchy(save_hierarchy(made, folder / f"h.{kind}")) == made


def test_other_programs_read_it(tmp_path):
    graph = nx.read_graphml(save_hierarchy(example(), tmp_path / "h.graphml"))
    assert next(iter(graph.edges(data="relation")))[2] == "is-a"
    assert graph.nodes["child"]["difficulty"] == 0.1


def test_graphml_of_other_programs(tmp_path):
    nx.write_graphml(nx.DiGraph([("animal", "dog")]), tmp_path / "h.graphml")
    with pytest.raises(HierarchyError, match="has the relation None.*load_hierarchy"):
        load_hierarchy(tmp_path / "h.graphml")
    assert load_hierarchy(tmp_path / "h.graphml", relation="is-a").ancestors("dog", "is-a") == ["animal"]
    graph = nx.DiGraph()
    graph.add_node("dog", colour="brown", weight=3)
    nx.write_graphml(graph, tmp_path / "h.graphml")
    assert load_hierarchy(tmp_path / "h.graphml").concept("dog").facts == {"colour": "brown", "weight": 3}
    nx.write_graphml(nx.Graph([("animal", "dog")]), tmp_path / "h.graphml")
    with pytest.raises(HierarchyError, match="no direction"):
        load_hierarchy(tmp_path / "h.graphml", relation="is-a")
    nx.write_graphml(nx.DiGraph([("a", "b"), ("b", "a")]), tmp_path / "h.graphml")
    with pytest.raises(HierarchyError, match="a is-a b is-a a"):
        load_hierarchy(tmp_path / "h.graphml", relation="is-a")


BOMB = (
    '<!DOCTYPE lolz [<!ENTITY a "lol">'
    + "".join(f'<!ENTITY {after} "{f"&{before};" * 10}">' for before, after in zip("abcdefgh", "bcdefghi", strict=True))
    + f']><graphml {XMLNS}><graph edgedefault="directed"><node id="&i;"/>'
    + CLOSE
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + BOMB, "document type"),
        ((HEAD + BOMB).replace('version="1.0"', 'version="1.0" encoding="UTF-16"').encode("utf-16"), "document type"),
        (
            f'{HEAD}<!DOCTYPE g [<!ENTITY x SYSTEM "file:///etc/passwd">]><graphml {XMLNS}><graph>'
            '<node id="&x;"/>' + CLOSE,
            "document type",
        ),
        (f'<!DOCTYPE g SYSTEM "http://example.com/x.dtd"><graphml {XMLNS}/>', "document type"),
        ("<a>" * 40 + "</a>" * 40, "levels"),
        ("", "ExpatError"),
        ("<a>", "ExpatError"),
        ("<a/>", "no graph|Error"),
        ("\x00\x01", "ExpatError"),
        (f"<graphml {XMLNS}/>", "no graph|Error"),
        (OPEN + '<node id="a"><data key="q">1</data></node>' + CLOSE,
         "no key q"),
        (f'<graphml {XMLNS}><key id="q" for="node" attr.name="difficulty" attr.type="double"/>'
         f'{GRAPH}<node id="a"><data key="q">NaN</data></node>{CLOSE}', "difficulty nan"),
        (f'<graphml {XMLNS}><key id="q" for="node" attr.name="difficulty" attr.type="int"/>'
         f'{GRAPH}<node id="a"><data key="q">x</data></node>{CLOSE}', "ValueError"),
        (f'<graphml {XMLNS}><key id="q" for="node" attr.name="facts" attr.type="string"/>'
         f'{GRAPH}<node id="a"><data key="q">[1]</data></node>{CLOSE}', "no JSON object"),
        (OPEN + '<hyperedge/>' + CLOSE, "hyperedge"),
        (OPEN + '<node/>' + CLOSE, "a node without id"),
        (f'<g:graphml {XMLNS.replace("xmlns", "xmlns:g", 1)}><g:graph edgedefault="directed"><g:edge source="a"/>'
         "</g:graph></g:graphml>", "edge without target"),
        (OPEN + '<edge source="a" target="b"/>'
         '<edge source="a" target="b"/>' + CLOSE, "twice"),
    ],
)  # fmt: skip
def test_graphml_is_not_trusted(tmp_path, text, said):
    path = tmp_path / "h.graphml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HierarchyError, match=said):
        load_hierarchy(path, relation="is-a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        (b"\xff\xfe", "damaged"),
        ("[1]", "does not say"),
        ('{"format": "other"}', "does not say"),
        ('{"format": "F", "version": 1}', "version '1'.*version 2; files of version 1 carry no hash"),
        ('{"format": "F", "version": 2, "concepts": [], "relations": []}', "it carries no hash"),
        ('{"format": "F", "version": 2, "sha256": "1"}', "was changed after it was written"),
        (
            '{"format": "F", "version": 2, "sha256": "", "x": ' + "[" * 993 + "]" * 993 + "}",
            "recursion|deeply|was changed",
        ),
        ('{"format": "F", "version": 2, "version": 2}', "twice in one object"),
        ('{"format": "F", "version": 2, "concepts": [{"name": "a", "difficulty": NaN}], "relations": []}', "NaN"),
        ('{"format": "F", "version": 2, "x": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_json_is_not_trusted(tmp_path, text, said):
    path = tmp_path / "h.json"
    path.write_bytes(text if isinstance(text, bytes) else text.replace('"F"', f'"{hierarchy_files.FORMAT}"').encode())
    with pytest.raises(SeedbedError, match=said):
        load_hierarchy(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "no list of concepts"),
        ({"concepts": [{"name": "a", "difficulty": float("inf")}], "relations": []}, "inf"),
        ({"concepts": [{"name": 3}], "relations": []}, "Entry 0 of concepts"),
    ],
)
def test_json_hashed_anew_is_not_trusted(tmp_path, values, said):
    values = {"format": hierarchy_files.FORMAT, "version": hierarchy_files.VERSION, **values}
    path = tmp_path / "h.json"
    path.write_text(json.dumps(values | {"sha256": own_hash(values)}).replace("Infinity", "1e999"))
    with pytest.raises(HierarchyError, match=said):
        load_hierarchy(path)


def test_a_change_by_hand_is_noticed(tmp_path):
    path = save_hierarchy(example(), tmp_path / "h.json")
    path.write_text(path.read_text().replace('"requires"', '"is-a"'))
    with pytest.raises(HierarchyError, match="was changed after it was written: its hash is another.*Save it again"):
        load_hierarchy(path)


@pytest.mark.parametrize("kind", ["json", "graphml"])
def test_damage_anywhere_is_an_error_of_ours_or_another_hierarchy(tmp_path, kind):
    path = save_hierarchy(example(), tmp_path / f"h.{kind}")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        for damaged in (content[:place], content[:place] + b"\x00" + content[place + 1 :],
                        content[:place] + bytes([content[place] ^ 3]) + content[place + 1 :]):  # fmt: skip
            path.write_bytes(damaged)
            with contextlib.suppress(HierarchyError):
                load_hierarchy(path)


def test_paths(tmp_path, monkeypatch):
    with pytest.raises(HierarchyError, match=r"ends in '.yaml'. Hierarchies are kept as .json or .graphml"):
        save_hierarchy(example(), tmp_path / "h.yaml")
    with pytest.raises(HierarchyError, match="nothing"):
        load_hierarchy(tmp_path / "h")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HierarchyError, match="cannot be saved as .*not below a file.*untouched"):
        save_hierarchy(example(), tmp_path / "file" / "h.json")
    for call in (lambda: save_hierarchy(example(), None), lambda: load_hierarchy(None)):
        with pytest.raises(HierarchyError, match="The path of the hierarchy is None.*Expected a path"):
            call()
    with pytest.raises(HierarchyError, match="The hierarchy is None. Expected a ConceptHierarchy"):
        save_hierarchy(None, tmp_path / "h.json")
    with pytest.raises(HierarchyError, match="cannot be read"):
        load_hierarchy(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(HierarchyError, match="cannot be read"):
        load_hierarchy(tmp_path / "folder.json")
    path = save_hierarchy(example(), tmp_path / "h.JSON")
    assert json.loads(path.read_text())["version"] == 2
    monkeypatch.setattr(hierarchy_files, "MOST_BYTES", 100)
    with pytest.raises(HierarchyError, match="more than"):
        load_hierarchy(path)
