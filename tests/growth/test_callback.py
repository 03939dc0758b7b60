import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import utils
from utils.growth.callback import GrowthCallback
from utils.growth.edits import GrowthError
from utils.runtime.errors import ConfigError

SCHEDULE = {
    "schedule": [{"at": 3, "operator": "depth", "amount": 1}, {"at": 5, "operator": "feed_forward", "amount": 8}]
}


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


def fit(module, callback, steps, path=None):
    data = torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
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


@pytest.mark.parametrize("settings", [{"operators": ["depth"]}, {"begin_blocks": 1}])
def test_what_needs_the_run_of_seedbed_is_refused(settings):
    with pytest.raises(ConfigError, match=r"Train with utils\.train"):
        GrowthCallback(settings)
