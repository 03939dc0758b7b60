"""How hard samples are: lengths, losses against a loop over single samples, functions of the user's."""

import math

import pytest
import torch
from torch.nn import functional

import utils
from tests.continual.toys import SPEC, net
from utils.adapters import ModelAdapter, ModelSpec
from utils.continual.difficulty import (
    check_difficulty,
    difficulty_of,
    register_difficulty,
    sample_lengths,
    sample_losses,
    scored,
)
from utils.runtime.errors import ConfigError, DataError
from utils.training import TrainingConfig
from utils.training.dataset_utilities import load_data, prepare_data


def test_losses_of_images_are_those_of_single_samples_and_leave_no_trace(digits):
    model = net(norm=True)
    adapter = ModelAdapter(model, spec=SPEC)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.random.get_rng_state()
    found = sample_losses(adapter, digits, 100)
    assert torch.equal(stream, torch.random.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.shape == (digits.train_samples,)
    model.eval()
    with torch.no_grad():
        for number in (0, 7, 1000):
            image, label = (digits.train[name][number : number + 1] for name in ("pixel_values", "labels"))
            assert found[number] == pytest.approx(float(functional.cross_entropy(model(image), label)), rel=1e-5)


def test_losses_of_text_and_of_numbers(text_file):
    model = utils.load_model("example:gpt", config={"vocab_size": 300, "max_seq_len": 32, "d_model": 16, "nhead": 2,
                                                    "num_layers": 1})  # fmt: skip
    adapter = ModelAdapter(model)
    data = prepare_data(adapter, f"file:{text_file}", TrainingConfig())
    found = sample_losses(adapter, data, 16)
    adapter.module.eval()
    with torch.no_grad():
        logits = adapter.logits({adapter.main_input: data.train["input_ids"][3:4].long()})
    expected = functional.cross_entropy(logits.flatten(0, 1), data.train["labels"][3].long())
    assert found[3] == pytest.approx(float(expected), rel=1e-5)

    line = torch.nn.Linear(10, 1)
    numbers = load_data("builtin:diabetes", task="regression", features=10)
    adapter = ModelAdapter(line, spec=ModelSpec(task="regression", num_labels=1))
    found = sample_losses(adapter, numbers, 32)
    with torch.no_grad():
        error = (line(numbers.train["features"]) - numbers.train["labels"]).square().mean(1)
    assert torch.allclose(found, error, rtol=1e-4)


def test_losses_of_a_single_score():
    rows = {"features": torch.randn(9, 3), "labels": torch.arange(9) % 2}
    from utils.training.prepared_data import PreparedData

    data = PreparedData("toy", "tabular_classification", rows, rows, None, {})
    line = torch.nn.Linear(3, 1)
    adapter = ModelAdapter(line, spec=ModelSpec(task="tabular_classification", num_labels=1))
    found = sample_losses(adapter, data, 4)
    with torch.no_grad():
        scores = line(rows["features"])[:, 0]
    expected = functional.binary_cross_entropy_with_logits(scores, rows["labels"].float(), reduction="none")
    assert torch.allclose(found, expected)
    with torch.no_grad():
        line.weight.fill_(math.nan)
    assert sample_losses(adapter, data, 4).eq(torch.inf).all()


def test_lengths():
    assert sample_lengths({"input_ids": torch.ones(2, 5), "lengths": torch.tensor([2, 5])}).tolist() == [2, 5]
    pairs = {"lengths": torch.tensor([2, 5]), "target_lengths": torch.tensor([9, 1])}
    assert sample_lengths(pairs).tolist() == [11, 6]
    with pytest.raises(DataError, match=r"all of the same length.*different lengths.*'loss'"):
        sample_lengths({"input_ids": torch.ones(2, 5)})
    with pytest.raises(DataError, match="have no length"):
        sample_lengths({"pixel_values": torch.ones(2, 5)})


def test_functions_are_found_by_their_name(digits):
    register_difficulty("ink", lambda batch: batch["pixel_values"].flatten(1).sum(1))
    found = difficulty_of("ink", None, digits, 16, 0)
    assert torch.allclose(found, digits.train["pixel_values"].flatten(1).sum(1), atol=1e-4)
    with pytest.raises(ConfigError, match=r"'inc'.*length, loss.*ink.*register_difficulty\('inc'"):
        check_difficulty("inc", digits)
    with pytest.raises(ConfigError, match=r"'loss' is to be.*name other than length, loss"):
        register_difficulty("loss", len)
    with pytest.raises(ConfigError, match="and a function"):
        register_difficulty("other", 3)


@pytest.mark.parametrize(("function", "message"), [
    (lambda batch: batch["x"].sum(), r"shape \(\)\. Expected one finite"),
    (lambda batch: batch["x"][:, 0] / 0, "holds what is not finite"),
])  # fmt: skip
def test_what_a_function_must_not_return(function, message):
    with pytest.raises(DataError, match=message):
        scored(function, {"x": torch.ones(3, 2)})
