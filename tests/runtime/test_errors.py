"""Errors are one paragraph: found, expected, to do."""

import pytest

from utils.runtime import errors
from utils.runtime.errors import MissingPackageError, SeedbedError
from utils.runtime.optional import require


def test_message_is_one_paragraph_of_three_sentences():
    error = SeedbedError("Found 3.", "Expected 4.", "Add one.")
    assert str(error) == "Found 3. Expected 4. Add one."
    assert (error.found, error.expected, error.action) == ("Found 3.", "Expected 4.", "Add one.")


def test_empty_parts_leave_no_gap():
    assert str(SeedbedError("Found 3.", "", "Add one.")) == "Found 3. Add one."


def test_every_error_is_a_seedbed_error():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 11
    assert all(issubclass(value, SeedbedError) for value in classes)


def test_require_returns_a_module_that_is_there():
    assert require("json.decoder", "read JSON").__name__ == "json.decoder"


def test_require_says_what_for_and_how_to_install():
    with pytest.raises(MissingPackageError) as caught:
        require("no_such_module.part", "grow wings")
    text = str(caught.value)
    assert "The package no-such-module cannot be imported" in text
    assert "It is needed to grow wings." in text
    assert "pip install no-such-module" in text
    assert "pip install -r requirements-training.txt" in text
    assert isinstance(caught.value, ImportError)


def test_require_names_the_package_when_it_differs():
    with pytest.raises(MissingPackageError, match="pip install wings-for-all"):
        require("no_such_module", "grow wings", "wings-for-all")
