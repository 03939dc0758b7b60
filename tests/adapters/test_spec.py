"""Stated facts are checked by their text."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
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
        ({"pad_token_id": True}, r"ModelSpec\.pad_token_id is True"),
        ({"frozen": (1,)}, r"ModelSpec\.frozen is \(1,\)\. Expected a tuple of prefixes"),
        ({"frozen": ("",)}, r"ModelSpec\.frozen is \('',\)"),
        ({"factory": "Model"}, r"ModelSpec\.factory is a str\. Expected a function without arguments"),
        ({"linear_memory": "yes"}, r"ModelSpec\.linear_memory is 'yes'\. Expected True or False"),
        ({"example_inputs": {1: None}}, r"example_inputs has the key 1\. Expected the names"),
        ({"example_inputs": {"x": np.ones(3)}}, r"example_inputs\['x'\] is a ndarray\. Expected tensors"),
        ({"frozen": "emb"}, r"ModelSpec\.frozen is the string 'emb'\..*Write frozen=\('emb',\)"),
    ],
)
def test_wrong_facts(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(**facts)


class Language(nn.Module):
    """Token ids in, scores of 50 out; `pooled` gives one row of 5 per text."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(50, 16), nn.GRU(16, 16, batch_first=True)
        self.head, self.pooled = nn.Linear(16, 5 if pooled else 50), pooled

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.rnn(self.tok(input_ids))[0]
        return self.head(hidden.mean(1) if self.pooled else hidden)


class Pictures(nn.Module):
    """Images in, five scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


IDS = torch.arange(16).view(2, 8)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"frozen": ("toc",)},
            r"names 'toc', and no parameter's name starts with it\. Expected prefixes of tok\.weight",
        ),
        ({"example_inputs": {"ids": IDS}}, r"gives 'ids', which forward\(\) does not take and lacks 'input_ids'"),
        ({"example_inputs": {"input_ids": IDS + 35}}, r"holds the id 50, and `tok` reads it\..*the largest has 50"),
        ({"example_inputs": {"input_ids": IDS - 1}}, r"holds the id -1"),
        ({"example_inputs": {"input_ids": IDS / 2}}, r"\['input_ids'\] is float32, and `tok` looks rows up by it"),
        ({"task": "image_classification"}, r"task is 'image_classification', but Language takes token ids"),
        ({"task": "tabular_classification"}, r"returns \(2, 12, 50\) for two samples\. Expected one row of features"),
    ],
)
def test_facts_that_the_model_contradicts(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelAdapter(Language(), spec=ModelSpec(**facts))


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "tabular_classification"])
def test_pictures_are_no_texts(task: str) -> None:
    with pytest.raises(ConfigError, match=f"task is '{task}', but Pictures takes images and returns \\(2, 5\\)"):
        ModelAdapter(Pictures(), spec=ModelSpec(task=task))


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (Language(), {"task": "causal_lm", "frozen": ("tok",), "example_inputs": {"input_ids": IDS}}),
        (Language(), {"task": "text_classification"}),
        (Language(pooled=True), {"task": "text_classification"}),
        (Language(pooled=True), {"task": "tabular_classification"}),
        (Pictures(), {"task": "image_classification"}),
        (Pictures(), {"task": "embedding"}),
        # Vectors of words, one map per text, as convolutions over texts read them.
        (Pictures(), {"task": "text_classification"}),
        (nn.Sequential(nn.Linear(784, 10)), {"task": "image_classification"}),
        (nn.Sequential(nn.Linear(8, 3)), {"task": "text_classification"}),
    ],
)
def test_facts_that_fit(model: nn.Module, facts: dict[str, Any]) -> None:
    adapter = ModelAdapter(model, spec=ModelSpec(**facts))
    assert adapter.failure is None
    assert adapter.task.value == facts["task"]


def test_promised_ids_are_the_models_to_read() -> None:
    """The config says 60, the table has 50: the example is right and the model is not."""
    spec = ModelSpec(example_inputs={"input_ids": IDS + 40})
    adapter = ModelAdapter(Language(), {"vocab_size": 60}, spec)
    assert adapter.failure is not None


def test_factory_builds_the_same_model() -> None:
    adapter = ModelAdapter(Language(), spec=ModelSpec(factory=Language))
    assert adapter.factory is not None
    assert isinstance(adapter.factory(), Language)
    for wrong, said in ((lambda: 3, "builds a int"), (Pictures, "builds a Pictures with other parameters")):
        other = ModelAdapter(Language(), spec=ModelSpec(factory=wrong))  # type: ignore[arg-type]
        assert other.factory is not None
        with pytest.raises(ConfigError, match=said):
            other.factory()


def test_a_frozen_prefix_may_be_the_second_name_of_a_shared_weight() -> None:
    model = nn.Module()
    model.tok, model.head = nn.Embedding(20, 4), nn.Linear(4, 20, bias=False)
    model.head.weight = model.tok.weight
    ModelSpec(frozen=("head",)).check_against(model, (), ("input_ids",))


@pytest.mark.parametrize("prefix", ["module.tok", "tok", "_orig_mod.module.tok", "module."])
def test_frozen_prefixes_may_name_wrappers(prefix: str) -> None:
    """Names as the wrapped model has them, and as the model inside has them."""
    for model in (Language(), nn.DataParallel(Language())):
        spec = ModelSpec(frozen=(prefix,))
        adapter = ModelAdapter(model, spec=spec)
        assert adapter.failure is None
        assert all(spec.freezes(name) for name, _ in adapter.module.named_parameters() if "tok" in name)
        assert spec.freezes("head.weight") == (prefix == "module.")
    with pytest.raises(ConfigError, match=r"names 'module\.toc'"):
        ModelAdapter(nn.DataParallel(Language()), spec=ModelSpec(frozen=("module.toc",)))


def test_single_numbers_of_numpy_are_numbers() -> None:
    class Scaled(Pictures):
        def forward(self, pixels: torch.Tensor, scale: float) -> torch.Tensor:
            return pixels.mean((2, 3)) * scale

    inputs = {"pixels": torch.randn(2, 3, 8, 8), "scale": np.float32(2)}
    assert ModelAdapter(Scaled(), spec=ModelSpec(example_inputs=inputs)).failure is None
    with pytest.raises(ConfigError, match=r"example_inputs\['scale'\] is a ndarray"):
        ModelSpec(example_inputs={**inputs, "scale": np.ones(2)})


def test_what_tables_are_asked_for_is_seen_under_any_name() -> None:
    """Ids given by keyword are looked at as well; a crash of the model's own is passed on as it is."""

    class Keyword(Language):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.tok(input=input_ids)

    with pytest.raises(ConfigError, match="holds the id 50, and `tok` reads it"):
        ModelAdapter(Keyword(), spec=ModelSpec(example_inputs={"input_ids": IDS + 35}))

    class Broken(Language):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.tok(input_ids)
            raise RuntimeError("no such head")

    assert ModelAdapter(Broken(), spec=ModelSpec(example_inputs={"input_ids": IDS})).failure is not None
