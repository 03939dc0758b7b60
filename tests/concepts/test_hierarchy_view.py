import json
import random
import re
import shutil
import subprocess
import sys
from html import unescape
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import environment
from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_layout import GAP, HEIGHT, layered_layout, rising, shortened
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_page import SCRIPT, STYLE
from utils.concepts.hierarchy_view import (
    colour_numbers,
    curve,
    hierarchy_figure,
    hierarchy_html,
    save_hierarchy_figure,
    save_hierarchy_html,
)
from utils.runtime.errors import MissingPackageError

EVIL = "<script>alert(1)</script> & \"'"


def lessons():
    made = ConceptHierarchy()
    for name, domain in (
        ("counting", "numbers"), ("addition", "numbers"), ("area", "geometry"), (EVIL, "<i>evil</i>"), ("$x$", ""),
    ):  # fmt: skip
        made.add(name, 2 if domain else 0, domain, source="made up")
    made.relate_all([
        ("addition", "requires", "counting"), ("area", "requires", "addition"), ("area", "requires", "counting"),
        (EVIL, "is-a", "area"),
    ])  # fmt: skip
    return made


def drawn(number, edges, seed):
    dice = random.Random(seed)
    made = ConceptHierarchy()
    for name in range(number):
        made.add(f"concept {name}" * dice.randint(1, 3))
    names = list(made)
    for _ in range(edges if number > 1 else 0):
        low, high = sorted(dice.sample(range(number), 2))
        made.relate(names[high], dice.choice(["requires", "is-a"]), names[low])
    return made


@settings(max_examples=40, deadline=None)
@given(number=st.integers(1, 40), edges=st.integers(0, 80), seed=st.integers(0, 99))
def test_boxes_do_not_touch_and_lines_run_onward(number, edges, seed):
    made = drawn(number, edges, seed)
    plan = layered_layout(made)
    assert sorted(box.name for box in plan.boxes) == sorted(made)
    assert len(plan.lines) == len(made.reduced().relations())
    boxes = {box.name: box for box in plan.boxes}
    for box in plan.boxes:
        assert box.left >= 0 and box.left + box.width <= plan.width
        assert box.middle >= HEIGHT / 2 and box.middle + HEIGHT / 2 <= plan.height
        for other in plan.boxes:
            apart = abs(box.middle - other.middle) >= HEIGHT or other.left >= box.left + box.width
            assert other is box or apart or box.left >= other.left + other.width
    for line in plan.lines:
        parent, child = boxes[line.relation.parent], boxes[line.relation.concept]
        assert line.points[0] == (parent.left + parent.width, parent.middle)
        assert line.points[-1] == (child.left, child.middle)
        across = [x for x, _ in line.points]
        assert across == sorted(across)
        assert all(0 <= y <= plan.height for _, y in line.points)
        assert len(curve(line)) == 3 * len(line.points) - 2
    assert layered_layout(made) == plan


def test_a_chain_is_straight_and_a_line_passes_beside_a_box():
    chain = ConceptHierarchy.from_relations([("b", "requires", "a"), ("c", "requires", "b")])
    assert len({box.middle for box in layered_layout(chain).boxes}) == 1
    chain.relate("c", "is-a", "a")
    plan = layered_layout(chain)
    long = next(line for line in plan.lines if len(line.points) == 4)
    box = next(box for box in plan.boxes if box.name == "b")
    assert abs(long.points[1][1] - box.middle) >= HEIGHT / 2 + GAP / 4


def test_relations_that_contradict_each_other_are_drawn_all_the_same():
    both = ConceptHierarchy.from_relations([("a", "requires", "b"), ("b", "is-a", "a")])
    assert len(layered_layout(both).lines) == 2
    assert hierarchy_figure(both)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.1, 5)), max_size=12))
def test_the_nearest_rising_numbers(pairs):
    wanted, weights = [one for one, _ in pairs], [two for _, two in pairs]
    found = rising(wanted, weights)
    assert found == sorted(found)
    isotonic = pytest.importorskip("sklearn.isotonic")
    if pairs:
        best = isotonic.IsotonicRegression().fit_transform(range(len(pairs)), wanted, sample_weight=weights)
        assert found == pytest.approx(list(best), abs=1e-6)


def test_the_picture_is_well_formed_and_everything_is_escaped():
    shown = hierarchy_html(lessons())
    body = shown[shown.index("<div") : shown.index("<script>")] + "</div>"
    tree = ElementTree.fromstring(body)
    boxes = tree.findall(".//svg/g")
    assert [box.get("aria-label") for box in boxes] == list(lessons())
    assert "<script>alert" not in shown and "<i>evil" not in shown and shown.count("<script>") == 1
    graph = json.loads(tree.get("data-graph"))
    assert (
        graph["names"] == list(lessons())
        and len(graph["lines"]) == 3 == len(tree.findall(".//path[@d][@data-line]")) / 2
    )
    area = graph["said"][2]
    assert "domain: geometry; level: 2 (requires); level: 0 (is-a); difficulty: 2; source: made up" in area
    assert "requires: addition, counting" in area and f"kinds: {EVIL}" in area
    assert "is required by: area" in graph["said"][1] and "in all" not in graph["said"][1]
    assert graph["said"][4] == "level: 0 (requires); level: 0 (is-a); source: made up"
    legend = "".join(tree.find("p").itertext())
    assert "5 concepts" in legend and "first then (requires, 3)" in legend and "<i>evil</i>" in legend
    assert lessons()._repr_html_() == shown


def test_the_picture_asks_for_nothing():
    assert not re.findall(r"https?:|//|url\(|@import|innerHTML|eval", SCRIPT + STYLE)
    assert not re.findall(r"(?:src|href|on\w+)=", hierarchy_html(lessons()))


def test_too_many_and_none():
    many = ConceptHierarchy()
    assert "It is empty" in hierarchy_html(many)
    with pytest.raises(HierarchyError, match="has 0 concepts"):
        hierarchy_figure(many)
    for number in range(301):
        many.add(f"n{number}")
    assert "A picture shows at most 300" in unescape(hierarchy_html(many))
    with pytest.raises(HierarchyError, match="has 301 concepts"):
        layered_layout(many)


def test_domains_have_colours_of_their_own_as_far_as_there_are():
    made = ConceptHierarchy()
    for number in range(10):
        made.add(f"n{number}", domain=f"d{number}")
    assert list(colour_numbers(made).values()) == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert shortened("x" * 40) == "x" * 27 + "…" and shortened("short") == "short"


@pytest.mark.parametrize("dark", [False, True])
def test_the_drawing(tmp_path, dark):
    path = save_hierarchy_figure(lessons(), tmp_path / "h.png", dark)
    with pytest.raises(HierarchyError, match="ends in .png"):
        save_hierarchy_figure(lessons(), tmp_path / "h.docx")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = hierarchy_figure(lessons(), dark)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert "addition" in said and r"\$x\$" in said and "first → then (requires)" in said
    figure.canvas.draw()
    assert figure.axes[0].get_window_extent().width > 300


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        hierarchy_figure(lessons())
    assert "<svg" in hierarchy_html(lessons()), "the interactive picture needs none"


DRIVER = """
import sys
from playwright.sync_api import sync_playwright
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=sys.argv[2], args=["--no-sandbox", "--disable-gpu"])
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 600, "height": 500}, color_scheme=scheme)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(sys.argv[1])
        node = lambda name: page.get_by_role("button", name=name, exact=True)
        card = page.locator(".card")
        node("addition").hover()
        assert "is required by: area" in card.inner_text(), card.inner_text()
        node("addition").click()
        names = lambda kind: [one.get_attribute("aria-label") for one in page.locator("g." + kind).all()]
        assert names("above") == ["counting"] and names("below")[0] == "area" and len(names("below")) == 2
        assert names("off") == ["$x$"] and names("chosen") == ["addition"]
        page.screenshot(path=sys.argv[3] + f"-{scheme}.png")
        page.keyboard.press("Escape")
        assert not names("off") and "Point at" in card.inner_text()
        node("area").focus()
        page.keyboard.press("Enter")
        assert names("above") == ["counting", "addition"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 600
        assert page.evaluate("getComputedStyle(document.querySelector('.seedbed-hierarchy')).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 25, 29)")
        assert not errors and len(asked) == 1, (errors, asked)
    browser.close()
"""


@pytest.mark.slow
@pytest.mark.browser
def test_pointing_and_clicking_in_a_browser(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    try:
        lab = f"{environment.ensure('browser')}/bin/python"
    except environment.EnvironmentFailure as error:
        pytest.skip(f"Playwright cannot be installed: {error}")
    page = save_hierarchy_html(lessons(), tmp_path / "h.html")
    done = subprocess.run(
        [lab, "-c", DRIVER, page.as_uri(), chromium, str(tmp_path / "shot")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "shot-dark.png").stat().st_size > 5_000
