"""Sizes against hand counts and torch's own counter, and every reason for a refusal."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.budget import Budget, BudgetError, ModelSize, forward_flops, model_size
from utils.growth.config import GrowthConfig
from utils.training.batching import collate
from utils.training.config import TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.step_memory import activation_bytes, run_bytes, tensor_bytes

SMALL = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}


def test_operations_by_hand():
    adapter = ModelAdapter(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    assert forward_flops(adapter, adapter.example_inputs(5)) == 5 * 2 * (8 * 16 + 16 * 3)
    size = model_size(adapter, adapter.example_inputs(5))
    assert size.flops == 3 * forward_flops(adapter, adapter.example_inputs(5))
    assert size.parameters == 8 * 16 + 16 + 16 * 3 + 3
    assert size.to_dict() == {"parameters": size.parameters, "flops": size.flops, "bytes": size.bytes}


def test_fused_attention_is_counted():
    """The fused CPU kernel is in no table of torch's: with it, FlopCounterMode counts no attention at all."""
    adapter = ModelAdapter(utils.load_model("example:gpt", config=SMALL))
    inputs = adapter.example_inputs(2, 16)
    unfused = torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH])
    with unfused, adapter.isolated(), FlopCounterMode(display=False) as counter:
        adapter.logits(inputs)
    assert forward_flops(adapter, inputs) == counter.get_total_flops()
    per_token = 2 * (2 * (4 * 32 * 32 + 8 * 32 * 32) + 32 * 300) + 2 * 4 * 16 * 32
    assert forward_flops(adapter, inputs) == 2 * 16 * per_token


def test_torchs_encoder_layers_are_counted():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 3))
    adapter = ModelAdapter(model, spec=ModelSpec(task="regression", example_inputs={"input": torch.randn(2, 6, 16)}))
    inputs = adapter.example_inputs(2)
    flops = 2 * 6 * (2 * (4 * 16 * 16 + 2 * 16 * 32 + 16 * 3) + 4 * 6 * 16)
    assert forward_flops(adapter, inputs) == flops


def test_memory_with_and_without_data(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {number} is about {number * 7} things." for number in range(400)))
    adapter = ModelAdapter(utils.load_model("example:gpt", config=SMALL))
    config = TrainingConfig(max_steps=2, batch_size=4, ema_decay=0.9)
    data = prepare_data(adapter, f"file:{text}", config)
    inputs = {"input_ids": collate(data.train, torch.arange(2))["input_ids"]}
    plain, with_data = model_size(adapter, inputs, config), model_size(adapter, inputs, config, data)
    cpu = torch.device("cpu")
    assert plain.bytes == tensor_bytes(adapter.module) + run_bytes(adapter, config, cpu)
    assert with_data.bytes == plain.bytes + 4 * activation_bytes(adapter, data, config)
    gpu = model_size(adapter, inputs, config, device=torch.device("cuda"))
    assert gpu.bytes == run_bytes(adapter, config, torch.device("cuda"))


def test_tied_parameters_count_once():
    adapter = ModelAdapter(utils.load_model("example:gpt", config=SMALL))
    size = model_size(adapter, adapter.example_inputs(1))
    assert size.parameters == sum(p.numel() for p in adapter.module.parameters())


START, BEFORE, AFTER = ModelSize(1000, 100, 10**6), ModelSize(2000, 150, 2 * 10**6), ModelSize(3000, 300, 5 * 10**6)


def test_without_limits_everything_may_grow():
    assert Budget().refusal(BEFORE, AFTER, START, events=99) is None
    Budget.from_config(GrowthConfig()).check(BEFORE, AFTER, START)


@pytest.mark.parametrize(
    ("limit", "at_most", "too_little", "message"),
    [
        ("max_parameters", 3000, 2999, r"from 2.0k to 3.0k parameters. Expected at most max_parameters=2,999. Raise"),
        ("max_flops_share", 3.0, 2.9, r"3.00 times as expensive as the first one \(300 FLOPs\). .*max_flops_share=2.9"),
        ("max_memory_gb", 0.005, 0.0049, r"from 2.0 MB to 5.0 MB of memory. Expected at most max_memory_gb=0.0049"),
        ("max_events", 3, 2, r"has grown 2 times. Expected at most max_events=2 events. Raise max_events"),
    ],
)
def test_each_limit(limit, at_most, too_little, message):
    Budget.from_config(GrowthConfig(**{limit: at_most})).check(BEFORE, AFTER, START, events=2)
    with pytest.raises(BudgetError, match=message):
        Budget.from_config(GrowthConfig(**{limit: too_little})).check(BEFORE, AFTER, START, events=2)


def test_room_for_the_grown_model():
    assert Budget().refusal(BEFORE, AFTER, START, free=3_450_001) is None
    refused = Budget().refusal(BEFORE, AFTER, START, free=3_400_000)
    assert "needs 3.4 MB more memory, a reserve of 15% included, and 3.4 MB are free" in str(refused)


def test_a_model_without_counted_operations_has_no_share():
    nothing = ModelSize(1, 0, 1)
    assert Budget(max_flops_share=1.5).refusal(nothing, nothing, nothing) is None
