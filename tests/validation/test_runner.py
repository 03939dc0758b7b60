"""The frame: isolation, exceptions, budgets."""

import copy
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.tier1_critical_validation import TIER1, validate
from utils.validation import Budget, Check, Finding, Outcome, Skipped, run_checks, runner


def fingerprint(model):
    """Return everything about a model that a check could change."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": {
            name: (None if p.grad is None else (id(p.grad), p.grad.clone())) for name, p in model.named_parameters()
        },
        "requires": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "ids": [id(p) for p in model.parameters()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "global": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
    }


def same(first, second):
    """Compare two fingerprints exactly."""
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    for name, grad in first["grads"].items():
        other = second["grads"][name]
        assert (grad is None) == (other is None)
        assert grad is None or (grad[0] == other[0] and torch.equal(grad[1], other[1]))
    for key in ("modes", "requires", "hooks", "ids", "random", "global"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("kind", ["GPT", "ConvNet", "LSTM"])
@pytest.mark.parametrize("training", [True, False])
def test_model_comes_back_as_found(tiny, kind, training):
    """Mixed modes, existing gradients, batch statistics and random streams all survive the whole tier."""
    model = getattr(tiny, kind)().train(training)
    next(model.children()).train(not training)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    before = fingerprint(model)
    validate(model, progress=False)
    same(before, fingerprint(model))


def vandal(adapter, budget):
    """Change everything that can be changed, then raise."""
    adapter.module.train()
    adapter.module(torch.randn(4, 3, 32, 32)).sum().backward()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    adapter.module.body[1].running_mean.fill_(7)
    adapter.module.body[1].count = 3
    raise KeyError("the vandal's work")


def test_exception_in_a_check(tiny):
    """It becomes that check's result; the others run, the verdict is incomplete, the model is as it was."""
    model = tiny.ConvNet()
    before = fingerprint(model)
    report = run_checks(ModelAdapter(model), (Check("vandal", 1, "?", vandal), TIER1[2]), progress=False)
    same(before, fingerprint(model))
    assert not hasattr(model.body[1], "count")
    broken, sound = report.results
    assert broken.status == "skip" and broken.why.startswith("could not run: KeyError: ") and sound.status == "pass"
    assert report.verdict == "INCOMPLETE" and not report.passed
    assert "1 check could not run" in report.sentence


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        RuntimeError("[enforce fail] can't allocate memory: you tried"),
        torch.OutOfMemoryError("x"),
    ],
)
def test_out_of_memory_is_one_checks_result(tiny, error):
    """Memory that runs out is no fault of the model."""

    def hungry(adapter, budget):
        raise error

    report = run_checks(ModelAdapter(tiny.MLP()), (Check("hungry", 1, "?", hungry),), progress=False)
    assert "could not run: out of memory" in report.results[0].why and report.verdict == "INCOMPLETE"


def test_crash_of_the_model_is_a_failure(tiny):
    """A model that raises on a legal input fails with the module's name, once; other checks point to that."""
    model = tiny.GPT(longest=32)
    model.config["max_position_embeddings"] = 64
    report = validate(model, progress=False)
    assert report.verdict == "NOT READY"
    stability = next(result for result in report.results if result.check == "numerical_stability")
    assert stability.status == "skip" and "crashed on a legal input, see shape_robustness" in stability.why
    assert [finding.where for finding in report.findings] == ["pos"], "one fault counts once"


def test_parameters_changed_by_forward(tiny):
    """A forward pass that trains the model is a fault."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1000:
                with torch.no_grad():
                    self.layer.weight.add_(0.1)
            return self.layer(x)

    model = Changing()
    adapter = ModelAdapter(model)
    model.calls = 1000
    result = run_checks(adapter, (TIER1[0],), progress=False).results[0]
    assert result.status == "fail" and "changed the values of layer.weight" in result.why


def test_model_that_never_runs_is_not_ready(tiny):
    """One failure with the reason; the others could not run."""
    model = tiny.broken()
    report = validate(model, progress=False)
    assert report.verdict == "NOT READY" and [r.status for r in report.results[:2]] == ["fail", "skip"]
    others = {result.check: result for result in report.results[1:] if result.check != "causality"}
    assert all(result.why == "not run, see above" for result in others.values() if result.status == "skip")
    assert report.text().count("No forward pass") == 1
    runs_nothing = {"registration", "persistence"}
    assert not any(result.status == "pass" for name, result in others.items() if name not in runs_nothing)


def test_skip_is_no_gap(tiny):
    """A check that does not apply leaves the verdict alone."""

    def inapplicable(adapter, budget):
        raise Skipped("not for this kind")

    report = run_checks(ModelAdapter(tiny.MLP()), (Check("x", 1, "?", inapplicable),), progress=False)
    assert report.passed and report.results[0].why == "not for this kind"


def test_budget_reduces_and_says_so(tiny):
    """A tiny budget still runs every check and lists what was cut."""
    model = tiny.GPT(longest=2048)
    report = validate(model, time_budget=0.01, progress=False)
    assert [result.check for result in report.results] == [check.id for check in TIER1]
    notes = [note for result in report.results for note in result.details.get("reduced", [])]
    assert any("stands for the maximum of 2048" in note for note in notes)
    assert "reduced:" in report.text()


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_all_checks_together_keep_the_budget(tiny, seconds):
    """Checks that use what they get end on time, and what one leaves goes to the next ones."""
    given = []

    def greedy(adapter, budget):
        given.append(budget.seconds)
        while budget.afford(0.02, "more rounds"):
            time.sleep(0.02)
        return Outcome(1, 1, "fine")

    def quick(adapter, budget):
        given.append(budget.seconds)
        return Outcome(1, 1, "fine")

    checks = [Check("a", 1, "?", greedy, share=2), Check("b", 1, "?", quick, share=5), Check("c", 1, "?", greedy)]
    started = time.perf_counter()
    report = run_checks(ModelAdapter(tiny.MLP()), checks, time_budget=seconds, progress=False)
    assert time.perf_counter() - started < seconds + 0.3
    assert [r.details.get("reduced") for r in report.results] == [["more rounds"], None, ["more rounds"]]
    assert given[0] == pytest.approx(seconds * 2 / 8, abs=0.1)
    assert given[2] > 0.6 * seconds, "the quick check's time is used"


def test_a_short_budget_is_kept_by_a_model_of_middle_size(tiny):
    """What every check does at least takes about two seconds here; the budget must not add to it, nor drop a check."""
    model = tiny.GPT(vocab=500, width=128, layers=4, longest=1024)
    validate(model, time_budget=0.01, progress=False)
    started = time.perf_counter()
    validate(model, time_budget=0.01, progress=False)
    least = time.perf_counter() - started
    started = time.perf_counter()
    report = validate(model, time_budget=least + 1.0, progress=False)
    assert time.perf_counter() - started < 2 * (least + 1.0)
    assert len(report.results) == len(TIER1) and not report.incomplete


def test_budget_clock():
    """What is affordable shrinks; what is refused is recorded once."""
    budget = Budget(10)
    assert budget.afford(1, "never") and not budget.afford(100, "cut") and not budget.afford(100, "cut")
    assert budget.reduced == ["cut"] and 0 < budget.remaining() <= 10 and budget.spent() < 10


def test_findings_are_sorted_and_decide_the_status(tiny):
    """Warnings alone warn; one fault fails."""

    def findings(adapter, budget):
        return Outcome(1, 2, "fine", [Finding("b", "warn", "x", "m", "h"), Finding("a", "fail", "y", "m", "h")])

    result = run_checks(ModelAdapter(tiny.MLP()), (Check("x", 1, "?", findings),), progress=False).results[0]
    assert result.status == "fail" and [finding.code for finding in result.findings] == ["a", "b"]


def test_same_verdict_for_a_copy(tiny):
    """Validation is seeded: a copy gets the same numbers."""
    model = tiny.GPT()
    first, second = (validate(m, progress=False).to_dict() for m in (model, copy.deepcopy(model)))
    for one, two in zip(first["results"][:5], second["results"][:5], strict=True):
        assert one["value"] == two["value"] and one["status"] == two["status"]


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_forward_that_changes_its_parameters_from_the_start(tiny, how):
    """No traceback from the adapter, one fault with the parameter's name, and the values are back."""

    class Drifting(tiny.GPT):
        def forward(self, input_ids):
            weight = self.head.weight.data if how == "data" else self.head.weight
            with torch.no_grad():
                weight.mul_(0.99)
            return super().forward(input_ids)

    model = Drifting()
    before = fingerprint(model)
    report = validate(model, progress=False)
    same(before, fingerprint(model))
    assert report.verdict == "NOT READY"
    assert [(f.code, f.where, f.severity) for f in report.findings] == [("state_across_calls", "head.weight", "fail")]


def test_rwkv_rescales_its_weights_in_eval_mode():
    """It ends as a finding, with the weights as they were."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, rescale_every=2, context_length=32
    )
    model = transformers.RwkvForCausalLM(config)
    before = fingerprint(model)
    report = validate(model, progress=False)
    same(before, fingerprint(model))
    assert "state_across_calls" in [finding.code for finding in report.findings]
    assert not report.incomplete


def test_time_is_divided_among_the_tiers_as_they_usually_take():
    """Tier 1 does not starve beside Tier 2, nor the other way round; within a tier the shares decide."""
    checks = [
        Check("a", 1, "?", None, share=1),
        Check("b", 1, "?", None, share=3),
        Check("c", 2, "?", None, share=7),
    ]
    weights = runner._weights(checks)
    assert weights[1] == pytest.approx(3 * weights[0])
    assert (weights[0] + weights[1], weights[2]) == pytest.approx(
        (runner.DEFAULT_SECONDS[1], runner.DEFAULT_SECONDS[2])
    )


class Undefined(nn.Module):
    """Its answer is NaN, and it says so each time."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, input_ids):
        print("here I am")
        return self.head((self.embedding(input_ids) - 9).log())


def test_what_a_model_prints_is_shown_once():
    """Each check counts what was printed; the text stands beside the first."""
    report = validate(Undefined(), progress=False)
    shown = [result for result in report.results if "printed_start" in result.details]
    assert len(shown) == 1 and shown[0].details["printed_start"] == "here I am\n"
    assert sum(bool(result.details.get("printed")) for result in report.results) > 10


def test_the_cause_comes_first_and_what_it_explains_is_left_out(tiny):
    """Where the output is NaN, a warning about scales says nothing; in a finite model it stays."""
    warned = Finding("embedding_scale", "warn", "pos", "loud", "h")
    dead = Finding("dead_relu", "fail", "act", "dead", "h")
    nan = Finding("nan_output", "fail", "log", "NaN", "h")

    def found(*findings):
        return lambda adapter, budget: Outcome(1, 1, "fine", findings)

    def report(*groups):
        checks = [Check(f"c{i}", 1, "?", found(*group)) for i, group in enumerate(groups)]
        return run_checks(ModelAdapter(tiny.MLP()), checks, progress=False)

    broken = report([dead], [warned], [nan])
    assert [finding.code for finding in broken.findings] == ["nan_output", "dead_relu"]
    assert (
        broken.results[1].status == "skip" and broken.results[1].why == "not judged: something is not finite (see c2)"
    )
    assert [finding.code for finding in report([dead], [warned]).findings] == ["dead_relu", "embedding_scale"]


def test_a_gradient_of_nan_is_not_called_finite():
    """The check says that it did not judge."""
    result = next(r for r in validate(Undefined(), progress=False).results if r.check == "gradient_flow")
    assert result.status == "skip" and "the loss is not finite" in result.why


def test_what_takes_longer_than_a_stated_budget_says_so(tiny):
    """The least that a check does it does in any case; without a stated budget nobody was promised anything."""

    def slow(adapter, budget):
        time.sleep(0.6)
        return Outcome(1, 1, "fine")

    def quick(adapter, budget):
        return Outcome(1, 1, "fine")

    checks, adapter = (Check("a", 1, "?", slow), Check("b", 1, "?", quick)), ModelAdapter(tiny.MLP())
    first, second = run_checks(adapter, checks, time_budget=0.01, progress=False).results
    (note,) = first.details["reduced"]
    assert note.startswith("took 0.") and note.endswith(" s, the least it does, where 0.0 s were left for it")
    assert "reduced" not in second.details
    assert "reduced" not in run_checks(adapter, checks, progress=False).results[0].details
