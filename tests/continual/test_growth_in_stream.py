import pytest
import torch
from torch import nn

from tests.continual.methods.toy_streams import in_sessions, settings_of, train
from utils.continual.accuracy_matrix import read_matrix
from utils.continual.extension import make_extension
from utils.continual.learner import LOGITS
from utils.growth.extension import GrowthExtension
from utils.growth.lineage import read_lineage
from utils.runtime.isolation import preserved
from utils.training import TrainingConfig
from utils.training.resume import open_run

BORDER = {"schedule": [{"at": 16, "operator": "channels", "to": 24, "where": "net.1"},
                       {"at": 16, "operator": "channels", "to": 24, "where": "net.3"}]}  # fmt: skip


class Plain(nn.Module):
    """Two hidden layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                                 nn.Linear(16, 10))  # fmt: skip

    def forward(self, pixel_values):
        return self.net(pixel_values)


def plain():
    torch.manual_seed(0)
    return Plain()


def config_of(method, growth=BORDER, **changes):
    return TrainingConfig(
        max_steps=40, batch_size=8, learning_rate=5e-3, schedule="constant", warmup_share=0.0, val_every_steps=1000,
        log_every_steps=3, checkpoint_every_steps=1000, continual=settings_of(method, **changes), growth=growth,
    )  # fmt: skip


def state_of(folder, config):
    extension = make_extension(config)
    run, state = open_run(folder, model=plain())
    extension.use_data(run.data)
    extension.load_state_dict(state["continual"])
    return extension


@pytest.mark.parametrize("method", ["ewc", "der++", "consolidation", "ewc+replay"])
def test_what_a_method_keeps_follows_growth_at_a_border_also_when_killed_behind_it(tmp_path, method):
    config = config_of(method, penalty=6.0)
    run = train(plain(), config, tmp_path / "whole")
    assert [tuple(p.shape) for p in run.model.parameters() if p.dim() > 1] == [(24, 64), (24, 24), (10, 24)]
    parts = in_sessions(plain(), plain, config, tmp_path / "parts", 15, 18)
    for one, other in zip(run.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
    extension = state_of(tmp_path / "whole", config)
    kept = extension.methods[0]
    if hasattr(kept, "anchors"):
        shapes = {name: p.shape for name, p in run.model.named_parameters()}
        assert {name: t.shape for name, t in kept.anchors.importance.items()} == shapes
    if LOGITS in extension.memory.layouts:
        # What is stored is an answer: it has the size of the outputs, whatever the layers behind them.
        assert extension.memory.layouts[LOGITS].shape == (10,)
    assert len(read_matrix(tmp_path / "whole").rows) == 5


def test_what_is_new_is_held_by_nothing_and_what_is_old_as_before(tmp_path, monkeypatch):
    seen = []
    original = GrowthExtension.grow

    def grow(self, session, *rest, **named):
        anchors = session.extensions["continual"].methods[0].anchors
        before = {name: (anchors.importance[name].clone(), anchors.anchor[name].clone()) for name in anchors.importance}
        result = original(self, session, *rest, **named)
        seen.append((before, dict(anchors.importance), dict(anchors.anchor)))
        return result

    monkeypatch.setattr(GrowthExtension, "grow", grow)
    growth = {"schedule": [{"at": 20, "operator": "channels", "to": 20, "where": "net.1"}]}
    train(plain(), config_of("ewc", growth), tmp_path)
    ((before, importance, anchor),) = seen
    assert torch.equal(importance["net.1.weight"][:16], before["net.1.weight"][0])
    assert torch.equal(anchor["net.1.weight"][:16], before["net.1.weight"][1])
    assert torch.equal(importance["net.3.weight"][:, :16], before["net.3.weight"][0])
    assert float(importance["net.1.weight"][16:].abs().sum() + importance["net.3.weight"][:, 16:].abs().sum()) == 0


def test_old_tasks_are_answered_alike_before_and_after_an_event(tmp_path, monkeypatch):
    moved = []
    original = GrowthExtension.grow

    def answers(session):
        learner = session.extensions["continual"].learner
        with preserved(learner.module), torch.no_grad():
            learner.module.eval()
            return learner.module(learner.data.validation["pixel_values"])

    def grow(self, session, *rest, **named):
        before = answers(session)
        result = original(self, session, *rest, **named)
        moved.append(float((answers(session) - before).abs().max() / before.abs().max()))
        return result

    monkeypatch.setattr(GrowthExtension, "grow", grow)
    train(plain(), config_of("consolidation"), tmp_path)
    assert len(moved) == len(read_lineage(tmp_path)) == 2
    assert max(moved) < 1e-5
    assert all(event.certificate.passed for event in read_lineage(tmp_path))
