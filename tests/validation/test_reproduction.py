"""The lines beside a finding: they run as they are pasted, and show the fault."""

import ast
import contextlib
import io
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from benchmarks.zoo import entries
from utils import ModelAdapter, ModelSpec
from utils.tier1_critical_validation import TIER1
from utils.validation.learnability import _reproduction
from utils.validation.reproduction import fitted, on_a_copy
from utils.validation.runner import WITHOUT_LINES, run_checks
from utils.validation.show import reproduce

CODES = sorted({code for check in TIER1 for code in check.codes})
PLAIN = [entry for entry in entries() if "transformers " not in entry.name]
WITHOUT = {
    "timed_out": "the lines would not come back",
    "process_died": "the lines would end the process",
    "out_of_memory": "the lines would take all memory",
    "slow_python_loop": "a measurement, which utils.show repeats",
    "quadratic_memory": "a measurement, which utils.show repeats",
    "shape_limit": "the message names the lengths that do not run",
}
"""Codes that may come without lines, and why."""
NOTHING = {"constant_output", "ignored_input", "position_absent", "symmetric_init", "missing_residual"}
SOMETHING = {
    "future_leakage", "batch_leakage", "padding_leakage", "dropout_in_eval", "nondeterministic_forward",
    "state_across_calls",
}  # fmt: skip
WORDS = {
    "backward_crash": "RuntimeError: one of the variables needed",
    "buffer_not_registered": r"mix \[\]",
    "dead_relu": r"weight': 0\.0",
    "detached_submodule": "feed.up.weight",
    "double_softmax": r"tensor\(\[\[1\.0000, 1\.0000",
    "embedding_scale": r"positions.weight \(64, 48\) tensor\(0\.9",
    "exploding_gradient": r"tensor\(\d\d\d",
    "exploding_init": r"tensor\(9\d\.",
    "frozen_parameter": "False",
    "hardcoded_device": "CUDA|cuda",
    "hardcoded_dtype": "RuntimeError: .*dtype",
    "input_mutation": r"tensor\(\[|^[1-9]",
    "label_shift": r"labels tensor.* trained on tensor",
    "lazy_parameter": "head.weight",
    "low_precision_unsafe": "RuntimeError: value cannot be converted|nan",
    "memory_growth": r"\[\d+, \d+, \d+",
    "missing_attention_scale": "blocks.0.attention', 1.0",
    "nan_long_sequence": r"tensor\(False\) tensor\(nan",
    "nan_padding": r"^finite: tensor\(False\)|^NaN in \['",
    "nan_output": r"tensor\(False\) tensor\(nan",
    "padding_idx_wrong": r"1 tensor\(0\..* 0$",
    "shape_crash": r"torch.Size|tensor|Error",
    "shared_weight": "True",
    "train_eval_ignored": "tensor",
    "unregistered_layer": "tokens.weight",
    "unused_parameter": "norm_out.weight",
    "vanishing_gradient": "e-1",
    "vanishing_init": r"tensor\(0\.0",
    "vocab_mismatch": "95 96",
    "wrong_builtin_loss": "loss",
    "wrong_softmax_dim": "tensor",
    "zero_gradient": r"^0\.0$",
    "zero_init": r"weight': 0\.0",
}


def pasted(lines, **names):
    """Return what lines show when they are typed in: what they print, the values of expressions, and the error."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for statement in ast.parse(lines).body:
                exec(compile(ast.Interactive([statement]), "<pasted>", "single"), names)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    return shown.getvalue().strip()


def finding_of(code, model, config=None, spec=None):
    """Return the first finding of a code in a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = reproduce(code, ModelAdapter(model, config, spec), TIER1)
    assert not [result.details for result in shown.results if WITHOUT_LINES in result.details]
    return next((f for result in shown.results for f in result.findings if f.code == code), None)


def state_of(model):
    """Return all of a model that lines might change: values, kinds, gradients, modes."""
    values = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items() if not is_lazy(value)}
    gradients = [(p.grad, p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return values, gradients, [part.training for part in model.modules()]


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for (kind, value), (kind_after, value_after) in zip(before[0].values(), after[0].values(), strict=True):
        assert kind == kind_after and torch.equal(value.nan_to_num(7.0), value_after.nan_to_num(7.0))
    for (grad, required, value), (grad_after, required_after, _) in zip(before[1], after[1], strict=True):
        assert grad is grad_after and required == required_after and (grad is None or torch.equal(grad, value))
    assert before[2] == after[2]


class Rounded(nn.Module):
    """Rounds everything away before the loss."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return (self.head(self.inner(x)) * 8).round()


OWN = {"zero_gradient": Rounded}


@pytest.mark.parametrize("code", [code for code in CODES if code not in {*WITHOUT, "cannot_learn"}])
def test_every_code_has_lines_that_run_and_show_the_fault(code):
    """Lines of plain Python; pasted, they print what the finding says or raise what it tells of."""
    if code in OWN:
        made = [(OWN[code], None, {})]
    else:
        group = [entry for entry in PLAIN if entry.codes[:1] == (code,)]
        made = [(entry.make, entry.config, entry.spec) for entry in group]
    make, config, given = made[0]
    torch.manual_seed(0)
    spec = ModelSpec(**given) if given else None
    finding = finding_of(code, make(), config, spec)
    assert finding is not None and finding.reproduction
    lines = finding.reproduction.splitlines()
    assert len(lines) <= 5 and max(map(len, lines)) <= 120
    torch.manual_seed(0)
    model = make().train()
    for number, parameter in enumerate(model.parameters()):
        if not is_lazy(parameter):
            parameter.grad = torch.full_like(parameter, 0.1 * number) if parameter.is_floating_point() else None
    before = state_of(model)
    text = pasted(finding.reproduction, model=model, config=config, spec=spec)
    assert_same(before, state_of(model))
    if code in NOTHING | SOMETHING:
        numbers = [abs(float(number)) for number in re.findall(r"-?\d+\.\d*(?:e[-+]?\d+)?", text)]
        assert numbers and (max(numbers) < 1e-5) == (code in NOTHING), text
    else:
        assert re.search(WORDS[code], text), text


def test_codes_without_lines_are_few_and_say_why():
    assert set(WITHOUT) < set(CODES) | {"timed_out", "process_died"} and len(WITHOUT) <= 8 and all(WITHOUT.values())


@pytest.mark.parametrize(
    ("kind", "code"), [("GPT", "future_leakage"), ("GPT", "unused_parameter"), ("MLP", "zero_gradient")]
)
def test_the_same_lines_clear_a_sound_model(tiny, kind, code):
    """What shows a fault in a broken model shows none in a sound one."""
    from utils.validation.check import Finding
    from utils.validation.reproduction import default_lines

    model = getattr(tiny, kind)()
    lines = default_lines(ModelAdapter(model), Finding(code, "fail", type(model).__name__, "", ""))
    text = pasted(lines, model=model)
    largest = max((abs(float(number)) for number in re.findall(r"\d+\.\d*(?:e[-+]?\d+)?", text)), default=0.0)
    assert {"future_leakage": largest < 1e-5, "unused_parameter": text.endswith("[]"), "zero_gradient": largest > 0}[
        code
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("print(model.get_parameter('a').std())", None),
        ("value = model.part.table\nprint([name for name, _ in model.named_parameters()])", None),
        ("model.eval()", "import copy; trial = copy.deepcopy(model); trial.eval()"),
        ("for x in (1, 2):\n    model(x)", "import copy; trial = copy.deepcopy(model)\nfor x in (1, 2):\n    trial(x)"),
        (
            "a = 'model model'; model.half(); b = Adapter('é', model, model=model.part)",
            "import copy; trial = copy.deepcopy(model)\na = 'model model'; trial.half();"
            " b = Adapter('é', trial, model=trial.part)",
        ),
        ("import copy; m = copy.deepcopy(model).half()", None),
    ],
)
def test_lines_that_change_a_model_work_on_a_copy(lines, expected):
    """Those that only read its values need none."""
    assert on_a_copy(lines) == (expected or lines)


class Uncopied(Rounded):
    """Keeps a result with its graph, which cannot be copied."""

    def __init__(self):
        super().__init__()
        self.kept = self.inner.weight * 2


def test_a_model_that_cannot_be_copied_still_gets_lines():
    """They say what they do."""
    finding = finding_of("zero_gradient", Uncopied())
    assert finding.reproduction.startswith("# model cannot be copied")
    assert pasted(finding.reproduction, model=Uncopied()) == "0.0"


def test_lines_that_cannot_be_made_are_told_in_the_details(monkeypatch):
    """The finding stays, and so do the lines of others."""
    from utils.validation import reproduction

    def fail(adapter, finding):
        raise KeyError("no such name")

    monkeypatch.setitem(reproduction.LINES, "zero_gradient", fail)
    shown = reproduce("zero_gradient", ModelAdapter(Rounded()), TIER1)
    (result,) = [result for result in shown.results if result.findings]
    assert result.details[WITHOUT_LINES] == {"zero_gradient": "KeyError: 'no such name'"}
    assert [f.reproduction for f in result.findings if f.code == "zero_gradient"] == [""]


def test_lines_that_take_too_long_to_make_are_left_out(monkeypatch):
    """Those that a check gave itself work on a copy all the same."""
    from utils.validation import reproduction, runner
    from utils.validation.check import Finding

    def hang(adapter, finding):
        while True:
            pass

    monkeypatch.setitem(reproduction.LINES, "zero_gradient", hang)
    monkeypatch.setattr(runner, "HANGING_AGAIN_SECONDS", 0.2)
    found = [Finding(code, "fail", "", "", "", text) for code, text in (("zero_gradient", ""), ("x", "model.half()"))]
    lines, lost = runner._lines(ModelAdapter(Rounded()), found)
    assert lines == ["", "import copy; trial = copy.deepcopy(model); trial.half()"]
    assert list(lost) == ["zero_gradient"] and "no answer within 0.2 s" in lost["zero_gradient"]


def test_wide_lines_are_broken_between_statements():
    wide = "; ".join(["a = 1234567890"] * 12)
    assert max(map(len, fitted(wide).splitlines())) <= 107 and pasted(fitted(wide) + "\nprint(a)") == "1234567890"


def test_what_the_user_stated_is_part_of_the_lines():
    """Without the example inputs nobody could call the model."""
    spec = ModelSpec(example_inputs={"x": torch.randn(4, 8)})
    finding = finding_of("zero_gradient", Rounded(), None, spec)
    assert "ModelAdapter(trial, spec=spec)" in finding.reproduction
    checks = [check for check in TIER1 if check.id == "embedding_scale"]
    assert run_checks(ModelAdapter(Rounded(), spec=spec), checks, progress=False).arguments == ", spec=spec"
    assert run_checks(ModelAdapter(Rounded()), checks, progress=False).arguments == ""


def test_a_model_that_no_call_can_run_shows_why(tiny):
    finding = finding_of("shape_crash", tiny.broken())
    assert "No forward pass" in pasted(finding.reproduction, model=tiny.broken())


def test_the_lines_for_a_model_that_cannot_learn_run(tiny):
    """Its losses, step by step."""
    assert pasted(_reproduction(), model=tiny.MLP()).startswith("{")
