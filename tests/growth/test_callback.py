import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import utils
from tests.growth.operators.test_expert import made
from tests.growth.toys import Toy
from utils.adapters import ModelAdapter
from utils.growth.callback import GrowthCallback, _inputs, _total
from utils.growth.edits import GrowthError, GrowthRefusedError
from utils.growth.opening import STEPS
from utils.growth.operators.expert import CLOSED
from utils.runtime.errors import ConfigError
from utils.training.state import MigrationError, ModelChange, TensorChange

SCHEDULE = {
    "schedule": [{"at": 3, "operator": "depth", "amount": 1}, {"at": 5, "operator": "feed_forward", "amount": 8}]
}

BEGINS = {"begin_blocks": 1, "schedule": [{"at": 3, "operator": "depth", "to": "full"}]}


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = {"d_model": 16, "num_layers": 2, "nhead": 2, "vocab_size": 60, "max_seq_len": 16}
        self.net = utils.load_model("example:gpt", config=config).module
        self.extra = nn.Parameter(torch.ones(1))
        self.losses = []

    def training_step(self, batch, number):
        loss = nn.functional.cross_entropy(self.net(batch).flatten(0, 1) * self.extra, batch.flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(module, callback, steps, path=None, data=None, **options):
    data = data if data is not None else torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=path)
    return trainer


def test_a_model_inside_a_lightning_module_grows_and_so_does_its_checkpoint(tmp_path):
    whole, callback = Lit(), GrowthCallback(SCHEDULE, model="net")
    fit(whole, callback, 8)
    assert [(e.step, e.plan.operator) for e in callback.events] == [(3, "depth"), (5, "feed_forward")]
    assert len(whole.net.blocks) == 3

    part, first = Lit(), GrowthCallback(SCHEDULE, model="net")
    fit(part, first, 6).save_checkpoint(tmp_path / "at-6.ckpt")
    again, second = Lit(), GrowthCallback(SCHEDULE, model="net")
    trainer = fit(again, second, 8, tmp_path / "at-6.ckpt")
    assert trainer.global_step == 8
    assert [event.plan for event in second.events] == [event.plan for event in callback.events]
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert "on_load_checkpoint" not in vars(again)
    optimizer = trainer.optimizers[0]
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(again.parameters())


def test_what_is_refused_is_told_and_the_training_goes_on():
    module, callback = Lit(), GrowthCallback({"schedule": [{"at": 2, "operator": "expert", "amount": 1}]}, model="net")
    fit(module, callback, 4)
    assert callback.events == []
    assert [(r["step"], r["operator"]) for r in callback.refusals] == [(2, "expert")]
    stopping = GrowthCallback({"schedule": [{"at": 2, "operator": "expert", "amount": 1}], "on_refusal": "stop"},
                              model="net")  # fmt: skip
    with pytest.raises(GrowthError):
        fit(Lit(), stopping, 4)


def test_a_name_that_holds_no_model_is_told():
    with pytest.raises(ConfigError, match="Lit has no module `model`. Expected the attribute"):
        fit(Lit(), GrowthCallback(SCHEDULE), 2)


@pytest.mark.parametrize("settings", [{"operators": ["depth"]}, BEGINS])
def test_what_needs_the_run_of_seedbed_is_refused(settings):
    with pytest.raises(ConfigError, match=r"Train with utils\.train"):
        GrowthCallback(settings)


@pytest.mark.parametrize(
    "limit", [{"max_parameters": 1000}, {"max_events": 1}, {"probe_steps": 2}, {"approximate": True}]
)
def test_limits_that_it_cannot_keep_are_refused(limit):
    with pytest.raises(ConfigError, match=f"was given {next(iter(limit))}="):
        GrowthCallback({**SCHEDULE, **limit})


DEPTH_AT_5 = {"schedule": [{"at": 5, "operator": "depth", "amount": 1}]}


def test_a_session_that_continues_in_the_middle_of_an_accumulation_grows_once(tmp_path):
    """Behind an event at step 5 the first micro-batch of the next session still counts 5 steps."""
    first = GrowthCallback(DEPTH_AT_5, model="net")

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            if trainer.global_step == 5 and number % 2:
                trainer.save_checkpoint(tmp_path / "at-5.ckpt")

    module = Lit()
    data = torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        max_steps=7, callbacks=[first, Saving()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", accumulate_grad_batches=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert [event.step for event in first.events] == [5]
    again, second = Lit(), GrowthCallback(DEPTH_AT_5, model="net")
    fit(again, second, 10, tmp_path / "at-5.ckpt", accumulate_grad_batches=2)
    assert [event.step for event in second.events] == [5]
    assert len(again.net.blocks) == 3


class Counting(SimpleNamespace):
    """What the callback asks of a trainer."""


def test_a_trainer_that_fits_again_goes_on_and_another_begins_anew():
    settings = {"schedule": [{"at": 2, "operator": "depth", "amount": 1}, {"at": 4, "operator": "depth", "amount": 1}]}
    module, callback = Lit(), GrowthCallback(settings, model="net")
    trainer = fit(module, callback, 4)
    assert [event.step for event in callback.events] == [2]
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 3, 7
    data = torch.utils.data.DataLoader(torch.randint(0, 60, (64, 12)), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    assert [event.step for event in callback.events] == [2, 5]
    assert callback.refusals == []
    fit(Lit(), callback, 6)
    assert [event.step for event in callback.events] == [2, 4]


def test_a_state_without_what_is_past_grows_no_second_time():
    saved = GrowthCallback(DEPTH_AT_5)
    state = {"events": [], "refusals": []}
    saved.load_state_dict(state)
    saved.model = "net"
    trainer = Counting(global_step=5, estimated_stepping_batches=10, max_steps=10, optimizers=[None])
    saved.on_train_start(trainer, Lit())
    trainer.global_step = 6
    saved.on_train_batch_end(trainer, Lit(), None, None, 0)
    assert saved.events == saved.refusals == []
    assert saved.state_dict()["looked"] == 6


def test_a_step_that_two_optimizers_pass_over_counts():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.other, self.automatic_optimization = nn.Linear(2, 2), False

        def training_step(self, batch, number):
            for optimizer, loss in zip(
                self.optimizers(), (super().training_step(batch, number), self.other(torch.ones(2)).sum()), strict=True
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.AdamW(self.net.parameters(), 1e-3), torch.optim.SGD(self.other.parameters(), 1e-3)]

    module, callback = Two(), GrowthCallback(DEPTH_AT_5, model="net")
    trainer = fit(module, callback, 10)
    assert [event.step for event in callback.events] == [6]
    first, second = ({p for g in o.param_groups for p in g["params"]} for o in trainer.optimizers)
    assert first == set(module.net.parameters())
    assert second == set(module.other.parameters())


@pytest.mark.parametrize("at", [6, 50])
def test_an_event_that_the_fit_does_not_reach_is_told_and_made_in_a_longer_one(tmp_path, at):
    settings = {"schedule": [{"at": at, "operator": "depth", "amount": 1}]}
    callback = GrowthCallback(settings, model="net")
    with pytest.warns(UserWarning, match=f"planned for at={at}, and the run has 6 steps. Expected a step before"):
        trainer = told(Lit(), callback, 6)
    assert callback.events == []
    assert [(r["step"], r["operator"]) for r in callback.refusals] == [(at, "depth")]
    trainer.save_checkpoint(tmp_path / "at-6.ckpt")
    longer = GrowthCallback(settings, model="net")
    fit(Lit(), longer, 10, tmp_path / "at-6.ckpt")
    assert [event.step for event in longer.events] == ([7] if at == 6 else [])
    assert len(longer.refusals) == (at == 50)
    stopping = GrowthCallback({**settings, "on_refusal": "stop"}, model="net")
    with pytest.raises(GrowthRefusedError, match="Let it grow earlier"):
        fit(Lit(), stopping, 6)


def told(module, callback, steps):
    data = torch.randint(0, 60, (64, 12))
    trainer = pl.Trainer(max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return trainer


def test_a_share_of_a_fit_without_an_end_is_told():
    callback = GrowthCallback({"schedule": [{"at": 0.5, "operator": "depth", "amount": 1}]}, model="net")
    trainer = Counting(global_step=0, estimated_stepping_batches=float("inf"), max_steps=-1, optimizers=[None])
    with pytest.warns(UserWarning, match="the run has no known end"):
        callback.on_train_start(trainer, Lit())
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, Lit(), None, None, 0)
    assert callback.events == []


def test_answers_are_compared_on_the_batch_where_forward_takes_it():
    callback = GrowthCallback(DEPTH_AT_5, model="net")
    fit(Lit(), callback, 7)
    assert callback.events[0].why == "scheduled for step 5; compared on the batch just trained on"

    class Pairs(Lit):
        def training_step(self, batch, number):
            return super().training_step(batch[0], number)

    pairs = torch.utils.data.TensorDataset(torch.randint(0, 60, (64, 12)))
    callback = GrowthCallback(DEPTH_AT_5, model="net")
    fit(Pairs(), callback, 7, data=pairs)
    assert callback.events[0].why == "scheduled for step 5; compared on made-up inputs"

    class Long(Lit):
        """The batch ends with an id that the model has no row for."""

        def training_step(self, batch, number):
            return super().training_step(batch[:, :-1], number)

    callback = GrowthCallback(DEPTH_AT_5, model="net")
    fit(Long(), callback, 7, data=torch.cat([torch.zeros(64, 8), torch.full((64, 1), 99)], 1).long())
    assert callback.events[0].why == "scheduled for step 5; compared on made-up inputs"


class Experts(pl.LightningModule):
    def __init__(self, grown=False):
        super().__init__()
        self.net = made()
        if grown:
            with pytest.warns(UserWarning, match="gets no tokens"):
                utils.grow(self.net, "expert", 1)

    def training_step(self, batch, number):
        return self.net(batch, labels=batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def closed(module):
    return module.net.blocks[0].mixture.router.bias[4].item() == CLOSED


def test_a_new_expert_is_let_in_and_a_session_that_continues_goes_on(tmp_path):
    ids = torch.randint(0, 37, (64, 12))
    settings = {"schedule": [{"at": 1, "operator": "expert", "amount": 1}]}
    module, callback = Experts(), GrowthCallback(settings, model="net")
    trainer = fit(module, callback, 4, data=ids)
    assert [event.plan.operator for event in callback.events] == ["expert"]
    assert callback.openings.rising
    assert not closed(module)
    trainer.save_checkpoint(tmp_path / "at-4.ckpt")
    again, second = Experts(), GrowthCallback(settings, model="net")
    fit(again, second, STEPS + 5, tmp_path / "at-4.ckpt", data=ids)
    assert second.openings.rising == []
    assert len(second.events) == 1


def test_an_expert_that_was_added_before_is_let_in():
    module, callback = Experts(grown=True), GrowthCallback(DEPTH_AT_5, model="net")
    assert closed(module)
    fit(module, callback, 3, data=torch.randint(0, 37, (64, 12)))
    assert callback.openings.rising
    assert not closed(module)


def test_a_new_parameter_that_several_optimizers_could_train_is_refused():
    module, callback = Lit(), GrowthCallback(DEPTH_AT_5, model="net")
    named = dict(module.net.named_parameters())
    held = list(named.values())
    gate = nn.Parameter(torch.zeros(()))
    change = ModelChange("depth", 1, {**named, "gate": gate}, changes={"gate": TensorChange()}, before=named)
    two = [torch.optim.SGD(held[:2], 0.1), torch.optim.SGD([*held[2:], module.extra], 0.1)]
    with pytest.raises(MigrationError, match="2 optimizers train the model, and nothing says which one trains .* gate"):
        callback._followed(SimpleNamespace(optimizers=two), change)
    undo = callback._followed(SimpleNamespace(optimizers=two[1:]), change)
    assert any(p is gate for p in two[1].param_groups[0]["params"])
    undo()
    assert not any(p is gate for p in two[1].param_groups[0]["params"])


def test_a_mapping_is_taken_where_its_names_are_arguments_of_forward():
    adapter = ModelAdapter(Toy())
    ids = torch.randint(0, 37, (6, 12))
    assert torch.equal(_inputs(adapter, {"input_ids": ids, "labels": ids})["input_ids"], ids[:4])
    assert list(_inputs(adapter, {"input_ids": ids, "labels": ids})) == ["input_ids"]
    for batch in ({"input_ids": ids, "weights": ids}, {"labels": ids}, {"input_ids": ids.float()}, [ids], ids[0], {},
                  {"input_ids": ids[:0]}, {"input_ids": 4}, ids + 30, ids.repeat(1, 6)):  # fmt: skip
        assert _inputs(adapter, batch) is None


@pytest.mark.parametrize(
    ("batches", "max_steps", "optimizers", "total"),
    [(10, 10, 1, 10), (10, -1, 1, 10), (10, -1, 2, 20), (10, 15, 2, 15), (float("inf"), -1, 1, None)],
)
def test_the_steps_of_all_optimizers_count(batches, max_steps, optimizers, total):
    trainer = Counting(estimated_stepping_batches=batches, max_steps=max_steps, optimizers=[None] * optimizers)
    assert _total(trainer) == total
