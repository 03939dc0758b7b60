"""Which lengths a model takes is found once, by trying."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.lengths import Lengths, find_lengths


def only(legal: Callable[[int], bool]) -> Callable[[int], None]:
    def run(length: int) -> None:
        if not legal(length):
            raise RuntimeError("deliberate")

    return run


@pytest.mark.parametrize(
    ("legal", "probe", "expected", "words"),
    [
        (lambda n: True, 12, Lengths(), "all"),
        (lambda n: n >= 5, 12, Lengths(5), "from 5 on"),
        (lambda n: n >= 2, 12, Lengths(2), "from 2 on"),
        (lambda n: n == 12, 12, Lengths(12, fixed=True), "12 only"),
        (lambda n: n % 4 == 0, 12, Lengths(4, 4), "multiples of 4"),
        (lambda n: n % 4 == 0 and n > 8, 12, Lengths(12, 4), "multiples of 4, from 12 on"),
    ],
)
def test_found_by_trying(legal: Callable[[int], bool], probe: int, expected: Lengths, words: str) -> None:
    found = find_lengths(only(legal), probe)
    assert (found, str(found)) == (expected, words)
    for wanted in (1, 5, 17, 40):
        assert legal(found.legal(wanted))


def test_nearest_legal_length() -> None:
    assert [Lengths(4, 4).legal(n) for n in (1, 4, 7, 8, 17)] == [4, 4, 4, 8, 16]
    assert [Lengths(12, fixed=True).legal(n) for n in (1, 100)] == [12, 12]


def test_adapter_says_it() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.emb(input_ids).unflatten(1, (-1, 4)).mean((1, 2)))

    adapter = ModelAdapter(Patches())
    assert adapter.legal_length(17) == 16
    assert {"name": "lengths", "value": "multiples of 4", "reason": "found by trying"} in adapter.describe()
    assert str(ModelAdapter(nn.Linear(4, 2)).lengths.value) == "all"


def test_parameters_that_forward_changes_are_put_back_and_noted() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

        def forward(self, input_ids: Tensor) -> Tensor:
            self.head.weight.data.mul_(0.99)
            return self.head(self.emb(input_ids))

    model = Changing()
    before = model.head.weight.detach().clone()
    adapter = ModelAdapter(model)
    adapter.describe()
    assert adapter.changed is not None
    assert (adapter.changed.names, adapter.changed.restored) == (("head.weight",), True)
    assert torch.equal(model.head.weight, before)
    assert ModelAdapter(nn.Linear(4, 2)).changed is None
