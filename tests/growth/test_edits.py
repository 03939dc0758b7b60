"""Plans are plain values: they survive JSON, and what is unknown in one is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.growth.config import OPERATORS
from utils.growth.edits import (
    FILLS,
    KINDS,
    PROMISES,
    Gate,
    GrowthError,
    GrowthRefusedError,
    InsertBlock,
    LineageError,
    Number,
    Overwrite,
    Plan,
    Scale,
    Widen,
)

NAMES = st.text("abc.0123", min_size=1, max_size=8)
COUNTS = st.integers(0, 99)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PLACES = st.lists(st.tuples(COUNTS, st.integers(1, 9)), min_size=1, max_size=3).map(tuple)
VALUES = st.one_of(COUNTS, FLOATS, st.tuples(COUNTS, COUNTS), st.tuples(NAMES, NAMES))
EDITS = st.one_of(
    st.builds(Widen, NAMES, st.integers(0, 3), PLACES, st.sampled_from(FILLS), FLOATS),
    st.builds(Scale, NAMES, FLOATS),
    st.builds(Overwrite, NAMES, FLOATS),
    st.builds(Number, NAMES, st.tuples(NAMES, NAMES), VALUES, VALUES),
    st.builds(InsertBlock, NAMES, COUNTS, COUNTS, st.lists(NAMES, max_size=3).map(tuple), st.booleans()),
    st.builds(Gate, NAMES, COUNTS),
)
TEXTS = st.lists(NAMES, max_size=3).map(tuple)
PLANS = st.builds(
    Plan,
    operator=st.sampled_from(OPERATORS),
    where=TEXTS,
    edits=st.lists(EDITS, max_size=4).map(tuple),
    before=COUNTS,
    after=COUNTS,
    promise=st.sampled_from(PROMISES),
    outputs=st.none() | COUNTS,
    reasons=TEXTS,
)


@given(PLANS)
def test_a_plan_survives_json(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(PLANS)
def test_a_plan_survives_as_plain_values(plan):
    values = plan.to_dict()
    assert Plan.from_dict(values) == plan
    assert values == Plan.from_dict(values).to_dict()


def plan(*edits, where=("a",)):
    return Plan("depth", where, edits, 2, 3)


def test_a_plan_says_in_one_line_what_grows():
    assert plan().describe() == "depth from 2 to 3 in a"
    assert plan(where=()).describe() == "depth from 2 to 3 in the model"
    assert plan(where=("a", "b", "c", "d", "e")).describe() == "depth from 2 to 3 in a, b, c and 2 more"


def test_an_unknown_kind_of_step_is_named():
    values = plan(Gate("blocks", 1)).to_dict()
    values["edits"][0]["kind"] = "shrink"
    with pytest.raises(LineageError, match=f"a growth step of the kind 'shrink'.*knows {', '.join(KINDS)}"):
        Plan.from_dict(values)


@pytest.mark.parametrize(("field", "known"), [("operator", OPERATORS), ("promise", PROMISES)])
@pytest.mark.parametrize("given", ["teleport", None, ["depth"]])
def test_an_unknown_operator_or_promise_is_named(field, known, given):
    with pytest.raises(LineageError) as raised:
        Plan.from_dict({**plan().to_dict(), field: given})
    assert raised.value.found == f"The lineage holds a growth event with the {field} {given!r}."
    assert raised.value.expected == f"This version of Seedbed knows {', '.join(known)}."
    assert raised.value.action == "Resume with the version that wrote it, or a newer one."


@pytest.mark.parametrize("broken", ["edits", "where"])
def test_a_plan_that_lacks_something_is_refused(broken):
    values = plan().to_dict()
    del values[broken]
    with pytest.raises(LineageError, match="A growth event of the lineage cannot be read"):
        Plan.from_dict(values)


@pytest.mark.parametrize("edits", [[{"kind": "gate", "size": 4}], [{}], 7, [None]])
def test_a_step_with_other_fields_is_refused(edits):
    with pytest.raises(LineageError, match="A growth event of the lineage cannot be read"):
        Plan.from_dict({**plan().to_dict(), "edits": edits})


def test_an_unknown_field_of_a_plan_is_refused():
    with pytest.raises(LineageError, match="cannot be read .TypeError"):
        Plan.from_dict({**plan().to_dict(), "speed": 4})


def test_refusals_and_lineage_errors_are_growth_errors():
    assert issubclass(GrowthRefusedError, GrowthError)
    assert issubclass(LineageError, GrowthError)
