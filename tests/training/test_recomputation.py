import pytest
import torch
from torch import nn

import utils
from utils.runtime.errors import ConfigError
from utils.training.recomputation import recomputed_blocks
from utils.training.resume import train
from utils.training.weights import weights_sha256

TINY_GPT = {"vocab_size": 300, "max_seq_len": 32, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.1}


class Normed(nn.Module):
    """Two blocks with batch statistics."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))


def test_training_is_bitwise_the_same_and_the_model_is_left_as_it_was(tmp_path, text_file, quick):
    kept, again = (utils.load_model("example:gpt", config=TINY_GPT) for _ in range(2))
    again.module.load_state_dict(kept.module.state_dict())
    plain = train(kept, f"file:{text_file}", quick, tmp_path / "kept", progress=False)
    config = quick.with_changes(gradient_checkpointing=True)
    recomputed = train(again, f"file:{text_file}", config, tmp_path / "again", progress=False)
    assert weights_sha256(plain.model) == weights_sha256(recomputed.model)
    assert all("forward" not in vars(part) for part in recomputed.model.modules())


def test_less_is_kept_for_the_backward_pass(tiny_gpt):
    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            tiny_gpt.module(torch.zeros(2, 32, dtype=torch.long))
        return sum(sizes)

    everything = kept()
    with recomputed_blocks(tiny_gpt.module) as names:
        assert len(names) == 2
        assert kept() < 0.6 * everything
    assert kept() == everything


@pytest.mark.parametrize(
    ("model", "words"), [(Normed(), "keep batch statistics"), (nn.Linear(3, 3), "no container holds|0 containers hold")]
)
def test_models_without_blocks_that_can_be_computed_again(model, words):
    with pytest.raises(ConfigError, match=words), recomputed_blocks(model):
        pass
