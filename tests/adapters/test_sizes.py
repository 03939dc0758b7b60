"""The one size that a flattening fits is found from what other sizes do."""

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.sizes import folded_rows, needed_features
from utils.adapters.troubles import UNSIZED
from utils.validation.check import Budget
from utils.validation.shape_robustness import check_shape_robustness


class Pictures(nn.Module):
    """Two convolutions and a flattening for images of one size; `fold` hard-codes the number of features."""

    def __init__(self, features: int, fold: bool = True, channels: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 5), nn.Conv2d(4, 8, 5)
        self.head, self.features, self.fold = nn.Linear(features, 10), features, fold

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = nn.functional.max_pool2d(layer(x).relu(), 2)
        return self.head(x.view(-1, self.features) if self.fold else x.flatten(1))


class Series(nn.Module):
    """The same along time."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv, self.head, self.features = nn.Conv1d(2, 4, 5), nn.Linear(features, 3), features

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool1d(self.conv(x).relu(), 2).view(-1, self.features))


class Text(nn.Module):
    """The same for token ids."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.head, self.features = nn.Embedding(50, 16), nn.Linear(16 * length, 3), 16 * length

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).view(-1, self.features))


class Vectors(nn.Module):
    """Images that are flattened at once, by a name that says so."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head, self.features = nn.Linear(features, 10), features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.view(-1, self.features))


SOUND = {
    "32": lambda: Pictures(8 * 25),
    "28": lambda: Pictures(8 * 16, channels=1),
    "40": lambda: Pictures(8 * 49),
    "40 flattened": lambda: Pictures(8 * 49, fold=False),
    "150": lambda: Pictures(8 * 34 * 34),
    "series of 187": lambda: Series(4 * 91),
    "text of 20": lambda: Text(20),
    "text of 24": lambda: Text(24),
    "text of 6": lambda: Text(6),
    "mnist": lambda: Vectors(784),
    "cifar": lambda: Vectors(3072),
}


@pytest.mark.parametrize("kind", SOUND)
def test_the_authors_own_size(kind: str) -> None:
    """Rows are samples, and nothing is wrong with any shape that is legal."""
    adapter = ModelAdapter(SOUND[kind]())
    assert adapter.failure is None
    assert [len(adapter.logits(adapter.example_inputs(n))) for n in (1, 2, 3)] == [1, 2, 3]
    outcome = check_shape_robustness(adapter, Budget(20.0))
    assert [finding.code for finding in outcome.findings if finding.severity == "fail"] == []


def test_a_width_that_no_size_mends() -> None:
    """Pooled features are as many at every size, so the layer behind them is wrong."""

    class Pooled(Pictures):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).mean((2, 3)))

    adapter = ModelAdapter(Pooled(5))
    assert adapter.failure is not None
    assert UNSIZED not in adapter.failure
    (finding,) = check_shape_robustness(adapter, Budget(20.0)).findings
    assert (finding.code, finding.severity) == ("shape_crash", "fail")


def test_samples_that_are_averaged_have_no_better_size() -> None:
    """One row for any batch is what the model does, and is left to be judged."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((0, 2, 3)))[None]

    adapter = ModelAdapter(Mean())
    assert adapter.failure is None
    assert adapter.image_shape.value == (3, 64, 64)
    assert len(adapter.logits(adapter.example_inputs(3))) == 1


def test_what_refusals_say() -> None:
    """How many times the features were needed; None where the size is not to blame."""
    assert needed_features(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x100 and 400x5)"), 2) == 4
    assert needed_features(RuntimeError("shape '[-1, 400]' is invalid for input of size 100"), 2) == 8
    assert needed_features(RuntimeError("shape '[2, 400]' is invalid for input of size 100"), 2) == 8
    assert needed_features(RuntimeError("shape '[4, 12, 16]' is invalid for input of size 384"), 2) is None
    assert needed_features(RuntimeError("something else"), 2) is None
    assert folded_rows(torch.zeros(18, 10), 2, 24) == pytest.approx(1 / 9)
    assert folded_rows(torch.zeros(24, 10), 2, 24) is None
    assert folded_rows([torch.zeros(12, 50)] * 2, 2, 24) is None
    assert folded_rows({"logits": torch.zeros(5, 2, 10), "loss": torch.zeros(())}, 2, 24) is None
