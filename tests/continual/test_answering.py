import pytest
import torch

import utils
from tests.continual.methods.toy_streams import SPEC, config_of, fresh, train
from utils.continual.answering import answering
from utils.runtime.errors import ConfigError, RunError


def test_methods_without_weights_of_each_task_answer_with_the_outputs_of_the_task(tmp_path):
    run = train(fresh(), config_of("replay", setting="task"), tmp_path)
    value = torch.randn(3, 1, 8, 8)
    run.model.eval()
    with answering(run, 1, model=fresh()) as adapter, torch.no_grad():
        logits = adapter.logits({"pixel_values": value})
        assert torch.equal(logits[:, 2:4], run.model(value)[:, 2:4])
    assert set(logits.argmax(1).tolist()) <= {2, 3}


def test_tasks_and_runs_that_are_none_are_refused(tmp_path):
    train(fresh(), config_of("naive"), tmp_path / "stream")
    with pytest.raises(ConfigError, match="no task 'x'.*from 0 to 4, or one of '0, 1'"), \
            answering(tmp_path / "stream", "x", model=fresh()):  # fmt: skip
        pass
    plain = config_of("naive").with_changes(continual=None, max_steps=2)
    utils.train(fresh(), "builtin:digits", plain, tmp_path / "plain", progress=False, spec=SPEC)
    with pytest.raises(RunError, match="did not learn task after task"), \
            answering(tmp_path / "plain", 0, model=fresh()):  # fmt: skip
        pass
