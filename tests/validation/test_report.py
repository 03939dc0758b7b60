"""The report: verdict, golden text, JSON, HTML.

``SEEDBED_OVERWRITE_GOLDEN=1 pytest tests/validation/test_report.py`` writes the golden files anew.
"""

import dataclasses
import json
import math
import os
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from utils.tier1_critical_validation import TIER1, validate
from utils.validation import CheckResult, Finding, ValidationReport
from utils.validation.check import NOT_RUN
from utils.validation.codes import MEANING
from utils.validation.pictures import Picture
from utils.validation.report import _EXPLAINS

# Read when the module is imported: a fixture hides these variables from the tests themselves.
OVERWRITE = bool(os.environ.get("SEEDBED_OVERWRITE_GOLDEN"))
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def compare(name, text):
    """Compare with a golden file, or write it when asked to."""
    path = GOLDEN / name
    if OVERWRITE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def stable(report):
    """Return what neither the machine nor a new check changes in a report's text: the head and the findings."""
    head = report.text().partition("\ncheck ")[0]
    head = re.sub(r" +Tier 1, \d+ checks, \S+ s", "  Tier 1", head)
    return re.sub(r"\|change\| \S+, noise \S+,", "|change| X, noise X,", head).rstrip() + "\n"


def fixed_report(**changes):
    """Return a report whose every number is fixed."""
    leak = Finding(
        "future_leakage", "fail", "blocks.2.attn", "token 9 changes the logits at position 5", "Mask the future."
    )
    slow = Finding("slow_python_loop", "warn", "mixer", "38 more per position & <b>", "Batch it.")
    results = (
        CheckResult("causality", 1, "fail", 0.31, 2e-7, leak.message, 0.5, {"norms": {"a": 1.0, "b": 0.1}}, (leak,)),
        CheckResult("inference_speed", 1, "warn", 123456.7, None, slow.message, 1.25, {"reduced": ["less"]}, (slow,)),
        CheckResult("gradient_flow", 1, "pass", 1.5, math.inf, "all fine", 2.0),
        CheckResult("initialization", 1, "skip", None, None, "the model has no parameters", 0.0),
    )
    values = {"results": results, "model": "GPTMini", "task": "causal_lm", "parameters": 3_200_000, "seconds": 3.84}
    return ValidationReport(**{**values, **changes})


def test_golden_of_a_fixed_report():
    """The look of the terminal table, byte for byte."""
    compare("report_fixed.txt", fixed_report().text())


@pytest.mark.parametrize(("name", "settings"), [("sound", {}), ("leaking", {"mask": "none"})])
def test_golden_of_a_real_report(tiny, name, settings):
    """Verdict and findings of a real validation; the table depends on the machine."""
    compare(f"report_{name}.txt", stable(validate(tiny.GPT(**settings), progress=False)))


def test_verdict_sentence():
    """Faults and warnings are counted once each."""
    report = fixed_report()
    assert report.sentence == "GPTMini, causal language model, 3.2M parameters: 1 fault, 1 warning"
    assert report.text().startswith("NOT READY  GPTMini, causal language model, 3.2M parameters: 1 fault, 1 warning ")
    assert report.scope == "Tier 1, 4 checks, 3.8 s"
    assert (report.verdict, report.passed) == ("NOT READY", False)
    assert [result.check for result in report.failures] == ["causality"]
    assert [result.check for result in report.warnings] == ["inference_speed"]


def test_warnings_pass_and_gaps_do_not():
    """READY with warnings; INCOMPLETE when a check could not run; no results are no pass."""
    results = fixed_report().results
    assert fixed_report(results=results[1:]).passed
    gap = CheckResult("x", 1, "skip", None, None, "could not run: why", 0.0, {"could_not_run": True})
    incomplete = fixed_report(results=(results[2], gap))
    assert (incomplete.verdict, incomplete.passed) == ("INCOMPLETE", False)
    assert not fixed_report(results=()).passed


def test_lines_are_at_most_120_wide():
    """Long messages, names and verdicts are wrapped."""
    long = Finding("future_leakage", "fail", "encoder.layers.11." * 3 + "attention", "word " * 60, "do " * 80)
    result = CheckResult("causality", 1, "fail", 1.0, 2.0, "word " * 60, 1.0, {}, (long,))
    text = fixed_report(results=(result,), model="M" * 90).text()
    assert max(len(line) for line in text.splitlines()) <= 120 and text.count("do ") > 70


def test_every_finding_says_where_in_the_code_and_how_to_see_it():
    """Location, the call that reproduces it, and the lines to paste."""
    leak = Finding(
        "future_leakage", "fail", "blocks.2.attn", "m", "h", "a = 1\nb = model(a)", "model.py:42 (class Attention)"
    )
    results = (CheckResult("causality", 1, "fail", 1, 0, "m", 0.1, {}, (leak,)),)
    report = dataclasses.replace(fixed_report(), results=results)
    text = report.text()
    assert 'See it: utils.show("future_leakage", model)\n            a = 1\n            b = model(a)\n' in text
    assert "Code: model.py:42 (class Attention)" in text
    page = report.to_html()
    assert "<pre>a = 1\nb = model(a)</pre>" in page and "model.py:42 (class Attention)" in page


@pytest.mark.parametrize(
    ("changes", "words", "colour"),
    [
        ({}, "not ready, 1 fault", "#b42318"),
        ({"results": (CheckResult("a", 1, "pass", 1, 1, "fine", 0.1),)}, "ready", "#1a7f37"),
        ({"results": (CheckResult("a", 2, "pass", 1, 1, "fine", 0.1),), "tiers": (2,)}, "described", "#5b6570"),
        ({"results": (CheckResult("a", 1, "skip", 1, 1, "x", 0.1, {"could_not_run": True}),)}, "incomplete", "#8a5a00"),
    ],
)
def test_badge_says_the_verdict_in_one_line(tmp_path, changes, words, colour):
    """A picture of one line for a README; Tier 2 alone never says ready."""
    report = fixed_report(**changes)
    picture = report.badge()
    assert f">{words}</text>" in picture and f'fill="{colour}"' in picture and picture.count("\n") == 1
    assert report.badge(tmp_path / "badge.svg").read_text() == picture
    assert xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")


def test_pictures_are_in_the_page_and_not_in_the_json():
    """A picture is for people."""
    picture = Picture("by layer", "<svg></svg>", "see")
    results = (CheckResult("rank", 2, "pass", 1, None, "fine", 0.1, {"a": 1}, (), (picture,)),)
    report = dataclasses.replace(fixed_report(), results=results)
    assert picture.html() in report.to_html() and "by layer" not in report.to_json()


def test_json(tmp_path):
    """Versioned, and strict JSON even with infinities."""
    text = fixed_report().to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (data["version"], data["verdict"], data["passed"]) == (2, "NOT READY", False)
    assert data["results"][2]["threshold"] == "inf" and data["findings"][0]["where"] == "blocks.2.attn"
    assert set(data["results"][0]) == {
        "check", "tier", "status", "value", "threshold", "why", "seconds", "details", "findings"
    }  # fmt: skip
    assert fixed_report().to_json(str(tmp_path / "report.json")) == tmp_path / "report.json"
    assert json.loads((tmp_path / "report.json").read_text()) == data


class Audit(HTMLParser):
    """Collects what a page would load or run, and checks that tags close."""

    VOID = ("meta", "br", "img", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "action", "data")]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_self_contained_and_escaped(tmp_path):
    """No requests, no scripts, names and messages escaped, light and dark, small."""
    evil = Finding("x", "fail", "<script>alert(1)</script>", '"><img src=x onerror=1>', "<b>")
    result = CheckResult("<i>", 1, "fail", "<u>", None, "<script>", 1.0, {"<k>": "</pre><script>"}, (evil,))
    report = fixed_report(results=(*fixed_report().results, result), model="</title><script>")
    page = report.to_html()
    audit = Audit()
    audit.feed(page)
    assert (audit.links, audit.scripts, audit.open) == ([], 0, [])
    assert "<script" not in page and "onerror=1>" not in page.replace("onerror=1&gt;", "")
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "prefers-color-scheme:dark" in page and len(page) < 100_000
    assert "<svg" in page and "<details>" in page and "reduced: less" in page
    assert report.to_html(tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_rows_of_the_page_repeat_nothing():
    """A finding is told once, a value that is a sentence once, and what could not run is not as grey as a skip."""
    leak = Finding("future_leakage", "fail", "attn", "the only message", "h")
    results = (
        CheckResult("a", 1, "fail", "a value of many words", None, leak.message, 0.1, {}, (leak,)),
        CheckResult("b", 1, "skip", None, None, "not run, see above", 0.1, {"could_not_run": True}),
    )
    page = fixed_report(results=results).to_html()
    assert page.count("the only message") == 1 and "see above</td>" in page and "a value of many words" not in page
    assert "<td class='warn'>skip</td>" in page


def test_notebook_fragment_styles_only_itself():
    """Every rule of the fragment's style sheet starts with the report's own class."""
    fragment = fixed_report()._repr_html_()
    style = re.search(r"<style>(.*?)</style>", fragment, re.S).group(1)
    style = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style, flags=re.S)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", style) for part in rule.split(",")]
    assert selectors and all(selector.startswith(".seedbed-report") for selector in selectors)
    assert "<html" not in fragment and "<body" not in fragment
    assert "seedbed-report" in fixed_report().results[0]._repr_html_()


JUPYTER = {
    "table": ("border-collapse", "color", "font-size", "table-layout", "margin"),
    "tr": ("background", "border"),
    "td": ("text-align", "vertical-align", "padding", "line-height", "border"),
    "th": ("text-align", "vertical-align", "padding", "line-height", "border"),
}
"""What Jupyter says of the parts of a table, with at most two classes, a pseudo-class and two elements."""


def test_tables_look_the_same_in_jupyter():
    """Each of its properties is set by a rule that is more specific than any of its own."""
    style = re.search(r"<style>(.*?)</style>", fixed_report()._repr_html_(), re.S).group(1)
    rules = [
        (part.strip(), body) for head, body in re.findall(r"([^{}]+)\{([^{}]*)\}", style) for part in head.split(",")
    ]
    for element, properties in JUPYTER.items():
        bodies = [body for selector, body in rules if selector == f"{'.seedbed-report' * 3} {element}"]
        said = {name.split(":")[0].strip() for body in bodies for name in body.split(";")}
        assert set(properties) <= said
    assert all(selector.count(".seedbed-report") == 3 for selector, _ in rules if not selector.startswith("@"))


def test_a_finding_names_what_show_takes_beside_the_model():
    """Without what the user stated, it might not be found again."""
    report = fixed_report(arguments=", spec=spec")
    assert 'See it: utils.show("future_leakage", model, spec=spec)' in report.text()
    assert "utils.show(&quot;future_leakage&quot;, model, spec=spec)" in report.to_html()


def test_repr_is_a_dozen_lines():
    """The verdict and the findings; where the rest is."""
    found = tuple(Finding("nan_output", "fail", f"layer{i}", "word " * 60, "do") for i in range(30))
    many = fixed_report(results=(CheckResult("x", 1, "fail", 1, 0, "", 0.0, {}, found),))
    lines = repr(many).splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 120
    assert lines[0].startswith("NOT READY  GPTMini") and lines[-2] == "and 21 more" and "print(report)" in lines[-1]
    assert len(repr(fixed_report()).splitlines()) == 4 and str(many) == many.text()


def found(code, message="m", severity="fail"):
    """Return the result of a check that found one thing."""
    return CheckResult(code, 1, severity, 1, 0, message, 0.1, {}, (Finding(code, severity, "x", message, "h"),))


@pytest.mark.parametrize(
    ("results", "order"),
    [
        ((found("padding_leakage"), found("wrong_softmax_dim")), ["wrong_softmax_dim", "padding_leakage"]),
        ((found("nan_output"), found("padding_leakage", "`m` is inverted")), ["padding_leakage", "nan_output"]),
        ((found("padding_leakage"), found("nan_output")), ["nan_output", "padding_leakage"]),
        ((found("cannot_learn"), found("zero_gradient"), found("zero_init")),
         ["zero_init", "cannot_learn", "zero_gradient"]),
        ((found("cannot_learn"), found("missing_residual", severity="warn")), ["cannot_learn", "missing_residual"]),
        ((found("batch_leakage"), found("label_shift")), ["batch_leakage", "label_shift"]),
    ],
)  # fmt: skip
def test_causes_come_before_what_they_explain(results, order):
    """Whichever check met it first; a warning stays behind the faults, and what explains nothing where it is."""
    report = fixed_report(results=results)
    assert [finding.code for finding in report.findings] == order
    assert [finding["code"] for finding in report.to_dict()["findings"]] == order


def test_causes_are_codes_that_exist():
    """A code that was renamed would explain nothing."""
    known = {code for check in TIER1 for code in check.codes} | set(MEANING)
    assert {code for cause, _, explained in _EXPLAINS for code in (cause, *explained)} <= known


def test_what_waits_for_one_call_is_one_row_and_the_verdict_says_what_to_do():
    """The one useful line is not buried under those that point to it."""
    why = "could not run: no pass of Net succeeded. Pass ModelSpec(example_inputs={'x': ...}) with tensors it accepts."
    first = CheckResult("shape_robustness", 1, "skip", None, None, why, 0.5, {"could_not_run": True})
    gap = {"could_not_run": True}
    others = [CheckResult(f"check{i}", 1, "skip", None, None, NOT_RUN, 0.25, gap) for i in range(8)]
    report = fixed_report(results=(first, *others))
    text = " ".join(report.text().split())
    assert "9 checks could not run. Pass ModelSpec(example_inputs={'x': ...}) with tensors it accepts Tier 1" in text
    assert "8 checks skip - - 2.00 not run, see above" in text and "check3" not in report.text()
    assert report.to_html().count("not run, see above") == 1 and len(report.results) == 9
    single = fixed_report(results=(first, others[0]))
    assert "check0" in single.text() and "Pass" not in fixed_report().sentence


def test_tier_2_alone_does_not_say_no_faults():
    """It does not look for any."""
    described = fixed_report(results=(CheckResult("rank", 2, "pass", 1, None, "fine", 0.1),), tiers=(2,))
    assert described.sentence.endswith("parameters: faults were not looked for")
    sound = fixed_report(results=(CheckResult("modes", 1, "pass", 1, None, "fine", 0.1),), tiers=(1, 2))
    assert sound.sentence.endswith("parameters: no faults")


def test_values_are_checked():
    """A status or severity that the verdict would not count is refused."""
    with pytest.raises(ValueError, match=r"CheckResult.status is 'ok'"):
        CheckResult("x", 1, "ok", None, None, "", 0.0)
    with pytest.raises(ValueError, match=r"Finding.severity is 'error'"):
        Finding("x", "error", "", "", "")


def test_what_has_no_parameters_is_called_that():
    """No task is made up for it; what has one parameter keeps its task."""
    report = fixed_report(parameters=0, results=())
    assert report.sentence == "GPTMini, a module without parameters: no faults, and nothing to train"
    assert "causal language model, 1 parameter:" in fixed_report(parameters=1).sentence


def test_what_returns_no_vectors_is_called_no_embedding_model():
    """A picture made of a picture, or an activation alone."""
    for module in (torch.nn.PReLU(), torch.nn.Conv2d(3, 3, 3, padding=1)):
        report = validate(module, progress=False)
        assert report.task == "embedding" and "model of real-valued output" in report.sentence
