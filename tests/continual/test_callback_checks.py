from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.continual.toys import net
from tests.continual.trainers import Lit, fit, loader, made, scaled, weights
from utils.continual.callback import ContinualCallback
from utils.runtime.errors import ConfigError, DataError


class Mapped(nn.Module):
    """Returns its scores beside other things, and its own loss if it gets labels."""

    def __init__(self, kind=dict, own=False):
        super().__init__()
        self.inner, self.kind, self.own = net(), kind, own

    def forward(self, pixel_values, labels=None):
        logits = self.inner(pixel_values)
        if self.kind is not dict:
            return self.kind([logits, pixel_values.flatten(1)])
        loss = {} if labels is None else {"loss": functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class OfMapping(Lit):
    def scores(self, output):
        return output["logits"] if isinstance(output, dict) else output[0]


class OwnLoss(Lit):
    def training_step(self, batch, number):
        return self.net(batch[0], labels=batch[1])["loss"]


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_scores_are_lowered_in_mappings_and_sequences_alike(digits, kind):
    plain, mapped = Lit(), OfMapping(Mapped(kind))
    for module in (plain, mapped):
        callback = made("consolidation", module)
        for number in range(2):
            fit(module, loader(digits, number, count=64), callback)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(mapped)[f"inner.{name}"]), name


def test_a_model_that_computes_its_loss_itself_is_replayed_and_not_consolidated(digits):
    module = OwnLoss(Mapped())
    fit(module, loader(digits, 0), made("replay", module))
    before = weights(module)
    with pytest.raises(ConfigError, match=r"does not depend on the scores that Mapped returned\. Expected .* Make the"):
        fit(module, loader(digits, 0), made("consolidation", module))
    assert all(torch.equal(value, weights(module)[name]) for name, value in before.items())
    assert not module.net._forward_hooks


class Smoothed(Lit):
    def training_step(self, batch, number):
        return functional.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1)


def test_a_loss_that_moves_what_is_left_out_is_refused(digits):
    module = Smoothed()
    with pytest.raises(ConfigError, match=r"moves scores of classes that have not come up.* without label smoothing"):
        fit(module, loader(digits, 0), made("consolidation", module))
    fit(module, loader(digits, 0), made("replay", module))


class Nested(Mapped):
    def forward(self, pixel_values):
        return {"head": {"logits": self.inner(pixel_values)}}


def test_scores_that_cannot_be_put_back_are_told(digits):
    module = Lit(Nested())
    with pytest.raises(
        ConfigError, match=r"Nested returns a dict with scores of shape \(2, 10\) at `head.logits`\. Exp"
    ):
        fit(module, loader(digits, 0), made("replay", module))


class Fickle(Mapped):
    def forward(self, pixel_values):
        return {"scores" if self.training and torch.is_grad_enabled() else "logits": self.inner(pixel_values)}


def test_a_model_that_changes_what_it_returns_is_told(digits):
    module = Lit(Fickle())
    with pytest.raises(DataError, match="returned scores in training_step. Expected its scores at `logits`"):
        fit(module, loader(digits, 0), made("replay", module))


class Twice(Lit):
    def training_step(self, batch, number):
        self.net(batch[0])
        return super().training_step(batch, number)


class Around(Lit):
    def training_step(self, batch, number):
        return functional.cross_entropy(self.net.net(batch[0]), batch[1])


@pytest.mark.parametrize(("kind", "calls"), [(Twice, 2), (Around, 0)])
def test_another_number_of_calls_is_told_where_scores_are_needed(digits, kind, calls):
    module = kind()
    with pytest.raises(
        ConfigError, match=rf"called the Net {calls} times with gradients\. Expected one .* Call it once"
    ):
        fit(module, loader(digits, 0), made("replay", module))
    fit(module, loader(digits, 0), made("ewc", module))


class Half(Lit):
    def training_step(self, batch, number):
        return super().training_step([part[: len(part) // 2] for part in batch], number)


def test_scores_of_other_samples_than_the_batchs_are_told(digits):
    module = Half()
    with pytest.raises(
        DataError, match=r"scores of shape \(8, 10\) for labels of shape \(16,\)\. Expected .* Let batch"
    ):
        fit(module, loader(digits, 0), made("replay", module))


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Several(Lit):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


def test_ways_of_training_in_which_it_cannot_act_are_refused(digits):
    module, data = Lit(), loader(digits, 0)
    with pytest.raises(ConfigError, match="The Net of ContinualCallback is no part of Lit. Expected .* Give it"):
        fit(Lit(), data, made("naive", module))
    manual = Manual()
    with pytest.raises(ConfigError, match="Manual optimizes manually. Expected automatic .* Leave"):
        fit(manual, data, made("naive", manual))
    with pytest.raises(ConfigError, match="2 processes train together. Expected one: .* Set devices=1"):
        made("naive", module).setup(SimpleNamespace(world_size=2), module, "fit")
    made("naive", module).setup(SimpleNamespace(world_size=2), module, "validate")
    module.net.compile()
    with pytest.raises(ConfigError, match="The Net was compiled in place. Expected .* Leave out"):
        fit(module, data, made("naive", module))
    several = Several()
    with pytest.raises(ConfigError, match="The gradient of one batch was asked for twice. Expected one .* LBFGS"):
        fit(several, data, made("replay", several))


def test_gradients_that_stay_scaled_are_refused(digits):
    module = Lit(fused=True)
    with pytest.raises(ConfigError, match="A fused optimizer takes the scaled gradients .* Set precision='bf16-mixed'"):
        fit(module, loader(digits, 0), made("ewc", module), **scaled())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tasks": 3, "split": "parts"}, r"was given split='parts', tasks=3\. Expected settings of the method .* Tr"),
        ({"method": "packnet", "setting": "task"}, r"method='packnet'\. Expected .* packnet needs weights of its own"),
        ({"method": "columns", "setting": "task"}, r"method='columns'\. Expected .* columns needs weights of its own"),
        ({"method": "joint"}, r"method='joint'\. Expected .* joint needs the samples of all tasks at once\. Fit once"),
        ({"method": "ewc", "boundaries": False}, "boundaries is False. Expected boundaries: ewc acts where"),
        ({"method": "sleep"}, "'sleep' is no method"),
        ({"bufer": 3}, "Did you mean 'buffer'"),
    ],
)  # fmt: skip
def test_settings_that_it_cannot_keep_are_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        ContinualCallback({"method": "naive", **given}, model=net(), task="image_classification")


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("masked_lm", r"task='masked_lm'\. Expected .*which words are hidden .* Train with"),
        ("cats", r"task='cats'\. Expected .*causal_lm.* Say what"),
    ],
)
def test_tasks_that_it_cannot_learn_are_refused(task, told):
    with pytest.raises(ConfigError, match=told):
        ContinualCallback({"method": "naive"}, model=net(), task=task)


IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pixel_values": IMAGES}, r"A batch has pixel_values\. Expected input_ids, pixel_values or fea.* Let"),
        ({"labels": LABELS}, "A batch has labels. Expected"),
        ({}, "A batch has nothing. Expected"),
        ([IMAGES, LABELS], "A batch has list. Expected"),
        ({"pixel_values": IMAGES, "labels": [0] * 4}, "A batch has pixel_values, labels. Expected .* as tensors"),
        ({"pixel_values": IMAGES, "labels": LABELS, "task": LABELS}, "has an entry 'task', a name .* Expected .* Let"),
        ({"pixel_values": IMAGES, "labels": LABELS[:2]}, "A batch has 4 rows of pixel_values, 2 rows of labels. Exp"),
        ({"pixel_values": IMAGES, "labels": LABELS.sum()}, "4 rows of pixel_values, 0 rows of labels"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_remembered_are_told(digits, given, told):
    module = Lit()
    with pytest.raises(DataError, match=told):
        fit(module, loader(digits, 0), made("replay", module, batch=lambda batch: given))


def test_a_batch_may_be_a_mapping_or_a_pair(digits):
    module = Lit()
    with pytest.raises(DataError, match=r"A batch is a Tensor\. Expected a mapping, or a pair .* Say what is in it"):
        made("naive", module)._batch(IMAGES)
    assert list(made("naive", module)._batch({"pixel_values": IMAGES, "labels": LABELS})) == ["pixel_values", "labels"]
    assert list(made("naive", module)._batch((LABELS[:, None], LABELS))) == ["input_ids", "labels"]


@pytest.mark.parametrize("labels", [LABELS.float(), torch.zeros(4, 10).long()])
def test_labels_that_are_no_classes_are_told(digits, labels):
    module = Lit()
    callback = made("ewc", module, batch=lambda batch: {"pixel_values": IMAGES, "labels": labels})
    with pytest.raises(DataError, match=r"has labels of shape \(4.* Expected the number of a class .* Let batch"):
        fit(module, loader(digits, 0), callback)


def test_labels_without_an_output_are_told(digits):
    module = Lit(net(outputs=3))
    callback = ContinualCallback({"method": "naive"}, model=module.net, task="image_classification")
    with pytest.raises(DataError, match="'task 1' has a sample of class 6. Expected numbers from 0 to 2. Check"):
        fit(module, loader(digits, 3), callback)


def test_a_model_that_changed_between_tasks_is_told(digits):
    module = Lit()
    callback = made("ewc", module)
    fit(module, loader(digits, 0), callback)
    module.net.net[3] = nn.Linear(32, 12)
    with pytest.raises(
        ConfigError, match=r"The Net has changed since the last fit, in net\.3\.weight\. Expected .* Let"
    ):
        fit(module, loader(digits, 1), callback)
