"""Lines that are repeated between documents are taken out once, and counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.memory.repeated_lines import without_repeated_lines
from utils.runtime.errors import ConfigError, DataError

LICENCE = "This line is a licence that every file has."


def test_the_first_stays_and_later_ones_go():
    splits = {
        "memory": [f"{LICENCE}\nfirst of the memory's own\n    return None\n", f"  {LICENCE}\n"],
        "test": [f"{LICENCE}\nsomething only the test has\n    return None\n"],
    }
    clean = without_repeated_lines(splits, shortest=16)
    assert clean.texts == {
        "memory": [f"{LICENCE}\nfirst of the memory's own\n    return None\n"],
        "test": ["something only the test has\n    return None\n"],
    }
    assert clean.documents == {"memory": [0], "test": [0]}
    assert clean.removed == {"memory": 1, "test": 1} and clean.lines == {"memory": 4, "test": 3}
    assert "1 of 4 lines of memory (25%)" in str(clean)
    assert clean.to_dict() == {"lines": clean.lines, "removed": clean.removed, "shortest": 16}


def test_within_a_split_on_request():
    splits = {"memory": [f"{LICENCE}\n{LICENCE}\n"], "test": [f"{LICENCE}\nnew line of the test\n"]}
    clean = without_repeated_lines(splits, within=False)
    assert clean.removed == {"memory": 0, "test": 1}
    assert clean.texts["memory"] == splits["memory"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text("ab \n", max_size=12), max_size=3), min_size=2, max_size=3), st.integers(1, 3))
def test_no_line_is_left_twice(splits, shortest):
    named = {str(number): documents for number, documents in enumerate(splits)}
    clean = without_repeated_lines(named, shortest)
    left = [line.strip() for texts in clean.texts.values() for text in texts for line in text.splitlines()]
    long = [line for line in left if len(line) >= shortest]
    assert len(long) == len(set(long))
    lines = {line.strip() for texts in splits for text in texts for line in text.splitlines()}
    assert set(long) == {line for line in lines if len(line) >= shortest}


def test_bad_input():
    with pytest.raises(ConfigError, match="shortest is 0"):
        without_repeated_lines({"memory": []}, 0)


@pytest.mark.parametrize("splits", [{"a": "one text"}, {"a": [1, 2]}, ["a text"], None, {"a": None}])
def test_what_are_no_lists_of_documents(splits):
    with pytest.raises(DataError, match="Documents are given as .* Expected a list of texts for each split"):
        without_repeated_lines(splits)
