import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional

import utils
from tests.continual.trainers import Lit, Saving, fit
from utils.continual.callback import ContinualCallback
from utils.continual.callback_parts import join_growth
from utils.growth.callback import GrowthCallback
from utils.runtime.errors import ConfigError
from utils.training.state import MigrationError, ModelChange, TensorChange


class Words(Lit):
    """A small language model with the usual loss."""

    def __init__(self):
        config = {"d_model": 16, "num_layers": 2, "nhead": 2, "vocab_size": 60, "max_seq_len": 16}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(utils.load_model("example:gpt", config=config).module)

    def training_step(self, batch, number):
        return functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())


def of_words(method, module):
    return ContinualCallback({"method": method, "buffer": 20}, model=module.net, task="causal_lm")


def text(low, high, rows=48):
    ids = torch.randint(low, high, (rows, 12), generator=torch.Generator().manual_seed(low))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids[:, :-1], ids[:, 1:]), 8)


GROWS = {"schedule": [{"at": 3, "operator": "depth", "amount": 1}, {"at": 4, "operator": "feed_forward", "amount": 8}]}


def test_a_language_model_learns_texts_one_after_another():
    module = Words()
    callback = of_words("der++", module)
    for low in (0, 30):
        fit(module, text(low, low + 30), callback, epochs=3)
        losses = callback.measure([text(0, 30), text(30, 60)])
    assert not callback.matrix.higher_is_better
    assert callback.matrix.unit == "nats"
    ids = text(30, 60).dataset.tensors
    with torch.no_grad():
        by_hand = functional.cross_entropy(module.net(ids[0]).flatten(0, 1), ids[1].flatten())
    assert losses[1] == pytest.approx(float(by_hand), rel=1e-5)
    assert set(callback.memory.counts) == {0, 1}


@pytest.mark.parametrize("method", ["replay", "ewc", "si", "lwf", "consolidation"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_kept_follows_a_model_that_grows_in_the_same_trainer(tmp_path, method, first):
    module = Words()
    callback, growth = of_words(method, module), GrowthCallback(GROWS, model="net")
    fit(module, text(0, 30), callback)
    pair = (callback, growth) if first else (growth, callback)
    trainer = fit(module, text(30, 60), *pair, Saving(tmp_path / "grown.ckpt", 5))
    assert [event.plan.operator for event in growth.events] == ["depth", "feed_forward"], growth.refusals
    assert "_followed" not in vars(growth)
    assert trainer.global_step == 6
    for part in callback._extension.methods:
        if hasattr(part, "anchors") and part.anchors.importance:
            shapes = {name: p.shape for name, p in module.net.named_parameters()}
            assert all(value.shape == shapes[name] for name, value in part.anchors.importance.items())
    again = Words()
    second, other = of_words(method, again), GrowthCallback(GROWS, model="net")
    fit(again, text(30, 60), *((second, other) if first else (other, second)), path=tmp_path / "grown.ckpt")
    assert second.step == 12
    fit(again, text(0, 30), second)
    assert len(second.ends) == 3


class Falling(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if trainer.global_step == 5:
            raise RuntimeError("fell")


def test_a_task_that_was_interrupted_after_growth_goes_on():
    module = Words()
    callback, growth = of_words("ewc+replay", module), GrowthCallback(GROWS, model="net")
    fit(module, text(0, 30), callback)
    with pytest.raises(RuntimeError, match="fell"):
        fit(module, text(30, 60), callback, growth, Falling())
    assert len(growth.events) == 2
    assert callback.in_task
    assert not module.net._forward_hooks
    assert "_followed" not in vars(growth)
    fit(module, text(30, 60), callback)
    assert callback.ends == (6, 17)


def test_growth_that_cannot_be_followed_is_undone():
    module = Words()
    callback = of_words("ewc", module)
    for low in (0, 30):
        fit(module, text(low, low + 30), callback)
    anchors = callback._extension.methods[0].anchors
    before = dict(anchors.importance)
    named = dict(module.net.named_parameters())
    first = next(iter(named))
    left = {name: parameter for name, parameter in named.items() if name != first}
    new = nn.Parameter(torch.zeros(2))
    change = ModelChange("depth", 1, {"new": new, **left}, changes={"new": TensorChange()}, before=named)

    class Refusing(GrowthCallback):
        def _followed(self, trainer, change):
            assert first not in anchors.importance
            raise MigrationError("No.", "Yes.", "Do.")

    growth = Refusing(GROWS, model="net")
    part = join_growth(growth, module, module.net, callback._extension.migrate)
    with pytest.raises(MigrationError, match="No"):
        growth._followed(None, change)
    assert anchors.importance.keys() == before.keys()
    part()
    assert "_followed" not in vars(growth)


def test_two_callbacks_for_two_modules_are_refused():
    module = Words()
    with pytest.raises(ConfigError, match="GrowthCallback lets a Words grow, and .* Expected the same .* Name it"):
        fit(module, text(0, 30), of_words("ewc", module), GrowthCallback(GROWS, model=""))
