"""A table's row for padding must be the padding's."""

import pytest
from torch import nn

from tests.validation.faulty_texts import TextModel
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.padding_row import check_padding_row
from utils.validation.runner import run_check

CHECK = Check("padding_row", 1, "", check_padding_row)


def judged(model, config=None, **spec):
    return run_check(ModelAdapter(model, config, ModelSpec(task="masked_lm", **spec)), CHECK, 5.0)


@pytest.mark.parametrize(
    ("given", "spec"), [({"pad_token_id": 0}, {}), (None, {"pad_token_id": 0}), ({"pad_id": 0, "vocab_size": 60}, {})]
)
def test_another_row_is_found(given, spec):
    """The config or the user says 0, the table keeps 5."""
    (finding,) = judged(TextModel(pad=5), given, **spec).findings
    assert (finding.code, finding.severity, finding.where) == ("padding_idx_wrong", "fail", "tokens")
    assert "row 5" in finding.message and "padding id is 0" in finding.message


def test_row_that_was_drawn_again_warns():
    """An initialization of one's own forgets the row; with a mask it does no harm."""
    model = TextModel(pad=0)
    nn.init.normal_(model.tokens.weight)
    (finding,) = judged(model).findings
    assert (finding.code, finding.severity) == ("padding_idx_wrong", "warn") and "times as large" in finding.message


@pytest.mark.parametrize(("pad", "given"), [(0, {"pad_token_id": 0}), (5, None), (5, {"pad_token_id": None})])
def test_sound_tables_pass(pad, given):
    """Agreement, and no word about the padding id."""
    assert judged(TextModel(pad=pad), given).status == "pass"


def test_table_of_positions_may_keep_a_row():
    """RoBERTa's positions start after the padding id's row."""

    class Counted(TextModel):
        def __init__(self):
            super().__init__(pad=1)
            self.positions = nn.Embedding(64, 32, padding_idx=3)

    assert judged(Counted(), {"pad_token_id": 1}).status == "pass"


@pytest.mark.parametrize(
    ("model", "reason"),
    [(TextModel(), "no token table keeps a row"), (nn.Linear(3, 2), "no sequence of tokens")],
)
def test_skips_with_the_reason(model, reason):
    """Nothing to hold against anything."""
    adapter = ModelAdapter(model)
    result = run_check(adapter, CHECK, 5.0)
    assert result.status == "skip" and reason in result.why
