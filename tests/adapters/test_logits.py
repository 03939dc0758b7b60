"""The logits are found in outputs of any structure."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.runtime.errors import AdapterError

Pair = namedtuple("Pair", "hidden logits")


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor
    extra: object = None


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (lambda h, x: x, ""),
        (lambda h, x: (h, x), "1"),
        (lambda h, x: [h, x], "1"),
        (lambda h, x: {"hidden": h, "scores": x}, "scores"),
        (lambda h, x: Output(h, x), "logits"),
        (lambda h, x: Pair(h, x), "logits"),
        (lambda h, x: (h, {"a": [h, x]}), "1.a.1"),
        (lambda h, x: (x.mean(), x), "1"),
    ],
)
def test_wherever_they_are(small: Any, shape: Callable[..., Any], path: str) -> None:
    adapter = ModelAdapter(small.Scorer(shape))
    assert adapter.output.value == path
    assert tuple(adapter.logits(adapter.example_inputs(3, 5)).shape) == (3, 5, 30)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda h, x: x.argmax(-1), r"Scorer returned no real-valued tensor \(torch\.int64\)\. Expected logits"),
        (lambda h, x: x.mean(), r"Scorer returned a single number and nothing per sample\..*beside the loss"),
    ],
)
def test_outputs_without_logits(small: Any, shape: Callable[..., Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ModelAdapter(small.Scorer(shape))


def test_no_tensor_at_all(small: Any) -> None:
    failure = ModelAdapter(small.Scorer(lambda h, x: None)).failure
    assert failure is not None
    assert "forward() of Scorer returned None and no tensor for token ids (2, 12)" in failure
