"""Stated facts are checked by their text."""

from typing import Any

import pytest

from utils.adapters import ModelSpec
from utils.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"task": "chess"}, r"ModelSpec\.task is 'chess'\. Expected one of causal_lm, .*Or leave it out"),
        ({"vocab_size": 0}, r"ModelSpec\.vocab_size is 0\. Expected a whole number of at least 1"),
        ({"max_length": True}, r"ModelSpec\.max_length is True"),
        ({"num_labels": 2.5}, r"ModelSpec\.num_labels is 2\.5"),
        ({"pad_token_id": -1}, r"ModelSpec\.pad_token_id is -1\. Expected a token id, 0 or more"),
        ({"example_inputs": [1]}, r"ModelSpec\.example_inputs is a list\. Expected a dict of keyword arguments"),
        ({"frozen": "emb"}, r"ModelSpec\.frozen is the string 'emb'\..*Write frozen=\('emb',\)"),
    ],
)
def test_wrong_facts(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(**facts)
