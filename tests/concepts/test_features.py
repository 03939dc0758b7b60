"""Features of a layer, the examples they are strongest on, and what a model keeps with them."""

import json
import math

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.autoencoder import AutoencoderConfig, AutoencoderFit, SparseAutoencoder, fit_autoencoder
from utils.concepts.features import fit_layer_autoencoder, layer_features, strongest_features
from utils.concepts.recovery import recovery
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.files import null_nonfinite
from utils.tokenization import choose_tokenizer

WIDTH = 4


def axes_of(width=WIDTH, layer="", side="output", active=1, pool="positions"):
    """An autoencoder whose features are the numbers of a vector themselves."""
    made = SparseAutoencoder(width, width, active).eval().requires_grad_(False)
    made.encoder.copy_(torch.eye(width))
    made.decoder.copy_(torch.eye(width))
    config = AutoencoderConfig(features=width, active=active)
    return AutoencoderFit(made, config, 1.0, 1.0, 1.0, 0, (1, 1), ((0, 1.0, 0.0),), layer, side, pool)


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    return ModelAdapter(
        model, spec=ModelSpec(task="tabular_classification", example_inputs={"input": torch.rand(2, WIDTH)})
    )


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    config = {"vocab_size": 300, "max_seq_len": 24, "d_model": 16, "nhead": 2, "num_layers": 1}
    return ModelAdapter(utils.load_model("example:gpt", config=config))


def test_the_strongest_places_by_hand():
    values = torch.tensor([[5.0, 0, 0, 0], [4, 0, 0, 0], [0, 3, 0, 0], [9, 0, 0, 0], [0, 0, 0.5, 0]])
    samples, positions = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 0])
    view = strongest_features(axes_of(), values, samples, positions)
    # Feature 3 is never active, and is not shown.
    assert [feature.number for feature in view.features] == [0, 1, 2]
    first = view.features[0]
    assert [(place.example, place.position, place.strength) for place in first.strongest] == [(1, 1, 9.0), (0, 0, 5.0)]
    assert first.density == pytest.approx(0.6) and first.mean == pytest.approx(6.0)
    assert first.energy == pytest.approx((25 + 16 + 81) / (25 + 16 + 81 + 9 + 0.25))
    assert [f.number for f in strongest_features(axes_of(), values, numbers=[3, 1]).features] == [3, 1]
    assert len(strongest_features(axes_of(), values, count=1, top=1).features[0].strongest) == 1
    assert json.loads(json.dumps(view.to_dict()))["features"][0]["strongest"][0]["example"] == 1
    assert "example 1, position 1 (9.00)" in str(view)
    with pytest.raises(ConfigError, match="There is no feature 4"):
        strongest_features(axes_of(), values, numbers=[4])
    with pytest.raises(DataError, match="samples of the shape \\(4,\\)"):
        strongest_features(axes_of(), values, samples[1:])


def test_texts_are_shown_round_the_place(gpt):
    tokenizer = choose_tokenizer(["some text to learn merges from"], 300)
    texts = [f"number {i}: {'xyz' * (i % 4)} end" for i in range(30)]
    gpt.module.train()
    fit = fit_layer_autoencoder(
        gpt, texts, None, AutoencoderConfig(features=32, active=4, steps=60), tokenizer=tokenizer
    )
    assert gpt.module.training
    assert fit.side == "input" and fit.pool == "positions" and fit.layer
    view = layer_features(gpt, fit, texts, tokenizer=tokenizer, count=3, top=4)
    assert len(view.features) == 3
    for feature in view.features:
        for place in feature.strongest:
            ids = tokenizer.encode([texts[place.example]])[0]
            assert place.text[1] == tokenizer.decode(ids[place.position : place.position + 1])
            assert place.text[0].endswith(tokenizer.decode(ids[max(0, place.position - 2) : place.position]))
            alone = layer_features(gpt, fit, texts[place.example], tokenizer=tokenizer, numbers=[feature.number])
            assert alone.features[0].strongest[0].strength == pytest.approx(place.strength, abs=1e-4)


def test_all_features_keep_everything_and_the_mean_keeps_nothing_else():
    model = classifier()
    rows = torch.randn(50, WIDTH)
    labels = torch.randint(0, 3, (50,))
    whole = recovery(model, axes_of(layer="1", active=WIDTH), rows, labels)
    assert whole.divergence == pytest.approx(0, abs=1e-9)
    assert whole.recovered == pytest.approx(1) and whole.agreement == 1.0
    assert whole.loss_reconstructed == pytest.approx(whole.loss)
    with torch.no_grad():
        logits = model.module(rows)
        bias = model.module[2].bias.detach().expand(50, 3)
    assert whole.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-5)
    # The autoencoder's mean is zero: the answer is the bias of the last layer.
    assert whole.loss_ablated == pytest.approx(float(nn.functional.cross_entropy(bias, labels)), abs=1e-5)
    ablated = nn.functional.kl_div(bias.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean")
    assert whole.divergence_ablated == pytest.approx(float(ablated), abs=1e-5)
    some = recovery(model, axes_of(layer="1", active=1), rows)
    assert some.divergence > 0 and some.recovered < 1
    assert math.isnan(some.loss) and math.isnan(some.loss_recovered)
    assert json.loads(json.dumps(null_nonfinite(some.to_dict()), allow_nan=False))["loss"] is None
    assert "of 50 answers the same" in str(some) and "loss" in str(whole)
    assert not model.module[1]._forward_hooks


def test_a_causal_model_needs_no_labels(gpt):
    ids = torch.randint(1, 300, (6, 12), generator=torch.Generator().manual_seed(0))
    fit = fit_layer_autoencoder(gpt, ids, None, AutoencoderConfig(features=32, active=4, steps=20))
    found = recovery(gpt, fit, ids, batch_size=4)
    with gpt.isolated():
        logits = gpt.logits({gpt.main_input: ids})
    wanted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss == pytest.approx(float(wanted), abs=1e-5)
    assert found.answers == 72


def test_outputs_that_are_numbers_have_squared_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    adapter = ModelAdapter(model, spec=ModelSpec(task="regression", example_inputs={"input": torch.rand(2, WIDTH)}))
    rows = torch.randn(30, WIDTH)
    found = recovery(adapter, axes_of(layer="1"), rows)
    with torch.no_grad():
        wanted = (model(rows) - model[2].bias).square().mean()
    assert found.divergence_ablated == pytest.approx(float(wanted), abs=1e-6)
    assert math.isnan(found.agreement)


def test_a_layer_that_does_not_matter():
    model = classifier()
    with torch.no_grad():
        model.module[2].weight.zero_()
    found = recovery(model, axes_of(layer="1"), torch.randn(20, WIDTH))
    assert math.isnan(found.recovered)
    assert "do not depend on the layer" in str(found)


def test_flat_layers_are_put_back_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    spec = ModelSpec(task="image_classification", example_inputs={"input": torch.rand(2, 1, 4, 4)})
    adapter = ModelAdapter(model, spec=spec)
    images = torch.randn(60, 1, 4, 4)
    fit = fit_layer_autoencoder(adapter, images, "1", AutoencoderConfig(features=16, active=8, steps=300), pool="flat")
    assert fit.autoencoder.width == 8 and fit.pool == "flat"
    assert recovery(adapter, fit, images).recovered > 0.5


def test_errors():
    model = classifier()
    rows = torch.randn(60, WIDTH)
    given = fit_autoencoder(rows, AutoencoderConfig(features=8, active=2, steps=2))
    for call in (layer_features, recovery):
        with pytest.raises(ConfigError, match="of no known layer"):
            call(model, given, rows)
    with pytest.raises(ConfigError, match="cannot be put back"):
        fit_layer_autoencoder(model, rows, pool="mean")
    with pytest.raises(ConfigError, match="no layer 'x'"):
        fit_layer_autoencoder(model, rows, "x")
    fit = axes_of(layer="1")
    with pytest.raises(DataError, match="60 examples, and the labels are of the shape \\(59,\\)"):
        recovery(model, fit, rows, torch.zeros(59, dtype=torch.long))
    with pytest.raises(DataError, match="A label is 3"):
        recovery(model, fit, rows, torch.full((60,), 3))
