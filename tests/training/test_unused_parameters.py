import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import RunError
from utils.training import TrainingConfig
from utils.training.dataset_utilities import load_data
from utils.training.unused_parameters import leaves_some_out, unused_explained
from utils.training.weights import weights_sha256

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """import torch
from torch import nn


class Half(nn.Module):
    def __init__(self, vocab_size=300, d=16, max_seq_len=32):
        super().__init__()
        self.embed, self.spare, self.head = nn.Embedding(vocab_size, d), nn.Linear(d, d), nn.Linear(d, vocab_size)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
"""


class Sometimes(nn.Module):
    """Leaves out a layer in some passes."""

    def __init__(self, share):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(300, 8), nn.Linear(8, 8), nn.Linear(8, 300)
        self.share = share

    def forward(self, input_ids):
        x = self.embed(input_ids)
        if not self.training or float(torch.rand(())) >= self.share:
            x = self.layer(x)
        return self.head(x)


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (0.5, True), (1.0, True)])
def test_a_probe_finds_what_a_step_may_leave_out(text_file, share, expected):
    model = Sometimes(share)
    adapter = ModelAdapter(model, spec=ModelSpec(task="causal_lm", vocab_size=300, max_length=32))
    data = load_data(f"file:{text_file}", task="causal_lm", vocab_size=300, max_length=32)
    before = weights_sha256(model)
    assert leaves_some_out(adapter, data, TrainingConfig()) is expected
    assert weights_sha256(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_no_probe_found_is_told_in_words(tiny_gpt):
    adapter = ModelAdapter(tiny_gpt)
    words = "step of GPT gave some parameter no gradient.*Train on one device"
    with pytest.raises(RunError, match=words), unused_explained(adapter):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")
    with pytest.raises(RuntimeError, match="something else"), unused_explained(adapter):
        raise RuntimeError("something else")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_with_an_unused_layer_trains_on_two_devices(tmp_path, text_file):
    (tmp_path / "model.py").write_text(SOURCE)
    code = (
        "import utils; from utils.adapters import ModelSpec\n"
        f"config = utils.TrainingConfig(devices=2, max_steps=3, batch_size=2, val_every_steps=3)\n"
        f"spec = ModelSpec(task='causal_lm', vocab_size=300, max_length=32)\n"
        f"run = utils.train('model.py', {f'file:{text_file}'!r}, config, 'run', spec=spec, progress=False)\n"
        "print(run.status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.stdout.strip().endswith("finished"), result.stderr[-2000:]
