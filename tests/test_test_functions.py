"""The historical names: real functions, not collected by pytest, results instead of printing."""

import pytest
import torch
from torch import nn

from utils import test_functions
from utils.validation import CheckResult, ValidationReport

NAMES = (
    "test_shape_robustness", "test_causality", "test_gradient_flow", "test_output_stability",
    "test_parameter_initialization", "test_memory_footprint", "test_inference_speed",
)  # fmt: skip


class Tagger(nn.Module):
    """A causal language model without mixing, which needs its config for the vocabulary."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.mark.parametrize("name", NAMES)
def test_alias_runs_its_check(name, capsys):
    """Each takes (model, config), prints nothing and returns a CheckResult."""
    torch.set_num_threads(1)
    function = getattr(test_functions, name)
    assert function.__test__ is False and function.__name__.startswith("check_")
    result = function(Tagger(), {"vocab_size": 64, "max_seq_len": 32})
    assert isinstance(result, CheckResult) and result.status == "pass", result.why
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("promised", "codes"), [(80, {"vocab_mismatch"}), (64, set()), (50, set())])
def test_run_all(promised, codes):
    """All of them at once give the report, and a config that promises more ids than the model has is noticed."""
    report = test_functions.run_all_tier1_tests(Tagger(), {"vocab_size": promised, "max_seq_len": 32})
    assert isinstance(report, ValidationReport) and report.passed == (not codes)
    assert {finding.code for finding in report.findings} == codes
