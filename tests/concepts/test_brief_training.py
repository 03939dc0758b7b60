import json

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.brief_training import train_briefly
from utils.concepts.reasoning_trace import record_trace
from utils.runtime.errors import ConfigError
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.evaluation import evaluate


@pytest.fixture(scope="module")
def vit():
    return utils.load_model("example:vit", config={"image_size": 8, "num_layers": 1, "d_model": 32})


def test_it_learns_and_leaves_the_model_and_the_streams_alone(vit):
    before = {name: value.clone() for name, value in vit.module.state_dict().items()}
    training, stream = vit.module.training, torch.get_rng_state()
    config = TrainingConfig(max_steps=150, batch_size=32, validation_share=0.5)
    made = train_briefly(vit, "builtin:digits", config)
    assert torch.equal(torch.get_rng_state(), stream) and vit.module.training == training
    assert all(torch.equal(value, before[name]) for name, value in vit.module.state_dict().items())
    assert made.measured["accuracy"] > 0.6 and made.losses[-1] < 1 < made.losses[0] and made.steps == 150
    assert made.measured == evaluate(made.adapter, made.data, 32, config.seed)
    assert not made.module.training and made.module is made.adapter.module
    assert made.data.validation_samples == 898
    json.dumps(made.to_dict())
    assert str(made).startswith("ViT on builtin:digits, 150 steps. Held out: loss") and str(made) in made._repr_html_()


def test_the_same_seed_gives_the_same_weights_and_another_one_others(vit):
    states = []
    for seed in (0, 0, 1):
        made = train_briefly(vit, "builtin:digits", TrainingConfig(max_steps=3, seed=seed))
        states.append(torch.cat([value.flatten() for value in made.module.state_dict().values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_passes_count_and_every_sample_is_seen(vit):
    made = train_briefly(vit, "builtin:digits", TrainingConfig(max_steps=None, max_epochs=0.1, batch_size=64))
    assert made.steps == int(0.1 * -(-made.data.train_samples // 64))


def test_a_language_model_brings_its_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {i} of {i * 7 % 13} says {i * i}." for i in range(400)))
    config = {"vocab_size": 300, "max_seq_len": 16, "d_model": 16, "nhead": 2, "num_layers": 1}
    gpt = utils.load_model("example:gpt", config=config)
    made = train_briefly(gpt, f"file:{tmp_path / 'text.txt'}", TrainingConfig(max_steps=5))
    assert made.data.tokenizer is not None and "bits_per_byte" in made.measured
    assert record_trace(made, "Line", 2).tokens


def test_prepared_data_and_plain_modules(vit):
    data = prepare_data(vit, "builtin:digits", TrainingConfig())
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert train_briefly(module, data, TrainingConfig(max_steps=2)).data.fingerprint() == data.fingerprint()


def test_what_cannot_be_done_is_told(vit):
    with pytest.raises(ConfigError, match="is auto"):
        train_briefly(vit, "builtin:digits", TrainingConfig(learning_rate="auto"))
    module = nn.Linear(4, 2)
    module.weight_norm = torch.ones(2, requires_grad=True) * 2
    adapter = ModelAdapter(module, spec=ModelSpec(example_inputs={"input": torch.zeros(2, 4)}))
    with pytest.raises(ConfigError, match="cannot be copied"):
        train_briefly(adapter, "builtin:wine", TrainingConfig(max_steps=1))
